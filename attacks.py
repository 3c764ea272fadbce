"""FGSM, PGD and CW-Linf: pure functions on images in [0, 1] that return adversarial images.

Sizes (``epsilon``, ``alpha``) are pixel fractions: 8/255, not 8. Every function returns a new
(N, C, H, W) tensor inside [0, 1] and, but for ``noise`` starts, inside the epsilon ball around x.

``fgsm``, ``pgd`` and ``cw`` measure a finished network: they run in eval mode and fp32, and leave
mode, parameters, ``.grad``, batch norm statistics and the global random state as they found them.
``craft`` makes the images that a network is trained on, in the mode and precision of the caller.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]  # (logits, labels) -> the sum over images
STARTS = ("zero", "uniform", "half", "noise")


def project(x_adv: Tensor, x: Tensor, epsilon: float) -> Tensor:
    """Return ``x_adv`` clipped to the epsilon ball around ``x``, then to the image box [0, 1]."""
    return (x + (x_adv - x).clamp(-epsilon, epsilon)).clamp(0, 1)


def start_point(
    x: Tensor, kind: str, epsilon: float, generator: torch.Generator | None = None
) -> Tensor:
    """Return where the ascent begins, inside [0, 1].

    Args:
        x: (N, C, H, W) images in [0, 1].
        kind: ``zero``: x itself. ``uniform``: U(-epsilon, epsilon) as in FGSM-RS, arXiv:2001.03994.
            ``half``: +-epsilon/2 with random signs, as in FGSM-LAW, arXiv:2308.11443. ``noise``:
            U(-2 epsilon, 2 epsilon), not projected onto the ball, as in N-FGSM, arXiv:2202.01181.
        epsilon: Radius of the ball, a pixel fraction.
        generator: Source of the randomness, on the device of ``x``; the global one where None.

    Raises:
        ValueError: No start is called ``kind``.
    """
    if kind not in STARTS:
        raise ValueError(f"start {kind!r}: choose one of {', '.join(STARTS)}")
    if kind == "zero":
        return x.clone()
    u = torch.empty_like(x).uniform_(-1, 1, generator=generator)
    eta = {"uniform": u * epsilon, "half": u.sign() * (epsilon / 2), "noise": u * (2 * epsilon)}
    return (x + eta[kind]).clamp(0, 1)


def cross_entropy_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy summed over images: what FGSM and PGD raise."""
    return F.cross_entropy(logits, y, reduction="sum")


def margin_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Return the best wrong logit minus the right one, summed over images: what CW raises.

    Carlini and Wagner, arXiv:1608.04644, the sixth objective with confidence 0 and no floor.
    """
    right = logits.gather(1, y[:, None]).squeeze(1)
    wrong = logits.scatter(1, y[:, None], -math.inf).amax(1)
    return (wrong - right).sum()


def fooled(logits: Tensor, y: Tensor) -> Tensor:
    """Return per image whether the prediction is wrong; a non-finite logit counts as wrong."""
    return (logits.argmax(1) != y) | ~logits.isfinite().all(1)


def sign_ascent(
    model: nn.Module,
    x: Tensor,
    loss: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    epsilon: float,
    alpha: float,
    steps: int = 1,
) -> tuple[Tensor, Tensor]:
    """Raise ``loss(model(.))`` by ``steps`` signed gradient steps of size ``alpha`` from ``start``.

    Only the gradient of the images is computed, so a step costs two forward passes, not three.

    Returns:
        The adversarial images, and the detached logits of ``start``, which come for free.
    """
    x_adv, start_logits = start, None
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        with torch.enable_grad():
            logits = model(x_adv)
            (gradient,) = torch.autograd.grad(loss(logits), x_adv)
        start_logits = logits.detach() if start_logits is None else start_logits
        x_adv = project(x_adv.detach() + alpha * gradient.sign(), x, epsilon)
    return x_adv, start_logits


def refuse_other_images(x: Tensor, *, values: bool) -> None:
    """Raise a ValueError for no (N, C, H, W) images; ``values`` looks at (and waits for) all."""
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(
            f"images of shape {tuple(x.shape)} and {x.dtype}: an attack takes (N, C, H, W) in "
            "floating point; divide uint8 images by 255"
        )
    if values and len(x):
        low, high = x.aminmax()
        if not (low >= 0 and high <= 1):  # nan is neither
            found = f"images in [{low:g}, {high:g}]"
            raise ValueError(f"{found}: an attack takes them in [0, 1]; normalise inside the model")


@contextmanager
def measuring(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Hold the model in eval mode and fp32; a ValueError where x are not images in [0, 1]."""
    refuse_other_images(x, values=True)
    modes = [(module, module.training) for module in model.modules()]
    # GPUs may compute fp32 convolutions and products in TF32, which has 10 bits of the 23.
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    model.eval()
    try:
        with torch.autocast(x.device.type, enabled=False):
            yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before
        for module, training in modes:
            module.training = training


