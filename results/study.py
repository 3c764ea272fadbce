"""Run the study: train and measure each cell of a table, in order, within a budget of minutes.

    python3 results/study.py cpu --budget 150
    python3 results/study.py gpu --budget 30 --device cuda

What the budget cuts off goes on where it was when the same line is run again; what is done is not
done again. Each training leaves log, flags and fp16 weights in a folder of results/, and each
measurement of these weights its report.
"""

import argparse
import fnmatch
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import shrink

import checkpoint
from report import verdict_file

HERE = Path(__file__).resolve().parent

BOTH = "--mixup-alpha 0.2 --kl-weight 1"
METHODS = {
    "fgsm_rs": "--baseline fgsm_rs",
    "n_fgsm": "--baseline n_fgsm",
    "mixup": "--mixup-alpha 0.2 --kl-weight 0 --temperature 1",
    "kl0": "--kl-weight 0",
    "kl": "--kl-weight 1",
    "kl4": "--kl-weight 4",
    "kl1to4": "--kl-weight 1:4",
    "kl4ramp": "--kl-weight 4 --kl-warmup 0.9",
    "kl1to4t1": "--kl-weight 1:4 --temperature 1",
    "t1": f"{BOTH} --temperature 1",
    "pgd_at": "--baseline pgd_at",
    "rs_both": "--baseline fgsm_rs --attack-mode both",
    "n_both": "--baseline n_fgsm --attack-mode both",
    "both": BOTH,
    "train": f"{BOTH} --attack-mode train",
    "train8": "--mixup-alpha 0.2 --kl-weight 8 --attack-mode train",
    "eval0": "--mixup-alpha 0.2 --kl-weight 0 --attack-mode eval",
    "eval1": f"{BOTH} --kl-warmup 0.05 --attack-mode eval",
    "fgsm_rs16": "--baseline fgsm_rs --alpha 16",
    "paper": "--mixup-alpha 1 --kl-weight 1 --temperature 1 --delta-init half --attack-mode train",
    "late": f"{BOTH} --attack-mode train --lr-peak 0.4",
}
ABLATION = (
    "mixup", "kl0", "kl", "kl4", "kl1to4", "kl4ramp", "kl1to4t1", "t1", "eval1", "paper",
)  # fmt: skip
LONG = "--width 16 --train-images 4000 --epochs 110 --batch-size 64 --measure-every 10"
SHORT = "--width 16 --epochs 15 --lr-schedule cyclic --lr 0.2 --measure-every 5"
LATE = f"{SHORT} {METHODS['late']}"
FAST = "--preset fast --width 16 --measure-every 7"
STEEP = (
    "--width 16 --train-images 25000 --epochs 6 --lr-schedule cyclic --lr 0.2 --lr-peak 0.1 "
    "--epsilon 16"
)
STEEP15_PARTS = (
    "kl0", "kl", "kl4", "kl1to4", "kl4ramp", "paper", "rs_both", "n_both", "eval0", "eval1",
    "train8",
)  # fmt: skip
STEEP15 = f"{STEEP} --epochs 15 --on-collapse stop"  # a dead network is not trained further
LONG16 = f"{LONG} --measure-every 5 --epsilon 16"
AUTOATTACK = "--attacks clean pgd-50-10 cw-50 autoattack"
PGD_CW = "--attacks clean pgd-50 cw-50"


@dataclass(frozen=True)
class Cell:
    """One training and its measurements."""

    name: str  # of its folder
    train: str  # flags of the training script
    measure: str  # flags of the measuring script
    files: tuple[str, ...] = ("final",)  # which checkpoints are measured
    classes: int = 10
    autoattack: str = ""  # flags of a second, longer measurement, where there is one


