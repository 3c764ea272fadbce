"""Seconds and FLOPs of PGD-50-10 on a checkpoint: our evaluation against the plain loop.

    python benchmarks/eval_speed.py --model_path output/run/final_model.pth --n-examples 500

The plain loop is written after fast_adversarial's: every image goes through every step of every
restart, with the whole backward pass; only the images that still stand are moved. Both start from
the same points and decide by the same rule, so the verdicts must be equal, image by image.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import Flops, interleaved, parser, show

import attacks
import checkpoint
import data
import evaluation
import utils
from models import build_model

EPS, ALPHA = 8 / 255, 2 / 255


def plain(model, x, y, *, steps, restarts, batch_size):
    """Return (N,) which images stand after PGD as fast_adversarial runs it."""
    fell = torch.zeros_like(y, dtype=torch.bool)
    for restart in range(restarts):
        starts = evaluation.uniform_starts(x, EPS, evaluation.RESTART * restart)
        for index in torch.arange(len(y)).split(batch_size):
            images, labels, adv = x[index], y[index], starts[index].to(x.device)
            for step in range(steps + 1):
                adv.requires_grad_()
                logits = model(adv)
                fell[index] |= attacks.fooled(logits.detach(), labels)
                if step < steps:
                    model.zero_grad()
                    F.cross_entropy(logits, labels).backward()
                    moved = attacks.project(adv.detach() + ALPHA * adv.grad.sign(), images, EPS)
                    up = ~fell[index]
                    adv = torch.where(up[:, None, None, None], moved, adv.detach())
    with torch.no_grad():
        for index in torch.arange(len(y)).split(batch_size):
            fell[index] |= attacks.fooled(model(x[index]), y[index])
    return ~fell


def main():
    """Time both, count both, compare the verdicts and print the table."""
    made = parser(__doc__, rounds=1)
    made.add_argument("--model_path", type=Path, required=True)
    made.add_argument("--data-dir", type=Path, default=Path("cifar-data"))
    made.add_argument("--synthetic", action="store_true", help="use the built-in synthetic images")
    made.add_argument("--n-examples", type=int, default=500)
    made.add_argument("--attack", default="pgd-50-10")
    made.add_argument("--batch-size", type=int, default=128)
    args = made.parse_args()
    attack = evaluation.parse_attack(args.attack)
    if attack.family != "pgd":
        made.error(f"--attack {args.attack}: the plain loop is PGD, as pgd-50-10")
    utils.keep_freed_memory()  # as the measuring scripts do
    device = utils.pick_device(args.device)
    saved = checkpoint.load(args.model_path)
    classes = saved["num_classes"]
    given = argparse.Namespace(model=None, width=None, transfer_from=None)
    name, network = checkpoint.architecture(saved, args.model_path, given, classes, {})
    dataset = data.load(f"cifar{classes}", classes, args.data_dir, args.synthetic)
    images = dataset.test.first(args.n_examples, "--n-examples").to(device)
    x, y = images.as_float(), images.labels

    def ours(model):
        settings = evaluation.Settings(epsilon=EPS, batch_size=args.batch_size, seed=0)
        return evaluation.standing_images(model, x, y, [attack], settings)[attack].standing

    def theirs(model):
        settings = dict(steps=attack.steps, restarts=attack.restarts, batch_size=args.batch_size)
        with attacks.measuring(model, x):  # in the precision of ours
            return plain(model, x, y, **settings)

    evaluations = {}
    for title, run, layout in (
        ("plain loop, NCHW", theirs, torch.contiguous_format),
        ("ours", ours, torch.channels_last),
    ):
        model = build_model(name, **network)
        weights = checkpoint.load_weights(model, saved, None, args.model_path)
        evaluations[title] = partial(run, model.eval().to(device, memory_format=layout))
    seconds = interleaved(evaluations, args.rounds, args.device)
    rows, verdicts = [], []
    for title, run in evaluations.items():
        with Flops() as flops:
            verdicts.append(run())
        rows.append({"evaluation": title, "seconds": seconds[title], "TFLOP": flops.total / 1e12,
                     "standing": int(verdicts[-1].sum())})  # fmt: skip
    for row in rows:
        row["x faster"] = rows[0]["seconds"] / row["seconds"]
        row["x fewer FLOPs"] = rows[0]["TFLOP"] / row["TFLOP"]
    first, second = verdicts
    show(f"{attack.name} on {len(y)} images, {name}, {weights} weights", rows, args)
    print(f"verdicts that differ: {int((first != second).sum())} of {len(y)}")


if __name__ == "__main__":
    main()
