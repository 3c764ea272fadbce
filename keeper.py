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

import checkpoint
import files
import parallel
import resume
import utils

# The last is a scheduler's warning; Windows has none.
NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
# Steps between two looks at the loss, and at which several processes agree whether to save or stop;
# where a step takes more than a second they look after each.
LOOK = 10
ECHO = 2.0  # seconds within which a signal is the same one again, passed on by torchrun


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
        """Refuse a run whose rest its disk cannot hold; ``steps`` are those of an epoch."""
        self.folder, self.parts, self.progress, self.args = folder, parts, progress, args
        self.steps, self.heard, self.every = steps, 0, 1
        self.failure: OSError | None = None  # of the last state
        self.unwritten: OSError | None = None  # why the files of the last epoch are not there
        self.saved = self.written = time.monotonic()  # the state; the files of an epoch
        if folder and progress.epoch <= args.epochs:
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
        when = 0.0

        def hear(number: int, _: object) -> None:
            nonlocal when
            if self.heard and (number != self.heard or time.monotonic() - when > ECHO):
                os._exit(128 + number)
            if not self.heard:
                self.heard, when = number, time.monotonic()

        before = {number: signal.signal(number, hear) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def after_step(self) -> None:
        """Look at loss, signals and clock; all processes come to the same decision.

        Raises:
            checkpoint.DivergedError: The loss is not finite.
            SystemExit: A signal was heard; the state is saved.
        """
        last = self.progress.step == self.steps
        look = last or self.progress.step % self.every == 0
        broken = int(look and not bool(self.progress.sums.isfinite().all()))
        if parallel.size() > 1 and not look:
            return
        # What comes after the last step is measuring, which hears no signal for minutes on a CPU;
        # and in epoch 1 the files of an epoch, which without a state could not be gone on from.
        wait = min(1, self.args.save_every) if last else self.args.save_every
        old = time.monotonic() - self.saved > 60 * wait
        due = int(old or (last and self.progress.epoch == 1))
        slow = int(self.progress.seconds > self.progress.step)
        broken, heard, due, slow = parallel.maxima(broken, self.heard, due, slow)
        self.every = 1 if slow else LOOK
        if broken:
            self.diverged(f"the loss is {float(self.progress.sums[0] / self.progress.step)}")
        if heard or due:
            self.save()
        self.stop_if(heard)

    def keeps(self, measured: bool) -> bool:
        """Return whether an epoch writes its files and the state; all processes say the same.

        On a GPU an epoch may take as long as two writes: after the first, one that was not measured
        writes where the last one that did is a minute old, where a write has failed, or before a
        stop.
        """
        failed = self.failure or self.unwritten
        pressing = measured or self.progress.epoch == 1 or failed or self.heard
        old = time.monotonic() - self.written > 60 * min(1, self.args.save_every)
        return parallel.anywhere(pressing or old)

    def after_epoch(self, keep: bool) -> None:
        """Save where its files were written; stop where a signal was heard and epochs are left."""
        if not keep:  # a signal since then is seen after the next step
            return
        self.written = time.monotonic()
        self.save()
        if self.progress.epoch <= self.args.epochs:
            self.stop_if(*parallel.maxima(self.heard))

    def stop_if(self, heard: int) -> None:
        """End the process with the status of a signal where there was one."""
        if heard:
            self.close()
            p = self.progress
            parallel.say(
                f"{signal.Signals(heard).name}: stopped in epoch {p.epoch} after {p.step} of "
                f"{self.steps} steps; the same command with --resume {self.folder} goes on"
            )
            raise SystemExit(128 + heard)

    def check(self) -> None:
        """Raise where weights, average or momentum are not finite."""
        if not utils.finite(self.parts.tensors()):
            self.diverged("the weights are not finite")

    def diverged(self, what: str) -> None:
        """Raise the line for a run that has diverged."""
        p, kept = self.progress, self.folder and self.folder / resume.NAME
        held = f"; {kept} holds the last good state" if kept and kept.exists() else ""
        raise checkpoint.DivergedError(
            f"epoch {p.epoch}: {what} after step {p.step}, lr "
            f"{float(self.parts.optimizer.param_groups[0]['lr']):g}; try a smaller --lr or "
            f"--kl-weight{held}"
        )

    def save(self) -> None:
        """Save the state of the run; what was saved before stays beside it.

        After an epoch whose files could not be written, the state stays the one before it until
        those of another are: a run that goes on from it writes them again.
        """
        self.check()
        state = resume.taken(self.parts, self.progress, self.args)
        if self.folder and not self.unwritten:
            path = self.folder / resume.NAME
            self.failure = failure_of(
                lambda: files.write(path, lambda f: torch.save(state, f), keep_previous=True)
            )
        # Where one process ends, its launcher may end the others: none does while rank 0 writes.
        parallel.anywhere(self.failure)
        self.saved = time.monotonic()

    def write(self, files_of_epoch: Callable[[], None]) -> None:
        """Write the files of an epoch, or warn, as the run goes on."""
        self.unwritten = failure_of(files_of_epoch)

    def close(self) -> None:
        """Raise what went wrong with the last writes, now that nothing comes after them."""
        if failure := self.unwritten or self.failure:
            again = f"add --resume {self.folder} to the same command"
            raise OSError(f"{failure}; make room, and {again}")


def failure_of(write: Callable[[], None]) -> OSError | None:
    """Call ``write``; where it could not, warn, and return why."""
    try:
        write()
    except OSError as error:
        parallel.say(f"warning: {error}; the run goes on")
        return error
    return None
