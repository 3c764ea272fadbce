"""Train a robust CIFAR-100 classifier with MIX-KL: FGSM, temperature-scaled KL, optional Mixup.

    python3 MIX_KL_CIFAR100.py --out_dir ./output/ --data-dir cifar-data

The method is ``engine.mix_kl_step``; this script chooses data, network and attack.
"""

import argparse
from functools import partial

import torch

import attacks
import checkpoint
import data
import engine
import evaluation
import options
import parallel
import record
import resume
import utils
from models import build_model, canonical_name

DATASET = "cifar100"
NUM_CLASSES = 100
DEFAULTS = dict(
    model="PreActResNet18",
    epochs=110,
    batch_size=128,
    lr=0.2,
    lr_schedule="cyclic",
    mixup_alpha=0.0,
    temperature=(2.0, 2.0),
    kl_weight=(1.0, 4.0),
    ema_decay=0.999,
)


def main(argv: list[str]) -> None:
    """Parse the flags, join the other processes if there are any, train."""
    args = options.parse_training(argv, __doc__, DEFAULTS)
    args.num_classes = NUM_CLASSES
    if args.factor is not None:
        args.label_smoothing = utils.smoothing_of_factor(args.factor, NUM_CLASSES)
    args.model = canonical_name(args.model)
    device = parallel.start(args.device)
    args.dtype = utils.pick_precision(args.precision, device)
    args.processes = parallel.size()
    utils.keep_freed_memory()
    utils.seed_everything(args.seed, parallel.rank())
    remedy = "try a smaller --batch-size, --precision bf16, or a smaller network"
    with utils.memory_named(remedy), parallel.together():
        run(args, device)


def run(args: argparse.Namespace, device: torch.device) -> None:
    """Train one network on one device, alone or with other processes."""
    with parallel.rank_0_first():
        dataset = data.load(DATASET, NUM_CLASSES, args.data_dir, args.synthetic)
    args.images = dataset.trained_on()
    train, held_out = data.split_held_out(dataset.train.to(device), args.held_out)
    batches = data.TrainingBatches(
        train.first(args.train_images, "--train-images"), args.batch_size, args.crop_padding
    )
    network = dict(num_classes=NUM_CLASSES, mean=dataset.mean, std=dataset.std)
    model = build_model(args.model, width=args.width, **network)
    model = model.to(device, memory_format=torch.channels_last)

    # From here on sizes are pixel fractions: this is the only place that divides by 255.
    epsilon, steps = args.epsilon / 255, args.attack_steps

    def attack_of(size: float, start: str) -> engine.Attack:
        return partial(attacks.craft, epsilon=epsilon, alpha=size / 255, steps=steps, start=start)

    names = {"clean": "clean", "fgsm": "fgsm", "pgd10": "pgd-10"}
    settings = evaluation.Settings(epsilon=epsilon, batch_size=250, seed=0)
    x, y = held_out.as_float(), held_out.labels
    measure = partial(evaluation.accuracies, x=x, y=y, names=names, settings=settings)

    default = f"{dataset.name}-{args.method}-seed{args.seed}"
    state = resume.find(args, default)
    folder = None if parallel.rank() else record.start_run(args, default, state)
    facts = checkpoint.facts(args, dataset.name, args.model, network)
    machine = f"{args.processes} x {device.type}, {args.dtype}"
    parallel.say(
        f"{args.method} on {len(batches.labels):,} images of {dataset.name} ({dataset.origin}), "
        f"{args.model}, {machine}; results in {folder}"
    )
    with record.alone_in(folder):
        engine.train(
            model, batches, attack_of=attack_of, measure=measure, args=args, facts=facts,
            folder=folder, state=state,
        )  # fmt: skip


if __name__ == "__main__":
    options.run(main)
