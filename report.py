"""What a measurement says: the table that is printed and the file beside it."""

import json
import platform
import re
from pathlib import Path

import torch


def machine(device: torch.device) -> dict[str, str]:
    """Return what the numbers were made on."""
    hardware = platform.processor() or platform.machine()
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        hardware = f"{len(models)} x {models[0]}" if models else hardware
    return {
        "hardware": hardware,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def table(report: dict[str, object]) -> str:
    """Return the report as the table that is printed."""
    lines = [f"{'attack':<12}{'loss':<8}{'alpha':>8}{'steps':>7}{'restarts':>10}{'start':>9}"
             f"{'correct':>15}{'accuracy':>10}{'seconds':>9}"]  # fmt: skip
    for row in report["attacks"]:
        alpha = f"{255 * row['alpha']:g}/255" if row["steps"] else "-"
        correct = f"{row['correct']:,}/{row['n']:,}"
        lines.append(
            f"{row['attack']:<12}{row['loss']:<8}{alpha:>8}{row['steps']:>7}{row['restarts']:>10}"
            f"{row['start']:>9}{correct:>15}{row['accuracy']:>10.2%}{row['seconds']:>9.1f}"
        )
    worst = report["worst_case"]
    correct = f"{worst['correct']:,}/{report['n']:,}"
    lines.append(f"{'worst case, image by image':<54}{correct:>15}{worst['accuracy']:>10.2%}")
    return "\n".join(lines)


def write(report: dict[str, object], out_dir: Path, stem: str) -> Path:
    """Write the report as JSON below ``out_dir`` and return the file; never over another one."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for number in range(1, 1_000_000):
        path = out_dir / (f"{stem}.json" if number == 1 else f"{stem}-{number}.json")
        if not path.exists():
            path.write_text(json.dumps(report, indent=2) + "\n")
            return path
    raise ValueError(f"{out_dir}: too many reports")