def cpu() -> list[Cell]:
    """Return the cells that two cores carry, the most telling ones first."""
    cells = [
        Cell(f"steep-{method}-seed{seed}", f"{STEEP} {METHODS[method]} --seed {seed}",
             f"{PGD_CW} --epsilon 16 --n-examples 1000")
        for seed in range(5)
        for method in ("both", "train8", "fgsm_rs", "n_fgsm", "train", "fgsm_rs16")
    ]  # fmt: skip
    cells += [
        Cell(f"steep15-{method}-seed{seed}", f"{STEEP15} {METHODS[method]} --seed {seed}",
             f"{PGD_CW} --epsilon 16 --n-examples 1000")
        for seed in range(5) for method in ("both", "fgsm_rs", "n_fgsm", *STEEP15_PARTS)
    ]  # fmt: skip
    cells += [
        Cell(f"long16-{method}-seed{seed}", f"{LONG16} {METHODS[method]} --seed {seed}",
             f"{PGD_CW} --epsilon 16 --n-examples 1000")
        for seed in range(5) for method in ("both", "train8", "fgsm_rs", "n_fgsm", "eval0")
    ]  # fmt: skip
    cells += [
        Cell(f"long-{method}-seed{seed}", f"{LONG} {METHODS[method]} --seed {seed}",
             f"{PGD_CW} --n-examples 2000", ("final", "best"),
             autoattack=f"{AUTOATTACK} --n-examples 1000")
        for methods in (("both", "n_fgsm", "fgsm_rs", "train", "eval0"), ABLATION, ("pgd_at",))
        for seed in range(3) for method in methods
    ]  # fmt: skip
    cells += [
        Cell(f"short-{method}-seed{seed}", f"{SHORT} {METHODS[method]} --seed {seed}", PGD_CW)
        for seed in range(2)
        for method in (
            "both", "kl", "kl4", "kl1to4", "kl4ramp", "n_fgsm", "fgsm_rs", "train", "eval0", "late",
        )
    ]  # fmt: skip
    cells += [Cell(f"fast-preset-seed{seed}", f"{FAST} --seed {seed}", PGD_CW) for seed in range(2)]
    cells += [
        Cell(f"precision-{precision}-seed{seed}",
             f"{LATE} --train-images 10000 --precision {precision} --seed {seed}",
             f"{PGD_CW} --n-examples 2000")
        for seed in range(3) for precision in ("bf16", "fp32")
    ]  # fmt: skip
    return cells + [
        Cell(f"short100-{method}-seed{seed}", f"{SHORT} {METHODS[method]} --seed {seed}", PGD_CW,
             classes=100)
        for seed in range(2) for method in ("both", "kl", "kl4", "kl1to4", "n_fgsm")
    ]  # fmt: skip


def gpu() -> list[Cell]:
    """Return the full-scale cells: two networks, two data sets, two schedules, two epsilons."""
    schedules = {
        "110": "--epochs 110 --lr-schedule multistep --lr 0.1",
        "30": "--epochs 30 --lr-schedule cyclic --lr 0.2",
    }
    wide = "--model WideResNet34-10"
    cells = [
        Cell(f"gpu-{classes}-{model}-{epochs}-eps{eps}-{method}-seed{seed}",
             f"--model {model} {schedules[epochs]} --epsilon {eps} {METHODS[method]} --seed {seed}",
             f"{PGD_CW} --epsilon {eps} --batch-size 1000 --n-examples 2000", ("final", "best"),
             classes, f"{AUTOATTACK} --epsilon {eps} --batch-size 1000")
        for seed in range(3) for model in ("PreActResNet18", "ResNet18")
        for epochs in ("110", "30") for classes in (10, 100) for eps in (8, 16)
        for method in ("kl1to4", "n_fgsm", "both", "kl", "kl4", "fgsm_rs")
    ]  # fmt: skip
    return cells + [
        Cell(f"gpu-{classes}-wide-30-eps8-kl1to4-seed0",
             f"{wide} {schedules['30']} {METHODS['kl1to4']}",
             f"{AUTOATTACK} --batch-size 500", classes=classes)
        for classes in (10, 100)
    ]  # fmt: skip


SCALES = {"cpu": cpu, "gpu": gpu}


class OutOfTimeError(Exception):
    """The budget is spent."""


