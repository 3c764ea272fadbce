"""Rebuild the tables of both READMEs, runs.csv and collapse.png from the logs and reports here.

    python3 results/make_tables.py

A table stands between the comments ``<!-- table NAME -->`` and ``<!-- end -->``.
"""

import json
import re
import statistics
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import parts
import runs

import plots
from report import wilson

PAGES = (runs.HERE.parent / "README.md", runs.HERE / "README.md")
MAIN = ("fgsm_at", "fgsm_rs", "n_fgsm", "pgd_at", "paper", "kl1to4", "kl1to4t1", "kl")
OLDER = ("fgsm_rs", "n_fgsm", "pgd_at", "both")  # where today's defaults are not measured
SETTINGS = {  # of the README's first table: what it is called, its methods, names of its folders
    "16/255, slow warm-up": (MAIN, ("steep15-{}-seed*",)),
    "8/255, long": (MAIN, ("long-{}-seed*",)),
    "8/255, short": (MAIN, ("short-{}-seed*", "cifar10-{}")),
    "8/255, full width": (OLDER, ("gpu-10-PreActResNet18-30-eps8-{}-seed*",)),
}
FULL = "gpu-10-PreActResNet18-30-eps"
SHIPPED = {  # folders of trained networks: what they are
    "short-kl1to4-seed0": "width 16, CIFAR-10, 15 epochs",
    "short-kl1to4-seed1": "the same, seed 1",
    "short100-kl1to4-seed0": "width 16, CIFAR-100, 15 epochs",
    "short100-kl1to4-seed1": "the same, seed 1",
    f"{FULL}8-n_fgsm-seed0": "full width, CIFAR-10, 30 epochs, N-FGSM",
    f"{FULL}8-both-seed0": "the same, Mixup and KL 1",
    f"{FULL}16-both-seed0": "the same, trained and attacked at 16/255",
}


