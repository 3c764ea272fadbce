"""A checkpoint as RobustBench wants it: one file of code, the weights, and the claim."""

import json
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import nn

import files

SOURCES = Path(__file__).parent / "models"
FUNCTIONS = {"resnet18": "resnet18", "preactresnet18": "preact_resnet18"}  # the others are wide
LOADER = '''

def load_model():
    """Return the network, in eval mode; it maps images in [0, 1] to logits."""
    from pathlib import Path

    import torch

    network = {constructor}
    state = torch.load(Path(__file__).with_name("weights.pt"), weights_only=True)
    network.load_state_dict(state)
    return network.eval()
'''


def source(constructor: str) -> str:
    """Return one file of code from those of ``models/``, with a function ``load_model``.

    Args:
        constructor: The call that builds the network.
    """
    parts = ['"""A network that maps images in [0, 1] to logits."""\n']
    for name in ("normalize", "resnet", "preact_resnet", "wide_resnet"):
        lines = (SOURCES / f"{name}.py").read_text().splitlines()
        parts.append("\n".join(line for line in lines if not line.startswith("from models")))
    return "\n".join(parts) + LOADER.replace("{constructor}", constructor)


def constructor(name: str, network: dict[str, object]) -> str:
    """Return the Python call that builds a network of ``models/``.

    Args:
        name: Its name, as ``--model`` takes it.
        network: ``num_classes``, ``width``, ``mean`` and ``std``.
    """
    words = {key: network[key] for key in ("num_classes", "mean", "std") if key in network}
    if name.startswith("Wide"):
        depth, widen = name.removeprefix("WideResNet").split("-")
        words |= {"depth": int(depth), "widen": int(widen)}
    elif network.get("width"):
        words["width"] = network["width"]
    function = FUNCTIONS.get(name.lower(), "wide_resnet")
    return f"{function}({', '.join(f'{key}={value!r}' for key, value in words.items())})"


def refuse(folder: Path) -> None:
    """Raise a FileExistsError where there is such a folder."""
    if folder.exists():
        raise FileExistsError(f"--export {folder}: exists; name a new folder, or remove it")


def write(
    folder: Path, model: nn.Module, name: str, network: dict[str, object], report: dict
) -> Path:
    """Write ``model.py``, ``weights.pt`` and ``claim.json`` into a new folder, all or none.

    Args:
        folder: Must not exist.
        model: The network with its weights.
        name: Its name, and ``network``: what it was built with.
        report: What was measured.

    Raises:
        FileExistsError: There is such a folder.
        OSError: It cannot be written.
    """
    refuse(folder)
    known = report.get("trained_on") == report["dataset"]  # a bare state dict does not say it
    accuracy = {row["attack"]: round(100 * row["accuracy"], 2) for row in report["attacks"]}
    claim = {
        "dataset": report["dataset"], "threat_model": "Linf",
        "eps": f"{255 * report['epsilon']:g}/255",
        "architecture": name, "additional_data": False if known else None, "n": report["n"],
        "clean_acc": accuracy.get("clean"), "autoattack_acc": accuracy.get("autoattack"),
        "reported": accuracy, "checkpoint_sha256": report["sha256"],
    }  # fmt: skip
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        made = Path(place) / "export"
        made.mkdir()
        files.write_text(made / "model.py", source(constructor(name, network)))
        files.write(made / "weights.pt", partial(torch.save, state))
        files.write_text(made / "claim.json", json.dumps(claim, indent=2) + "\n")
        made.rename(folder)
    return folder
