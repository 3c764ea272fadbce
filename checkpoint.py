"""Model files that are whole, safe to open, and say what they hold."""

import platform
import subprocess
from argparse import Namespace
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

import files
import reading

SCHEMA = "mix-kl/1"
PREFIXES = ("module.", "_orig_mod.")  # DataParallel and torch.compile put these before every key
NESTED = ("state_dict", "model_state_dict", "model", "net")  # where public files keep a state dict
ROOM = 1 << 20  # numbers: the state dict of a smaller network gets a message of its own
MANY = 1 << 16  # classes or channels: more than any network here has
UNUSED = "sub_block1."  # layers of the common WideResNet code that its forward pass never calls


def is_count(value: object) -> bool:
    """Return whether a value from a file is a number of classes or of channels."""
    return type(value) is int and 0 < value < MANY


def is_statistic(value: object, low: float) -> bool:
    """Return whether a value from a file is three finite numbers above ``low``."""
    sound = isinstance(value, (tuple, list)) and len(value) == 3
    return sound and all(type(v) in (int, float) and low < v < 1e6 for v in value)


FACTS: dict[str, Callable[[object], bool]] = {  # what a checkpoint must say, and what makes sense
    "model": lambda value: isinstance(value, str) and 0 < len(value) < 100 and value.isprintable(),
    "num_classes": is_count,
    "width": lambda value: value is None or is_count(value),
    "mean": lambda value: is_statistic(value, -1e6),
    "std": lambda value: is_statistic(value, 0),
    "dataset": lambda value: isinstance(value, str) and len(value) < 100 and value.isprintable(),
    "selected": lambda value: isinstance(value, str) and value in ("raw", "ema"),
    "metrics": lambda value: value is None or (
        type(value) is dict
        and all(type(value.get(f"{which}clean_acc", 0.0)) in (int, float) for which in ("", "ema_"))
    ),
}  # fmt: skip
SPLIT = {  # flags that say which images a run trained on, and what makes sense
    "held_out": is_count,  # how many were kept aside
    "train_images": lambda value: value is None or is_count(value),  # of the others; None: all
    "images": lambda value: value is None or (isinstance(value, str) and len(value) < 100),  # all
}


def save(path: Path, content: dict[str, object]) -> None:
    """Write a checkpoint whole or not at all.

    Args:
        path: The file; replaced where it exists.
        content: Tensors and plain types, among them ``model``, ``num_classes``, ``dataset``, a
            state dict ``raw`` and perhaps ``ema``, and ``selected``, the one to measure.
    """
    files.write(path, lambda file: torch.save({"schema": SCHEMA} | content, file))


class DivergedError(ValueError):
    """A loss or weights that are not finite: the training diverges, or had diverged."""

    exit_code = 3


def load(path: Path) -> dict[str, object]:
    """Return what a checkpoint of ours, or a bare state dict, holds; nothing in it is executed.

    A bare state dict comes back as ``{"raw": state_dict, "selected": "raw"}``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a checkpoint; the message says what it is instead.
    """
    content, size = reading.read(path), path.stat().st_size
    content = dict(dict.items(content)) if isinstance(content, dict) else {}
    schema = content.get("schema")
    if isinstance(schema, str) and schema.startswith("mix-kl/") and schema != SCHEMA:
        raise ValueError(
            f"{path}: written as {reading.brief(schema)}, newer than {SCHEMA} here; update the code"
        )
    ours = isinstance(schema, str) and schema == SCHEMA
    nested = [key for key in NESTED if isinstance(content.get(key), dict)]
    if not ours:
        state = content[nested[0]] if nested else content
        if not any(isinstance(value, Tensor) for value in dict.values(state)):
            raise ValueError(f"{path}: neither a checkpoint of this project nor a state dict")
        content = {"raw": state, "selected": "raw"}
    for key in {"raw", "ema"} & content.keys():
        try:
            content[key] = reading.tensors(content[key], size)
        except ValueError as error:
            raise ValueError(f"{path}: {key}: {error}") from error
    for key, sound in FACTS.items() if ours else ():
        value = content.get(key)
        if not sound(value) or key not in {"metrics", *content}:
            raise damaged(path, key, repr(value) if key in content else "absent")
    if content["selected"] not in content:
        raise damaged(path, "selected", "no such weights")
    return content


def damaged(path: Path, key: str, value: str) -> ValueError:
    """Return the error for a checkpoint that says something impossible of itself."""
    value = reading.brief(value)
    return ValueError(f"{path}: damaged, its {key} is wrong ({value}); train or download again")


def load_weights(
    model: nn.Module,
    saved: dict[str, object],
    weights: str | None,
    path: Path,
    *,
    assign: bool = False,
) -> str:
    """Put the weights of a loaded checkpoint into ``model`` and return which they were.

    Args:
        model: Network of the checkpoint's architecture.
        saved: What ``load`` returned.
        weights: ``raw``, ``ema``, or None for the set that the checkpoint selects.
        path: For messages.
        assign: Whether ``model`` takes the tensors of the file themselves, not copies.

    Raises:
        ValueError: The set is not there or does not fit the network.
        DivergedError: It is not finite.
    """
    weights = weights or saved["selected"]
    if weights not in saved:
        raise ValueError(f"{path}: holds no {weights} weights; leave --weights out")
    state = saved[weights]
    for prefix in PREFIXES * 2:  # of wrappers in either order
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if not key.startswith(UNUSED)}
    held = {key: value for key, value in model.state_dict().items() if key.startswith("normalize.")}
    state = held | state  # bare state dicts normalise outside the network, or not at all
    refuse_infinite(state, path)
    try:
        model.load_state_dict(state, assign=assign)
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n", 1)[-1].split())[:160]
        raise ValueError(f"{path}: does not fit this network ({reason}); see --model") from error
    refuse_infinite(model.state_dict(), path)  # a float64 may be too large for a float32
    return weights


