"""Wide residual networks for 32x32 images, arXiv:1605.07146, in the form TRADES made common."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from models.normalize import Normalize


class WideBlock(nn.Module):
    """Two 3x3 convolutions, each behind batch norm and ReLU, and a shortcut around them."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        """Make a block; the shortcut is a 1x1 convolution where the number of channels changes."""
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.convShortcut = None
        if in_planes != planes:
            self.convShortcut = nn.Conv2d(in_planes, planes, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_planes, H, W) to (N, planes, H / stride, W / stride)."""
        out = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.convShortcut is None else self.convShortcut(out)
        out = self.conv2(F.relu(self.bn2(self.conv1(out)), inplace=True))
        return out.add_(shortcut)


class Stage(nn.Module):
    """A row of wide blocks, the first of which changes the shape."""

    def __init__(self, depth: int, in_planes: int, planes: int, stride: int) -> None:
        """Make ``depth`` blocks."""
        super().__init__()
        first = WideBlock(in_planes, planes, stride)
        self.layer = nn.Sequential(first, *(WideBlock(planes, planes, 1) for _ in range(depth - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_planes, H, W) to (N, planes, H / stride, W / stride)."""
        return self.layer(x)


class WideResNet(nn.Module):
    """Three stages of wide blocks between a 16-channel stem and the pooled linear layer."""

    def __init__(
        self,
        depth: int,
        widen: int,
        *,
        num_classes: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        """Build the network of ``depth`` convolutions, ``widen`` times as wide as a ResNet."""
        super().__init__()
        blocks = (depth - 4) // 6
        planes = [16, 16 * widen, 32 * widen, 64 * widen]
        self.normalize = Normalize(mean, std)
        self.conv1 = nn.Conv2d(3, planes[0], 3, padding=1, bias=False)
        self.block1 = Stage(blocks, planes[0], planes[1], 1)
        self.block2 = Stage(blocks, planes[1], planes[2], 2)
        self.block3 = Stage(blocks, planes[2], planes[3], 2)
        self.bn1 = nn.BatchNorm2d(planes[3])
        self.fc = nn.Linear(planes[3], num_classes)
        self._initialise()

    def _initialise(self) -> None:
        """Draw the convolutions from He's normal distribution, as the reference code does."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 3, H, W) images in [0, 1] to (N, num_classes) logits."""
        out = self.conv1(self.normalize(x))
        out = self.block3(self.block2(self.block1(out)))
        out = F.relu(self.bn1(out), inplace=True).mean(dim=(2, 3))
        return self.fc(out)


def wide_resnet(
    *,
    depth: int,
    widen: int,
    num_classes: int,
    mean: tuple[float, ...] = (0.0, 0.0, 0.0),
    std: tuple[float, ...] = (1.0, 1.0, 1.0),
) -> WideResNet:
    """Build WideResNet-depth-widen: 34-10 has 46,160,474 parameters at 10 classes."""
    return WideResNet(depth, widen, num_classes=num_classes, mean=mean, std=std)
