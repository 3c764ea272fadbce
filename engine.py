"""The method, and the loop around it. Knows no dataset and no attack: both come as arguments."""

import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import graph
import keeper
import parallel
import record
import resume
import rollback
import schedules
import utils

# (model, images, loss of the logits) -> adversarial images and the detached logits of the start
Attack = Callable[[nn.Module, Tensor, Callable[[Tensor], Tensor]], tuple[Tensor, Tensor]]
Step = Callable[[Tensor, Tensor], Tensor]  # indices of images, a row of the plan -> loss terms


def mix_kl_step(
    model: nn.Module, average: nn.Module | None, x: Tensor, y: Tensor, *,
    lam: Tensor, T: Tensor, T_a: Tensor, W: Tensor, attack: Attack, args: Namespace,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the loss of one MIX-KL step, its hard term and its KL term.

    Args:
        model: Network f in train mode, images in [0, 1] to (N, K) logits.
        average: The averaged network, for ``--kl-reference ema``.
        x: (N, C, H, W) images in [0, 1], and ``y``: their (N,) labels.
        lam: Weight of the first image in a mixture of two.
        T: Temperature of the KL term, and ``T_a``: that of the attack.
        W: Weight of the KL term.
        attack: Raises a loss of the logits around x within the threat model.
        args: The flags of the method, and ``num_classes``.
    """
    network = parallel.unwrapped(model)  # no process waits for another in the attack
    if args.mixup_alpha > 0:
        x, y = utils.mixup(x, y, lam, args.num_classes)  # x~, y~
    x_adv, start = attacked(network, x, y, T_a, attack, args)
    clean = clean_logits(network, x, args)
    logits = model(x_adv).float()
    hard_logits = clean if args.hard_term == "clean" else logits
    hard = F.cross_entropy(hard_logits, y, label_smoothing=args.label_smoothing)
    if max(args.kl_weight) == 0:
        return hard, hard, torch.zeros_like(hard)
    reference = reference_logits(start, clean, average, x, args)
    kl = utils.temperature_kl(logits[: len(reference)], reference, T)
    return hard + W * kl, hard, kl


def attacked(
    model: nn.Module, x: Tensor, y: Tensor, T_a: Tensor, attack: Attack, args: Namespace
) -> tuple[Tensor, Tensor]:
    """Return the adversarial images, and the logits of their start that the KL term refers to.

    In the mode ``both`` half of the images meet the batch's statistics, the rest the running ones;
    the logits are those of the first half: the pass that trains uses the batch's statistics, too.
    """

    def crafted(part: slice, mode: str) -> tuple[Tensor, Tensor]:
        with utils.statistics_held(model, mode):
            with torch.no_grad():
                target = model(x[part]).float() if args.attack_target == "clean" else None

            def loss(logits: Tensor) -> Tensor:  # a sum: half precision keeps its gradient
                if target is not None:
                    return len(logits) * utils.temperature_kl(logits.float(), target, T_a)
                return F.cross_entropy(logits / T_a, y[part], reduction="sum")  # KL, but for H(y~)

            return attack(model, x[part], loss)

    if args.attack_mode != "both":
        return crafted(slice(None), args.attack_mode)
    half = (len(x) + 1) // 2
    x_adv, start = crafted(slice(half), "train")
    return torch.cat([x_adv, crafted(slice(half, None), "eval")[0]]), start


def clean_logits(model: nn.Module, x: Tensor, args: Namespace) -> Tensor | None:
    """Return f(x~) where some term asks for it, with a gradient only where one is wanted."""
    if args.hard_term != "clean" and (args.kl_reference != "clean" or max(args.kl_weight) == 0):
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


def whole_step(
    model: nn.Module,
    average: utils.WeightAverage | None,
    optimizer: torch.optim.Optimizer,
    load: Callable[[Tensor], tuple[Tensor, Tensor]],
    scaler: torch.amp.GradScaler,
    *,
    attack: Attack,
    side: int,
    args: Namespace,
) -> Step:
    """Return one step on images of ``side`` pixels; it never waits, so a CUDA graph can hold it."""

    def step(index: Tensor, row: Tensor) -> Tensor:
        lr, T, T_a, W, lam, pull = row.unbind()
        optimizer.param_groups[0]["lr"].copy_(lr)
        x, y = load(index)
        x = utils.resized(x, side)
        # The cache is off: it would hand weights cast without a gradient to a pass that needs one.
        with torch.autocast(
            x.device.type, args.dtype, args.dtype != torch.float32, cache_enabled=False
        ):
            terms = mix_kl_step(
                model, average and average.model, x, y,
                lam=lam, T=T, T_a=T_a, W=W, attack=attack, args=args,
            )  # fmt: skip
        optimizer.zero_grad()
        scaler.scale(terms[0]).backward()
        scaler.step(optimizer)
        scaler.update()
        if average:
            average.update(parallel.unwrapped(model), pull)
        return torch.stack(terms).detach()

    return step


def train_one_epoch(
    step: Step,
    batches,
    progress: resume.Progress,
    args: Namespace,
    after_step: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Train over what is left of an epoch and return the row of means for the log."""
    started, epoch = time.perf_counter() - progress.seconds, progress.epoch
    rng = np.random.default_rng([args.seed, epoch])
    rows = schedules.plan(args, epoch, len(batches), rng)
    order = batches.shuffled(rng)
    bar = tqdm(
        torch.tensor(rows, device=order.device)[progress.step :], f"epoch {epoch}/{args.epochs}",
        leave=False, unit="batch", disable=True if parallel.rank() else None,
    )  # fmt: skip
    for index, row in zip(order[progress.step :], bar, strict=True):
        progress.sums = progress.sums + step(parallel.share(index), row)
        progress.step, progress.seconds = progress.step + 1, time.perf_counter() - started
        after_step()
    means = progress.sums / len(batches)
    parallel.average_([means])
    loss, hard, kl = means.tolist()
    return {
        "epoch": epoch, "lr": rows[-1].lr, "temperature": rows[-1].T, "kl_weight": rows[-1].W,
        "loss": loss, "hard_loss": hard, "kl": kl, "train_seconds": time.perf_counter() - started,
    }  # fmt: skip


def prepare(
    model: nn.Module, batches, args: Namespace
) -> tuple[Callable[[Attack, int], Step], resume.Parts]:
    """Return what builds the step of ``model`` from attack and image side, and the step's parts.

    The step is captured where ``--compile`` says so; another attack or side needs another step.

    Raises:
        ValueError: ``--batch-size`` cannot be shared, or ``--compile`` asks for what is not there.
    """
    device = next(model.parameters()).device
    parallel.refuse_uneven(args.batch_size, args.attack_mode)
    alone_on_gpu = device.type == "cuda" and parallel.size() == 1
    if args.compile == "on" and not alone_on_gpu:
        raise ValueError("--compile on: a CUDA graph needs a GPU and a single process")
    replica = parallel.wrapped(model)
    average = utils.WeightAverage(model) if args.ema_decay > 0 else None
    optimizer = torch.optim.SGD(
        model.parameters(), torch.tensor(args.lr, device=device), args.momentum,
        weight_decay=args.weight_decay, nesterov=args.nesterov, fused=True,
    )  # fmt: skip
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == torch.float16)
    parts = resume.Parts(model, average, optimizer, scaler)
    model.train()

    def build(attack: Attack, side: int) -> Step:
        step = whole_step(
            replica, average, optimizer, batches.load, scaler, attack=attack, side=side, args=args
        )
        if alone_on_gpu and args.compile != "off":
            with device:
                example = torch.arange(args.batch_size), torch.ones(len(schedules.Row._fields))
            untouched = scaler.state_dict()
            step = graph.captured(step, example, parts.tensors())
            scaler.load_state_dict(untouched)
        return step

    return build, parts


