"""Rebuild the tables of results in both READMEs, and collapse.png, from the logs and reports here.

    python3 results/make_tables.py

A table stands between the comments ``<!-- table NAME -->`` and ``<!-- end -->``.
"""

import csv
import json
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import plots
from report import wilson

HERE = Path(__file__).resolve().parent
PAGES = (HERE.parent / "README.md", HERE / "README.md")
METHODS = {
    "mix_kl": "MIX-KL", "fgsm_rs": "FGSM-RS", "n_fgsm": "N-FGSM", "mixup": "Mixup alone",
    "kl": "temperature-scaled KL alone", "t1": "MIX-KL, T 1", "pgd_at": "PGD-10 AT",
    "both": "MIX-KL",
    "train": "MIX-KL, attack mode train, KL weight 1",
    "train8": "MIX-KL, attack mode train, KL weight 8",
    "eval0": "Mixup, attack mode eval, no KL",
    "eval1": "MIX-KL, attack mode eval, KL weight 1 after a warm-up",
    "rs_both": "FGSM-RS, attack mode both", "n_both": "N-FGSM, attack mode both",
    "fgsm_rs16": "FGSM-RS, alpha 16",
}  # fmt: skip
SETTINGS = {  # of the README's first table: what it is called, and the names of its folders
    "16/255, slow warm-up": ("steep15-{}-seed*",),
    "16/255, long": ("long16-{}-seed*",),
    "8/255, long": ("long-{}-seed*",),
    "8/255, all images": ("short-{}-seed*", "cifar10-{}"),
}
AA = "autoattack"
HEADLINE = ("fgsm_rs", "n_fgsm", "both", "eval0", "pgd_at")


def log_of(folder: Path) -> list[dict[str, str]]:
    """Return the rows of a run's log."""
    with (folder / "log.csv").open() as file:
        return list(csv.DictReader(file))


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
        for method, title in METHODS.items():
            folder = HERE / f"{data}-{method}"
            if not folder.exists():
                continue
            found, rows = json.loads((folder / "report.json").read_text()), log_of(folder)
            if method == "mix_kl":
                args = json.loads((folder / "args.json").read_text())
                mode = args.get("attack_mode", "train")
                title += f" (attack mode {mode}, KL weight {args['kl_weight']:g}, "
                title += f"start `{args['delta_init']}`)"
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
    found = json.loads((HERE / "cifar10-mix_kl" / "autoattack" / "report.json").read_text())
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
    both = [log_of(HERE / f"control-peak-{method}") for method in ("fgsm_rs", "n_fgsm")]
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
    for row in log_of(HERE / "control-rollback-fgsm_rs"):
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
            path = HERE / f"control-{value}-fgsm_rs" / f"report-{weights}.json"
            cells = [counted(row) for row in json.loads(path.read_text())["attacks"]]
            lines.append(f"| {value} | {title} | {' | '.join(cells)} |")
    return lines


def study(prefix: str, titles: dict[str, str] = METHODS) -> list[str]:
    """Return the table of the cells of ``study.py`` whose names begin with ``prefix``.

    Accuracies in percent, mean and standard deviation over the seeds, last and best epoch.
    """
    rows = []
    for method, title in titles.items():
        for file, epoch in EPOCHS.items():
            found = measured([f"{prefix}-{method}-seed*"], file)
            if found:
                rows.append((title, epoch, found))
    names = list(rows[0][2][0].shares)
    lines = [
        f"| method | epoch | seeds | {' | '.join(names)} | collapses | minutes |",
        "| --- " * (len(names) + 5) + "|",
    ]
    for title, epoch, found in rows:
        cells = [title, epoch, str(len(found))]
        cells += [spread([run.shares[name] for run in found]) for name in names]
        cells.append(str(sum(run.collapsed for run in found)))
        minutes = statistics.mean(run.minutes for run in found)
        lines.append(f"| {' | '.join([*cells, f'{minutes:.1f}'])} |")
    return lines


EPOCHS = {"final": "last", "best": "best"}


@dataclass(frozen=True)
class Run:
    """A measured checkpoint: accuracy by attack in percent, and what its log says."""

    shares: dict[str, float]
    collapsed: bool
    minutes: float


def measured(patterns: Sequence[str], file: str) -> list[Run]:
    """Return the measured checkpoints ``file`` of the folders that match."""
    found = []
    for folder in sorted(path for pattern in patterns for path in HERE.glob(pattern)):
        path = folder / f"{file}_model-report.json"
        if file == "final" and (folder / "report.json").exists():  # of before the study
            path = folder / "report.json"
        if path.exists():
            log, rows = log_of(folder), json.loads(path.read_text())["attacks"]
            shares = {row["attack"]: 100 * row["accuracy"] for row in rows}
            more = folder / f"{file}_model-autoattack.json"
            if more.exists():
                rows = json.loads(more.read_text())["attacks"]
                shares |= {r["attack"]: 100 * r["accuracy"] for r in rows if r["attack"] == AA}
            collapsed = any(row["collapse"] == "1" for row in log)
            minutes = sum(float(row["train_seconds"]) for row in log) / 60
            found.append(Run(shares, collapsed, minutes))
    return found


