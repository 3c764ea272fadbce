"""Where the time of one MIX-KL step goes, operation by operation.

    python benchmarks/step_profile.py
    python benchmarks/step_profile.py --width 16 --precision fp32

The step is the one of ``step_speed.py`` with memory kept as the training scripts keep it. Every
operation below autograd is timed from outside, which costs some microseconds each.
"""

import time
from collections import Counter

import torch
from step_speed import mix_kl, random_images
from timing import parser, show
from torch.utils._python_dispatch import TorchDispatchMode

import utils
from models import build_model


class Seconds(TorchDispatchMode):
    """Sums the seconds of each kind of operation, and counts its calls."""

    def __init__(self, device):
        """Start at 0."""
        super().__init__()
        self.device, self.seconds, self.calls = device, Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run one operation between two looks at the clock."""
        began = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        name = func.overloadpacket.__name__.strip("_")
        self.seconds[name] += time.perf_counter() - began
        self.calls[name] += 1
        return out


def main():
    """Time the operations of some steps and print them, the dearest first."""
    made = parser(__doc__, rounds=5)
    made.add_argument("--model", default="PreActResNet18")
    made.add_argument("--width", type=int)
    made.add_argument("--batch-size", type=int, default=128)
    made.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    args = made.parse_args()
    utils.keep_freed_memory()  # as the training scripts do
    device, count = utils.pick_device(args.device), args.batch_size
    dtype = utils.pick_precision(args.precision, device)
    images = random_images(count, device)
    model = build_model(args.model, num_classes=10, width=args.width).train().to(device)
    step, _ = mix_kl(model, images, dtype, "--compile", "off")
    for _ in range(2):
        step()
    with Seconds(device) as spent:
        for _ in range(args.rounds):
            step()
    whole = spent.seconds.total()
    rows = [
        {"operation": name, "calls": spent.calls[name] // args.rounds,
         "seconds": seconds / args.rounds, "share": seconds / whole}
        for name, seconds in spent.seconds.most_common() if seconds > 0.001 * whole
    ]  # fmt: skip
    convolutions = [row["share"] for row in rows if "convolution" in row["operation"]]
    title = f"one MIX-KL step, {args.model}, batch {count}, {str(dtype).removeprefix('torch.')}"
    show(f"{title}: convolutions {100 * sum(convolutions):.1f} % of the time", rows, args)


if __name__ == "__main__":
    main()
