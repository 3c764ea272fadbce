"""What a run leaves behind: folder, log, curves, checkpoints, and the verdict on a collapse."""

import csv
import io
import json
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from torch import nn

import checkpoint
import files
import plots
import utils

COLLAPSE_FLOOR = 0.05  # a fall of fewer points than this is noise on 1,000 images
Measure = Callable[[nn.Module], dict[str, float]]  # model -> accuracy by attack, in [0, 1]
# What a run writes besides args.json, and --overwrite takes away first.
WRITTEN = (
    "log.csv", "curves.png", "best_model.pth", "final_model.pth", "state.pth", "state.pth.prev",
)  # fmt: skip
MEASURED = {"clean": "clean", "fgsm": "FGSM", "pgd10": "PGD-10"}  # accuracies, as log and line say


def start_run(args: Namespace, default: str, state: Path | None) -> Path:
    """Return the folder of a run; a new one is created.

    Args:
        args: All flags of the run.
        default: Name of the folder where ``--run-name`` gives none.
        state: The state file that the run goes on from, in its folder; None for a fresh start.

    Raises:
        ValueError: The name that the user gave is taken.
        OSError: Nothing can be written there.
    """
    files.probe(state.parent if state else args.out_dir)
    if state:
        return state.parent
    unborn = bool(args.resume and args.run_name)  # unless it wrote something
    folder = args.out_dir / (args.run_name or default)
    if unborn and any((folder / file).exists() for file in WRITTEN):
        raise ValueError(
            f"{folder}: exists, without a state that --resume could go on from; choose another "
            "--run-name, or give --overwrite in its place"
        )
    return run_folder(args.out_dir, args.run_name, default, args.overwrite or unborn)


def run_folder(out_dir: Path, name: str | None, default: str, overwrite: bool) -> Path:
    """Create and return the folder of a run, never one that is in use.

    Args:
        out_dir: Folder of all runs; created where missing.
        name: Name that the user gave, or None.
        default: Name to number (``default``, ``default-2``, ...) where the user gave none.
        overwrite: Whether a run of the given name may be replaced.

    Raises:
        ValueError: The name that the user gave is taken, or a path.
    """
    if name and (Path(name).name != name or name == ".."):
        raise ValueError(f"--run-name {name}: a name, not a path; --out-dir says where it goes")
    out_dir.mkdir(parents=True, exist_ok=True)
    for number in range(1, 1_000_000):
        stem = name or (default if number == 1 else f"{default}-{number}")
        try:
            (out_dir / stem).mkdir(exist_ok=bool(name) and overwrite)
        except FileExistsError:
            if name:
                raise ValueError(
                    f"{out_dir / name}: exists; choose another --run-name, or add --overwrite"
                ) from None
            continue
        return out_dir / stem
    raise ValueError(f"{out_dir}: too many runs")


@contextmanager
def alone_in(folder: Path | None) -> Iterator[None]:
    """Keep other processes out of the folder of a run.

    A run that ends within before it wrote leaves no folder: its name is free again.

    Raises:
        ValueError: Another process trains there.
    """
    busy = f"{folder}: another process trains here; let it end, or choose another --run-name"
    try:
        with files.held(folder / ".lock", busy) if folder else nullcontext():
            yield
    except BaseException:
        if folder:
            with suppress(OSError):  # it is not empty
                folder.rmdir()
        raise


def to_measure(epoch: int, args: Namespace) -> bool:
    """Return whether an epoch is measured: each ``--measure-every``-th, and the last."""
    return epoch % args.measure_every == 0 or epoch == args.epochs


def unmeasured(_: nn.Module) -> dict[str, None]:
    """Measure nothing: the accuracies of an epoch that is left out, empty in the log."""
    return dict.fromkeys(MEASURED)


def accuracies(
    model: nn.Module, average: utils.WeightAverage | None, measure: Measure
) -> dict[str, float]:
    """Return the held-out accuracies of the raw and of the averaged weights, and the seconds."""
    started = time.perf_counter()
    row = {f"{name}_acc": value for name, value in measure(model).items()}
    if average:
        row |= {f"ema_{name}_acc": value for name, value in measure(average.model).items()}
    return row | {"eval_seconds": time.perf_counter() - started}


