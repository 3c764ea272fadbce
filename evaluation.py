"""Robust accuracy per attack, the worst case over attacks image by image, and the report."""

import re
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

import attacks
import parallel
import report

STEP = 2 / 255  # alpha of PGD and CW, a pixel fraction
LOSSES = {"pgd": attacks.cross_entropy_loss, "cw": attacks.margin_loss}


@dataclass(frozen=True)
class Attack:
    """One row of the table: a family (clean, fgsm, fgsm-rs, pgd, cw) and its sizes."""

    family: str
    steps: int = 0
    restarts: int = 1

    @property
    def name(self) -> str:
        """Return the name as it is printed and typed."""
        sizes = [self.steps] * (self.family in LOSSES) + [self.restarts] * (self.restarts > 1)
        return "-".join([self.family, *map(str, sizes)])

    @property
    def loss(self) -> str:
        """Return the name of the loss that the attack raises."""
        return {"clean": "-", "cw": "margin"}.get(self.family, "CE")

    @property
    def start(self) -> str:
        """Return the name of the start."""
        return {"clean": "-", "fgsm": "zero"}.get(self.family, "uniform")

    def alpha(self, epsilon: float) -> float:
        """Return the step size as a pixel fraction."""
        return {"clean": 0.0, "fgsm": epsilon, "fgsm-rs": epsilon}.get(self.family, STEP)


def parse_attack(text: str) -> Attack:
    """Return the attack that ``text`` names, such as ``pgd-20``, ``PGD50-10`` or ``cw20``.

    Raises:
        ValueError: No attack is called that.
    """
    name = text.lower()
    if name in ("clean", "fgsm", "fgsm-rs"):
        return Attack(name, steps=0 if name == "clean" else 1)
    match = re.fullmatch(r"(pgd|cw)-?(\d+)(?:-(\d+))?", name)
    if not match or min(int(size) for size in match.groups()[1:] if size) < 1:
        raise ValueError(
            f"--attacks {text}: unknown; there are clean, fgsm, fgsm-rs, pgd-STEPS, "
            "pgd-STEPS-RESTARTS and cw-STEPS"
        )
    return Attack(match[1], int(match[2]), int(match[3] or 1))


def uniform_starts(x: Tensor, epsilon: float, seed: int) -> Tensor:
    """Return the uniform starts of all images, on the CPU.

    An image's start depends on its place and the seed, on no batch size, device or other verdict.
    """
    generator = torch.Generator().manual_seed(seed)
    return attacks.start_point(x.cpu(), "uniform", epsilon, generator)


@dataclass
class Ascent:
    """What one run of signed ascent found."""

    first_fooled: Tensor  # (N,) steps after which an image was first fooled; steps + 1 if never
    seconds: list[float]  # spent up to and including each step


def ascend(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    starts: Tensor,
    todo: Tensor,
    *,
    loss: attacks.Loss,
    epsilon: float,
    alpha: float,
    steps: int,
    batch_size: int,
    bar: tqdm,
) -> Ascent:
    """Attack images until they fall, and note the step of each fall.

    An image is fooled if any iterate, the start included, fools the model; it is then attacked no
    further. So the verdict after k steps is that of a k-step attack from the same start, for every
    k at once. The pool under attack keeps its size while there are images left: where one leaves,
    the next of the queue takes its lane, at its own first step.

    Args:
        model: Maps images in [0, 1] to logits.
        x: (N, C, H, W) all images; ``y``: (N,) labels; ``starts``: where to begin, on any device.
        todo: Indices of the images to attack.
        loss: What to raise, in ``steps`` steps.
        epsilon: Radius of the ball, and ``alpha``: the step, pixel fractions.
        batch_size: Lanes of the pool.
        bar: Moves on by one for each image done.
    """
    first = torch.full((len(x),), steps + 1, device=x.device)
    spent = torch.zeros(steps + 1, dtype=torch.float64)
    lanes, queue = todo[:0], todo
    x_adv, age = x[:0], todo[:0]  # of each lane: its image now, and the steps that it has taken
    ends = []  # images after their last step, and which they are
    with attacks.measuring(model, x):
        while len(lanes) or len(queue):
            began = time.perf_counter()
            fresh, queue = queue.tensor_split([batch_size - len(lanes)])
            lanes, age = torch.cat([lanes, fresh]), torch.cat([age, torch.zeros_like(fresh)])
            x_adv = torch.cat([x_adv, starts[fresh.to(starts.device)].to(x.device)])
            labels = y[lanes]
            stepped, logits = attacks.sign_ascent(
                model, x[lanes], lambda z: loss(z, labels), x_adv,  # noqa: B023
                epsilon=epsilon, alpha=alpha,
            )  # fmt: skip
            fell = attacks.fooled(logits, labels)
            first[lanes[fell]] = age[fell]
            ended = ~fell & (age == steps - 1)
            going = ~fell & ~ended
            ends.append((lanes[ended], stepped[ended]))
            each = (time.perf_counter() - began) / len(lanes)
            spent += each * torch.bincount(age, minlength=steps + 1).cpu()
            bar.update(len(lanes) - int(going.sum()))
            lanes, age, x_adv = lanes[going], age[going] + 1, stepped[going]
        began = time.perf_counter()
        for last, images in ends:
            first[last[~standing(model, images, y[last], batch_size)]] = steps
        spent[steps] += time.perf_counter() - began
    return Ascent(first, spent.cumsum(0).tolist())


