"""PreActResNet-18 for 32x32 images: batch norm and ReLU before each convolution.

Identity Mappings in Deep Residual Networks, arXiv:1603.05027. The last batch norm and ReLU before
the pooling, which some copies in circulation lack, are part of it.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.normalize import Normalize
from models.resnet import Projection, stages


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each behind its batch norm and ReLU, and a shortcut around them."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        """Make a block; the shortcut is a 1x1 convolution where the shape changes."""
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(Projection(in_planes, planes, stride))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_planes, H, W) to (N, planes, H / stride, W / stride)."""
        out = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out), inplace=True))
        return out.add_(shortcut)


class PreActResNet(nn.Module):
    """Four stages of pre-activation blocks, each half as large and twice as wide as the last."""

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
        self.layer1, self.layer2, self.layer3, self.layer4 = stages(PreActBlock, blocks, width)
        self.bn = nn.BatchNorm2d(8 * width)
        self.linear = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 3, H, W) images in [0, 1] to (N, num_classes) logits."""
        out = self.conv1(self.normalize(x))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        out = F.relu(self.bn(out), inplace=True).mean(dim=(2, 3))
        return self.linear(out)


def preact_resnet18(
    *,
    num_classes: int,
    width: int = 64,
    mean: tuple[float, ...] = (0.0, 0.0, 0.0),
    std: tuple[float, ...] = (1.0, 1.0, 1.0),
) -> PreActResNet:
    """Build PreActResNet-18: 11,172,170 parameters at width 64 and 10 classes."""
    return PreActResNet((2, 2, 2, 2), num_classes=num_classes, width=width, mean=mean, std=std)
