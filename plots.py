"""Pictures of a run, and an empty one. matplotlib is imported only when one is drawn."""

from pathlib import Path
from typing import BinaryIO


def figure(width: float, height: float):
    """Return an empty matplotlib figure of so many inches; it needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    empty = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(empty)
    return empty


def curves(rows: list[dict[str, float]], collapses: list[int], file: Path | BinaryIO) -> None:
    """Draw held-out accuracy, loss and learning rate over the epochs of a run.

    Args:
        rows: Rows of ``log.csv``, accuracies in [0, 1], or None where an epoch was not measured.
        collapses: Epochs that collapsed, also such as are not among the rows.
        file: PNG file to write.
    """
    drawn = figure(11, 4)
    accuracy, loss = drawn.subplots(1, 2, width_ratios=(3, 2))
    epochs = [row["epoch"] for row in rows]

    def plot(column: str, *style: str, **words: object) -> None:
        measured = [row for row in rows if row.get(column) is not None]
        if measured:
            shares = [100 * row[column] for row in measured]
            accuracy.plot([row["epoch"] for row in measured], shares, *style, **words)

    shown = {"clean": ("clean", "tab:blue"), "fgsm": ("FGSM", "tab:orange")}
    for key, (name, color) in (shown | {"pgd10": ("PGD-10", "tab:green")}).items():
        plot(f"{key}_acc", "o-", ms=3, c=color, label=name)
        plot(f"ema_{key}_acc", "--", c=color, label=f"{name}, averaged")
    for number, epoch in enumerate(collapses):
        label = "collapse" if number == 0 else None
        accuracy.axvline(epoch, c="tab:red", lw=6, alpha=0.3, label=label)
    accuracy.set(xlabel="epoch", ylabel="held-out accuracy [%]", ylim=(0, None))
    above = dict(
        loc="lower left", bbox_to_anchor=(0, 1), fontsize=7, columnspacing=1, frameon=False
    )
    if accuracy.lines:
        accuracy.legend(ncols=4, **above)

    loss.plot(epochs, [row["loss"] for row in rows], "o-", ms=3, c="k", label="loss")
    loss.plot(epochs, [row["hard_loss"] for row in rows], "--", c="k", label="hard term")
    loss.plot(epochs, [row["kl"] for row in rows], ":", c="k", label="KL term (unweighted)")
    loss.set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
    rate = loss.twinx()
    rate.plot(epochs, [row["lr"] for row in rows], c="tab:purple", lw=1, label="learning rate")
    rate.set(ylabel="learning rate", ylim=(0, None))
    lines = loss.get_lines() + rate.get_lines()
    labels = [entry.get_label() for entry in lines]
    loss.legend(lines, labels, ncols=2, **above)
    for axes in (accuracy, loss):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    drawn.savefig(file, dpi=110)
