"""The networks, by the name that ``--model`` takes. Each maps images in [0, 1] to logits."""

from collections.abc import Callable
from functools import partial

from torch import nn

from models.preact_resnet import preact_resnet18
from models.resnet import resnet18
from models.wide_resnet import wide_resnet

MODELS: dict[str, Callable[..., nn.Module]] = {
    "PreActResNet18": preact_resnet18,
    "ResNet18": resnet18,
    "WideResNet34-10": partial(wide_resnet, depth=34, widen=10),
    "WideResNet28-10": partial(wide_resnet, depth=28, widen=10),
    "WideResNet16-4": partial(wide_resnet, depth=16, widen=4),
}


def canonical_name(name: str) -> str:
    """Return the key of ``MODELS`` that ``name`` means, whatever its case, dashes and underscores.

    Raises:
        ValueError: No network is called that; the message lists those there are.
    """

    def bare(text: str) -> str:
        return text.lower().replace("-", "").replace("_", "")

    matches = [key for key in MODELS if bare(key) == bare(name)]
    if not matches:
        raise ValueError(f"--model {name}: unknown; choose one of {', '.join(MODELS)}")
    return matches[0]


def build_model(
    name: str,
    *,
    num_classes: int,
    width: int | None = None,
    mean: tuple[float, ...] = (0.0, 0.0, 0.0),
    std: tuple[float, ...] = (1.0, 1.0, 1.0),
) -> nn.Module:
    """Build a network with random weights.

    Args:
        name: A key of ``MODELS``, in any spelling that ``canonical_name`` understands.
        num_classes: Number of logits.
        width: Channels of the first stage of a ResNet (64 where None), a multiple of 8: with other
            numbers, oneDNN's channels-last gradient writes out of bounds (seen with torch 2.15 on
            AVX2). A WideResNet has its width in its name.
        mean: Per-channel mean of the training images, in [0, 1]; subtracted inside the model.
        std: Per-channel standard deviation, likewise.

    Raises:
        ValueError: The name is unknown, or the width is not for this network.
    """
    key = canonical_name(name)
    if width is None:
        return MODELS[key](num_classes=num_classes, mean=mean, std=std)
    if key.startswith("Wide"):
        raise ValueError(f"--width {width}: only for the ResNets; {key} has its width by name")
    if width % 8:
        raise ValueError(f"--width {width}: must be a multiple of 8")
    return MODELS[key](num_classes=num_classes, mean=mean, std=std, width=width)