def counted(row: dict) -> str:
    """Return an accuracy with its interval, in percent."""
    low, high = wilson(row["correct"], row["n"])
    return f"{100 * row['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def short() -> list[str]:
    """Return the table of the runs on all images."""
    lines = [
        "| data | method | clean | PGD-20 | PGD-50 | CW-50 | worst case | collapses | minutes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for data in ("cifar10", "cifar100"):
        for method, title in runs.TITLES.items():
            folder = runs.HERE / f"{data}-{method}"
            if not folder.exists():
                continue
            found, rows = json.loads((folder / "report.json").read_text()), runs.log_of(folder)
            cells = [counted(row) for row in found["attacks"]]
            cells.append(counted(found["worst_case"] | {"n": found["n"]}))
            collapses = sum(int(row["collapse"]) for row in rows)
            minutes = [
                sum(float(row[f"{part}_seconds"]) for row in rows) / 60
                for part in ("train", "eval")
            ]
            cells += [str(collapses), f"{minutes[0]:.1f} + {minutes[1]:.1f}"]
            lines.append(
                f"| {data.upper().replace('CIFAR', 'CIFAR-')} | {title} | {' | '.join(cells)} |"
            )
    return lines


def autoattack() -> list[str]:
    """Return the table of AutoAttack beside the other attacks."""
    found = json.loads((runs.HERE / "cifar10-mix_kl" / "autoattack" / "report.json").read_text())
    lines = [
        "| attack | accuracy | images that went forward | minutes |",
        "| --- | --- | --- | --- |",
    ]
    for row in found["attacks"]:
        cells = [row["attack"], counted(row), f"{row['passes']:,}", f"{row['seconds'] / 60:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(f"| worst case | {counted(found['worst_case'] | {'n': found['n']})} | | |")
    return lines


def control() -> list[str]:
    """Return the table of the two controls."""
    lines = [
        "| epoch | FGSM-RS: clean | FGSM | PGD-10 | announced "
        "| N-FGSM: clean | FGSM | PGD-10 | announced |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    both = [runs.log_of(runs.HERE / f"control-peak-{method}") for method in ("fgsm_rs", "n_fgsm")]
    for rows in zip(*both, strict=True):
        cells = []
        for row in rows:
            found = [row[f"{name}_acc"] for name in ("clean", "fgsm", "pgd10")]
            cells += [f"{100 * float(value):.1f}" if value else "" for value in found]
            cells.append("collapse" if row["collapse"] == "1" else "")
        lines.append(f"| {rows[0]['epoch']} | {' | '.join(cells)} |")
    return lines


def rollback() -> list[str]:
    """Return the table of FGSM-RS with ``--on-collapse rollback``, in the order of training."""
    lines = [
        "| epoch | start | alpha | clean | FGSM | PGD-10 | averaged: PGD-10 | what followed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in runs.log_of(runs.HERE / "control-rollback-fgsm_rs"):
        names = ("clean", "fgsm", "pgd10", "ema_pgd10")
        shares = [f"{100 * float(row[f'{name}_acc']):.1f}" for name in names]
        back = row["rollback_to"] and f"collapse: back to the end of epoch {row['rollback_to']}"
        alpha = f"{float(row['alpha']):g}"
        cells = [row["epoch"], row["delta_init"], alpha, *shares, back]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def outcome() -> list[str]:
    """Return the table of how FGSM-RS at eps 16 ends, with rollbacks and without."""
    lines = ["| --on-collapse | weights | clean | PGD-20 | CW-20 |", "| --- " * 5 + "|"]
    for value in ("warn", "rollback"):
        for weights, title in {"raw": "raw", "ema": "averaged"}.items():
            path = runs.HERE / f"control-{value}-fgsm_rs" / f"report-{weights}.json"
            cells = [counted(row) for row in json.loads(path.read_text())["attacks"]]
            lines.append(f"| {value} | {title} | {' | '.join(cells)} |")
    return lines


def study(prefix: str, titles: dict[str, str] = runs.TITLES) -> list[str]:
    """Return the table of the cells of ``study.py`` whose names begin with ``prefix``.

    Accuracies in percent, mean and standard deviation over the seeds that did not collapse.
    """
    rows = []
    for method, title in titles.items():
        for file, epoch in runs.EPOCHS.items():
            found = runs.measured([f"{prefix}-{method}-seed*"], file)
            if found:
                rows.append((title, epoch, found))
    names = list(dict.fromkeys(name for *_, found in rows for run in found for name in run.shares))
    lines = [
        f"| method | epoch | seeds | {' | '.join(names)} | collapses | minutes |",
        "| --- " * (len(names) + 5) + "|",
    ]
    for title, epoch, found in rows:
        lines.append(line([title, epoch, str(len(found))], found, names))
    return lines


def line(cells: list[str], found: list[runs.Run], names: Iterable[str], of: str = "") -> str:
    """Return a row of a table: means over the runs that lived, how many did not, and minutes."""
    alive = [run for run in found if not run.collapsed]
    cells = cells + [mean(alive, name) for name in names]
    cells.append(f"{len(found) - len(alive)}{of}")
    cells.append(f"{statistics.mean(run.minutes for run in alive):.1f}" if alive else "")
    return f"| {' | '.join(cells)} |"


def mean(found: list[runs.Run], attack: str) -> str:
    """Return mean, from three runs on its deviation, and where not all were measured, how many."""
    values = [run.shares[attack] for run in found if attack in run.shares]
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 2 else ""
    missing = f" ({len(values)} of {len(found)})" if len(values) < len(found) else ""
    return f"{statistics.mean(values):.1f}{deviation}{missing}"


def headline() -> list[str]:
    """Return the README's first table; accuracies are those of the seeds that did not collapse."""
    rows = []
    for setting, (methods, patterns) in SETTINGS.items():
        for method in methods:
            for file, epoch in runs.EPOCHS.items():
                found = runs.measured([pattern.format(method) for pattern in patterns], file)
                if found:
                    rows.append(([setting, runs.TITLES[method], epoch], found))
    names = runs.titles(name for _, found in rows for run in found for name in run.shares)
    names.pop("held-out", None)  # it chose the defaults
    lines = [
        f"| setting | method | epoch | {' | '.join(names.values())} | collapsed | minutes |",
        "| --- " * (len(names) + 5) + "|",
    ]
    above: list[str] = []
    for cells, found in rows:
        kept = [cells[:n] == above[:n] for n in (1, 2)]  # what stands above is not said again
        shown = ["" if same else cell for cell, same in zip(cells, [*kept, False], strict=True)]
        lines.append(line(shown, found, names, of=f" of {len(found)}"))
        above = cells
    return lines


def shipped() -> list[str]:
    """Return the table of the trained networks that lie here, and how good they are."""
    names = {name: runs.ATTACKS[name] for name in ("clean", "pgd-50", "cw-50")}
    lines = [f"| file | network | {' | '.join(names.values())} |", "| --- " * 5 + "|"]
    for folder, what in SHIPPED.items():
        [run] = runs.measured([folder], "final")
        shares = " | ".join(f"{run.shares[name]:.1f}" for name in names)
        lines.append(f"| `results/{folder}/final_model.pth` | {what} | {shares} |")
    return lines


def preset() -> list[str]:
    """Return the table of ``--preset fast`` beside the runs of 15 epochs."""
    late = "Mixup and KL 1, attack mode train, peak at 0.4"
    slow = study("short", runs.TITLES | {"late": late})
    return [*slow, *study("fast", {"preset": "`--preset fast`"})[2:]]


def speed(hardware: str, networks: tuple[str, ...], digits: int) -> list[str]:
    """Return the table of the last benchmark of a step, of each network, on one hardware."""
    known = json.loads((runs.HERE / "benchmarks.json").read_text())
    lines = [
        "| one step | FGSM-RS loop | prior-guided loop | MIX-KL, fp32 "
        "| MIX-KL, bf16 (default there) |",
        "| --- " * 5 + "|",
    ]
    for network in networks:
        *_, rows = (
            found["rows"] for found in known
            if found["title"].startswith(f"one training step, {network},")
            and hardware in found["machine"]["hardware"]
        )  # fmt: skip
        cells = {
            f"{network}: seconds": f"{{seconds:.{digits}f}}",
            "speed-up over FGSM-RS, over prior-guided": "{x FGSM-RS:.2f}, {x prior-guided:.2f}",
            "GFLOP/s, over those of a matrix product": "{GFLOP/s:,.0f}, {of matrix peak:.2f}",
        }
        for title, text in cells.items():
            lines.append(f"| {title} | {' | '.join(text.format(**row) for row in rows)} |")
    return lines


PREACT, WIDE = "PreActResNet18, batch 128", "WideResNet34-10, batch {}"
TABLES = {"headline": headline, "short": short, "autoattack": autoattack, "control": control}
TABLES |= {"parts": partial(parts.table, parts.PARTS, "part", "collapsed with it | without")}
TABLES |= {"rivals": partial(parts.table, parts.RIVALS, "MIX-KL less", "collapsed | the other")}
TABLES |= {"rest": parts.rest, "choice": parts.choice, "shipped": shipped}

TABLES |= {"rollback": rollback, "outcome": outcome, "preset": preset}
TABLES["speed"] = partial(speed, "EPYC", (PREACT, WIDE.format(8), WIDE.format(16)), 2)
TABLES["speed-gpu"] = partial(speed, "H100", (PREACT, WIDE.format(128)), 4)
for name in ("long", "long4", "long12", "long16", "steep", "steep15", "short100"):
    TABLES[name] = partial(study, name)
TABLES["precision"] = partial(study, "precision", {"bf16": "bf16", "fp32": "fp32"})


def rebuilt(text: str) -> str:
    """Return a page with its tables made anew."""
    for name, make in TABLES.items():
        if f"<!-- table {name} -->" not in text:
            continue
        table = "\n".join(make())
        pattern = rf"(<!-- table {name} -->\n).*?(<!-- end -->)"
        text = re.sub(
            pattern, lambda m, table=table: f"{m[1]}\n{table}\n\n{m[2]}", text, flags=re.S
        )
    return text


LINES = {"fgsm_rs": "tab:red", "n_fgsm": "tab:gray", "both": "tab:blue", "kl1to4": "k"}


def collapse(path: Path) -> None:
    """Draw held-out PGD-10 accuracy of the raw weights at eps 16, one line a seed."""
    figure = plots.figure(9, 3.2)
    settings = {"steep15": "slow warm-up", "long16": "long"}
    both = figure.subplots(1, 2, sharey=True)
    for axes, (prefix, title) in zip(both, settings.items(), strict=True):
        for method, color in LINES.items():
            label = runs.TITLES[method]
            for folder in sorted(runs.HERE.glob(f"{prefix}-{method}-seed*")):
                rows = [row for row in runs.log_of(folder) if row["pgd10_acc"]]
                epochs = [int(row["epoch"]) for row in rows]
                shares = [100 * float(row["pgd10_acc"]) for row in rows]
                axes.plot(epochs, shares, c=color, lw=1, label=label)
                label = None
        axes.set(title=title, xlabel="epoch", ylim=(0, None))
        axes.grid(alpha=0.3)
    both[0].set_ylabel("PGD-10 accuracy [%]")
    both[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    collapse(runs.HERE / "collapse.png")
    (runs.HERE / "runs.csv").write_text(runs.listed())
    for page in PAGES:
        page.write_text(rebuilt(page.read_text()))
