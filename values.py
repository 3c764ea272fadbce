"""Values of flags: sizes in 1/255, numbers within bounds, lines over the run."""

import argparse
import math
from collections.abc import Callable


def pixels(text: str) -> float:
    """Return a size in 1/255 from ``8``, ``8/255`` or a fraction of 1 such as ``0.03137``.

    ``0.5`` could be either: without a slash, what lies between 64/255 and 1 is refused.
    """
    size, slash, scale = text.partition("/")
    value = float(size)
    if not slash and 64 / 255 < value < 1:
        raise argparse.ArgumentTypeError(f"{text}: write {text}/255, or {255 * value:g}/255")
    if slash or value < 1:
        value *= 255 / (float(scale or 1) or math.nan)
    if not 0 <= value <= 255:
        raise argparse.ArgumentTypeError(f"{text}: not in [0, 255], in units of 1/255")
    return value


def distinct(sizes: list[float]) -> list[float]:
    """Return sizes in 1/255 in their order, each once: 8, 8/255 and 0.03137 are one."""
    return list({round(size, 2): size for size in sorted(sizes)}.values())


def number(low: float, high: float = math.inf, kind: type = float) -> Callable[[str], float]:
    """Return a parser of finite numbers in [low, high]."""

    def parse(text: str) -> float:
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text}: outside [{low:.10g}, {high:.10g}]")
        return value

    parse.__name__ = "number"
    return parse


def count(low: int = 1, high: int = 2**31 - 1) -> Callable[[str], int]:
    """Return a parser of whole numbers in [low, high]."""
    return number(low, high, int)


def temperatures(text: str) -> tuple[float, float]:
    """Return first and last temperature from ``2`` (constant) or ``4:1`` (a line over the run)."""
    return ends(text, lambda value: value > 0, "temperatures are above 0")


def weights(text: str) -> tuple[float, float]:
    """Return first and last weight from ``1`` (constant) or ``1:4`` (a line over the run)."""
    return ends(text, lambda value: value >= 0, "weights are 0 or more")


def ends(text: str, fits: Callable[[float], bool], rule: str) -> tuple[float, float]:
    """Return both numbers of ``4:1``, or twice the one of ``2``; all are finite and fit."""
    first, _, last = text.partition(":")
    values = float(first), float(last or first)
    if not all(fits(value) and math.isfinite(value) for value in values):
        raise argparse.ArgumentTypeError(f"{text}: {rule}")
    return values
