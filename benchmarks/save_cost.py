"""Share of a full-width epoch that saving takes.

    python benchmarks/save_cost.py

What is saved after an epoch: the whole state of the run, and log, curves and both checkpoints, all
flushed to the disk of ``--out-dir``. What it is compared with: the steps of an epoch on 49,000
images, from the median of a few of them.
"""

import tempfile
from pathlib import Path

from step_speed import mix_kl, random_images
from timing import interleaved, parser, show

import checkpoint
import keeper
import options
import record
import resume
import utils
from models import build_model

IMAGES, EPOCHS = 49_000, 110


def rows_of_a_run():
    """Return the log of a run of ``EPOCHS`` epochs."""
    names = ["clean_acc", "fgsm_acc", "pgd10_acc"]
    names += [f"ema_{name}" for name in names]
    names += ["lr", "temperature", "loss", "hard_loss", "kl", "train_seconds", "eval_seconds"]
    rows = [dict.fromkeys(names, 0.123456789) for _ in range(EPOCHS)]
    return [row | {"epoch": number, "collapse": 0} for number, row in enumerate(rows, 1)]


def main():
    """Time a step and both savings in turn, and print the table."""
    made = parser(__doc__, rounds=5)
    made.add_argument("--width", type=int, default=64)
    made.add_argument("--batch-size", type=int, default=128)
    made.add_argument("--out-dir", type=Path, default=Path(), help="on which disk to save")
    given = made.parse_args()
    device = utils.pick_device(given.device)
    words = ["--width", str(given.width), "--batch-size", str(given.batch_size), "--lr", "0.01"]
    args = options.parse_training(words, "doc", {})
    args.num_classes, args.dtype = 10, utils.pick_precision("auto", device)
    utils.keep_freed_memory()
    images = random_images(given.batch_size, device)
    model = build_model(args.model, num_classes=10, width=given.width).train().to(device)
    step, parts = mix_kl(model, images, args.dtype, *words)
    facts = checkpoint.facts(args, "cifar10", args.model, {"num_classes": 10})
    with tempfile.TemporaryDirectory(dir=given.out_dir) as name:
        folder, steps = Path(name), IMAGES // given.batch_size
        rows = rows_of_a_run()
        watch = keeper.Keeper(folder, parts, resume.Progress(rows=rows), args, steps)
        average = parts.average.model
        seconds = interleaved({
            "one training step": step,
            "the whole state": watch.save,
            "log, curves, both checkpoints": lambda: record.write_epoch(
                folder, resume.Progress(rows=rows), model, average, facts
            ),
        }, given.rounds, given.device)  # fmt: skip
        size = {path.name: path.stat().st_size / 1e6 for path in folder.iterdir()}
    took, *saving = seconds.values()
    states = size.pop("state.pth"), size.pop("state.pth.prev")
    sizes = [states[0], sum(size.values())]
    found = [{"what": f"{steps} training steps", "seconds": took * steps, "MB": 0, "share": 1.0}]
    for title, value, written in zip(list(seconds)[1:], saving, sizes, strict=True):
        share = value / (took * steps)
        found.append({"what": title, "seconds": value, "MB": written, "share": share})
    total = sum(row["seconds"] for row in found[1:])
    found.append({
        "what": "saving after an epoch", "seconds": total, "MB": sum(sizes),
        "share": total / (took * steps),
    })  # fmt: skip
    show(f"saving, {args.model} of width {given.width}, median of {given.rounds}", found, given)


if __name__ == "__main__":
    main()
