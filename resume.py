"""A run that goes on after an interruption as if nothing had happened.

The whole state of a run lies in ``state.pth`` in its folder: weights, average, momentum, scaler of
the loss, how far the run is, and of every process its random states and batch norm statistics. What
an epoch draws besides (order, lam) depends on seed and epoch alone.
"""

import random
import re
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import checkpoint
import files
import parallel
import reading
import utils

SCHEMA = "mix-kl-state/1"
NAME = "state.pth"
# Flags that leave the mathematics and the log alone; all others must be as they were. What counts
# of precision and factor is what they came to, dtype and label_smoothing; method and num_classes
# are no flags.
FREE = {
    "allow_changed", "compile", "data_dir", "debug", "device", "factor", "method", "num_classes",
    "out_dir", "overwrite", "precision", "resume", "run_name", "save_every",
}  # fmt: skip
# Columns of every row of the log; flags and the kind of training add others.
COLUMNS = {
    "epoch", "lr", "loss", "hard_loss", "kl", "clean_acc", "fgsm_acc", "pgd10_acc", "collapse",
}  # fmt: skip


@dataclass
class Parts:
    """Everything that a training step changes."""

    model: nn.Module
    average: utils.WeightAverage | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    def tensors(self) -> list[Tensor]:
        """Return weights, average and momentum."""
        kept = [*self.model.state_dict().values(), *(self.average.tensors if self.average else [])]
        return kept + self.momentum()

    def momentum(self) -> list[Tensor]:
        """Return the momentum of each parameter."""
        return [state["momentum_buffer"] for state in self.optimizer.state.values()]

    def statistics(self) -> list[Tensor]:
        """Return batch norm statistics, which differ from process to process within an epoch."""
        average = self.average and self.average.model
        return utils.statistics(self.model) + utils.statistics(average)


@dataclass
class Progress:
    """How far a run is; a TypeError where a file says something else."""

    epoch: int = 1  # the one under way
    step: int = 0  # steps done of it
    steps: int = 0  # of an epoch; states of before this was kept have none
    sums: Tensor | int = 0  # of the loss terms over these steps
    seconds: float = 0.0  # spent in them
    best: float = -1.0  # held-out PGD-10 accuracy of the best epoch written, raw or averaged
    rows: list[dict[str, float]] = field(default_factory=list)  # of the log
    rollbacks: int = 0  # done so far: what the attack is now follows from their number
    healthy: list[dict[str, object]] = field(default_factory=list)  # states to go back to
    commit: str = field(default_factory=checkpoint.commit)  # of the code; several where it changed

    def __post_init__(self) -> None:
        """Look at the types of what a file may hold."""
        kinds = dict(epoch=int, step=int, steps=int, rows=list, commit=str)
        kinds |= dict(seconds=float, best=float)
        for name, kind in kinds.items():
            if type(getattr(self, name)) is not kind:
                raise TypeError(f"its {name} is {reading.brief(getattr(self, name))}")
        if not all(type(row) is dict and COLUMNS <= row.keys() for row in self.rows):
            raise TypeError("its rows are no log")

    def begin(self, epoch: int) -> None:
        """Begin an epoch."""
        self.epoch, self.step, self.sums, self.seconds = epoch, 0, 0, 0.0


# ------------------------------------------------------------------------------------ states, files


def learned(parts: Parts) -> dict[str, object]:
    """Return weights, average, momentum and scaler, not copied."""
    return {
        "raw": parts.model.state_dict(), "momentum": parts.momentum(),
        "ema": parts.average.model.state_dict() if parts.average else None,
        "scaler": parts.scaler.state_dict(),
    }  # fmt: skip


