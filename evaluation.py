"""Robust accuracy per attack, the worst case over attacks image by image, and the report."""

import json
import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import attacks

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

    An image counts as fooled if any iterate, the start included, fools the model; it is then
    attacked no further. So the verdict after k steps is that of a k-step attack from the same
    start, for every k at once.

    Args:
        model: Maps images in [0, 1] to logits.
        x: (N, C, H, W) all images.
        y: (N,) their labels.
        starts: (N, C, H, W) where to begin, on any device.
        todo: Indices of the images to attack.
        loss: What to raise.
        epsilon: Radius of the ball, and ``alpha``: the step, pixel fractions.
        steps: Number of gradient steps.
        batch_size: Images at a time.
        bar: Moves on by one for each image done.
    """
    first = torch.full((len(x),), steps + 1, device=x.device)
    seconds = [0.0] * (steps + 1)
    with attacks.measuring(model, x):
        for batch in todo.split(batch_size):
            active, x_adv = batch, starts[batch.to(starts.device)].to(x.device)
            began = time.perf_counter()
            for step in range(steps + 1):
                labels, stepped = y[active], x_adv
                if step < steps:
                    stepped, logits = attacks.sign_ascent(
                        model, x[active], lambda z: loss(z, labels), x_adv,  # noqa: B023
                        epsilon=epsilon, alpha=alpha,
                    )  # fmt: skip
                else:
                    with torch.no_grad():
                        logits = model(x_adv)
                fell = attacks.fooled(logits, labels)
                first[active[fell]] = step
                active, x_adv = active[~fell], stepped[~fell]
                seconds[step] += time.perf_counter() - began
                began = time.perf_counter()
                if not len(active):
                    break
            bar.update(len(batch))
    return Ascent(first, list(torch.tensor(seconds).cumsum(0).tolist()))


def clean_standing(model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> Tensor:
    """Return (N,) whether each unperturbed image is classified right."""
    with attacks.measuring(model, x), torch.no_grad():
        parts = [
            ~attacks.fooled(model(images), labels)
            for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True)
        ]
    return torch.cat(parts)


def standing_images(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    chosen: list[Attack],
    *,
    epsilon: float,
    batch_size: int,
    seed: int,
    progress: bool = False,
) -> dict[Attack, tuple[Tensor, float]]:
    """Return per attack (N,) which images still stand, and its seconds.

    Images that are wrong when clean are counted as fooled by every attack, and not attacked.
    Attacks that differ in their number of steps only are read off one run.
    """
    began = time.perf_counter()
    clean = clean_standing(model, x, y, batch_size)
    verdicts = {Attack("clean"): (clean, time.perf_counter() - began)}
    for members in shared_runs(chosen):
        longest = max(members, key=lambda attack: attack.steps)
        family, restarts, steps = longest.family, longest.restarts, longest.steps
        todo, found = clean.nonzero().squeeze(1), []
        for restart in range(restarts):
            starts = x if family == "fgsm" else uniform_starts(x, epsilon, seed + restart)
            hidden = None if progress else True
            with tqdm(total=len(todo), desc=longest.name, unit="img", disable=hidden) as bar:
                found.append(
                    ascend(
                        model, x, y, starts, todo, steps=steps, epsilon=epsilon,
                        loss=LOSSES.get(family, attacks.cross_entropy_loss),
                        alpha=longest.alpha(epsilon), batch_size=batch_size, bar=bar,
                    )
                )  # fmt: skip
            todo = todo[found[-1].first_fooled[todo] > steps]
        for attack in members:
            fell = torch.stack([run.first_fooled for run in found]) <= attack.steps
            seconds = sum(run.seconds[attack.steps] for run in found)
            verdicts[attack] = clean & ~fell.any(0), seconds
    return {attack: verdicts[attack] for attack in chosen}


def shared_runs(chosen: list[Attack]) -> list[list[Attack]]:
    """Group the attacks that one run answers: those that differ in steps only, with one restart."""
    runs: dict[tuple, list[Attack]] = {}
    for attack in chosen:
        if attack.family != "clean":
            steps = attack.steps if attack.restarts > 1 else None
            runs.setdefault((attack.family, attack.restarts, steps), []).append(attack)
    return list(runs.values())


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
) -> dict[str, object]:
    """Measure a model under several attacks, with progress bars, and return the report.

    Args:
        model: Maps images in [0, 1] to logits.
        x: (N, 3, H, W) images, and ``y``: their (N,) labels.
        names: Attacks, as ``parse_attack`` reads them.
        epsilon: Radius of the ball, a pixel fraction.
        batch_size: Images at a time.
        seed: Of the random starts.

    Returns:
        ``n``, one row per attack with its parameters, ``correct``, ``accuracy`` in [0, 1] and
        ``seconds``, the worst case over attacks, and the software and hardware.
    """
    chosen = list(dict.fromkeys(parse_attack(name) for name in names))
    verdicts = standing_images(
        model, x, y, chosen, epsilon=epsilon, batch_size=batch_size, seed=seed, progress=True
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
        "n": len(x), "epsilon": epsilon, "attacks": rows,
        "worst_case": {"correct": worst, "accuracy": worst / len(x)}, "machine": machine(x.device),
    }  # fmt: skip


def machine(device: torch.device) -> dict[str, str]:
    """Return what the numbers were made on."""
    hardware = platform.processor() or platform.machine()
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        hardware = f"{len(models)} x {models[0]}" if models else hardware
    return {
        "hardware": hardware,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def table(report: dict[str, object]) -> str:
    """Return the report as the table that is printed."""
    lines = [f"{'attack':<12}{'loss':<8}{'alpha':>8}{'steps':>7}{'restarts':>10}{'start':>9}"
             f"{'correct':>15}{'accuracy':>10}{'seconds':>9}"]  # fmt: skip
    for row in report["attacks"]:
        alpha = f"{255 * row['alpha']:g}/255" if row["steps"] else "-"
        correct = f"{row['correct']:,}/{row['n']:,}"
        lines.append(
            f"{row['attack']:<12}{row['loss']:<8}{alpha:>8}{row['steps']:>7}{row['restarts']:>10}"
            f"{row['start']:>9}{correct:>15}{row['accuracy']:>10.2%}{row['seconds']:>9.1f}"
        )
    worst = report["worst_case"]
    correct = f"{worst['correct']:,}/{report['n']:,}"
    lines.append(f"{'worst case, image by image':<54}{correct:>15}{worst['accuracy']:>10.2%}")
    return "\n".join(lines)


def write(report: dict[str, object], out_dir: Path, stem: str) -> Path:
    """Write the report as JSON below ``out_dir`` and return the file; never over another one."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for number in range(1, 1_000_000):
        path = out_dir / (f"{stem}.json" if number == 1 else f"{stem}-{number}.json")
        if not path.exists():
            path.write_text(json.dumps(report, indent=2) + "\n")
            return path
    raise ValueError(f"{out_dir}: too many reports")
