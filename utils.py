"""Mixup, temperature-scaled KL, weight averaging, seeding and the choice of device."""

import copy
import ctypes
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ------------------------------------------------------------------------------------------- labels


def draw_lam(alpha: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return ``count`` mixing weights lam ~ Beta(alpha, alpha); all 1 where alpha is 0."""
    return rng.beta(alpha, alpha, count) if alpha > 0 else np.ones(count)


def mixup(x: Tensor, y: Tensor, lam: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mix each image and its label with those of the one before it, arXiv:1710.09412, Eq. 1.

    In a shuffled batch that is a random partner, and never the image itself.

    Args:
        x: (N, C, H, W) images.
        y: (N,) class indices.
        lam: Weight of an image against its partner, in [0, 1]; a scalar.
        num_classes: K.

    Returns:
        (N, C, H, W) mixed images and (N, K) label distributions.
    """
    labels = x.new_zeros(len(y), num_classes).scatter_(1, y[:, None], 1)
    return torch.lerp(x.roll(1, 0), x, lam), torch.lerp(labels.roll(1, 0), labels, lam)


def smoothing_of_factor(factor: float, num_classes: int) -> float:
    """Return the smoothing s that equals the label relaxation factor of the published scripts.

    Relaxation gives the right class ``factor`` and shares the rest among the K - 1 others; label
    smoothing shares s among all K. They are the same labels where s = (1 - factor) K / (K - 1).

    Raises:
        ValueError: The right class would get less than chance.
    """
    if factor < 1 / num_classes:
        raise ValueError(f"--factor {factor}: below chance, 1/{num_classes}")
    return (1 - factor) * num_classes / (num_classes - 1)


# --------------------------------------------------------------------------------------- divergence


def temperature_kl(student: Tensor, teacher: Tensor, temperature: float | Tensor) -> Tensor:
    """Return T^2 KL( softmax(teacher / T) || softmax(student / T) ), the mean over images.

    Hinton et al., arXiv:1503.02531, section 2. The gradient in ``student`` is
    T (softmax(student / T) - softmax(teacher / T)) / N; without T^2 it would vanish as 1 / T^2 for
    large T. Gradients flow to both arguments: detach the teacher to stop its own.

    Args:
        student: (N, K) logits.
        teacher: (N, K) logits.
        temperature: T > 0.
    """
    log_q = F.log_softmax(student / temperature, dim=1)
    log_p = F.log_softmax(teacher / temperature, dim=1)
    return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


# --------------------------------------------------------------------------------- weight averaging


class WeightAverage:
    """An exponential moving average of a network's weights and buffers, beside the network.

    ``model`` is the averaged network, in eval mode, frozen; ``tensors`` are all its parts.
    """

    def __init__(self, model: nn.Module) -> None:
        """Start from a copy of ``model``."""
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.tensors = list(self.model.state_dict().values())

    @torch.no_grad()
    def update(self, model: nn.Module, pull: Tensor) -> None:
        """Move by the share ``pull`` (see there) towards ``model``; integer buffers are copied."""
        pairs = list(zip(self.tensors, model.state_dict().values(), strict=True))
        mine, theirs = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
        torch._foreach_lerp_(mine, theirs, [pull] * len(mine))
        for average, value in pairs:
            if not average.is_floating_point():
                average.copy_(value)


def pull(decay: float, updates: int) -> float:
    """Return how far an average of this decay moves after ``updates`` updates, in (0, 1].

    The decay warms up as min(decay, (1 + t) / (10 + t)): the random start is soon forgotten.
    """
    return 1 - min(decay, (1 + updates) / (10 + updates))


def finite(tensors: list[Tensor]) -> bool:
    """Return whether all of them are finite; a GPU is waited for once."""
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())


def statistics(model: nn.Module | None) -> list[Tensor]:
    """Return the running means and variances of a network."""
    buffers = dict(model.named_buffers()) if model else {}
    return [value for name, value in buffers.items() if "running_" in name]


@contextmanager
def statistics_held(model: nn.Module, mode: str) -> Iterator[None]:
    """Record no batch norm statistics within; afterwards the model is in train mode.

    Args:
        model: A network in train mode.
        mode: ``eval``: batch norm uses the running statistics. Else: those of the batch.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    model.train(mode != "eval")
    for layer in layers:
        layer.track_running_stats = mode == "eval"
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
        model.train()


# ------------------------------------------------------------------------------------------ images


def resized(x: Tensor, side: int) -> Tensor:
    """Return (N, C, side, side) images, anti-aliased, in the memory format of ``x``."""
    if x.shape[-1] == side:
        return x
    return F.interpolate(x, (side, side), mode="bilinear", antialias=True)


# ------------------------------------------------------------------------------------- this process


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed python, numpy and torch on every device, differently in each process."""
    seed += 1_000_003 * rank
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def pick_device(name: str) -> torch.device:
    """Return the device called ``name``, made current; ``auto`` is the first GPU, else the CPU.

    Raises:
        ValueError: No such device is here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # there are devices that only pretend to compute
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device {name}: not available ({str(error).splitlines()[0]}); --device auto takes "
            "what is here"
        ) from error
    if probe.device.type == "cuda":
        torch.cuda.set_device(probe.device)  # a CUDA graph is recorded on the current one
    return probe.device


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the number format of the training passes; ``auto`` is bf16 where it is faster."""
    if name == "auto":
        name = "bf16" if has_fast_bf16(device) else "fp32"
    return PRECISIONS[name]


def has_fast_bf16(device: torch.device) -> bool:
    """Return whether the processor multiplies bf16 numbers faster than fp32 ones.

    The instructions alone do not say so: AVX-512's reach twice the fp32 rate on AMD's processors,
    and half of it on Intel's (2048 x 2048 products on Emerald Rapids, one core: 80 against
    152 GFLOP/s), where AMX is what bf16 is for.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            facts = cpuinfo.read()
    except OSError:
        return False
    return "amx_bf16" in facts or ("avx512_bf16" in facts and "AuthenticAMD" in facts)


@contextmanager
def memory_named(remedy: str) -> Iterator[None]:
    """Turn a device or a machine that is out of memory within into one line.

    Args:
        remedy: What the user can do about it.

    Raises:
        ValueError: The memory did not do.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        of_gpu = isinstance(error, torch.OutOfMemoryError)
        if not (of_gpu or isinstance(error, MemoryError) or "DefaultCPUAllocator" in text):
            raise
        where = "GPU" if of_gpu else "machine"
        reason = " ".join(text.split())[:160]
        raise ValueError(f"the {where} is out of memory ({reason}); {remedy}") from error


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next step instead of handing it to the kernel.

    A training step allocates and frees hundreds of megabytes on a CPU; faulting them in again each
    time cost a quarter of the step where it was measured. Does nothing on other C libraries.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # from malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
