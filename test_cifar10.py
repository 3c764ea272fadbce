"""Measure a CIFAR-10 checkpoint: clean, FGSM, PGD, CW and AutoAttack accuracy, and the worst case.

    python3 test_cifar10.py --model_path model.pth --out_dir ./output/ --data-dir cifar-data

The file says which network it holds; ``evaluation.py`` says what each attack is.
"""

import argparse
from functools import partial

import torch

import data
import evaluation
import options
import parallel
import referee
import report
import utils
import values
from models import build_model, canonical_name

DATASET = "cifar10"
NUM_CLASSES = 10


def main(argv: list[str]) -> None:
    """Parse the flags, join the other processes if there are any, measure."""
    args = options.parse_measuring(argv, __doc__)
    if args.compare:
        parallel.say(report.compared(args.compare))
        return
    args.attacks = [evaluation.parse_attack(name).name for name in args.attacks]
    args.model = args.model and canonical_name(args.model)
    referee.refuse(args)
    device = parallel.start(args.device)
    utils.keep_freed_memory()
    with utils.memory_named("try fewer --n-examples, or another --device"), parallel.together():
        run(args, device)


def run(args: argparse.Namespace, device: torch.device) -> None:
    """Measure one checkpoint on one device, alone or with other processes."""
    archive = data.ARCHIVES[DATASET]
    opened = partial(
        referee.open_network, build=build_model, args=args, classes=NUM_CLASSES,
        mean=archive.mean, std=archive.std,
    )  # fmt: skip
    model, network, facts = opened(args.model_path, weights=args.weights)
    model = model.to(device, memory_format=torch.channels_last)
    source = None
    if args.transfer_from:
        source, _, about = opened(args.transfer_from)
        referee.refuse_idle(args, facts, about)
        source, facts["transfer_from"] = source.to(device), about

    with parallel.rank_0_first():
        dataset = data.load(DATASET, NUM_CLASSES, args.data_dir, args.synthetic)
    pool, image_set = dataset.test, "test"
    if args.held_out:
        pool = data.not_trained_on(dataset, facts["split"], args.model_path)
        image_set = "held-out training"
    images = pool.first(args.n_examples, "--n-examples").to(device)
    facts |= {"dataset": dataset.name, "origin": dataset.origin, "test_images": len(dataset.test)}
    facts["image_set"] = image_set
    parallel.say(
        f"{args.model_path}: {facts['model']}, {facts['weights']} weights, trained on "
        f"{facts['trained_on']}\n{len(images):,} of {len(pool):,} {image_set} images of "
        f"{dataset.name} ({dataset.origin}), {parallel.size()} x {device.type}"
    )

    # From here on sizes are pixel fractions: this is the only place that divides by 255.
    sizes = [size / 255 for size in values.distinct(args.eps or [args.epsilon])]
    x, y = images.as_float(), images.labels
    measured = referee.measure(model, facts, x, y, sizes, args, source)
    if measured:
        referee.extras(model, network, measured, x, y, dataset.classes, args)


if __name__ == "__main__":
    options.run(main)
