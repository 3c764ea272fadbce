"""Rebuild the tables of results in both READMEs, and collapse.png, from the logs and reports here.

    python3 results/make_tables.py

A table stands between the comments ``<!-- table NAME -->`` and ``<!-- end -->``.
"""

import csv
import json
import re
import statistics
import sys
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
    "eval0": "Mixup, attack mode eval, no KL", "eval1": "MIX-KL, attack mode eval, KL weight 1",
    "fgsm_rs16": "FGSM-RS, alpha 16",
}  # fmt: skip


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
        folders = sorted(HERE.glob(f"{prefix}-{method}-seed*"))
        for file in ("final", "best"):
            found = [folder / f"{file}_model-report.json" for folder in folders]
            found = [path for path in found if path.exists()]
            reports = [json.loads(path.read_text()) for path in found]
            if reports:
                rows.append((title, file, reports, [log_of(path.parent) for path in found]))
    names = [row["attack"] for row in rows[0][2][0]["attacks"]]
    lines = [
        f"| method | epoch | seeds | {' | '.join(names)} | collapses | minutes |",
        "| --- " * (len(names) + 5) + "|",
    ]
    for title, file, reports, logs in rows:
        cells = [title, {"final": "last", "best": "best"}[file], str(len(reports))]
        for i in range(len(names)):
            values = [100 * found["attacks"][i]["accuracy"] for found in reports]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        cells.append(str(sum(any(row["collapse"] == "1" for row in log) for log in logs)))
        seconds = [sum(float(row["train_seconds"]) for row in log) for log in logs]
        lines.append(f"| {' | '.join([*cells, f'{statistics.mean(seconds) / 60:.1f}'])} |")
    return lines


def preset() -> list[str]:
    """Return the table of ``--preset fast`` beside the default recipe."""
    slow = study(
        "short", {"train": "MIX-KL, attack mode train, 15 epochs", "late": "the same, peak at 0.4"}
    )
    return [*slow, *study("fast", {"mix_kl": "`--preset fast`"})[2:]]


def rebuilt(text: str) -> str:
    """Return a page with its tables made anew."""
    tables = {"short": short, "autoattack": autoattack, "control": control}
    tables |= {"rollback": rollback, "outcome": outcome, "preset": preset}
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
