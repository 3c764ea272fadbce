"""Pictures of a finished network: sweeps, adversarial images, the loss nearby, the method."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attacks
import files
import plots
import utils

SHOWN = 6  # images in a grid
GRID = 21  # points along each direction of the loss surface


def _show(axes, image: Tensor, title: str, label: str = "") -> None:
    axes.imshow(image.detach().cpu().clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_title(title, fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_ylabel(label, fontsize=9)


def _stretched(delta: Tensor, epsilon: float) -> Tensor:
    """Return a perturbation as an image: grey is 0, black and white are -epsilon and epsilon."""
    return 0.5 + delta / (2 * epsilon)


def _save(figure, path: Path) -> None:
    files.write(path, lambda file: figure.savefig(file, dpi=130))


def sweep(rows: dict[str, dict[float, dict[str, object]]], path: Path) -> None:
    """Draw accuracy with its 95 % interval over epsilon.

    Args:
        rows: By attack and by epsilon (a pixel fraction), the row of the report.
        path: PNG file to write.
    """
    figure = plots.figure(6.5, 4.2)
    axes = figure.subplots()
    for name, by_epsilon in rows.items():
        sizes = [255 * epsilon for epsilon in by_epsilon]
        found = list(by_epsilon.values())
        low, high = ([100 * row["interval"][end] for row in found] for end in (0, 1))
        (line,) = axes.plot(sizes, [100 * row["accuracy"] for row in found], "o-", ms=4, label=name)
        axes.fill_between(sizes, low, high, color=line.get_color(), alpha=0.2, lw=0)
    axes.set(xlabel="eps [1/255]", ylabel="accuracy [%], 95 % interval", ylim=(0, None))
    axes.set_xticks(sizes)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, path)


def images(
    model: nn.Module, x: Tensor, y: Tensor, classes: tuple[str, ...], epsilon: float, path: Path
) -> None:
    """Draw clean images, perturbations by PGD-20, and adversarial images, with predictions.

    Args:
        model: Maps images in [0, 1] to logits.
        x: (N, 3, H, W) images; the first that are classified right are shown.
        y: (N,) labels, and ``classes``: what they mean.
        epsilon: Radius of the ball, a pixel fraction.
        path: PNG file to write.
    """
    chosen = attacks.standing(model, x[:200], y[:200], 200).nonzero().squeeze(1)[:SHOWN]
    x, y = x[chosen], y[chosen]
    x_adv = attacks.pgd(model, x, y, epsilon=epsilon, alpha=2 / 255, steps=20)
    with attacks.measuring(model, x), torch.no_grad():
        before, after = (model(part).softmax(1).max(1) for part in (x, x_adv))
    figure = plots.figure(1.55 * max(len(x), 1), 5.2)
    axes = figure.subplots(3, max(len(x), 1), squeeze=False)
    for i in range(len(x)):
        first = i == 0
        clean = f"{classes[before.indices[i]]}\n{before.values[i]:.0%}"
        fooled = f"{classes[after.indices[i]]}\n{after.values[i]:.0%}"
        _show(axes[0, i], x[i], clean, "clean" * first)
        scale = f"perturbation, grey is 0,\nblack and white ±{255 * epsilon:g}/255"
        _show(axes[1, i], _stretched(x_adv[i] - x[i], epsilon), "", scale * first)
        _show(axes[2, i], x_adv[i], fooled, "PGD-20" * first)
        wrong = bool(after.indices[i] != y[i])
        axes[2, i].title.set_color("tab:red" if wrong else "black")
    _save(figure, path)


def surface(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, path: Path) -> None:
    """Draw the mean loss on the plane through the images along FGSM's and a random direction.

    Where a network has collapsed the loss rises steeply before eps and falls again behind it; in a
    robust one it rises gently and evenly.

    Args:
        model: Maps images in [0, 1] to logits.
        x: (N, 3, H, W) images, and ``y``: their (N,) labels.
        epsilon: Radius of the ball, a pixel fraction.
        path: PNG file to write.
    """
    toward = attacks.fgsm(model, x, y, epsilon=1 / 255) - x
    across = torch.empty_like(x).bernoulli_(0.5) * 2 - 1
    sizes = torch.linspace(0, 1.5 * 255 * epsilon, GRID)
    loss = torch.empty(GRID, GRID)
    with attacks.measuring(model, x), torch.no_grad():
        for i, b in enumerate(sizes.tolist()):
            for j, a in enumerate(sizes.tolist()):
                moved = (x + a * toward.sign() / 255 + b * across / 255).clamp(0, 1)
                loss[i, j] = F.cross_entropy(model(moved), y)
    figure = plots.figure(9.5, 4)
    plane, line = figure.subplots(1, 2)
    drawn = plane.contourf(sizes, sizes, loss, levels=20, cmap="viridis")
    figure.colorbar(drawn, ax=plane, label="cross-entropy, mean of the images")
    plane.set(xlabel="along the sign of the gradient (FGSM) [1/255]",
              ylabel="along random signs [1/255]")  # fmt: skip
    plane.axvline(255 * epsilon, c="w", ls="--", lw=1)
    line.plot(sizes, loss[0], "o-", ms=3, label="FGSM direction")
    line.plot(sizes, loss[:, 0], "o-", ms=3, label="random signs")
    line.axvline(255 * epsilon, c="k", ls="--", lw=1, label=f"eps {255 * epsilon:g}/255")
    line.set(xlabel="distance [1/255]", ylabel="cross-entropy", ylim=(0, None))
    line.grid(alpha=0.3)
    line.legend(fontsize=8)
    _save(figure, path)


def method(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    classes: tuple[str, ...],
    epsilon: float,
    path: Path,
    *,
    lam: float = 0.7,
    T: float = 2.0,
) -> None:
    """Draw how a training image is made with (a) Mixup, (b) temperature-scaled KL, (c) both.

    Args:
        model: Maps images in [0, 1] to logits.
        x: (N, 3, H, W) images; the first two of different classes are used, where there are such.
        y: (N,) labels, and ``classes``: what they mean.
        epsilon: Step, and half of the noise at the start, a pixel fraction.
        path: PNG file to write.
        lam: Weight of the first image in the mixture.
        T: Temperature of (b) and (c).
    """
    other = int((y != y[0]).int().argmax())
    pair, labels = x[[0, other]], y[[0, other]]
    figure = plots.figure(11, 6.6)
    axes = figure.subplots(3, 5, width_ratios=(1, 1, 1, 1, 1.9))
    cases = {"(a) Mixup": (lam, 1.0), "(b) T-scaled KL": (1.0, T), "(c) both": (lam, T)}
    for row, (name, (weight, temperature)) in zip(axes, cases.items(), strict=True):
        mixed, soft = utils.mixup(pair, labels, torch.tensor(weight, device=x.device), len(classes))
        start = attacks.start_point(mixed, "noise", epsilon)  # as by default; nothing is projected

        def raised(logits: Tensor, soft: Tensor = soft, T: float = temperature) -> Tensor:
            return F.cross_entropy(logits / T, soft, reduction="sum")

        with attacks.measuring(model, x):
            adv, logits = attacks.sign_ascent(
                model, mixed, raised, start, epsilon=math.inf, alpha=epsilon
            )
            with torch.no_grad():
                after = model(adv)
        shares = f"{weight:.0%} {classes[labels[0]]}"
        if weight < 1:
            shares += f"\n{1 - weight:.0%} {classes[labels[1]]}"
        _show(row[0], mixed[0], shares, name)
        _show(row[1], start[0], "start: noise")
        title = f"perturbation\n±{255 * 3 * epsilon:g}/255"
        _show(row[2], _stretched(adv[0] - mixed[0], 3 * epsilon), title)
        _show(row[3], adv[0], "adversarial")
        kl = utils.temperature_kl(after[:1], logits[:1], temperature)
        _bars(row[4], logits[0] / temperature, after[0] / temperature, classes,
              f"T = {temperature:g}: T² KL = {kl:.3f}")  # fmt: skip
    _save(figure, path)


def _bars(axes, start: Tensor, after: Tensor, classes: tuple[str, ...], title: str) -> None:
    """Draw two distributions over the classes that matter most, side by side."""
    first, second = start.softmax(0).cpu(), after.softmax(0).cpu()
    top = (first + second).topk(min(6, len(classes))).indices
    place = torch.arange(len(top)).numpy()
    axes.barh(place - 0.2, first[top].numpy(), 0.4, label="at the start")
    axes.barh(place + 0.2, second[top].numpy(), 0.4, label="adversarial")
    axes.set_yticks(place, [classes[i] for i in top], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("probability", fontsize=7)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_title(title, fontsize=8)
    axes.legend(fontsize=6, loc="lower right")