def standing(model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> Tensor:
    """Return (N,) whether each image is classified right."""
    verdict = torch.zeros_like(y, dtype=torch.bool)
    with attacks.measuring(model, x), torch.no_grad():
        for index in torch.arange(len(y), device=y.device).split(batch_size):
            verdict[index] = ~attacks.fooled(model(x[index]), y[index])
    return verdict


def standing_images(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    chosen: list[Attack],
    *,
    epsilon: float,
    batch_size: int,
    seed: int,
    cascade: bool = False,
    progress: bool = False,
) -> dict[Attack, tuple[Tensor, float]]:
    """Return per attack (N,) which images still stand, and its seconds.

    Images that are wrong when clean are counted as fooled by every attack, and not attacked.
    Attacks of one family are read off one run, its restarts seeing survivors only. With
    ``cascade`` so do later families, and an attack's verdict includes those before it. Several
    processes share the images out, and all of them return all verdicts.
    """
    began = time.perf_counter()
    mine = parallel.share(torch.arange(len(y), device=y.device))
    clean = torch.ones_like(y)
    clean[mine] = standing(model, x[mine], y[mine], batch_size).long()
    clean = parallel.minimum_(clean).bool()
    verdicts = {Attack("clean"): (clean, time.perf_counter() - began)}
    upright = clean
    for family in dict.fromkeys(attack.family for attack in chosen if attack.family != "clean"):
        members = [attack for attack in chosen if attack.family == family]
        runs = restarts(
            model, x, y, upright, members,
            epsilon=epsilon, batch_size=batch_size, seed=seed, progress=progress,
        )  # fmt: skip
        for attack in members:
            used = runs[: attack.restarts]
            fell = torch.stack([run.first_fooled for run in used]).amin(0) <= attack.steps
            seconds = sum(run.seconds[min(attack.steps, len(run.seconds) - 1)] for run in used)
            verdicts[attack] = upright & ~fell, seconds
        if cascade:
            upright = torch.stack([verdicts[attack][0] for attack in members]).all(0)
    return {attack: verdicts[attack] for attack in chosen}


def restarts(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    upright: Tensor,
    members: list[Attack],
    *,
    epsilon: float,
    batch_size: int,
    seed: int,
    progress: bool,
) -> list[Ascent]:
    """Run what answers all ``members``, attacks of one family: one ascent per restart.

    A restart sees the images that stand for at least one of the attacks that it is for.
    """
    family, todo, runs = members[0].family, upright, []
    for restart in range(max(attack.restarts for attack in members)):
        waiting = [attack.steps for attack in members if attack.restarts > restart]
        if runs:
            fell = torch.stack([run.first_fooled for run in runs]).amin(0)
            todo = upright & (fell > min(waiting))
        starts = x if family == "fgsm" else uniform_starts(x, epsilon, seed + restart)
        mine = parallel.share(todo.nonzero().squeeze(1))
        hidden = None if progress and not parallel.rank() else True
        name = Attack(family, max(waiting)).name + f" {restart + 1}" * bool(restart)
        with tqdm(total=len(mine), desc=name, unit="img", disable=hidden) as bar:
            run = ascend(
                model, x, y, starts, mine, steps=max(waiting), epsilon=epsilon,
                loss=LOSSES.get(family, attacks.cross_entropy_loss),
                alpha=members[0].alpha(epsilon), batch_size=batch_size, bar=bar,
            )  # fmt: skip
        parallel.minimum_(run.first_fooled)
        runs.append(run)
    return runs


def accuracies(
    model: nn.Module, x: Tensor, y: Tensor, *, names: dict[str, str], **settings
) -> dict[str, float]:
    """Return the accuracy in [0, 1] under each attack, by the short names that the caller gives."""
    chosen = {short: parse_attack(name) for short, name in names.items()}
    verdicts = standing_images(model, x, y, list(chosen.values()), **settings)
    return {short: verdicts[attack][0].double().mean().item() for short, attack in chosen.items()}


# ------------------------------------------------------------------------------------------- report


def evaluate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    names: list[str],
    *,
    epsilon: float,
    batch_size: int,
    seed: int,
    cascade: bool = False,
) -> dict[str, object]:
    """Measure a model under several attacks, with progress bars, and return the report.

    Args:
        model: Maps images in [0, 1] to logits.
        x: (N, 3, H, W) images, and ``y``: their (N,) labels.
        names: Attacks, as ``parse_attack`` reads them.
        epsilon: Radius of the ball, a pixel fraction.
        batch_size: Images at a time.
        seed: Of the random starts.
        cascade: Whether an attack sees only what those before it left standing.

    Returns:
        ``n``, one row per attack with its parameters, ``correct``, ``accuracy`` in [0, 1] and
        ``seconds``, the worst case over attacks, and the software and hardware.
    """
    chosen = list(dict.fromkeys(parse_attack(name) for name in names))
    verdicts = standing_images(
        model,
        x,
        y,
        chosen,
        epsilon=epsilon,
        batch_size=batch_size,
        seed=seed,
        cascade=cascade,
        progress=True,
    )
    rows = []
    for attack, (standing, seconds) in verdicts.items():
        correct = int(standing.sum())
        row = {"attack": attack.name, "loss": attack.loss, "epsilon": epsilon, "seed": seed}
        row |= {"alpha": attack.alpha(epsilon), "steps": attack.steps, "restarts": attack.restarts}
        row |= {"start": attack.start, "n": len(x), "correct": correct}
        rows.append(row | {"accuracy": correct / len(x), "seconds": seconds})
    worst = int(torch.stack([standing for standing, _ in verdicts.values()]).all(0).sum())
    return {
        "n": len(x), "epsilon": epsilon, "cascade": cascade, "attacks": rows,
        "worst_case": {"correct": worst, "accuracy": worst / len(x)},
        "machine": report.machine(x.device),
    }  # fmt: skip
