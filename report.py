"""What a measurement says: intervals, the table that is printed, the files, and comparisons."""

import json
import math
import platform
import re
import statistics
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import files

DAMAGED = (  # what a file that does not hold verdicts may raise
    OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile,
    zlib.error,
)  # fmt: skip
Z95 = 1.959963984540054  # of the normal distribution


def wilson(correct: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share, Wilson 1927; it holds near 0 and 1 too."""
    share, spread = correct / n, Z95**2 / n
    middle = (share + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return (middle - half if correct else 0.0), (middle + half if correct < n else 1.0)


def mcnemar(first: np.ndarray, second: np.ndarray) -> tuple[int, int, float]:
    """Compare two verdicts on the same images by McNemar's exact test, 1947.

    Args:
        first: (N,) bool, and ``second``: likewise.

    Returns:
        The images that only the first has right, those that only the second has, and the two-sided
        probability of a split at least as uneven if both were equally good.
    """
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    n = only_first + only_second
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1))
    return only_first, only_second, min(1.0, 2 * tail / 2**n)


def build(
    facts: dict[str, object], rows: list[dict[str, object]], verdicts: dict[str, Tensor], y: Tensor
) -> dict[str, object]:
    """Return the report.

    Args:
        facts: What was measured, on what.
        rows: Per attack its parameters and cost.
        verdicts: Per attack (N,) which images stand.
        y: (N,) labels.
    """
    y = y.cpu()
    worst = torch.stack(list(verdicts.values())).all(0)
    shown = [row | shares(verdicts[row["attack"]], y) for row in rows]
    return facts | {"n": len(y), "attacks": shown, "worst_case": shares(worst, y)}


def shares(standing: Tensor, y: Tensor) -> dict[str, object]:
    """Return number, accuracy in [0, 1], its 95 % interval, and that of each class there is."""
    correct, n = int(standing.sum()), len(y)
    counts = torch.bincount(y)
    right = torch.bincount(y, standing.double(), len(counts))
    by_class = [r / c if c else None for r, c in zip(right.tolist(), counts.tolist(), strict=True)]
    return {
        "n": n, "correct": correct, "accuracy": correct / n, "interval": list(wilson(correct, n)),
        "per_class": by_class,
    }  # fmt: skip


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
    lines = [
        f"{'attack':<16}{'loss':<8}{'alpha':>8}{'steps':>7}{'restarts':>10}{'start':>9}"
        f"{'correct':>15}{'accuracy':>10}{'95 % interval':>18}{'passes':>12}{'seconds':>9}"
    ]
    for row in report["attacks"]:
        alpha = f"{255 * row['alpha']:g}/255" if row["alpha"] else "-"
        lines.append(
            f"{row['attack']:<16}{row['loss']:<8}{alpha:>8}{row['steps']:>7}{row['restarts']:>10}"
            f"{row['start']:>9}{_counted(row)}{row['passes']:>12,}{row['seconds']:>9.1f}"
        )
    lines.append(f"{'worst case, image by image':<58}{_counted(report['worst_case'])}")
    by_class = [share for share in report["worst_case"]["per_class"] if share is not None]
    lines.append(
        f"worst case of the classes: lowest {min(by_class):.2%}, median "
        f"{statistics.median(by_class):.2%}, highest {max(by_class):.2%}"
    )
    return "\n".join(lines + [f"warning: {text}" for text in report.get("warnings", [])])


def _counted(row: dict[str, object]) -> str:
    low, high = row["interval"]
    interval = f"{100 * low:.2f} - {100 * high:.2f}"
    return f"{row['correct']:>7,}/{row['n']:<7,}{row['accuracy']:>10.2%}{interval:>18}"


def write(
    report: dict[str, object], verdicts: dict[str, Tensor], y: Tensor, out_dir: Path, stem: str
) -> Path:
    """Write the report as JSON below ``out_dir``, the verdicts beside it; never over other files.

    Returns:
        The JSON file. The other has its name with ``-verdicts.npz``: (N,) bool by attack, and the
        labels.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    path = free(out_dir / f"{stem}.json")
    arrays = {name: verdict.numpy() for name, verdict in verdicts.items()}
    arrays["worst case"] = np.all(list(arrays.values()), axis=0)
    arrays["labels"] = y.cpu().numpy()
    files.write(verdict_file(path), partial(np.savez_compressed, **arrays))
    files.write_text(path, json.dumps(report, indent=2) + "\n")
    return path


def free(path: Path) -> Path:
    """Return ``path``; where it exists, the first of ``-2``, ``-3``, ... before its suffix."""
    number, found = 1, path
    while found.exists():
        number += 1
        found = path.with_stem(f"{path.stem}-{number}")
    return found


def verdict_file(path: Path) -> Path:
    """Return where the verdicts of a report lie."""
    return path.with_name(path.stem + "-verdicts.npz")


# --------------------------------------------------------------------------------------- comparing


def read(path: Path) -> dict[str, object]:
    """Return a report from its file, of which every line of a comparison can be made.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not a report.
    """
    try:
        found = json.loads(path.read_text())
        what(found)
        f"{found['worst_case']['accuracy']:.2%}"
        for row in found["attacks"]:
            f"{row['attack']:<16}{row['accuracy']:.2%}"
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"--compare {path}: not a report of this project") from error
    return found


