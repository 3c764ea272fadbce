"""Images a second of a training step over width, batch size and processes.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --processes 1 2 --widths 16 --batch-sizes 128

Each row is a short training by ``MIX_KL_CIFAR10.py`` on synthetic images in processes of its own;
its last epoch is read from ``log.csv``, so that what starts up is not counted.
"""

import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from timing import parser, show

ROOT = Path(__file__).resolve().parent.parent


def images_per_second(
    width: int, batch_size: int, processes: int, steps: int, device: str
) -> float:
    """Train two epochs of ``steps`` steps and return the speed of the second."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        launcher = [*launcher, str(processes)] if processes > 1 else []
        threads = max(1, (os.cpu_count() or 1) // processes)
        words = ["--synthetic", "--epochs", 2, "--held-out", 8, "--out_dir", folder, "--run-name",
                 "run", "--width", width, "--batch-size", batch_size, "--device", device,
                 "--train-images", steps * batch_size]  # fmt: skip
        command = [sys.executable, *launcher, ROOT / "MIX_KL_CIFAR10.py", *map(str, words)]
        environ = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environ)
        with (Path(folder) / "run" / "log.csv").open() as file:
            last = list(csv.DictReader(file))[-1]
    return steps * batch_size / float(last["train_seconds"])


def main():
    """Measure each combination and print the table."""
    made = parser(__doc__)
    made.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64])
    made.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 128, 256])
    made.add_argument("--processes", type=int, nargs="+", default=[1])
    made.add_argument("--steps", type=int, default=6)
    args = made.parse_args()
    rows = [
        {"width": width, "batch": batch, "processes": processes,
         "images/s": images_per_second(width, batch, processes, args.steps, args.device)}
        for processes in args.processes for width in args.widths for batch in args.batch_sizes
    ]  # fmt: skip
    show(f"training speed, PreActResNet18, {args.steps} steps", rows, args)


if __name__ == "__main__":
    main()