def refuse_infinite(state: dict[str, Tensor], path: Path) -> None:
    """Raise ``DivergedError`` where a tensor is not finite, without a copy of it."""
    for key, value in state.items():
        ends = value.aminmax() if value.numel() and not value.is_meta else ()
        if not all(end.isfinite() for end in ends):
            raise DivergedError(
                f"{path}: {reading.brief(key)} is not finite; the training had diverged"
            )


def build(
    make: Callable[..., nn.Module],
    name: str,
    network: dict[str, object],
    saved: dict[str, object],
    weights: str | None,
    path: Path,
) -> nn.Module:
    """Return a network with random weights, made only where those of the file fit it.

    Args:
        make: Makes a network from its name and ``network``.
        name: The network, and ``network``: what ``architecture`` returned.
        saved: What ``load`` returned.
        weights: As in ``load_weights``.
        path: For messages.

    Raises:
        ValueError: The file names an unknown network, or one that its weights do not fit.
        DivergedError: They are not finite.
    """
    try:
        with torch.device("meta"):  # shapes without memory
            shapes = make(name, **network)
    except (RuntimeError, ValueError) as error:  # sizes may overflow
        if "model" not in saved and isinstance(error, ValueError):
            raise  # the fault of a flag, which the message names
        raise ValueError(f"{path}: its network cannot be built ({reading.brief(error)})") from error
    needed = sum(value.numel() for value in shapes.state_dict().values())
    state = saved.get(weights or saved["selected"], {})
    held = sum(value.numel() for value in state.values())
    if state and needed > held + ROOM:
        raise ValueError(
            f"{path}: does not fit this network ({needed:,} numbers, the file holds {held:,}); "
            "see --model"
        )
    load_weights(shapes, saved, weights, path, assign=True)
    return make(name, **network)


def architecture(
    saved: dict[str, object],
    path: Path,
    args: Namespace,
    num_classes: int,
    statistics: dict[str, tuple[float, ...]],
) -> tuple[str, dict[str, object]]:
    """Return the name of the network in a loaded checkpoint, and what to build it with.

    Args:
        saved: What ``load`` returned.
        path: For messages.
        args: ``model``, ``width`` and ``normalize`` for a bare state dict; with a
            ``transfer_from`` they may be meant for that one.
        num_classes: Number of classes of the dataset to measure on.
        statistics: Its ``mean`` and ``std``.

    Raises:
        ValueError: The file is for other classes, or says nothing and neither does ``--model``.
    """
    if "model" not in saved:
        if not args.model:
            raise ValueError(f"{path}: a bare state dict; name its network with --model")
        network = {"num_classes": num_classes, "width": args.width}
        return args.model, network | ({} if args.normalize == "none" else statistics)
    if saved["num_classes"] != num_classes:
        raise ValueError(
            f"{path}: trained on {saved['dataset']} ({saved['num_classes']} classes); "
            f"use test_cifar{saved['num_classes']}.py"
        )
    alone = not args.transfer_from
    if alone and args.model and args.model.lower() != saved["model"].lower():
        raise ValueError(f"{path}: holds a {saved['model']}; leave --model {args.model} out")
    if alone and args.width not in (None, saved["width"] or 64):
        raise ValueError(f"{path}: is {saved['width'] or 64} wide; leave --width {args.width} out")
    keys = ("num_classes", "width", "mean", "std")
    return saved["model"], {key: saved[key] for key in keys}


def split(saved: dict[str, object]) -> dict[str, object] | None:
    """Return ``dataset`` and the flags ``SPLIT`` of a run; None where its file does not say."""
    flags = saved.get("args")
    flags = flags if isinstance(flags, dict) else {}
    found = {name: flags.get(name) for name in SPLIT}
    sound = all(fits(found[name]) for name, fits in SPLIT.items())
    return {"dataset": saved.get("dataset")} | found if sound else None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return reading.digest(path, "sha256")


def facts(
    args: Namespace, dataset: str, name: str, network: dict[str, object]
) -> dict[str, object]:
    """Return what a checkpoint says of itself besides weights.

    Args:
        args: All flags of the run.
        dataset: Name of the dataset.
        name: Name of the network.
        network: What it was built with: ``num_classes``, ``mean``, ``std``.
    """
    versions = {"torch": str(torch.__version__), "python": platform.python_version()}
    return network | {
        "model": name, "width": args.width, "dataset": dataset, "args": plain(args),
        "versions": versions,
    }  # fmt: skip


def plain(args: Namespace) -> dict[str, object]:
    """Return the flags as types that JSON and a safe unpickler know."""
    kept = (bool, int, float, str, list, tuple, type(None))
    return {key: v if isinstance(v, kept) else str(v) for key, v in sorted(vars(args).items())}


@cache
def commit() -> str:
    """Return the git revision of this code (``-dirty`` where files differ), or ``unknown``.

    What it was at the first call, which is what runs.
    """

    def git(*words: str) -> str:
        run = partial(subprocess.run, capture_output=True, text=True, check=True)
        return run(["git", *words], cwd=Path(__file__).parent).stdout.strip()

    try:
        if git("rev-parse", "--show-prefix"):  # these files lie in the repository of something else
            return "unknown"
        return git("describe", "--always", "--abbrev=12", "--dirty", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
