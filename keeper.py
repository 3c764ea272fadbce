"""Watches over a live run: saves its state when it is due, stops it when it must."""

import os
import shutil
import signal
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

import files
import parallel
import resume

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # the last: a scheduler's warning
# Steps between two looks at the loss, and at which several processes agree whether to save or stop.
LOOK = 10


class DivergedError(ValueError):
    """The loss or the weights are no longer finite."""

    exit_code = 3


class Keeper:
    """Saves the state of a run when it is due; ends the run when a signal or the loss says so."""

    def __init__(
        self,
        folder: Path | None,
        parts: resume.Parts,
        progress: resume.Progress,
        args: Namespace,
        steps: int,
    ) -> None:
        """Refuse a run that its disk cannot hold; ``steps`` is the number of them in an epoch."""
        self.folder, self.parts, self.progress, self.args = folder, parts, progress, args
        self.steps, self.heard = steps, 0
        self.failure: OSError | None = None  # of the last write
        self.saved = time.monotonic()
        if folder:
            size = sum(t.numel() * t.element_size() for t in parts.tensors())
            held = sum(path.stat().st_size for path in folder.glob("*.pth*"))  # and is replaced
            # Three files, each twice; a state that holds two healthy ones is as large as three.
            needed = max(0, (12 if args.on_collapse == "rollback" else 6) * size - held)
            free = shutil.disk_usage(folder).free
            if free < needed:
                raise ValueError(
                    f"{folder}: {free / 1e6:,.0f} MB free, the run needs {needed / 1e6:,.0f} MB; "
                    "make room, or choose another --out-dir"
                )

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note the first signal to stop; exit at once at the second."""

        def hear(number: int, _: object) -> None:
            if self.heard:
                os._exit(128 + number)
            self.heard = number

        before = {number: signal.signal(number, hear) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def after_step(self) -> None:
        """Look at loss, signals and clock; all processes come to the same decision.

        Raises:
            DivergedError: The loss is not finite.
            SystemExit: A signal was heard; the state is saved.
        """
        last = self.progress.step == self.steps
        look = last or self.progress.step % LOOK == 0
        broken = int(look and not bool(self.progress.sums.isfinite().all()))
        if parallel.size() > 1 and not look:
            return
        due = int(not last and time.monotonic() - self.saved > 60 * self.args.save_every)
        broken, heard, due = parallel.maxima(broken, self.heard, due)
        if broken:
            self.diverged()
        if heard or due:
            self.save()
        self.stop_if(heard)

    def after_epoch(self) -> None:
        """Save, and stop where a signal was heard meanwhile.

        Where the epoch's own files could not be written, the state stays the one before them: a run
        that goes on from it writes them again.
        """
        if not any(parallel.maxima(int(bool(self.failure)))):
            self.save()
        self.stop_if(*parallel.maxima(self.heard))

    def stop_if(self, heard: int) -> None:
        """End the process with the status of a signal where there was one."""
        if heard:
            self.close()
            p = self.progress
            print(
                f"{signal.Signals(heard).name}: stopped in epoch {p.epoch} after {p.step} of "
                f"{self.steps} steps; the same command with --resume goes on", flush=True,
            )  # fmt: skip
            raise SystemExit(128 + heard)

    def check(self) -> None:
        """Raise where weights, average or momentum are not finite."""
        if not all(bool(t.isfinite().all()) for t in self.parts.tensors()):
            self.diverged()

    def diverged(self) -> None:
        """Raise the line for a run that has diverged."""
        p, kept = self.progress, self.folder and self.folder / resume.NAME
        loss = float(p.sums[0] / p.step) if isinstance(p.sums, Tensor) else float("nan")
        held = f"; {kept} holds the last good state" if kept and kept.exists() else ""
        raise DivergedError(
            f"epoch {p.epoch}: the loss is {loss} after step {p.step}, lr "
            f"{float(self.parts.optimizer.param_groups[0]['lr']):g}; try a smaller --lr or "
            f"--kl-weight{held}"
        )

    def save(self) -> None:
        """Save the state of the run; what was saved before stays beside it."""
        self.check()
        state = resume.taken(self.parts, self.progress, self.args)
        if self.folder:
            path = self.folder / resume.NAME
            self.attempt(
                lambda: files.write(path, lambda f: torch.save(state, f), keep_previous=True)
            )
        self.saved = time.monotonic()

    def attempt(self, write: Callable[[], None]) -> bool:
        """Call ``write`` and return whether it could; if not, warn, as the run goes on."""
        try:
            write()
            self.failure = None
        except OSError as error:
            self.failure = error
            print(f"warning: {error}; the run goes on", flush=True)
        return self.failure is None

    def close(self) -> None:
        """Raise what went wrong with the last write, now that nothing comes after it."""
        if self.failure:
            raise OSError(f"{self.failure}; make room, and add --resume to the same command")