def read_verdicts(path: Path) -> dict[str, np.ndarray]:
    """Return the verdicts beside a report, and the labels of their images.

    Raises:
        ValueError: Their file is damaged, or holds something else.
    """
    file = verdict_file(path)
    try:
        with np.load(file) as found:
            arrays = dict(found)
        shape = arrays["labels"].shape
        if any(a.shape != shape or a.dtype != bool for k, a in arrays.items() if k != "labels"):
            raise ValueError("not a verdict for each label")
    except DAMAGED as error:
        raise ValueError(f"--compare {path}: {file} is damaged; measure again") from error
    return arrays


def compared(paths: list[Path]) -> str:
    """Return reports side by side: accuracies, mean and deviation, and McNemar's test for pairs.

    Raises:
        OSError: A file cannot be read.
        ValueError: It is not a report.
    """
    reports = [read(path) for path in paths]
    columns = [
        {row["attack"]: row for row in found["attacks"]} | {"worst case": found["worst_case"]}
        for found in reports
    ]
    names = [name for name in columns[0] if all(name in column for column in columns)]
    if any(column.keys() != columns[0].keys() for column in columns):
        names.remove("worst case")  # it would be that over other attacks
    about = [what(found) for found in reports]
    plain = [what(found | {"transfer_from": None}) for found in reports]
    sources = [(found.get("transfer_from") or {}).get("sha256") for found in reports]
    lines = [f"[{i}] {path}  ({text})" for i, (path, text) in
             enumerate(zip(paths, about, strict=True), 1)]  # fmt: skip
    head = "".join(f"{f'[{i}]':>10}" for i in range(1, len(paths) + 1))
    lines.append(f"{'attack':<16}{head}{'mean':>10}{'std':>8}")
    for name in names:
        shares = [column[name]["accuracy"] for column in columns]
        cells = "".join(f"{share:>10.2%}" for share in shares)
        deviation = np.std(shares, ddof=1) if len(shares) > 1 else 0.0
        lines.append(f"{name:<16}{cells}{np.mean(shares):>10.2%}{100 * deviation:>8.2f}")
    for i in range(1, len(paths)):
        tested, other = names, sources[i] != sources[0]
        # in a cascade the attacks after transfer saw what it left
        if plain[i] != plain[0] or (other and reports[0].get("cascade")):
            lines.append(f"[1] and [{i + 1}]: not measured alike, no test")
            continue
        if other:
            tested = [name for name in names if name not in ("transfer", "worst case")]
            lines.append(f"[1] and [{i + 1}]: transfer from other networks, no test of that")
        lines += _paired(paths[0], paths[i], i + 1, tested)
    return "\n".join(lines)


def what(report: dict[str, object]) -> str:
    """Return on which images, at which epsilon and how a report was measured, for its line."""
    dataset, epsilon = report.get("dataset", "unknown"), 255 * report.get("epsilon", float("nan"))
    text = f"{report['n']:,} {report.get('image_set', 'test')} images of {dataset}"
    text += f", eps {epsilon:g}/255"
    if report.get("cascade"):
        text += f", cascade of {' '.join(row['attack'] for row in report['attacks'])}"
    if source := report.get("transfer_from"):
        text += f", transfer from {source['checkpoint']} {source['sha256'][:8]}"
    return text


def _paired(first: Path, second: Path, number: int, names: list[str]) -> list[str]:
    if not (verdict_file(first).exists() and verdict_file(second).exists()):
        return [f"[1] and [{number}]: no verdicts beside both reports, no test"]
    one, two = read_verdicts(first), read_verdicts(second)
    if not np.array_equal(one["labels"], two["labels"]):
        return [f"[1] and [{number}]: not the same images, no test"]
    lines = []
    for name in names:
        if name in one and name in two:
            a, b, p = mcnemar(one[name], two[name])
            lines.append(
                f"[1] against [{number}], {name}: {a} images right only in the first, {b} only in "
                f"the second, McNemar p = {p:.2g}"
            )
    return lines
