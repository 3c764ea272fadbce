"""Write a checkpoint small enough to commit: the selected weights alone, in half precision.

    python3 results/shrink.py output/run/final_model.pth results/run/model.pth

Small tensors (batch norm, biases, normalisation) keep their precision.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint

KEPT = 4096  # tensors with fewer numbers stay as they are


def main(source: Path, target: Path) -> None:
    """Shrink one file."""
    saved = checkpoint.load(source)
    if "model" not in saved:
        sys.exit(f"{source}: a bare state dict; only checkpoints of this project are shrunk")
    weights = saved.pop(saved["selected"])
    for name in ("raw", "ema"):
        saved.pop(name, None)
    small = {
        key: value.half() if value.numel() > KEPT and value.is_floating_point() else value
        for key, value in weights.items()
    }
    checkpoint.save(target, saved | {saved["selected"]: small})
    print(f"{target}: {target.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*map(Path, sys.argv[1:]))
