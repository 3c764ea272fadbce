"""AutoAttack, arXiv:2003.01690, by the library of its authors or the package of the same numerics.

The library is called one part and one batch at a time, on the batches that it would form itself,
so that a run can be interrupted; it seeds itself for every batch, so that the verdicts are those of
a single call on all images.
"""

import contextlib
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import attacks
import files
import parallel

LIBRARIES = ("autoattack", "pyautoattack")  # the authors' own first
VERSIONS = {
    "autoattack": ("standard", ("apgd-ce", "apgd-t", "fab-t", "square")),
    "apgd": ("standard", ("apgd-ce", "apgd-t")),  # which decide nearly all
    "autoattack-plus": ("plus", ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t")),
} | {part: ("standard", (part,)) for part in ("apgd-ce", "apgd-t", "fab-t", "square")}


@dataclass
class Outcome:
    """What a run of AutoAttack found."""

    standing: Tensor  # (N,) bool, after all parts
    parts: dict[str, int]  # part -> images that stand after it
    seconds: float
    passes: int  # images that went forward through the network
    library: str  # which one, and its version
    journal: Path | None  # the file that an interrupted run goes on from; of no use any more


def library() -> tuple[type, str]:
    """Return the class ``AutoAttack`` of the library that is installed, and its name and version.

    Raises:
        ValueError: None is installed.
    """
    for name in LIBRARIES:
        try:
            found = importlib.import_module(name).AutoAttack
        except ImportError:
            continue
        try:
            return found, f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            return found, f"{name} of unknown version"
    raise ValueError("--attacks: AutoAttack is not installed; pip install -r requirements-eval.txt")


def known(arguments: dict[str, object], function: object) -> dict[str, object]:
    """Return the arguments that a function takes; the two libraries differ in their names."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in names}


@contextlib.contextmanager
def undisturbed(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Keep the library's hands off mode, random state, tracing and standard output."""
    devices = [x.device] if x.device.type == "cuda" else []
    tracing, logger = sys.gettrace(), logging.getLogger("auto-attack")
    level = logger.level
    logger.setLevel(logging.ERROR)  # its warnings come from checks.py, in our words
    with torch.random.fork_rng(devices), attacks.measuring(model, x):
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                yield
        finally:
            sys.settrace(tracing)
            logger.setLevel(level)


def fallen(
    model: nn.Module, x: Tensor, y: Tensor, part: str, version: str, *,
    epsilon: float, seed: int, batch_size: int,
) -> Tensor:  # fmt: skip
    """Return (N,) which images of a batch one part fools; all of them are right when clean."""
    make, _ = library()
    settings = dict(norm="Linf", eps=epsilon, seed=seed, version=version, device=x.device)
    with undisturbed(model, x):
        adversary = make(model, **known(settings | {"verbose": False}, make))
        adversary.verbose, adversary.attacks_to_run = False, [part]
        run = adversary.run_standard_evaluation
        size = {"bs": batch_size, "batch_size": batch_size}
        found = run(x.contiguous(), y, **known(size, run))  # it reshapes by view
        x_adv = found[0] if isinstance(found, tuple) else found
        return ~attacks.standing(model, x_adv, y, batch_size)


def fallen_in_parts(
    model: nn.Module, x: Tensor, y: Tensor, part: str, version: str, **settings: float
) -> Tensor:
    """Return ``fallen``; of each half of the batch where the GPU's memory does not do for all."""
    try:
        return fallen(model, x, y, part, version, **settings)
    except torch.OutOfMemoryError:
        if len(x) == 1:
            raise
    parallel.say(f"note: out of GPU memory; {part} goes on with {len(x) // 2} images at a time")
    halves = zip(x.tensor_split(2), y.tensor_split(2), strict=True)
    return torch.cat([fallen_in_parts(model, *half, part, version, **settings) for half in halves])


def fingerprint(model: nn.Module, x: Tensor, y: Tensor, *settings: object) -> str:
    """Return a name for this model, these images and these settings."""
    digest = hashlib.sha256(repr(settings).encode())
    for tensor in (*model.state_dict().values(), x, y):
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class Journal:
    """What has been found so far, in a file that survives the process; none where path is None."""

    def __init__(self, path: Path | None) -> None:
        """Read the file where it exists; a broken one is as good as none."""
        self.path, self.batches = path, {}
        if path and path.exists():
            with contextlib.suppress(ValueError):
                self.batches = json.loads(path.read_text())

    def add(self, key: str, entry: dict[str, object]) -> None:
        """Add one batch and write the file at once or not at all."""
        self.batches[key] = entry
        if self.path:
            files.write_text(self.path, json.dumps(self.batches))


def attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    upright: Tensor,
    name: str,
    *,
    epsilon: float,
    batch_size: int,
    seed: int,
    folder: Path | None = None,
    progress: bool = False,
) -> Outcome:
    """Run AutoAttack, or a single part of it, on the images that are upright.

    Args:
        model: Maps images in [0, 1] to logits.
        x: (N, C, H, W) images, and ``y``: their (N,) labels.
        upright: (N,) which images to attack: those that are right when clean.
        name: A key of ``VERSIONS``.
        epsilon: Radius of the ball, a pixel fraction.
        batch_size: Images at a time.
        seed: Of the library.
        folder: Where the journal lies, from which an interrupted run goes on, and ``autoattack``
            after any of its parts; None for no journal.
        progress: Whether to show a bar.
    """
    version, parts = VERSIONS[name]
    batch_size = -parallel.maxima(-batch_size)[0]  # some may have halved theirs: all deal the same
    settings = dict(epsilon=epsilon, seed=seed, batch_size=batch_size)
    title = library()[1]
    shown = x[upright], y[upright]  # the journal numbers images by their place among those
    journal = Journal(folder and journal_path(folder, model, *shown, version, settings))
    standing, counts, seconds, passes = upright.clone(), {}, 0.0, 0
    for part in parts:
        left = standing.nonzero().squeeze(1)
        batches = left.split(batch_size) if len(left) else ()  # split would give an empty batch
        mine = range(parallel.rank(), len(batches), parallel.size())
        after = standing.long()
        hidden = None if progress and not parallel.rank() else True
        for number in tqdm(mine, f"{name}: {part}", unit="batch", disable=hidden):
            index, key = batches[number], f"{part} {number} of {len(left)} images"
            if key not in journal.batches:
                began, count = time.perf_counter(), Passes(model)
                fell = fallen_in_parts(model, x[index], y[index], part, version, **settings)
                entry = {"fell": fell.nonzero().squeeze(1).tolist()}
                entry |= {"seconds": time.perf_counter() - began, "passes": count.stop()}
                journal.add(key, entry)
            entry = journal.batches[key]
            after[index[entry["fell"]]] = 0
            seconds, passes = seconds + entry["seconds"], passes + entry["passes"]
        standing = parallel.minimum_(after).bool()
        counts[part] = int(standing.sum())
    done_with = journal.path if "autoattack" in name else None  # it goes on from that of its parts
    return Outcome(standing, counts, seconds, passes, title, done_with)


def journal_path(
    folder: Path, model: nn.Module, x: Tensor, y: Tensor, version: str, settings: dict[str, object]
) -> Path:
    """Return the journal's file: one for each model, images, settings, library and process."""
    key = fingerprint(model, x, y, version, settings, library()[1], parallel.size())
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f".autoattack-{key}-{parallel.rank()}.json"


class Passes:
    """Counts the images that go forward through a model until it is stopped."""

    def __init__(self, model: nn.Module) -> None:
        """Start counting."""
        self.total = 0
        self.hook = model.register_forward_pre_hook(self._add)

    def _add(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.total += len(inputs[0])

    def stop(self) -> int:
        """Stop counting and return the number."""
        self.hook.remove()
        return self.total