def put_learned(state: dict[str, object], parts: Parts) -> None:
    """Bring weights, average, momentum and scaler, in place, to what ``learned`` saw."""
    parts.model.load_state_dict(state["raw"])
    if parts.average:  # a run without one may be told to go on with one, or in another precision
        parts.average.model.load_state_dict(state["ema"] or state["raw"])
    if state["scaler"]:
        parts.scaler.load_state_dict(state["scaler"])
    with torch.no_grad():
        for mine, kept in zip(parts.momentum(), state["momentum"], strict=True):
            mine.copy_(kept)


def taken(parts: Parts, progress: Progress, args: Namespace) -> dict[str, object]:
    """Return the whole state of a run as tensors and plain types; all processes must call this."""
    kind, numbers, *rest = np.random.get_state()
    mine = {
        "torch": torch.get_rng_state(), "python": random.getstate(),
        "numpy": (kind, numbers.tolist(), *rest),
        "statistics": [tensor.cpu() for tensor in parts.statistics()],
        "sums": progress.sums.cpu() if isinstance(progress.sums, Tensor) else 0,
    }  # fmt: skip
    device = next(parts.model.parameters()).device
    if device.type == "cuda":
        mine["cuda"] = torch.cuda.get_rng_state(device)
    return {
        "schema": SCHEMA, "args": checkpoint.plain(args),
        "progress": vars(progress) | {"sums": 0}, "processes": parallel.gathered(mine),
    } | learned(parts)  # fmt: skip


def put_back(state: dict[str, object], parts: Parts) -> Progress:
    """Bring model, average, optimizer and random states to what ``taken`` saw; return how far."""
    device = next(parts.model.parameters()).device
    put_learned(state, parts)
    progress = Progress(**{"commit": state.get("commit", "unknown")} | state["progress"])
    known = parallel.rank() < len(state["processes"])  # a process may be new
    process = state["processes"][parallel.rank() if known else 0]
    with torch.no_grad():
        # Those of the average come last; there may have been none.
        for mine, kept in zip(parts.statistics(), process["statistics"], strict=False):
            mine.copy_(kept)
        sums = process["sums"]
        progress.sums = sums.to(device) if isinstance(sums, Tensor) else sums
        if known:
            torch.set_rng_state(process["torch"])
            random.setstate(process["python"])
            np.random.set_state(process["numpy"])
            if device.type == "cuda" and "cuda" in process:
                torch.cuda.set_rng_state(process["cuda"], device)
    return progress


def load(path: Path) -> dict[str, object]:
    """Return the state in a file, or in the one before it where that is damaged.

    Raises:
        ValueError: Neither is whole.
    """
    faults = []
    for file in (path, files.previous(path)):
        try:
            state = reading.read(file)
            known = isinstance(state, dict) and state.get("schema") == SCHEMA
            if not known or type(state.get("args")) is not dict:
                raise ValueError(f"{file}: not a state as this version writes it, {SCHEMA}")
        except (OSError, ValueError) as error:
            faults.append(str(error))
            continue
        if faults:
            parallel.say(f"warning: {faults[0]}: going on from {file.name}, which is older")
        return state
    raise ValueError(f"--resume: no whole state ({'; '.join(faults)})")


def find(args: Namespace, default: str) -> Path | None:
    """Return the state file that ``--resume`` means, None for a fresh start.

    Args:
        args: Flags; ``resume`` is None, ``auto``, a folder or a file.
        default: Name of the run where ``--run-name`` gives none; it may have been numbered.

    Raises:
        ValueError: There is no such file, or it is that of another run than ``--run-name``.
    """
    if args.resume is None:
        return None
    if args.resume != "auto":
        path = Path(args.resume)
        path = path / NAME if path.is_dir() else path
        if not (path.exists() or files.previous(path).exists()):
            raise ValueError(
                f"--resume {args.resume}: no such state; leave the value out to find it"
            )
        if args.run_name not in (None, path.resolve().parent.name):
            raise ValueError(
                f"--run-name {args.run_name}: --resume {args.resume} goes on in {path.parent}; "
                "leave out one of the two"
            )
        return path
    if args.run_name:
        folders = [args.out_dir / args.run_name]
    else:
        numbered = re.compile(re.escape(default) + r"(?:-(\d+))?")
        known = {p: numbered.fullmatch(p.name) for p in args.out_dir.glob(f"{default}*")}
        known = {path: int(match[1] or 1) for path, match in known.items() if match}
        folders = sorted(known, key=known.get)[-1:]  # an older one is another run
    states = [folder / NAME for folder in folders]
    return next((p for p in states if p.exists() or files.previous(p).exists()), None)


