"""Normalisation as the first layer of a network, so that attacks see images in [0, 1] only."""

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """Subtract the per-channel mean and divide by the per-channel standard deviation.

    Both are buffers: they travel with the weights, and no gradient step moves them.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Take the statistics, one number a channel, for images in [0, 1]."""
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) images in [0, 1] to zero mean and unit variance."""
        return (x - self.mean) / self.std
