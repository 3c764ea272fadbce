"""What the benchmarks share: interleaved timing, the hardware line, a table and ``--json``."""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere

import report


def parser(doc: str, *, rounds: int) -> argparse.ArgumentParser:
    """Return a parser of the flags that every benchmark has."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
