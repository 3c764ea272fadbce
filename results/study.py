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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cells
import runs
import shrink

import checkpoint
from report import verdict_file

HERE = Path(__file__).resolve().parent
STAGES = ("train", *runs.MEASUREMENTS)


class OutOfTimeError(Exception):
    """The budget is spent."""


class CellError(Exception):
    """A cell cannot be carried out."""


def call(words: list[str], log: Path, deadline: float) -> None:
    """Run a script, its output appended to ``log``; at the deadline it is told to save and stop.

    So it is where the study itself is stopped: two trainings must not meet in one folder.

    Raises:
        OutOfTimeError: It was stopped.
        CellError: It failed.
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
            raise OutOfTimeError from None
        except KeyboardInterrupt:  # it heard Ctrl-C as well
            process.wait()
            raise
        finally:
            process.terminate()  # nothing where it has ended
            process.wait()
    if status:
        raise CellError(f"failed with status {status}: see its console.txt")


def carry_out(cell: cells.Cell, args: argparse.Namespace, deadline: float) -> None:
    """Train and measure one cell as far as it is not done, and keep what it shows.

    What is measured are the weights that are kept, so that anyone can measure them again.

    Raises:
        OutOfTimeError: The budget is spent; the next call goes on.
        CellError: A script failed, or weights are gone that were to be measured.
    """
    folder, kept = HERE.parent / args.out_dir / cell.name, args.results_dir / cell.name
    measurements = {"report": cell.measure} | cell.more
    wanted = runs.MEASUREMENTS[: max(1, STAGES.index(args.until))]
    reports = {
        kept / f"{file}_model-{kind}.json": (kept / f"{file}_model.pth", measurements[kind])
        for kind in wanted if kind in measurements for file in cell.files
    }  # fmt: skip
    if all(report.exists() for report in reports):
        return  # done, even where the weights were thought not worth keeping
    folder.mkdir(parents=True, exist_ok=True)
    shared = ["--data-dir", str(args.data_dir), "--device", args.device]
    if not (kept / "final_model.pth").exists():
        if (kept / "log.csv").exists():  # another training would not be the one of the reports
            raise CellError(f"is not measured, and the weights are gone: {kept}")
        train = [*shlex.split(cell.train), *shlex.split(args.train_flags)]
        words = [f"MIX_KL_CIFAR{cell.classes}.py", *train, "--run-name", cell.name, "--resume"]
        words += ["--out-dir", str(args.out_dir), *shared]
        call(words, folder / "console.txt", deadline)
        keep(folder, kept, cell.files)
    if args.until == "train":
        return
    for report, (path, flags) in reports.items():
        if report.exists():
            continue
        if path.exists():
            weights = os.path.relpath(path, HERE.parent)
            words = [f"test_cifar{cell.classes}.py", "--model-path", weights]
            words += [*shlex.split(flags), *shlex.split(args.measure_flags)]
            words += ["--out-dir", str(args.out_dir / cell.name), *shared]
            written = folder / f"{cell.name}-{path.stem}-report.json"
            written.unlink(missing_ok=True)  # of another measurement: the new would be numbered
            call(words, kept / "console.txt", deadline)
        elif path.name == "best_model.pth" and runs.best_is_last(kept):
            written = report.with_name(report.name.replace("best", "final"))
        else:
            raise CellError(f"is not measured, and the weights are gone: {path}")
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
    parser.add_argument("scale", choices=cells.SCALES)
    parser.add_argument("--budget", type=float, default=1e6, metavar="MINUTES")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="cells by name, as long-*")
    parser.add_argument("--list", action="store_true", help="print the cells, and do nothing")
    parser.add_argument("--out-dir", type=Path, default=Path("output/study"))
    parser.add_argument("--results-dir", type=Path, default=HERE)
    parser.add_argument("--data-dir", type=Path, default=Path("cifar-data"))
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--until", choices=STAGES, default=STAGES[-1],
        help="leave what comes after it to another call (default: do all)",
    )  # fmt: skip
    parser.add_argument("--train-flags", default="", help="more flags of every training")
    parser.add_argument("--measure-flags", default="", help="more flags of every measurement")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for name in ("out_dir", "data_dir"):  # as the scripts see them, which run in the root
        setattr(args, name, Path(os.path.relpath(getattr(args, name), HERE.parent)))
    deadline = time.monotonic() + 60 * args.budget
    todo = [cell for cell in cells.SCALES[args.scale]() if fnmatch.fnmatch(cell.name, args.only)]
    if not todo:
        parser.error(f"--only {args.only}: no cell has such a name; --list shows them all")
    failed = []
    for number, cell in enumerate(todo, 1):
        print(f"{number}/{len(todo)} {cell.name}", flush=True)
        if args.list:
            continue
        try:
            carry_out(cell, args, deadline)
        except OutOfTimeError:
            print("the budget is spent; the same line goes on from here")
            break
        except CellError as error:
            failed.append(cell.name)
            print(cell.name, error)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
