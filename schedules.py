"""What changes over a run: learning rate, temperatures, weights of KL and Mixup, image sizes."""

import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

import utils

Schedule = Callable[[float], float]  # progress of the run in [0, 1] -> value


class Row(NamedTuple):
    """What changes from step to step."""

    lr: float
    T: float  # temperature of the KL term
    T_a: float  # that of the attack
    W: float  # weight of the KL term
    lam: float  # weight of an image in its mixture
    pull: float  # of the weight average


def multistep(lr: float) -> Schedule:
    """Return lr, a tenth of it from 99/110 of the run on, a hundredth from 104/110 on."""
    return lambda t: lr * (1 if t < 99 / 110 else 0.1 if t < 104 / 110 else 0.01)


def triangular(lr: float, lr_min: float, rise: float) -> Schedule:
    """Return the line from ``lr_min`` up to ``lr`` at progress ``rise``, and down again."""
    return lambda t: lr_min + (lr - lr_min) * min(t / rise, (1 - t) / (1 - rise))


def cosine(lr: float, lr_min: float) -> Schedule:
    """Return half a cosine from ``lr`` down to ``lr_min``, arXiv:1608.03983, Eq. 5."""
    return lambda t: lr_min + (lr - lr_min) * (1 + math.cos(math.pi * t)) / 2


def one_cycle(lr: float, lr_min: float, rise: float) -> Schedule:
    """Return half a cosine from lr/25 up to ``lr``, then one to ``lr_min``, arXiv:1708.07120."""
    up, down = cosine(lr / 25, lr), cosine(lr, lr_min)
    return lambda t: up(t / rise) if t < rise else down((t - rise) / (1 - rise))


SCHEDULES: dict[str, Callable[[float, float, float], Schedule]] = {
    "multistep": lambda lr, lr_min, rise: multistep(lr),
    "cyclic": triangular,
    "onecycle": one_cycle,
    "cosine": lambda lr, lr_min, rise: cosine(lr, lr_min),
    "constant": lambda lr, lr_min, rise: lambda t: lr,
}


def ramp(t: float, until: float) -> float:
    """Return the line from 0 at the beginning to 1 at progress ``until``, and 1 from there on."""
    return min(1.0, t / until) if until > 0 else 1.0


def line(first: float, last: float) -> Schedule:
    """Return the line from ``first`` to ``last``: a temperature, or the weight of the KL term."""
    return lambda t: first + (last - first) * t


def stage(values: Sequence[int], epoch: int, epochs: int) -> int:
    """Return the value of an epoch (from 1) of a run that has ``values`` in turn, equally long."""
    return values[(epoch - 1) * len(values) // epochs]


def plan(args: Namespace, epoch: int, steps: int, rng: np.random.Generator) -> list[Row]:
    """Return a row for each step of an epoch, from 1.

    They are the same in every process, since flags, epoch and ``rng`` alone decide.
    """
    lr_at = SCHEDULES[args.lr_schedule](args.lr, args.lr_min, args.lr_peak)
    T_at, T_a_at = line(*args.temperature), line(*args.attack_temperature)
    W_at = line(*args.kl_weight)
    lam = utils.draw_lam(args.mixup_alpha, steps, rng).tolist()
    rows = []
    for step in range(steps):
        t, done = (epoch - 1 + step / steps) / args.epochs, (epoch - 1) * steps + step
        W, pull = ramp(t, args.kl_warmup) * W_at(t), utils.pull(args.ema_decay, done)
        rows.append(Row(lr_at(t), T_at(t), T_a_at(t), W, lam[step], pull))
    return rows
