"""What each part of the method changes, and the whole of it: pairs of cells, seed by seed."""

import itertools
import statistics

import runs
from cells import CHOICES

from report import mcnemar

PARTS = {  # of the method: the cells with it, and those without it
    "Mixup 0.2, beside KL 1": ("both", "kl"),
    "KL 1": ("kl", "kl0"),
    "KL 1 to 4": ("kl1to4", "kl0"),
    "KL 1 to 4 in place of KL 1": ("kl1to4", "kl"),
    "T = 2 in place of 1": ("kl1to4", "kl1to4t1"),
    "T = 2 in place of 1, with Mixup and KL 1": ("both", "t1"),
    "attack mode `both`, with Mixup and KL 1": ("both", "train"),
    "attack mode `both`, on N-FGSM": ("n_both", "n_fgsm"),
    "T = 2 and `both`, on N-FGSM": ("kl0", "n_fgsm"),
    "KL 1, T = 2 and `both`, on N-FGSM": ("kl", "n_fgsm"),
}
RIVALS = {runs.TITLES[name]: ("kl1to4", name) for name in ("n_fgsm", "fgsm_rs", "pgd_at")}
PLACES = {  # where they are compared: prefix of the cells, checkpoint
    "16/255, slow warm-up": ("steep15", "final"),
    "8/255, long, last": ("long", "final"),
    "8/255, long, best": ("long", "best"),
    "8/255, short": ("short", "final"),
    "12/255, long, last": ("long12", "final"),
    "12/255, long, best": ("long12", "best"),
    "4/255, long, last": ("long4", "final"),
    "4/255, long, best": ("long4", "best"),
}
STUDENT = {3: 4.30, 4: 3.18, 5: 2.78}  # 97.5 % quantile of t, by the number of seeds


def table(compared: dict[str, tuple[str, str]], head: str, sides: str) -> list[str]:
    """Return the table of the first method of each pair less the second, seed by seed.

    Mean and 95 % interval, Student's t over the seeds that neither network lost; of fewer than
    three, their values.

    Args:
        compared: Title of the rows: the two methods.
        head: What the titles are, and ``sides``: titles of how many seeds either method lost.
    """
    rows = []
    for title, methods in compared.items():
        for setting, (prefix, file) in PLACES.items():
            pairs = []
            for seed in range(5):
                both = [runs.measured([f"{prefix}-{m}-seed{seed}"], file) for m in methods]
                if all(both):
                    pairs.append([run for [run] in both])
            if pairs:
                rows.append((title, setting, pairs))
                title = ""  # what stands above is not said again
    names = runs.titles(
        name for *_, pairs in rows for one, other in pairs
        for name in one.shares.keys() & other.shares.keys()
    )  # fmt: skip
    lines = [
        f"| {head} | setting | {' | '.join(names.values())} | seeds | {sides} |",
        "| --- " * (len(names) + 5) + "|",
    ]
    for title, setting, pairs in rows:
        alive = [pair for pair in pairs if not any(run.collapsed for run in pair)]
        cells = [title, setting]
        for name in names:
            known = [pair for pair in alive if all(name in run.shares for run in pair)]
            cells.append(interval([a.shares[name] - b.shares[name] for a, b in known]))
        cells.append(str(len(alive)))
        for side in zip(*pairs, strict=True):
            cells.append(f"{sum(run.collapsed for run in side)} of {len(side)}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def rest() -> list[str]:
    """Return the table of CW-50 on the test images that chose nothing, seed by seed."""
    lines = [
        "| MIX-KL less | seed | epoch | CW-50, rest | only MIX-KL | only the other | McNemar's p |",
        "| --- " * 7 + "|",
    ]
    for title, methods in RIVALS.items():
        for seed, file in itertools.product(range(5), runs.EPOCHS):
            pair = [runs.rest(runs.HERE / f"long-{m}-seed{seed}", file) for m in methods]
            if any(standing is None for standing in pair):
                continue
            one, other, p = mcnemar(*pair)
            points = signed(100 * (one - other) / len(pair[0]))
            cells = [title, str(seed), runs.EPOCHS[file], points, str(one), str(other), f"{p:.2g}"]
            lines.append(f"| {' | '.join(cells)} |")
            title = ""
    return lines


def choice() -> list[str]:
    """Return the table of CW-50 on training images that no run saw: what the defaults rest on."""
    lines = [
        "| method | clean: last | best | CW-50: last | best | mean | MIX-KL less it | seeds |",
        "| --- " * 8 + "|",
    ]
    found = {}
    for method in CHOICES:
        folders = [runs.HERE / f"long-{method}-seed{seed}" for seed in range(3)]
        reports = {
            file: [runs.shares_of(folder / f"{file}_model-held-out.json") for folder in folders]
            for file in runs.EPOCHS
        }
        row = [runs.TITLES[method]]
        for attack in ("clean", "cw-50"):
            for shares in reports.values():
                row.append(f"{statistics.mean(known[attack] for known in shares):.1f}")
        both = zip(*reports.values(), strict=True)
        found[method] = [statistics.mean(known["cw-50"] for known in pair) for pair in both]
        row.append(f"{statistics.mean(found[method]):.2f}")
        less = [a - b for a, b in zip(found[CHOICES[0]], found[method], strict=True)]
        row += [interval(less, 2) if any(less) else "", str(len(less))]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def interval(values: list[float], digits: int = 1) -> str:
    """Return the mean with its 95 % interval, or the values where they are too few."""
    if len(values) not in STUDENT:
        return ", ".join(signed(value, digits) for value in values)
    mean = statistics.mean(values)
    half = STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    low, high = signed(mean - half, digits), signed(mean + half, digits)
    return f"{signed(mean, digits)} [{low}, {high}]"


def signed(value: float, digits: int = 1) -> str:
    """Return a number with its sign; there is no -0.0."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"
