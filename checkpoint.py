"""Model files that are whole, safe to open, and say what they hold."""

import hashlib
import platform
import subprocess
import zipfile
from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor, nn

import files

SCHEMA = "mix-kl/1"
PREFIXES = ("module.", "_orig_mod.")  # DataParallel and torch.compile put these before every key
NESTED = ("state_dict", "model_state_dict", "model", "net")  # where public files keep a state dict
UNUSED = "sub_block1."  # layers of the common WideResNet code that its forward pass never calls


def save(path: Path, content: dict[str, object]) -> None:
    """Write a checkpoint whole or not at all.

    Args:
        path: The file; replaced where it exists.
        content: Tensors and plain types, among them ``model``, ``num_classes``, ``dataset``, a
            state dict ``raw`` and perhaps ``ema``, and ``selected``, the one to measure.
    """
    files.write(path, lambda file: torch.save({"schema": SCHEMA} | content, file))


def load(path: Path) -> dict[str, object]:
    """Return what a checkpoint of ours, or a bare state dict, holds; nothing in it is executed.

    A bare state dict comes back as ``{"raw": state_dict, "selected": "raw"}``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a checkpoint; the message says what it is instead.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--model_path {path}: no such file")
    head = path.read_bytes()[:64].lstrip().lower()
    if head.startswith((b"<!doctype", b"<html")):
        raise ValueError(f"{path}: this is an HTML page, not a checkpoint; download it again")
    if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
        raise ValueError(f"{path}: damaged, its checksums do not agree; copy it again")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise ValueError(f"{path}: not a whole checkpoint ({reason})") from error
    if isinstance(content, dict) and content.get("schema") == SCHEMA:
        return content
    for key in NESTED:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    tensors = isinstance(content, dict) and [v for v in content.values() if isinstance(v, Tensor)]
    if tensors and len(tensors) == len(content):
        return {"raw": content, "selected": "raw"}
    raise ValueError(f"{path}: neither a checkpoint of this project nor a state dict")


def load_weights(
    model: nn.Module, saved: dict[str, object], weights: str | None, path: Path
) -> str:
    """Put the weights of a loaded checkpoint into ``model`` and return which they were.

    Args:
        model: Network of the checkpoint's architecture.
        saved: What ``load`` returned.
        weights: ``raw``, ``ema``, or None for the set that the checkpoint selects.
        path: For messages.

    Raises:
        ValueError: The set is not there, does not fit the network, or is not finite.
    """
    weights = weights or saved["selected"]
    if weights not in saved:
        raise ValueError(f"{path}: holds no {weights} weights; leave --weights out")
    state = saved[weights]
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if not key.startswith(UNUSED)}
    held = {key: value for key, value in model.state_dict().items() if key.startswith("normalize.")}
    state = held | state  # bare state dicts normalise outside the network, or not at all
    broken = [key for key, value in state.items() if not value.isfinite().all()]
    if broken:
        raise ValueError(f"{path}: {broken[0]} is not finite; the training had diverged")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).splitlines()[1].split())[:160]
        raise ValueError(f"{path}: does not fit this network ({reason}); see --model") from error
    return weights


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
        args: ``model``, ``width`` and ``normalize`` for a bare state dict.
        num_classes: Number of classes of the dataset to measure on.
        statistics: Its ``mean`` and ``std``.

    Raises:
        ValueError: The file is for other classes, or says nothing and neither does ``--model``.
    """
    if "model" not in saved:
        if not args.model:
            raise ValueError(f"{path}: a bare state dict; name its network with --model")
        network = {"num_classes": num_classes, "width": args.width}
        return args.model, network | (statistics if args.normalize == "dataset" else {})
    if saved["num_classes"] != num_classes:
        raise ValueError(
            f"{path}: trained on {saved['dataset']} ({saved['num_classes']} classes); "
            f"use test_cifar{saved['num_classes']}.py"
        )
    if args.model and args.model.lower() != saved["model"].lower():
        raise ValueError(f"--model {args.model}: the file holds a {saved['model']}; leave it out")
    keys = ("num_classes", "width", "mean", "std")
    return saved["model"], {key: saved[key] for key in keys}


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
        "versions": versions, "commit": commit(),
    }  # fmt: skip


def plain(args: Namespace) -> dict[str, object]:
    """Return the flags as types that JSON and a safe unpickler know."""
    kept = (bool, int, float, str, list, tuple, type(None))
    return {key: v if isinstance(v, kept) else str(v) for key, v in sorted(vars(args).items())}


def commit() -> str:
    """Return the git revision of this code (``-dirty`` where files differ), or ``unknown``."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
