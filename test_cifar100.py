"""Measure a CIFAR-100 checkpoint: clean, FGSM, PGD and CW accuracy, and the worst case of them.

    python3 test_cifar100.py --model_path model.pth --out_dir ./output/ --data-dir cifar-data

The file says which network it holds; ``evaluation.py`` says what each attack is.
"""

import argparse

import torch

import checkpoint
import data
import evaluation
import options
import parallel
import report
import utils
from models import build_model

DATASET = "cifar100"
NUM_CLASSES = 100


def main(argv: list[str]) -> None:
    """Parse the flags, join the other processes if there are any, measure."""
    args = options.parse_measuring(argv, __doc__)
    names = [evaluation.parse_attack(name).name for name in args.attacks]
    device = parallel.start(args.device)
    utils.keep_freed_memory()

    with parallel.together():
        run(args, names, device)


def run(args: argparse.Namespace, names: list[str], device: torch.device) -> None:
    """Measure one checkpoint on one device, alone or with other processes."""
    saved = checkpoint.load(args.model_path)
    name, network = checkpoint.architecture(saved, args, NUM_CLASSES)
    model = build_model(name, **network)
    weights = checkpoint.load_weights(model, saved, args.weights, args.model_path)
    model = model.to(device, memory_format=torch.channels_last)

    with parallel.rank_0_first():
        dataset = data.load(DATASET, NUM_CLASSES, args.data_dir, args.synthetic)
    images = dataset.test.first(args.n_examples, "--n-examples").to(device)
    trained_on = saved.get("dataset", "unknown images")
    facts = {"checkpoint": str(args.model_path), "model": name, "weights": weights}
    facts |= {"trained_on": trained_on, "dataset": dataset.name, "origin": dataset.origin}
    print(f"{args.model_path}: {name}, {weights} weights, trained on {trained_on}\n"
          f"{len(images):,} test images of {dataset.name} ({dataset.origin}), "
          f"eps {args.epsilon:g}/255, {device}")  # fmt: skip

    # From here on sizes are pixel fractions: this is the only place that divides by 255.
    measured = facts | evaluation.evaluate(
        model, images.as_float(), images.labels, names,
        epsilon=args.epsilon / 255, batch_size=args.batch_size, seed=args.seed,
        cascade=args.cascade,
    )  # fmt: skip
    if parallel.rank():
        return
    print(report.table(measured))
    stem = f"{args.model_path.resolve().parent.name}-{args.model_path.stem}-report"
    print(f"report: {report.write(measured, args.out_dir, stem)}")


if __name__ == "__main__":
    options.run(main)