def current(
    build: Callable[[Attack, int], Step],
    attack_of: Callable[[float, str], Attack],
    args: Namespace,
) -> Callable[[resume.Progress], Step]:
    """Return what gives the step of an epoch, built anew where attack or image side change."""
    step, made_for = None, None

    def step_of(progress: resume.Progress) -> Step:
        nonlocal step, made_for
        remedy = rollback.remedy(args, progress.rollbacks)
        side = schedules.stage(args.image_sizes, progress.epoch, args.epochs)
        if made_for != (remedy, side):
            step = None  # a captured one gives its memory back before the next is recorded
            step, made_for = build(attack_of(*remedy), side), (remedy, side)
        return step

    return step_of


def train(
    model: nn.Module,
    batches,
    *,
    attack_of: Callable[[float, str], Attack],
    measure: record.Measure,
    args: Namespace,
    facts: dict[str, object],
    folder: Path | None,
    state: Path | None = None,
) -> None:
    """Train ``model`` and leave log, curves and checkpoints in ``folder``.

    Args:
        model: Network on its device.
        batches: Has a length, ``shuffled(rng)``: the (len, B) indices of an epoch, and
            ``load(index)``: images in [0, 1] and their labels.
        attack_of: Makes the attack of a step from ``--alpha`` and ``--delta-init``, which a
            rollback changes.
        measure: Returns ``clean``, ``fgsm`` and ``pgd10`` accuracy on held-out images; PGD-10
            accuracy chooses the best epoch, and raw or averaged weights.
        args: All flags.
        facts: What a checkpoint says of itself besides weights: architecture, dataset, flags.
        folder: Existing folder of this run; None in a process that writes nothing.
        state: File that the run goes on from; None for a fresh start.

    Raises:
        checkpoint.DivergedError: Loss or weights are not finite any more.
        SystemExit: A signal told the run to stop; its state is saved.
    """
    build, parts = prepare(model, batches, args)
    progress = resume.progress_of(state, parts, args, len(batches))
    facts = facts | {"commit": progress.commit}
    average, step_of = parts.average, current(build, attack_of, args)
    watch = keeper.Keeper(folder, parts, progress, args, len(batches))
    if folder:  # nothing was touched so far: the run could still be refused
        record.begin_files(folder, args, progress.commit, progress.rows if state else None)
    with watch.listening():
        while progress.epoch <= args.epochs and not rollback.stopped(progress, args):
            row = train_one_epoch(step_of(progress), batches, progress, args, watch.after_step)
            parallel.average_(parts.statistics())
            measured = record.to_measure(row["epoch"], args)
            row |= record.accuracies(model, average, measure if measured else record.unmeasured)
            progress.rows.append(row)
            row["collapse"] = int(record.collapsed(progress.rows))
            row |= rollback.columns(progress, args)
            watch.check()
            keep = watch.keeps(measured)
            if folder:
                watch.write(partial(
                    record.write_epoch, folder, progress, model, average and average.model, facts,
                    keep=keep,
                ))  # fmt: skip
            parallel.say(record.line(row, args.epochs))
            rollback.follow(progress, parts, args)
            progress.begin(progress.epoch + 1)
            watch.after_epoch(keep)
    watch.close()
    if reason := rollback.stopped(progress, args):
        parallel.say(f"stopped after epoch {progress.rows[-1]['epoch']}: {reason}")
