"""The method, and the loop around it. Knows no dataset and no attack: both come as arguments."""

import csv
import math
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import plots
import utils

# (model, images, loss of the logits) -> adversarial images and the detached logits of the start
Attack = Callable[[nn.Module, Tensor, Callable[[Tensor], Tensor]], tuple[Tensor, Tensor]]
Measure = Callable[[nn.Module], dict[str, float]]  # model -> accuracy by attack, in [0, 1]
COLLAPSE_FLOOR = 0.05  # a fall of fewer points than this is noise on 1,000 images


def mix_kl_step(
    model: nn.Module, average: nn.Module | None, x: Tensor, y: Tensor, *,
    T: float, T_a: float, attack: Attack, args: Namespace,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the loss of one MIX-KL step, its hard term and its KL term.

    Args:
        model: Network f in train mode, images in [0, 1] to (N, K) logits.
        average: The averaged network, for ``--kl-reference ema``.
        x: (N, C, H, W) images in [0, 1], and ``y``: their (N,) labels.
        T: Temperature of the KL term, and ``T_a``: that of the attack.
        attack: Raises a loss of the logits around x within the threat model.
        args: The flags of the method, and ``num_classes``.
    """
    if args.mixup_alpha > 0:  # x~, y~
        lam = utils.draw_lam(args.mixup_alpha, x)
        order = torch.randperm(len(x), device=x.device)
        x, y = utils.mixup(x, y, lam, order, args.num_classes)
    clean = clean_logits(model, x, args)

    def attack_loss(logits: Tensor) -> Tensor:  # KL(y~ || q_Ta) up to the entropy of y~
        if args.attack_target == "clean":
            return utils.temperature_kl(logits, clean.detach(), T_a)
        return F.cross_entropy(logits / T_a, y, reduction="sum")

    with utils.statistics_held(model, args.attack_mode):
        x_adv, start = attack(model, x, attack_loss)
    logits = model(x_adv).float()
    hard_logits = clean if args.hard_term == "clean" else logits
    hard = F.cross_entropy(hard_logits, y, label_smoothing=args.label_smoothing)
    if args.kl_weight == 0:
        return hard, hard, torch.zeros_like(hard)
    kl = utils.temperature_kl(logits, reference_logits(start, clean, average, x, args), T)
    return hard + args.kl_weight * kl, hard, kl


def clean_logits(model: nn.Module, x: Tensor, args: Namespace) -> Tensor | None:
    """Return f(x~) where some term asks for it, with a gradient only where one is wanted."""
    as_reference = args.kl_reference == "clean" and args.kl_weight > 0
    if not (as_reference or args.hard_term == "clean" or args.attack_target == "clean"):
        return None
    if args.hard_term == "clean" or args.kl_gradient == "both":
        return model(x).float()
    with torch.no_grad(), utils.statistics_held(model, args.attack_mode):
        return model(x).float()


def reference_logits(
    start: Tensor, clean: Tensor | None, average: nn.Module | None, x: Tensor, args: Namespace
) -> Tensor:
    """Return the logits that the KL term pulls towards, detached unless the flags say otherwise."""
    if args.kl_reference == "start":
        return start.float()
    if args.kl_reference == "clean":
        return clean if args.kl_gradient == "both" else clean.detach()
    with torch.no_grad():
        return average(x).float()


# --------------------------------------------------------------------------------------------- loop


def train_one_epoch(
    model: nn.Module,
    average: utils.WeightAverage | None,
    optimizer: torch.optim.Optimizer,
    batches,
    epoch: int,
    *,
    attack: Attack,
    args: Namespace,
) -> dict[str, float]:
    """Train over all batches once and return the row of means for the log.

    Raises:
        ValueError: The loss is not finite.
    """
    lr_at = utils.SCHEDULES[args.lr_schedule](args.lr, args.lr_min, args.lr_peak)
    T_at, T_a_at = utils.line(*args.temperature), utils.line(*args.attack_temperature)
    started, sums = time.perf_counter(), 0
    model.train()
    bar = tqdm(batches, f"epoch {epoch}/{args.epochs}", leave=False, disable=None, unit="batch")
    for step, (x, y) in enumerate(bar):
        t = (epoch - 1 + step / len(batches)) / args.epochs
        optimizer.param_groups[0]["lr"] = lr_at(t)
        # The cache is off: it would hand weights cast without a gradient to a pass that needs one.
        with torch.autocast(
            x.device.type, args.dtype, args.dtype != torch.float32, cache_enabled=False
        ):
            terms = mix_kl_step(
                model, average and average.model, x, y,
                T=T_at(t), T_a=T_a_at(t), attack=attack, args=args,
            )  # fmt: skip
        optimizer.zero_grad()
        terms[0].backward()
        optimizer.step()
        if average:
            average.update(model)
        sums = sums + torch.stack(terms).detach()
    loss, hard, kl = (sums / len(batches)).tolist()
    if not math.isfinite(loss):
        raise ValueError(f"epoch {epoch}: the loss is {loss}; try a smaller --lr or --kl-weight")
    seconds = time.perf_counter() - started
    return {
        "epoch": epoch, "lr": lr_at(t), "temperature": T_at(t),
        "loss": loss, "hard_loss": hard, "kl": kl, "train_seconds": seconds,
    }  # fmt: skip


def collapsed(rows: list[dict[str, float]]) -> bool:
    """Return whether the last epoch shows catastrophic overfitting in the raw weights.

    It does where held-out PGD accuracy has lost more than half of its best within two epochs (and
    more than ``COLLAPSE_FLOOR``), and FGSM accuracy has not: where that fell as well, PGD accuracy
    must have kept less than half of the share that FGSM accuracy kept.
    """
    *before, now = rows
    if not before:
        return False
    best = max(before[-2:], key=lambda row: row["pgd10_acc"])
    fgsm_kept = min(1, now["fgsm_acc"] / best["fgsm_acc"]) if best["fgsm_acc"] else 1
    pgd_fell = best["pgd10_acc"] - now["pgd10_acc"] > COLLAPSE_FLOOR
    return pgd_fell and now["pgd10_acc"] < best["pgd10_acc"] * fgsm_kept / 2


def accuracies(
    model: nn.Module, average: utils.WeightAverage | None, measure: Measure
) -> dict[str, float]:
    """Return the held-out accuracies of the raw and of the averaged weights, and the seconds."""
    started = time.perf_counter()
    row = {f"{name}_acc": value for name, value in measure(model).items()}
    if average:
        row |= {f"ema_{name}_acc": value for name, value in measure(average.model).items()}
    return row | {"eval_seconds": time.perf_counter() - started}


def line(row: dict[str, float], epochs: int) -> str:
    """Return what is printed of an epoch."""

    def percentages(prefix: str) -> str:
        names = {"clean": "clean", "fgsm": "FGSM", "pgd10": "PGD-10"}
        return "  ".join(f"{shown} {row[f'{prefix}{n}_acc']:6.2%}" for n, shown in names.items())

    text = f"epoch {row['epoch']:3d}/{epochs}  lr {row['lr']:.4f}  loss {row['loss']:.4f}  "
    text += f"held-out {percentages('')}"
    if "ema_clean_acc" in row:
        text += f"  averaged {percentages('ema_')}"
    text += f"  {row['train_seconds'] + row['eval_seconds']:.0f} s"
    return text + ("  COLLAPSE: catastrophic overfitting" if row["collapse"] else "")


def append_row(path: Path, row: dict[str, float]) -> None:
    """Add one epoch to the CSV log, with a header where it is the first."""
    first = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row.keys())
        if first:
            writer.writeheader()
        writer.writerow(row)


def train(
    model: nn.Module,
    batches,
    *,
    attack: Attack,
    measure: Measure,
    args: Namespace,
    facts: dict[str, object],
    folder: Path,
) -> None:
    """Train ``model`` and leave log, curves and checkpoints in ``folder``.

    Args:
        model: Network on its device.
        batches: Sized iterable; each pass over it is an epoch of (images in [0, 1], labels).
        attack: Makes the adversarial images of a step.
        measure: Returns ``clean``, ``fgsm`` and ``pgd10`` accuracy on held-out images; PGD-10
            accuracy chooses the best epoch, and raw or averaged weights.
        args: All flags.
        facts: What a checkpoint says of itself besides weights: architecture, dataset, flags.
        folder: Existing folder of this run.
    """
    average = utils.WeightAverage(model, args.ema_decay) if args.ema_decay > 0 else None
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay, fused=True
    )
    rows, best = [], -1.0
    for epoch in range(1, args.epochs + 1):
        row = train_one_epoch(model, average, optimizer, batches, epoch, attack=attack, args=args)
        row |= accuracies(model, average, measure)
        rows.append(row)
        row["collapse"] = int(collapsed(rows))
        append_row(folder / "log.csv", row)
        plots.curves(rows, folder / "curves.png")
        print(line(row, args.epochs), flush=True)

        selected = "ema" if row.get("ema_pgd10_acc", -1) >= row["pgd10_acc"] else "raw"
        score = max(row["pgd10_acc"], row.get("ema_pgd10_acc", -1))
        saved = facts | {"epoch": epoch, "metrics": row, "raw": model.state_dict()}
        saved |= {"ema": average.model.state_dict()} if average else {}
        if score > best:
            best = score
            checkpoint.save(folder / "best_model.pth", saved | {"selected": selected})
        final = "ema" if average else "raw"
        checkpoint.save(folder / "final_model.pth", saved | {"selected": final})
        if row["collapse"] and args.early_stop:
            print(f"stopped after epoch {epoch}: --early-stop, and the run has collapsed")
            break
