"""A whole measurement of one checkpoint: network, attacks, warnings, report, pictures, export."""

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

import auto_attack
import checkpoint
import checks
import evaluation
import export
import files
import parallel
import pictures
import report

UNKNOWN = "unknown images"  # what a bare state dict was trained on
PROBED = 256  # images on which the network is probed for signs of a wrong defence


def refuse(args: argparse.Namespace) -> None:
    """Refuse what would otherwise be found out after hours of attacks.

    Raises:
        ValueError: A library is not installed, there is no other network for ``transfer`` or no use
            for it, or the claim of ``--export`` would not be of each attack by itself, or of
            another size, or of other images.
        OSError: The folder of ``--export`` exists, or cannot be made.
    """
    if (args.pictures or len(args.eps or ()) > 1) and not find_spec("matplotlib"):
        raise ValueError("--eps, --pictures: need matplotlib; pip install -r requirements.txt")
    families = {evaluation.parse_attack(name).family for name in args.attacks}
    if families & auto_attack.VERSIONS.keys():
        auto_attack.library()
    if "transfer" in families and args.transfer_from is None:
        raise ValueError("--attacks transfer: name the other checkpoint with --transfer-from")
    if args.transfer_from and "transfer" not in families:
        raise ValueError("--transfer-from: only the attack transfer uses it; add it to --attacks")
    if args.export:
        export.refuse(args.export)
        files.probe(args.export.parent, "--export")
        if args.held_out:
            raise ValueError("--export: claims accuracy on test images; leave --held-out out")
        if args.cascade:
            raise ValueError("--export: claims the accuracy of each attack; leave --cascade out")
        if args.eps and all(abs(size - args.epsilon) > 0.005 for size in args.eps):
            raise ValueError("--export: claims the accuracy at --epsilon; add that size to --eps")


def open_network(
    path: Path,
    build: Callable[..., nn.Module],
    args: argparse.Namespace,
    *,
    classes: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    weights: str | None = None,
) -> tuple[nn.Module, dict[str, object], dict[str, object]]:
    """Open a checkpoint.

    Args:
        path: The file.
        build: Makes a network from its name and what ``checkpoint.architecture`` returns.
        args: Flags of a bare state dict.
        classes: Number of classes to measure on.
        mean: Per channel of the dataset, and ``std``: likewise.
        weights: ``raw`` or ``ema``; None for those that the file selects.

    Returns:
        The network in eval mode, what it was built with, and what the report says of it.
    """
    saved = checkpoint.load(path)
    if "model" in saved and args.normalize and not args.transfer_from:
        raise ValueError(f"{path}: normalises by itself; leave --normalize {args.normalize} out")
    statistics = dict(mean=mean, std=std)
    name, network = checkpoint.architecture(saved, path, args, classes, statistics)
    model = checkpoint.build(build, name, network, saved, weights, path)
    weights = checkpoint.load_weights(model, saved, weights, path)
    facts = {"checkpoint": str(path), "sha256": checkpoint.sha256(path), "weights": weights}
    facts |= {"model": name, "trained_on": saved.get("dataset", UNKNOWN)}
    facts["split"] = checkpoint.split(saved)
    prefix = "ema_" if weights == "ema" else ""
    facts["recorded_clean"] = (saved.get("metrics") or {}).get(f"{prefix}clean_acc")
    return model.eval(), network, facts


def refuse_idle(args: argparse.Namespace, *networks: dict[str, object]) -> None:
    """Raise a ValueError where a flag is for bare state dicts, and no file is one."""
    given = [name for name in ("model", "width", "normalize") if getattr(args, name)]
    if given and all(facts["trained_on"] != UNKNOWN for facts in networks):
        raise ValueError(f"--{given[0]}: both files name their network; leave it out")