def typed(value: object) -> str:
    """Return the value of a flag as a command line gives it."""
    if isinstance(value, tuple):
        return ":".join(f"{end:g}" for end in dict.fromkeys(value))
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def check_flags(state: dict[str, object], args: Namespace, path: Path = Path(NAME)) -> None:
    """Print which flags changed since the state in a file was saved.

    Raises:
        ValueError: One of them changes the mathematics, and ``--allow-changed`` is not given.
    """
    before = {"images": vars(args).get("images")} | state["args"]  # older states do not name them
    names = {"dtype": "precision", "processes": "nproc-per-node of torchrun", "images": "data-dir"}
    precisions = {str(dtype): name for name, dtype in utils.PRECISIONS.items()}
    changed = []
    for key, value in checkpoint.plain(args).items():
        if key not in FREE and value != before.get(key):
            old, new = (precisions.get(text, text) for text in map(typed, (before.get(key), value)))
            changed.append(f"--{names.get(key, key.replace('_', '-'))} {old} -> {new}")
    text = ", ".join(changed)
    if changed and not args.allow_changed:
        raise ValueError(
            f"--resume: flags that change the run: {text}; give them as before to go on in "
            f"{path.parent}, or --allow-changed"
        )
    if changed:
        parallel.say(f"note: changed since the state was saved: {text}")


def progress_of(path: Path | None, parts: Parts, args: Namespace, steps: int) -> Progress:
    """Return how far a run is: where the state in a file left it, or at its beginning.

    An epoch that had another number of ``steps`` begins anew.

    Raises:
        ValueError: The file cannot be gone on from, or other processes found another state.
        checkpoint.DivergedError: Its weights are not finite.
    """
    progress = restored(path, parts, args) if path else Progress()
    if progress.step and progress.steps not in (0, steps):
        parallel.say(
            f"note: epoch {progress.epoch} begins anew: it has {steps} steps, not {progress.steps}"
        )
        progress.begin(progress.epoch)
    progress.steps = steps
    if len(set(parallel.gathered((progress.epoch, progress.step, progress.rollbacks)))) > 1:
        raise ValueError(
            "--resume: the processes found different states; --out-dir must be a folder that all "
            "of them see"
        )
    return progress


def restored(path: Path, parts: Parts, args: Namespace) -> Progress:
    """Bring a run to where the state in a file left it, and say so.

    Raises:
        ValueError: The file is damaged, its flags are others, or its network is another.
        checkpoint.DivergedError: Its weights are not finite.
    """
    state = load(path)
    check_flags(state, args, path)
    try:
        progress = put_back(state, parts)
    except Exception as error:  # what a file holds can raise anything
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"{path}: the state of another run ({reason}); choose another --run-name"
        ) from error
    if not utils.finite(parts.tensors()):
        raise checkpoint.DivergedError(
            f"{path}: its weights are not finite; try --resume {files.previous(path)}"
        )
    now, last = checkpoint.commit(), progress.commit.split(", ")[-1]
    if progress.epoch <= args.epochs and now != last:
        parallel.say(f"note: the code is not the one that saved the state: {last} -> {now}")
        progress.commit += f", {now}"
    where = f"epoch {progress.epoch}, after {progress.step} steps of it"
    if progress.epoch > args.epochs:
        where = f"the end: all {args.epochs} epochs are done"
    parallel.say(f"resumed from {path} at {where}")
    return progress