def call(words: list[str], log: Path, deadline: float) -> None:
    """Run a script, its output appended to ``log``; at the deadline tell it to save and stop.

    Raises:
        OutOfTimeError: It was stopped.
        subprocess.CalledProcessError: It failed.
    """
    if time.monotonic() >= deadline:
        raise OutOfTimeError
    with log.open("a") as out:
        print("$", shlex.join(["python3", *words]), file=out, flush=True)
        process = subprocess.Popen(
            [sys.executable, *words], cwd=HERE.parent, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            status = process.wait(deadline - time.monotonic())
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise OutOfTimeError from None
    if status:
        raise subprocess.CalledProcessError(status, words)


def carry_out(cell: Cell, args: argparse.Namespace, deadline: float) -> None:
    """Train and measure one cell as far as it is not done, and keep what it shows.

    What is measured are the weights that are kept, so that anyone can measure them again.

    Raises:
        OutOfTimeError: The budget is spent; the next call goes on.
        subprocess.CalledProcessError: A script failed; the cell's console.txt says why.
    """
    folder, kept = HERE.parent / args.out_dir / cell.name, args.results_dir / cell.name
    measurements = {"report": cell.measure}
    if cell.autoattack and args.until == "autoattack":
        measurements["autoattack"] = cell.autoattack
    reports = {
        kept / f"{file}_model-{kind}.json": (kept / f"{file}_model.pth", flags)
        for kind, flags in measurements.items() for file in cell.files
    }  # fmt: skip
    if all(report.exists() for report in reports):
        return  # done, even where the weights were thought not worth keeping
    folder.mkdir(parents=True, exist_ok=True)
    shared = ["--data-dir", str(args.data_dir), "--device", args.device]
    data = "" if cell.classes == 10 else "0"
    if not (kept / "final_model.pth").exists():
        train = [*shlex.split(cell.train), *shlex.split(args.train_flags)]
        words = [f"MIX_KL_CIFAR10{data}.py", *train, "--run-name", cell.name, "--resume"]
        words += ["--out-dir", str(args.out_dir), *shared]
        call(words, folder / "console.txt", deadline)
        keep(folder, kept, cell.files)
    if args.until == "train":
        return
    for report, (path, flags) in reports.items():
        if report.exists():
            continue
        if path.exists():
            words = [f"test_cifar10{data}.py", "--model-path", os.path.relpath(path, HERE.parent)]
            words += [*shlex.split(flags), *shlex.split(args.measure_flags)]
            words += ["--out-dir", str(args.out_dir / cell.name), *shared]
            written = folder / f"{cell.name}-{path.stem}-report.json"
            written.unlink(missing_ok=True)  # of another measurement: the new would be numbered
            call(words, kept / "console.txt", deadline)
        else:  # the best epoch is the last one
            written = report.with_name(report.name.replace("best", "final"))
        if verdict_file(written).exists():  # older reports have none
            shutil.copy(verdict_file(written), verdict_file(report))
        shutil.copy(written, report)


def keep(folder: Path, kept: Path, files: tuple[str, ...]) -> None:
    """Copy what a finished training shows to a folder of results, its weights in half precision.

    The best epoch has a file of its own where it is to be measured and is not the last one.
    """
    kept.mkdir(parents=True, exist_ok=True)
    for name in ("args.json", "log.csv", "curves.png", "console.txt"):
        if (folder / name).exists():  # there are no curves without matplotlib
            shutil.copy(folder / name, kept / name)
    best, final = (folder / f"{file}_model.pth" for file in ("best", "final"))
    if "best" in files and which(best) != which(final):
        shrink.main(best, kept / best.name)
    shrink.main(final, kept / final.name)  # the last of all: it says that the training is kept


def which(path: Path) -> tuple[object, ...]:
    """Return the epoch of a checkpoint, and which of its weights are measured."""
    saved = checkpoint.load(path)
    return saved["epoch"], saved["selected"]


def main() -> None:
    """Carry out the cells of a scale until the budget is spent."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scale", choices=SCALES)
    parser.add_argument("--budget", type=float, default=1e6, metavar="MINUTES")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="cells by name, as long-*")
    parser.add_argument("--list", action="store_true", help="print the cells, and do nothing")
    parser.add_argument("--out-dir", type=Path, default=Path("output/study"))
    parser.add_argument("--results-dir", type=Path, default=HERE)
    parser.add_argument("--data-dir", type=Path, default=Path("cifar-data"))
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--until", choices=["train", "report", "autoattack"], default="autoattack",
        help="leave what comes after it to another call (default: do all)",
    )  # fmt: skip
    parser.add_argument("--train-flags", default="", help="more flags of every training")
    parser.add_argument("--measure-flags", default="", help="more flags of every measurement")
    args = parser.parse_args()
    for name in ("out_dir", "data_dir"):  # as the scripts see them, which run in the root
        setattr(args, name, Path(os.path.relpath(getattr(args, name), HERE.parent)))
    deadline = time.monotonic() + 60 * args.budget
    cells = [cell for cell in SCALES[args.scale]() if fnmatch.fnmatch(cell.name, args.only)]
    failed = []
    for number, cell in enumerate(cells, 1):
        print(f"{number}/{len(cells)} {cell.name}", flush=True)
        if args.list:
            continue
        try:
            carry_out(cell, args, deadline)
        except OutOfTimeError:
            print("the budget is spent; the same line goes on from here")
            break
        except subprocess.CalledProcessError as error:
            failed.append(cell.name)
            print(f"{cell.name} failed with status {error.returncode}: see its console.txt")
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