def measure(
    model: nn.Module,
    facts: dict[str, object],
    x: Tensor,
    y: Tensor,
    sizes: list[float],
    args: argparse.Namespace,
    source: nn.Module | None,
) -> tuple[Path, dict[str, object]] | None:
    """Attack, warn, print and write a report for each epsilon; with several, draw the sweep.

    Args:
        model: Network in eval mode on its device.
        facts: What the report says of network and images.
        x: (N, 3, H, W) images in [0, 1], and ``y``: their (N,) labels.
        sizes: Epsilons, pixel fractions.
        args: Flags.
        source: Network on which the attack ``transfer`` makes its images.

    Returns:
        The report at the size nearest to ``--epsilon`` and its file; None in a process that writes
        nothing.
    """
    files.probe(args.out_dir)
    stem, reports, journals = stem_of(args.model_path), [], []
    for epsilon in sizes:
        settings = evaluation.Settings(
            epsilon=epsilon, batch_size=args.batch_size, seed=args.seed, cascade=args.cascade,
            progress=True, journal=args.out_dir, source=source,
        )  # fmt: skip
        rows, verdicts, kept = evaluation.evaluate(model, x, y, args.attacks, settings)
        journals += kept
        here = {"epsilon": epsilon, "cascade": args.cascade, "machine": report.machine(x.device)}
        with parallel.rank_0_first():
            if not parallel.rank():
                measured = report.build(facts | here, rows, verdicts, y)
                measured["warnings"] = warnings(model, x, y, measured, args.cascade)
                if reports:
                    measured["warnings"] += rises(reports[-1][1], measured)
                suffix = f"-eps{255 * epsilon:g}" if len(sizes) > 1 else ""
                path = report.write(measured, verdicts, y, args.out_dir, f"{stem}{suffix}-report")
                parallel.say(f"eps {255 * epsilon:g}/255\n{report.table(measured)}")
                parallel.say(f"report: {path}")
                reports.append((path, measured))
    for journal in journals:  # each process has its own; an interrupted sweep needs those of all
        journal.unlink(missing_ok=True)
    if len(reports) > 1:
        path = report.free(args.out_dir / f"{stem}-sweep.png")
        parallel.say(sweep([measured for _, measured in reports], path))
    return min(reports, key=lambda r: abs(255 * r[1]["epsilon"] - args.epsilon), default=None)


def stem_of(path: Path) -> str:
    """Return how files about a checkpoint are called: its folder's name and its own."""
    return f"{path.resolve().parent.name}-{path.stem}"


def warnings(
    model: nn.Module, x: Tensor, y: Tensor, measured: dict[str, object], cascade: bool
) -> list[str]:
    """Return all warnings about one report; attacks of a cascade cannot be compared."""
    rows = measured["attacks"]
    epsilon = max(measured["epsilon"], 1 / 255)
    found = evaluation.within_memory(
        evaluation.Settings(epsilon=epsilon, batch_size=PROBED, seed=0),
        lambda size: checks.of_the_network(
            model, x[:size], y[:size], epsilon=epsilon, recorded=measured["recorded_clean"]
        ),
    )
    found += checks.of_the_steps(rows) + checks.of_the_parts(rows)
    return found if cascade else found + checks.of_the_rows(rows)


def rises(before: dict[str, object], measured: dict[str, object]) -> list[str]:
    """Return a warning for each attack whose accuracy is above that at the size before."""
    found = []
    for rows in zip(before["attacks"], measured["attacks"], strict=True):
        shares = {row["epsilon"]: row["accuracy"] for row in rows}
        found += [f"{rows[0]['attack']}: {text}" for text in checks.of_the_sweep(shares)]
    return found


def sweep(reports: list[dict[str, object]], path: Path) -> str:
    """Draw accuracy over epsilon, and return the table."""
    names = [row["attack"] for row in reports[0]["attacks"]]
    rows = {
        name: {found["epsilon"]: found["attacks"][i] for found in reports}
        for i, name in enumerate(names)
    }
    pictures.sweep(rows, path)
    head = [f"eps {255 * found['epsilon']:g}" for found in reports]
    lines = [f"{'attack':<16}" + "".join(f"{text:>10}" for text in head)]
    for name, by_epsilon in rows.items():
        shares = "".join(f"{row['accuracy']:>10.2%}" for row in by_epsilon.values())
        lines.append(f"{name:<16}{shares}")
    return "\n".join([*lines, f"sweep: {path}"])


def extras(
    model: nn.Module,
    network: dict[str, object],
    measured: tuple[Path, dict[str, object]],
    x: Tensor,
    y: Tensor,
    classes: tuple[str, ...],
    args: argparse.Namespace,
) -> None:
    """Export the network and draw the pictures of a report, where the flags ask for it."""
    written, found = measured
    if args.export:
        if "autoattack" not in {row["attack"] for row in found["attacks"]}:
            note = "no autoattack_acc in the claim; add autoattack to --attacks"
            parallel.say(f"note: --export: {note}")
        path = export.write(args.export, model, found["model"], network, found)
        parallel.say(f"export: {path}")
    if args.pictures:
        epsilon = found["epsilon"]
        drawn = {
            "images": lambda path: pictures.images(model, x, y, classes, epsilon, path),
            "surface": lambda path: pictures.surface(model, x[:PROBED], y[:PROBED], epsilon, path),
            "method": lambda path: pictures.method(model, x, y, classes, epsilon, path),
        }
        for name, draw in drawn.items():
            path = written.with_name(name.join(written.stem.rsplit("report", 1)) + ".png")
            with torch.random.fork_rng(devices=[]):
                draw(path)
            parallel.say(f"{name}: {path}")