def spread(values: list[float]) -> str:
    """Return mean and standard deviation."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def headline() -> list[str]:
    """Return the README's first table; accuracies are those of the seeds that did not collapse."""
    lines = [
        "| setting | method | epoch | clean | PGD-50 | CW-50 | AutoAttack | collapsed |",
        "| --- " * 8 + "|",
    ]
    for setting, patterns in SETTINGS.items():
        for method in HEADLINE:
            for file, epoch in EPOCHS.items():
                found = measured([pattern.format(method) for pattern in patterns], file)
                if not found:
                    continue
                alive = [run.shares for run in found if not run.collapsed]
                cells = [setting, METHODS[method], epoch]
                for name in ("clean", "pgd-50", "cw-50", AA):
                    values = [shares[name] for shares in alive if name in shares]
                    cells.append(spread(values) if values else "")
                cells.append(f"{len(found) - len(alive)} of {len(found)}")
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def preset() -> list[str]:
    """Return the table of ``--preset fast`` beside the runs of 15 epochs."""
    late = "MIX-KL, attack mode train, KL weight 1, peak at 0.4"
    return [
        *study("short", METHODS | {"late": late}), *study("fast", {"preset": "`--preset fast`"})[2:]
    ]  # fmt: skip


def speed() -> list[str]:
    """Return the table of the last benchmark of a step, of each network."""
    known = json.loads((HERE / "benchmarks.json").read_text())
    lines = [
        "| one step | FGSM-RS loop | prior-guided loop | MIX-KL, fp32 "
        "| MIX-KL, bf16 (default there) |",
        "| --- " * 5 + "|",
    ]
    names = ("PreActResNet18, batch 128", "WideResNet34-10, batch 8", "WideResNet34-10, batch 16")
    for network in names:
        *_, rows = (
            found["rows"] for found in known
            if found["title"].startswith(f"one training step, {network},")
        )  # fmt: skip
        cells = {
            f"{network}: seconds": "{seconds:.2f}",
            "speed-up over FGSM-RS, over prior-guided": "{x FGSM-RS:.2f}, {x prior-guided:.2f}",
            "GFLOP/s, share of the measured matrix peak": "{GFLOP/s:.0f}, {of matrix peak:.2f}",
        }
        for title, text in cells.items():
            lines.append(f"| {title} | {' | '.join(text.format(**row) for row in rows)} |")
    return lines


def rebuilt(text: str) -> str:
    """Return a page with its tables made anew."""
    tables = {"headline": headline, "short": short, "autoattack": autoattack, "control": control}
    tables |= {"speed": speed, "rollback": rollback, "outcome": outcome, "preset": preset}
    tables |= {name: partial(study, name) for name in ("long", "long16", "steep", "steep15")}
    tables["precision"] = partial(study, "precision", {"bf16": "bf16", "fp32": "fp32"})
    for name, make in tables.items():
        if f"<!-- table {name} -->" not in text:
            continue
        table = "\n".join(make())
        pattern = rf"(<!-- table {name} -->\n).*?(<!-- end -->)"
        text = re.sub(
            pattern, lambda m, table=table: f"{m[1]}\n{table}\n\n{m[2]}", text, flags=re.S
        )
    return text


LINES = {
    "fgsm_rs": "tab:red",
    "n_fgsm": "tab:gray",
    "both": "k",
    "train8": "tab:green",
    "eval0": "tab:blue",
}


def collapse(path: Path) -> None:
    """Draw held-out PGD-10 accuracy over the long runs at eps 16, one line a seed."""
    figure = plots.figure(9, 3.2)
    columns = {"pgd10_acc": "raw weights", "ema_pgd10_acc": "averaged weights"}
    both = figure.subplots(1, 2, sharey=True)
    for axes, (column, title) in zip(both, columns.items(), strict=True):
        for method, color in LINES.items():
            label = METHODS[method]
            for folder in sorted(HERE.glob(f"long16-{method}-seed*")):
                rows = [row for row in log_of(folder) if row[column]]
                epochs = [int(row["epoch"]) for row in rows]
                shares = [100 * float(row[column]) for row in rows]
                axes.plot(epochs, shares, c=color, lw=1, label=label)
                label = None
        axes.set(title=title, xlabel="epoch", ylim=(0, None))
        axes.grid(alpha=0.3)
    both[0].set_ylabel("PGD-10 accuracy [%]")
    both[1].legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    collapse(HERE / "collapse.png")
    for page in PAGES:
        page.write_text(rebuilt(page.read_text()))
