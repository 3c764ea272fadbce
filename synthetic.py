"""Images drawn by a formula: for tests, the demo and machines without data."""

import numpy as np

SIZE = 32  # image side [pixels]


def waves(count: int, frequency: float, rng: np.random.Generator) -> np.ndarray:
    """Return (count, 32, 32, 3) sums of four plane waves, each sum of unit standard deviation."""
    grid = np.stack(np.meshgrid(np.arange(SIZE), np.arange(SIZE), indexing="ij"), -1) / SIZE
    angle = rng.uniform(0, 2 * np.pi, (count, 4))
    radius = rng.uniform(0.5 * frequency, frequency, (count, 4))
    k = 2 * np.pi * np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)
    phase = np.einsum("yxd,cwd->cwyx", grid, k) + rng.uniform(0, 2 * np.pi, (count, 4, 1, 1))
    color = rng.normal(size=(count, 4, 3))
    pattern = np.einsum("cwyx,cwk->cyxk", np.cos(phase), color)
    return pattern / pattern.std(axis=(1, 2, 3), keepdims=True)


def draw(num_classes: int, counts: tuple[int, ...]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draw images that look nothing like photographs but behave like them under attack.

    A class is a smooth pattern of 15 to 28/255, which survives a perturbation of 8/255, and a fine
    texture of 8/255, which predicts it as well, is learned first and does not survive. An image
    shifts and fades its pattern, and adds a background and noise. It depends on the sizes alone.

    Returns:
        For each count (N, 32, 32, 3) uint8 images and (N,) int64 labels.
    """
    rng = np.random.default_rng(num_classes)
    shapes = waves(num_classes, 1.5, rng)
    textures = waves(num_classes, 14.0, rng)
    splits = []
    for count in counts:
        labels = rng.integers(num_classes, size=count)
        fade = rng.uniform(0.06, 0.11, (count, 1, 1, 1))
        shift = rng.integers(-1, 2, (count, 2))
        rows = (np.arange(SIZE) + shift[:, :1]) % SIZE
        cols = (np.arange(SIZE) + shift[:, 1:]) % SIZE
        pixels = fade * shapes[labels[:, None, None], rows[:, :, None], cols[:, None, :]]
        pixels += 0.032 * textures[labels]
        backgrounds = waves(64, 3.0, rng)
        pixels += 0.03 * backgrounds[rng.integers(64, size=count)]
        pixels += 0.02 * rng.normal(size=pixels.shape) + 0.5
        pixels = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
        splits.append((pixels, labels))
    return splits
