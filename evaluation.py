"""Robust accuracy under several attacks, and the worst case over them, image by image."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

import attacks
import auto_attack
import parallel

T = TypeVar("T")
STEP = 2 / 255  # alpha of PGD and CW, a pixel fraction
LOSSES = {"pgd": attacks.cross_entropy_loss, "cw": attacks.margin_loss}
RESTART = 1_000_003  # between the seeds of two restarts: those of neighbouring seeds differ, too
SINGLE = ("clean", "fgsm", "fgsm-rs", "transfer")


@dataclass(frozen=True)
class Attack:
    """One row of the table: a family (clean, fgsm, pgd, cw, autoattack, ...) and its sizes."""

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
        if self.family in auto_attack.VERSIONS:
            return "various"
        return {"clean": "-", "cw": "margin"}.get(self.family, "CE")

    @property
    def start(self) -> str:
        """Return the name of the start."""
        if self.family in auto_attack.VERSIONS:
            return "various"
        return {"clean": "-", "fgsm": "zero"}.get(self.family, "uniform")

    def alpha(self, epsilon: float) -> float:
        """Return the step size as a pixel fraction; 0 where the attack chooses its own."""
        if self.family in auto_attack.VERSIONS:
            return 0.0
        return {"clean": 0.0, "fgsm": epsilon, "fgsm-rs": epsilon}.get(self.family, STEP)


def parse_attack(text: str) -> Attack:
    """Return the attack that ``text`` names, such as ``pgd-20``, ``PGD50-10`` or ``autoattack``.

    Raises:
        ValueError: No attack is called that.
    """
    name = text.lower()
    if name in SINGLE or name in auto_attack.VERSIONS:
        return Attack(name, {"fgsm": 1, "fgsm-rs": 1, "transfer": 20}.get(name, 0))
    match = re.fullmatch(r"(pgd|cw)-?(\d+)(?:-(\d+))?", name)
    if not match or min(int(size) for size in match.groups()[1:] if size) < 1:
        raise ValueError(
            f"--attacks {text}: unknown; there are {', '.join(SINGLE)}, pgd-STEPS, "
            f"pgd-STEPS-RESTARTS, cw-STEPS, {', '.join(auto_attack.VERSIONS)}"
        )
    return Attack(match[1], int(match[2]), int(match[3] or 1))


@dataclass
class Outcome:
    """What an attack found."""

    standing: Tensor  # (N,) bool
    seconds: float
    passes: int  # images that went forward through the attacked network
    detail: dict[str, object] = field(default_factory=dict)  # for the report
    journal: Path | None = None  # a file of no use once the report is written


@dataclass
class Settings:
    """What all attacks of a measurement share."""

    epsilon: float  # radius of the ball, a pixel fraction
    batch_size: int  # halved where the memory of the GPU does not do
    seed: int  # of the random starts
    cascade: bool = False  # whether an attack sees only what those before it left standing
    progress: bool = False
    journal: Path | None = None  # folder where long attacks note how far they are
    source: nn.Module | None = None  # the network on which ``transfer`` makes its images


def within_memory(
    settings: Settings, work: Callable[[int], T], again: Callable[[], object] = lambda: None
) -> T:
    """Return ``work(batch_size)``; where a GPU's memory does not do, that of half the batch size.

    No verdict depends on the batch size, so ``work`` may begin anew, after a call of ``again``. It
    waits for no other process.
    """
    while True:
        try:
            return work(settings.batch_size)
        except torch.OutOfMemoryError:
            if settings.batch_size == 1:
                raise
        settings.batch_size //= 2
        parallel.say(f"note: out of GPU memory; going on with --batch-size {settings.batch_size}")
        again()


def uniform_starts(x: Tensor, epsilon: float, seed: int) -> Tensor:
    """Return the uniform starts of all images, on the CPU.

    An image's start depends on its place, the seed and the order of x in memory, on no batch size,
    device or other verdict.
    """
    generator = torch.Generator().manual_seed(seed)
    return attacks.start_point(x.cpu(), "uniform", epsilon, generator)


def settled(verdict: Tensor) -> Tensor:
    """Return a verdict once a GPU has found it; before that its seconds would be of the launch."""
    verdict.any().item()
    return verdict


def standing_images(
    model: nn.Module, x: Tensor, y: Tensor, chosen: list[Attack], settings: Settings
) -> dict[Attack, Outcome]:
    """Return what each attack found; the clean verdict is always the first.

    Images that are wrong when clean are counted as fooled by every attack, and not attacked.
    Attacks of one family are read off one run, its restarts seeing survivors only. With
    ``cascade`` so do later families, and an attack's verdict includes those before it. Several
    processes share the images out, and all of them return all verdicts.
    """
    began = time.perf_counter()
    mine = parallel.share(torch.arange(len(y), device=y.device))
    clean = torch.ones_like(y)
    clean[mine] = within_memory(settings, partial(attacks.standing, model, x[mine], y[mine])).long()
    upright = settled(parallel.minimum_(clean).bool())
    found = {Attack("clean"): Outcome(upright, time.perf_counter() - began, len(y))}
    for family in dict.fromkeys(attack.family for attack in chosen if attack.family != "clean"):
        members = [attack for attack in chosen if attack.family == family]
        if family in auto_attack.VERSIONS:
            outcomes = [by_the_library(model, x, y, upright, family, settings)]
        elif family == "transfer":
            outcomes = [transferred(model, x, y, upright, members[0], settings)]
        else:
            outcomes = by_ascent(model, x, y, upright, members, settings)
        found |= zip(members, outcomes, strict=True)
        if settings.cascade:
            upright = torch.stack([found[attack].standing for attack in members]).all(0)
    return found


def by_ascent(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    upright: Tensor,
    members: list[Attack],
    settings: Settings,
) -> list[Outcome]:
    """Return what attacks of one family found, from one ascent per restart.

    A restart sees the images that stand for at least one of the attacks that it is for.
    """
    family, epsilon, todo, runs = members[0].family, settings.epsilon, upright, []
    for restart in range(max(attack.restarts for attack in members)):
        waiting = [attack.steps for attack in members if attack.restarts > restart]
        if runs:
            fell = torch.stack([run.first_fooled for run in runs]).amin(0)
            todo = upright & (fell > min(waiting))
        seed = settings.seed + RESTART * restart
        starts = x if family == "fgsm" else uniform_starts(x, epsilon, seed)
        mine = parallel.share(todo.nonzero().squeeze(1))
        hidden = None if settings.progress and not parallel.rank() else True
        name = Attack(family, max(waiting)).name + f" {restart + 1}" * bool(restart)
        with tqdm(total=len(mine), desc=name, unit="img", disable=hidden) as bar:
            ascend = partial(
                attacks.ascend, model, x, y, starts, mine, steps=max(waiting), epsilon=epsilon,
                loss=LOSSES.get(family, attacks.cross_entropy_loss),
                alpha=members[0].alpha(epsilon), bar=bar,
            )  # fmt: skip
            run = within_memory(settings, lambda size, go=ascend: go(batch_size=size), bar.reset)
        parallel.minimum_(run.first_fooled)
        runs.append(run)
    outcomes = []
    for attack in members:
        used = runs[: attack.restarts]
        fell = torch.stack([run.first_fooled for run in used]).amin(0) <= attack.steps
        seconds = sum(run.seconds[attack.steps] for run in used)
        passes = parallel.total(sum(run.passes[attack.steps] for run in used))
        outcomes.append(Outcome(upright & ~fell, seconds, passes))
    return outcomes


def by_the_library(
    model: nn.Module, x: Tensor, y: Tensor, upright: Tensor, name: str, settings: Settings
) -> Outcome:
    """Return what AutoAttack, or one part of it, found."""
    run = auto_attack.attack(
        model, x, y, upright, name, epsilon=settings.epsilon, batch_size=settings.batch_size,
        seed=settings.seed, folder=settings.journal, progress=settings.progress,
    )  # fmt: skip
    detail = {"library": run.library, "standing_after": run.parts}
    return Outcome(run.standing, run.seconds, parallel.total(run.passes), detail, run.journal)


def transferred(
    model: nn.Module, x: Tensor, y: Tensor, upright: Tensor, attack: Attack, settings: Settings
) -> Outcome:
    """Return which images stand against PGD images made on another network."""
    began = time.perf_counter()
    starts = uniform_starts(x, settings.epsilon, settings.seed)
    standing = upright.long()

    def work(size: int) -> None:
        for index in parallel.share(upright.nonzero().squeeze(1)).split(size):
            images = attacks.pgd(
                settings.source, x[index], y[index], epsilon=settings.epsilon, alpha=STEP,
                steps=attack.steps, start=starts[index.to(starts.device)].to(x.device),
            )  # fmt: skip
            standing[index] = attacks.standing(model, images, y[index], size).long()

    within_memory(settings, work)
    standing = settled(parallel.minimum_(standing).bool())
    return Outcome(standing, time.perf_counter() - began, int(upright.sum()))


def accuracies(
    model: nn.Module, x: Tensor, y: Tensor, *, names: dict[str, str], settings: Settings
) -> dict[str, float]:
    """Return the accuracy in [0, 1] under each attack, by the short names that the caller gives."""
    chosen = {short: parse_attack(name) for short, name in names.items()}
    found = standing_images(model, x, y, list(chosen.values()), settings)
    return {short: found[a].standing.double().mean().item() for short, a in chosen.items()}


def evaluate(
    model: nn.Module, x: Tensor, y: Tensor, names: list[str], settings: Settings
) -> tuple[dict[str, object], dict[str, Tensor], list[Path]]:
    """Measure a model under several attacks.

    Args:
        model: Maps images in [0, 1] to logits.
        x: (N, 3, H, W) images, and ``y``: their (N,) labels.
        names: Attacks, as ``parse_attack`` reads them.
        settings: What they share.

    Returns:
        The rows of the report, one per attack with its parameters and cost; the verdicts: by attack
        (N,) which images stand, in a cascade against those named before it too; and files to delete
        once both are written.
    """
    chosen = list(dict.fromkeys(parse_attack(name) for name in names))
    found = standing_images(model, x, y, chosen, settings)
    rows, verdicts, left = [], {}, torch.ones_like(y, dtype=torch.bool)
    for attack in chosen:
        outcome = found[attack]
        left = outcome.standing & left if settings.cascade else outcome.standing
        verdicts[attack.name] = left.cpu()
        row = {"attack": attack.name, "loss": attack.loss, "epsilon": settings.epsilon}
        row |= {"seed": settings.seed, "alpha": attack.alpha(settings.epsilon)}
        row |= {"steps": attack.steps, "restarts": attack.restarts, "start": attack.start}
        rows.append(row | {"seconds": outcome.seconds, "passes": outcome.passes} | outcome.detail)
    journals = [found[attack].journal for attack in chosen if found[attack].journal]
    return rows, verdicts, journals
