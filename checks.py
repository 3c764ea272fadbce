"""Warnings: signs that a measurement flatters a network, what was seen, and what it usually means.

After the checks of AutoAttack, arXiv:2003.01690, and Carlini et al., arXiv:1902.06705, section 5.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attacks

GAP = 0.06  # more than this between CE-PGD and CW or AutoAttack is no ordinary difference
NOISE = 0.02  # an accuracy that rises by less says nothing
SCALES = tuple(2.0**k for k in range(-12, 13))  # of the logits, among which the best is sought
FITTING = 4  # honest networks that were seen lie within this factor of the best
STRONG = ("cw", "autoattack", "apgd", "fab")  # what PGD on cross-entropy is held to
ENOUGH = 20  # images; shares of fewer say nothing
LARGE = 64 / 255  # a perturbation in which any image can be changed beyond recognition


def of_the_network(
    model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, recorded: float | None = None
) -> list[str]:
    """Probe a network on a few images and return the warnings.

    Args:
        model: Maps images in [0, 1] to logits.
        x: (N, C, H, W) images; some hundred are enough.
        y: (N,) labels.
        epsilon: Radius of the ball, a pixel fraction.
        recorded: Clean accuracy that the training measured, in [0, 1].
    """
    with attacks.measuring(model, x):
        with torch.no_grad():
            logits, again = model(x), model(x)
            noise = torch.empty_like(x).uniform_(-epsilon, epsilon, generator=_generator(x))
            perturbed = model((x + noise).clamp(0, 1))
        found = [
            _non_finite(logits, perturbed), _probabilities(logits), _random(logits, again),
        ]  # fmt: skip
        right = ~attacks.fooled(logits, y)
        if len(y) >= ENOUGH:
            accuracy = right.double().mean().item()
            found.append(_near_chance(accuracy, logits.shape[1], len(y)))
            found.append(_below_record(accuracy, recorded, len(y)))
        scale = _fitted_scale(logits, y)
        if right.sum() >= ENOUGH and not any(found[:2]):
            x, y = x[right], y[right]
            found.append(_zero_gradients(model, x, y))
            found.append(_scale(model, x, y, epsilon, scale))
            found.append(_large_epsilon(model, x, y))
    return [warning for warning in found if warning]


def _generator(x: Tensor) -> torch.Generator:
    return torch.Generator(x.device).manual_seed(0)


def _standing(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, epsilon: float, steps: int
) -> float:
    """Return the accuracy under CE-PGD with steps of epsilon / 4, in the mode that holds now."""
    x_adv, _ = attacks.sign_ascent(
        model, x, lambda z: attacks.cross_entropy_loss(z, y),
        attacks.start_point(x, "uniform", epsilon, _generator(x)),
        epsilon=epsilon, alpha=epsilon / 4, steps=steps,
    )  # fmt: skip
    with torch.no_grad():
        return (~attacks.fooled(model(x_adv), y)).double().mean().item()


def _non_finite(logits: Tensor, perturbed: Tensor) -> str | None:
    broken = ~torch.stack([logits, perturbed]).isfinite().all(2)
    if broken.any():
        return (
            f"non-finite logits on {int(broken[0].sum())} clean and {int(broken[1].sum())} "
            f"slightly changed images of {len(logits)}; they count as fooled. Usually overflow in "
            "the network"
        )
    return None


def _probabilities(logits: Tensor) -> str | None:
    sums_to_one = (logits.sum(1) - 1).abs().max() < 1e-4
    if sums_to_one and logits.min() >= 0:
        return (
            "the outputs look like probabilities (not below 0, sum 1). Usually a softmax inside "
            "the network: gradients vanish, and attacks see less than there is; give them logits"
        )
    return None


def _random(logits: Tensor, again: Tensor) -> str | None:
    moved = (logits - again).abs().max() / logits.abs().max().clamp(min=1e-12)
    if moved > 1e-4:
        return (
            f"two identical forward passes differ by {moved:.1%} of the largest logit. Usually "
            "dropout or noise left on: a random network needs attacks that average over it"
        )
    return None


def _near_chance(accuracy: float, classes: int, n: int) -> str | None:
    chance = 1 / classes
    if accuracy < chance + 3 * (chance * (1 - chance) / n) ** 0.5:
        return (
            f"clean accuracy {accuracy:.1%} is chance ({chance:.1%}). Usually untrained or wrong "
            "weights, labels in another order, or images normalised twice"
        )
    return None


def _below_record(accuracy: float, recorded: float | None, n: int) -> str | None:
    if recorded is None:
        return None
    error = (max(0, recorded * (1 - recorded)) / n) ** 0.5  # the standard error
    if accuracy < recorded - 0.1 - 3 * error:
        return (
            f"clean accuracy {accuracy:.1%} is far below the {recorded:.1%} that the training "
            "wrote into the file. Usually images normalised twice or not at all, or other weights"
        )
    return None


def _zero_gradients(model: nn.Module, x: Tensor, y: Tensor) -> str | None:
    images = x.clone().requires_grad_()
    with torch.enable_grad():
        logits = model(images)
        (gradient,) = (
            torch.autograd.grad(attacks.cross_entropy_loss(logits, y), images, allow_unused=True)
            if logits.requires_grad
            else (None,)
        )
    gradient = torch.zeros_like(x) if gradient is None else gradient
    still = (gradient == 0) | ~gradient.isfinite()  # sign(nan) is 0
    share = still.flatten(1).all(1).double().mean().item()
    if share > 0.05:
        return (
            f"the gradient is zero or not finite on {share:.0%} of the images. Usually a step "
            "without gradient (rounding, thresholds), a root or logarithm of 0, or logits so large "
            "that the softmax saturates: attacks by gradient fail without the network being robust"
        )
    return None


def _fitted_scale(logits: Tensor, y: Tensor) -> float:
    """Return the factor of the logits at which cross-entropy is least (arXiv:1706.04599)."""
    return min(SCALES, key=lambda s: F.cross_entropy(s * logits, y).nan_to_num(torch.inf).item())


def _scale(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, scale: float) -> str | None:
    if 1 / FITTING <= scale <= FITTING:
        return None
    as_it_is = _standing(model, x, y, epsilon, 10)
    least = _standing(lambda z: scale * model(z), x, y, epsilon, 10)
    if as_it_is - least > max(0.01, 2 / len(x)):
        return (
            f"CE-PGD leaves {as_it_is:.1%} of the clean hits, but {least:.1%} where the logits are "
            f"multiplied by {scale:g}, which fits the labels best and changes neither a prediction "
            "nor CW. Usually logits too flat or too steep for cross-entropy: believe CW and "
            "AutoAttack"
        )
    return None


def _large_epsilon(model: nn.Module, x: Tensor, y: Tensor) -> str | None:
    standing = _standing(model, x, y, LARGE, 20)
    if standing > 0.3:
        return (
            f"PGD-20 at 64/255 leaves {standing:.0%} of the clean hits, where it should leave "
            "almost none. Usually masked gradients: attacks fail without the network being robust"
        )
    return None


def _too_short(row: dict[str, object]) -> bool:
    """Return whether the steps of PGD or CW cannot lead from one side of the ball to the other."""
    return row["steps"] * row["alpha"] < 1.999 * row["epsilon"]


def of_the_steps(rows: list[dict[str, object]]) -> list[str]:
    """Return a warning where the longest attack of PGD or of CW in a report is too short."""
    found = []
    for family in ("pgd", "cw"):
        members = [row for row in rows if row["attack"].startswith(family)]
        longest = max(members, key=lambda row: row["steps"], default=None)
        if longest and _too_short(longest):
            found.append(
                f"{longest['attack']}: {longest['steps']} steps of {255 * longest['alpha']:g}/255 "
                f"cannot cross a ball of {255 * longest['epsilon']:g}/255; take more steps"
            )
    return found


def of_the_rows(rows: list[dict[str, object]]) -> list[str]:
    """Compare the attacks of one report with each other and return the warnings."""
    accuracy = {row["attack"]: row["accuracy"] for row in rows}
    pgd = [
        row["accuracy"] for row in rows if row["attack"].startswith("pgd") and not _too_short(row)
    ]
    strong = {name: value for name, value in accuracy.items() if name.startswith(STRONG)}
    found = []
    if pgd and strong:
        name, least = min(strong.items(), key=lambda item: item[1])
        if min(pgd) - least > GAP:
            found.append(
                f"CE-PGD leaves {min(pgd):.1%}, {name} only {least:.1%}. Usually logits "
                "that flatten the cross-entropy (temperature, smoothing): PGD flatters this network"
            )
    if pgd and accuracy.get("fgsm", 1.0) < min(pgd) - NOISE:
        found.append(
            f"FGSM leaves {accuracy['fgsm']:.1%}, less than PGD ({min(pgd):.1%}). Usually "
            "masked gradients: one step should not beat many"
        )
    for name in ("transfer", "square"):
        if pgd and accuracy.get(name, 1.0) < min(pgd) - NOISE:
            found.append(
                f"{name}, which sees no gradient, leaves {accuracy[name]:.1%}, less than PGD "
                f"({min(pgd):.1%}). Usually masked gradients"
            )
    return found


def of_the_parts(rows: list[dict[str, object]]) -> list[str]:
    """Return a warning where the last resort of AutoAttack still finds something."""
    found = []
    for row in rows:
        for (_, before), (part, after) in pairwise(row.get("standing_after", {}).items()):
            if part == "square" and before - after > 0.002 * row["n"]:
                found.append(
                    f"{row['attack']}: square, which sees no gradient, fools {before - after} "
                    "images that stood against the attacks by gradient before it. Usually masked "
                    "gradients: the true accuracy may be lower still"
                )
    return found


def of_the_sweep(accuracies: dict[float, float]) -> list[str]:
    """Return a warning where accuracy rises with epsilon; the keys are epsilons."""
    sizes = sorted(accuracies)
    return [
        f"accuracy rises from {accuracies[small]:.1%} to {accuracies[large]:.1%} as eps grows "
        f"from {255 * small:g} to {255 * large:g} / 255. Usually masked gradients"
        for small, large in pairwise(sizes)
        if accuracies[large] > accuracies[small] + NOISE
    ]
