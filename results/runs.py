"""What the folders here hold: logs, and the accuracies of measured checkpoints."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import record

HERE = Path(__file__).resolve().parent
EPOCHS = {"final": "last", "best": "best"}  # file of a checkpoint: its epoch
MEASUREMENTS = ("report", "held-out", "whole", "apgd", "autoattack")
STRONG = MEASUREMENTS[-2:]  # the second goes on from the first
ATTACKS = {  # columns of the tables, and their titles
    "clean": "clean", "pgd-50": "PGD-50", "cw-50": "CW-50", "held-out": "CW-50, held out",
    "rest": "CW-50, rest",
    "apgd": "APGD", "autoattack": "AutoAttack",
}  # fmt: skip
TITLES = {
    "mix_kl": "Mixup and KL 4, attack mode train, start `half`",
    "fgsm_at": "FGSM-AT", "fgsm_rs": "FGSM-RS", "n_fgsm": "N-FGSM", "mixup": "Mixup alone",
    "kl1to4": "MIX-KL", "kl1to4t1": "MIX-KL, T 1", "ta1": "MIX-KL, T 1 in the attack",
    "t4": "MIX-KL, T 4", "t4to1": "MIX-KL, T 4 to 1", "both": "Mixup and KL 1",
    "kl0": "KL 0", "kl": "KL 1", "kl4": "KL 4", "kl4ramp": "KL 0 to 4",
    "t1": "Mixup and KL 1, T 1", "pgd_at": "PGD-10 AT",
    "train": "Mixup and KL 1, attack mode train",
    "train8": "Mixup and KL 8, attack mode train",
    "eval0": "Mixup, attack mode eval",
    "eval1": "Mixup and KL 1 after a warm-up, attack mode eval",
    "rs_both": "FGSM-RS, attack mode both", "n_both": "N-FGSM, attack mode both",
    "fgsm_rs16": "FGSM-RS, alpha 16",
    "paper": "the published recipe, formulas mended",
}  # fmt: skip


def log_of(folder: Path) -> list[dict[str, str]]:
    """Return the rows of a run's log."""
    with (folder / "log.csv").open() as file:
        return list(csv.DictReader(file))


def best_is_last(folder: Path) -> bool:
    """Return whether a run's best file holds what its last one does: its averaged last epoch."""
    columns, scores = ("pgd10_acc", "ema_pgd10_acc"), []
    for row in log_of(folder):
        if row["pgd10_acc"]:
            known = {key: float(row[key]) for key in columns if row.get(key)}
            scores.append(-1.0 if row["collapse"] == "1" else record.score(known))
    averaged = known.get("ema_pgd10_acc", 1.0) >= known["pgd10_acc"]  # 1.0: there is no average
    return averaged and scores[-1] > max(scores[:-1], default=-1.0)


def shares_of(report: Path) -> dict[str, float]:
    """Return the accuracies of a report by attack, in percent."""
    rows = json.loads(report.read_text())["attacks"]
    return {row["attack"]: 100 * row["accuracy"] for row in rows}


def strong_shares_of(report: Path) -> dict[str, float]:
    """Return the accuracies under AutoAttack and under its first two parts, as far as measured."""
    shares = {}
    for row in json.loads(report.read_text())["attacks"]:
        if row["attack"] in STRONG:
            shares["apgd"] = 100 * row["standing_after"]["apgd-t"] / row["n"]
            shares[row["attack"]] = 100 * row["accuracy"]
    return shares


def rest(folder: Path, file: str) -> np.ndarray | None:
    """Return which test images that the report leaves out stand under CW-50; None: not measured."""
    whole, report = (
        folder / f"{file}_model-{end}" for end in ("whole-verdicts.npz", "report.json")
    )
    if not whole.exists():
        return None
    return np.load(whole)["cw-50"][json.loads(report.read_text())["n"] :]


@dataclass(frozen=True)
class Run:
    """A measured checkpoint: accuracy by attack in percent, and what its log says."""

    folder: str
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
            shares, log = shares_of(path), log_of(folder)
            left = rest(folder, file)
            held_out = folder / f"{file}_model-held-out.json"
            if held_out.exists():
                shares["held-out"] = shares_of(held_out)["cw-50"]
            if left is not None:
                shares["rest"] = 100 * float(left.mean())
            for name in STRONG:
                more = folder / f"{file}_model-{name}.json"
                if more.exists():
                    shares |= strong_shares_of(more)
            collapsed = any(row["collapse"] == "1" for row in log)
            minutes = sum(float(row["train_seconds"]) for row in log) / 60
            found.append(Run(folder.name, shares, collapsed, minutes))
    return found


def titles(known: Iterable[str]) -> dict[str, str]:
    """Return the columns of ``ATTACKS`` that can be filled."""
    known = set(known)
    return {name: title for name, title in ATTACKS.items() if name in known}


def listed() -> str:
    """Return every measured checkpoint as a line of CSV, accuracies in percent."""
    text = io.StringIO(newline="")
    found = [(run, epoch) for file, epoch in EPOCHS.items() for run in measured(["*"], file)]
    attacks = dict.fromkeys(attack for run, _ in found for attack in run.shares)
    columns = ["run", "epoch", *attacks, "collapsed", "minutes"]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for run, epoch in sorted(found, key=lambda row: (row[0].folder, row[1])):
        shares = {attack: f"{share:.2f}" for attack, share in run.shares.items()}
        facts = {"collapsed": int(run.collapsed), "minutes": f"{run.minutes:.1f}"}
        writer.writerow({"run": run.folder, "epoch": epoch} | shares | facts)
    return text.getvalue()