def measured(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """Return the rows that hold accuracies."""
    return [row for row in rows if row["pgd10_acc"] is not None]


def live(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """Return the rows of the epochs that the weights went through: none that a rollback undid."""
    kept = []
    for row in rows:
        kept.append(row)
        if row.get("rollback_to") is not None:
            kept = [one for one in kept if one["epoch"] <= row["rollback_to"]]
    return kept


def score(row: dict[str, float]) -> float:
    """Return what chooses the best epoch: PGD-10 accuracy, raw or averaged; -1 if unmeasured."""
    found = row["pgd10_acc"], row.get("ema_pgd10_acc")
    return max((value for value in found if value is not None), default=-1.0)


def collapsed(rows: list[dict[str, float]]) -> bool:
    """Return whether the last epoch shows catastrophic overfitting in the raw weights.

    It does where held-out PGD accuracy is below half of FGSM accuracy, or has lost more than half
    of its best within two measured epochs while FGSM accuracy has not: where that fell as well, PGD
    accuracy must have kept less than half of the share that FGSM accuracy kept. Differences of less
    than ``COLLAPSE_FLOOR`` are none.
    """
    *before, now = live(rows)
    if not measured([now]):
        return False
    if now["fgsm_acc"] - now["pgd10_acc"] > max(COLLAPSE_FLOOR, now["fgsm_acc"] / 2):
        return True
    before = measured(before)
    if not before:
        return False
    best = max(before[-2:], key=lambda row: row["pgd10_acc"])
    fgsm_kept = min(1, now["fgsm_acc"] / best["fgsm_acc"]) if best["fgsm_acc"] else 1
    pgd_fell = best["pgd10_acc"] - now["pgd10_acc"] > COLLAPSE_FLOOR
    return pgd_fell and now["pgd10_acc"] < best["pgd10_acc"] * fgsm_kept / 2


def line(row: dict[str, float], epochs: int) -> str:
    """Return what is printed of an epoch."""

    def percentages(prefix: str) -> str:
        return "  ".join(f"{name} {row[f'{prefix}{k}_acc']:6.2%}" for k, name in MEASURED.items())

    text = f"epoch {row['epoch']:3d}/{epochs}  lr {row['lr']:.4f}  loss {row['loss']:.4f}"
    if measured([row]):
        text += f"  held-out {percentages('')}"
        text += f"  averaged {percentages('ema_')}" if "ema_clean_acc" in row else ""
    text += f"  {row['train_seconds'] + row['eval_seconds']:.0f} s"
    return text + ("  COLLAPSE: catastrophic overfitting" if row["collapse"] else "")


def write_log(path: Path, rows: list[dict[str, float]]) -> None:
    """Write all epochs to the CSV log, so that rows of a run that was cut short do not stay."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, dict.fromkeys(key for row in rows for key in row))
    writer.writeheader()
    writer.writerows(rows)
    files.write_text(path, text.getvalue())


def begin_files(
    folder: Path, args: Namespace, commit: str, rows: list[dict[str, float]] | None
) -> None:
    """Bring ``args.json`` and the log to the flags and the state of a run.

    A new run, whose ``rows`` are None, leaves nothing of a run that it replaces.
    """
    for file in WRITTEN if rows is None else ():
        (folder / file).unlink(missing_ok=True)
    text = json.dumps(checkpoint.plain(args) | {"commit": commit}, indent=2)
    files.write_text(folder / "args.json", text + "\n")
    if rows:
        write_log(folder / "log.csv", rows)


def write_epoch(
    folder: Path,
    progress,
    model: nn.Module,
    average: nn.Module | None,
    facts: dict[str, object],
    *,
    keep: bool = True,
) -> None:
    """Write the log; if asked to, curves, and the epoch as the final and perhaps as the best.

    ``progress`` has the ``rows`` of the log, and ``best``, the score of the best epoch written.
    """
    rows, row = progress.rows, progress.rows[-1]
    write_log(folder / "log.csv", rows)
    if not keep:
        return
    collapses = [row["epoch"] for row in rows if row["collapse"]]
    files.write(folder / "curves.png", lambda file: plots.curves(live(rows), collapses, file))
    metrics = {key: value for key, value in row.items() if value is not None}
    saved = facts | {"epoch": row["epoch"], "metrics": metrics, "raw": model.state_dict()}
    saved |= {"ema": average.state_dict()} if average else {}
    if score(row) > progress.best and not row["collapse"]:
        selected = "ema" if row.get("ema_pgd10_acc", -1) >= row["pgd10_acc"] else "raw"
        checkpoint.save(folder / "best_model.pth", saved | {"selected": selected})
        progress.best = score(row)
    final = "ema" if average else "raw"
    checkpoint.save(folder / "final_model.pth", saved | {"selected": final})