def craft(
    model: nn.Module,
    x: Tensor,
    loss: Callable[[Tensor], Tensor],
    *,
    epsilon: float,
    alpha: float,
    steps: int = 1,
    start: str = "uniform",
) -> tuple[Tensor, Tensor]:
    """Make the images for one training step, from a random start drawn from the global generator.

    Args:
        model: Network in the mode that it is attacked in.
        x: (N, C, H, W) images in [0, 1], mixed or not.
        loss: Maps (N, K) logits to the scalar that the attack raises.
        epsilon: Radius of the ball, a pixel fraction.
        alpha: Step, a pixel fraction.
        steps: Number of gradient steps.
        start: One of ``STARTS``. With ``noise`` neither start nor result is cut to the ball, only
            to [0, 1], as N-FGSM does.

    Returns:
        The adversarial images, and the detached (N, K) logits of the start.
    """
    refuse_other_images(x, values=False)
    radius = math.inf if start == "noise" else epsilon
    begin = start_point(x, start, epsilon)
    return sign_ascent(model, x, loss, begin, epsilon=radius, alpha=alpha, steps=steps)


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    alpha: float,
    steps: int,
    loss: Loss = cross_entropy_loss,
    start: Tensor | None = None,
) -> Tensor:
    """Return the images after projected gradient ascent in the maximum norm, arXiv:1706.06083.

    Args:
        model: Maps (N, C, H, W) images in [0, 1] to (N, K) logits.
        x: The images.
        y: (N,) true labels.
        epsilon: Radius of the ball, a pixel fraction.
        alpha: Step, a pixel fraction.
        steps: Number of gradient steps.
        loss: What to raise, summed over images.
        start: Where to begin, as images inside ball and box; ``x`` itself where None.
    """
    start = x if start is None else start
    with measuring(model, x):
        return sign_ascent(
            model, x, lambda z: loss(z, y), start, epsilon=epsilon, alpha=alpha, steps=steps
        )[0]


def cw(model: nn.Module, x: Tensor, y: Tensor, **sizes) -> Tensor:
    """Return ``pgd`` on the logit margin: what fast adversarial training papers call C&W."""
    return pgd(model, x, y, loss=margin_loss, **sizes)


def fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    alpha: float | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Return the images after one signed step, of size ``epsilon`` where ``alpha`` is None.

    Goodfellow et al., arXiv:1412.6572; with a ``start`` in the ball it is FGSM-RS.
    """
    alpha = epsilon if alpha is None else alpha
    return pgd(model, x, y, epsilon=epsilon, alpha=alpha, steps=1, start=start)


# ------------------------------------------------------------------------------ many images


@dataclass
class Ascent:
    """What one run of signed ascent found."""

    first_fooled: Tensor  # (N,) steps after which an image was first fooled; steps + 1 if never
    seconds: list[float]  # spent up to and including each step
    passes: list[int]  # images that went forward through the network, likewise


def ascend(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    starts: Tensor,
    todo: Tensor,
    *,
    loss: Loss,
    epsilon: float,
    alpha: float,
    steps: int,
    batch_size: int,
    bar,
) -> Ascent:
    """Attack images until they fall, and note the step of each fall.

    An image is fooled if any iterate, the start included, fools the model; it is then attacked no
    further. So the verdict after k steps is that of a k-step attack from the same start, for every
    k at once. The pool under attack keeps its size while there are images left: where one leaves,
    the next of the queue takes its lane, at its own first step.

    Args:
        model: Maps images in [0, 1] to logits.
        x: (N, C, H, W) all images; ``y``: (N,) labels; ``starts``: where to begin, on any device.
        todo: Indices of the images to attack, in ``steps`` steps; ``loss``: what to raise.
        epsilon: Radius of the ball, and ``alpha``: the step, pixel fractions.
        batch_size: Lanes.
        bar: Its ``update(n)`` hears of each image that is done.
    """
    first = torch.full((len(x),), steps + 1, device=x.device)
    seconds, passes = torch.zeros(2, steps + 1, dtype=torch.float64)
    lanes, queue = todo[:0], todo
    x_adv, age = x[:0], todo[:0]  # of each lane: its image now, and the steps that it has taken
    ends = []  # images after their last step, and which they are
    with measuring(model, x):
        while len(lanes) or len(queue):
            began = time.perf_counter()
            fresh, queue = queue.tensor_split([batch_size - len(lanes)])
            lanes, age = torch.cat([lanes, fresh]), torch.cat([age, torch.zeros_like(fresh)])
            x_adv = torch.cat([x_adv, starts[fresh.to(starts.device)].to(x.device)])
            stepped, logits = sign_ascent(
                model, x[lanes], partial(loss, y=y[lanes]), x_adv, epsilon=epsilon, alpha=alpha
            )
            fell = fooled(logits, y[lanes])
            first[lanes[fell]] = age[fell]
            ended = ~fell & (age == steps - 1)
            going = ~fell & ~ended
            ends.append((lanes[ended], stepped[ended]))
            ages = torch.bincount(age, minlength=steps + 1).cpu()
            passes += ages
            seconds += (time.perf_counter() - began) / len(lanes) * ages
            bar.update(len(lanes) - int(going.sum()))
            lanes, age, x_adv = lanes[going], age[going] + 1, stepped[going]
        began = time.perf_counter()
        if ends:
            last, images = (torch.cat(parts) for parts in zip(*ends, strict=True))
            first[last[~standing(model, images, y[last], batch_size)]] = steps
            passes[steps] += len(last)
        seconds[steps] += time.perf_counter() - began
    return Ascent(first, seconds.cumsum(0).tolist(), passes.cumsum(0).int().tolist())


def standing(model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> Tensor:
    """Return (N,) whether each image is classified right."""
    verdict = torch.zeros_like(y, dtype=torch.bool)
    with measuring(model, x), torch.no_grad():
        for index in torch.arange(len(y), device=y.device).split(batch_size):
            verdict[index] = ~fooled(model(x[index]), y[index])
    return verdict
