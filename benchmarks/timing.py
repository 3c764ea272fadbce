"""What the benchmarks share: timing in turn, counting, the hardware line, a table, ``--json``."""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere

import report


def parser(doc: str, *, rounds: int = 0) -> argparse.ArgumentParser:
    """Return a parser of the flags of every benchmark, and of ``--rounds`` where it takes any."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if rounds:
        made.add_argument(
            "--rounds", type=int, default=rounds, help="timed rounds (default %(default)s)"
        )
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    return made


def interleaved(
    functions: dict[str, Callable[[], object]],
    rounds: int,
    device: str,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Return the median seconds of each function, called in turn, after one call to warm up.

    Calls in turn meet the same neighbours on a shared machine, so that ratios hold where absolute
    times drift. ``time.process_time`` as ``clock`` leaves neighbours out where one thread works.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            began = clock()
            function()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if number:
                seconds[name].append(clock() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


class Flops(TorchDispatchMode):
    """Counts the operations of convolutions and products; torch's hooks fail in autograd.grad."""

    def __init__(self):
        """Start at 0."""
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run one operation and add its cost."""
        out = func(*args, **(kwargs or {}))
        cost = flop_registry.get(func._overloadpacket)
        self.total += cost(*args, **(kwargs or {}), out_val=out) if cost else 0
        return out


def matrix_product(device: str, dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """Return a product of two square matrices and its floating-point operations.

    Its rate is the peak that convolutions are measured by: the same multiplications and sums, in
    the library's best order.
    """
    if device.startswith("cuda"):  # in the format that its fp32 convolutions use
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    size = 8192 if device.startswith("cuda") else 2048
    matrix = torch.randn(size, size, device=device).to(dtype)
    return lambda: matrix @ matrix, 2 * size**3


def show(title: str, rows: list[dict[str, object]], args: argparse.Namespace) -> None:
    """Print rows of equal keys as a table, with the hardware above, and write them as JSON."""
    machine = report.machine(torch.device(args.device))
    machine["threads"] = str(torch.get_num_threads())
    machine["load"] = f"{os.getloadavg()[0]:.1f}"
    print(f"{title}\n" + ", ".join(f"{key} {value}" for key, value in machine.items()))
    cells = [list(rows[0])] + [
        [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()]
        for row in rows
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row in cells:
        first, *others = (cell for cell in row)
        shown = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([f"{first:<{widths[0]}}", *shown]))
    print(flush=True)
    if args.json:
        known = json.loads(args.json.read_text()) if args.json.exists() else []
        known.append({"title": title, "machine": machine, "rows": rows})
        args.json.write_text(json.dumps(known, indent=2) + "\n")
