"""ResNet-18 for 32x32 images: batch norm and ReLU behind each convolution, arXiv:1512.03385."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from models.normalize import Normalize


class Projection(nn.Conv2d):
    """A 1x1 convolution of every ``stride``-th pixel, the shortcut where the shape changes.

    Pixels are picked before the convolution: a strided one of 8 channels writes out of bounds in
    oneDNN's weight gradient, wherever threads do not share the batch evenly (seen with torch 2.14).
    """

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        """Make the convolution, without bias."""
        super().__init__(in_planes, planes, 1, bias=False)
        self.every = stride

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_planes, H, W) to (N, planes, H / stride, W / stride)."""
        return super().forward(x[:, :, :: self.every, :: self.every])


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut added before the last ReLU."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        """Make a block; the shortcut is a 1x1 convolution and batch norm where shapes differ."""
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(
                Projection(in_planes, planes, stride), nn.BatchNorm2d(planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_planes, H, W) to (N, planes, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return F.relu(out.add_(self.shortcut(x)), inplace=True)


def stages(
    block: Callable[[int, int, int], nn.Module], blocks: tuple[int, int, int, int], width: int
) -> list[nn.Module]:
    """Return the four stages of a ResNet; stage i has ``blocks[i]`` blocks of ``width * 2**i``.

    Each stage but the first starts with stride 2. ``block`` takes input planes, planes and stride.
    """
    rows, in_planes = [], width
    for stage, depth in enumerate(blocks):
        planes = width * 2**stage
        first = block(in_planes, planes, 1 if stage == 0 else 2)
        rows.append(nn.Sequential(first, *(block(planes, planes, 1) for _ in range(depth - 1))))
        in_planes = planes
    return rows


class ResNet(nn.Module):
    """Four stages of basic blocks, each half as large and twice as wide as the last."""

    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        *,
        num_classes: int,
        width: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        """Stack ``blocks[i]`` blocks of ``width * 2**i`` channels in stage i."""
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages(BasicBlock, blocks, width)
        self.linear = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 3, H, W) images in [0, 1] to (N, num_classes) logits."""
        out = F.relu(self.bn1(self.conv1(self.normalize(x))), inplace=True)
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(out.mean(dim=(2, 3)))


def resnet18(
    *,
    num_classes: int,
    width: int = 64,
    mean: tuple[float, ...] = (0.0, 0.0, 0.0),
    std: tuple[float, ...] = (1.0, 1.0, 1.0),
) -> ResNet:
    """Build ResNet-18: 11,173,962 parameters at width 64 and 10 classes."""
    return ResNet((2, 2, 2, 2), num_classes=num_classes, width=width, mean=mean, std=std)
