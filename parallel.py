"""Processes that train one network together, each on its share of every batch.

``torchrun`` or a scheduler starts them and says in the environment who is who. Of a single process
each function here asks nothing and changes nothing, so its callers need no second path.
"""

import gc
import inspect
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NoReturn, TextIO

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import utils

# Where a launcher writes a process's rank, the number of processes, and its rank on its machine.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),  # srun
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),  # mpirun
)
# How long a process waits for one that lives: hours of AutoAttack are dealt out unevenly. One that
# has died is noticed by its closed connection, or by the launcher. At the start they meet sooner.
PATIENCE, MEETING = timedelta(days=1), timedelta(minutes=10)
# How gloo, NCCL and the store say that a connection was closed.
GONE = (
    "closed by peer", "reset by peer", "remote process", "broken pipe", "connection closed",
    "likely closed",
)  # fmt: skip


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def start(device_name: str) -> torch.device:
    """Join the processes that the environment names, and return the device of this one.

    Only rank 0 keeps its standard output.

    Raises:
        ValueError: The device is not here, ``--device`` numbers a GPU although each process takes
            its own, or the processes cannot find each other.
    """
    told = [[os.environ.get(name) for name in names] for names in LAUNCHERS]
    mine, count, local = next((values for values in told if all(values[:2])), ("0", "1", "0"))
    if int(count) == 1:
        return utils.pick_device(device_name)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ValueError(
                f"{count} processes, but {name} is not set: export it (the host of rank 0, a free "
                "port), or start them with torchrun"
            )
    on_gpu = device_name != "cpu" and torch.cuda.is_available()
    if ":" in device_name:
        raise ValueError(
            f"--device {device_name}: each of {count} processes takes a GPU of its own"
        )
    # A scheduler may show each process its own GPU alone; torchrun does not.
    alone = torch.cuda.device_count() == 1 and "LOCAL_WORLD_SIZE" not in os.environ
    index = 0 if alone else local or os.environ.get("LOCAL_RANK")
    if on_gpu and index is None:
        raise ValueError(
            f"{count} processes, but LOCAL_RANK is not set: export it (each one's number among "
            "those of its host), or start them with torchrun"
        )
    device = utils.pick_device(f"cuda:{index}" if on_gpu else device_name)
    who = dict(rank=int(mine), world_size=int(count))
    try:
        store, *_ = next(dist.rendezvous("env://", *who.values(), timeout=MEETING))
        store.set_timeout(PATIENCE)
        dist.init_process_group("nccl" if on_gpu else "gloo", store=store, timeout=PATIENCE, **who)
    except RuntimeError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ValueError(
            f"rank {mine}: the {count} processes cannot find each other at {address}, MASTER_ADDR "
            f"and MASTER_PORT ({str(error).splitlines()[0][:120]})"
        ) from error
    signal.signal(signal.SIGTERM, _told_to_stop)
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return device


def _told_to_stop(*_: object) -> None:
    raise ConnectionAbortedError(
        f"rank {rank()}: told to stop; what the run saved last is whole and can be measured"
    )


@contextmanager
def together() -> Iterator[None]:
    """Leave the group of processes at the end of the block.

    Raises:
        ConnectionError: Another process is gone, or they cannot talk to each other.
    """
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or "gloo" in str(error).lower()
        if not lost:
            raise
        text = " ".join(str(error).split())
        gone = any(sign in text.lower() for sign in GONE)
        what = "another process is gone" if gone else "the processes cannot talk to each other"
        reason = text if len(text) < 240 else f"{text[:120]} ... {text[-120:]}"  # NCCL's is the end
        raise ConnectionError(
            f"rank {rank()}: {what}; what the run saved last is whole and can be measured "
            f"({reason})"
        ) from error
    if dist.is_initialized():
        gc.collect()  # what is left of DDP holds threads, which may not outlive the interpreter
        dist.barrier()
        dist.destroy_process_group()


def say(text: str, file: TextIO | None = None) -> None:
    """Print a line; where it cannot be written (a full disk, a closed pipe) the run goes on."""
    with suppress(OSError):
        print(text, file=file, flush=True)


def leave(status: int) -> NoReturn:
    """Exit with a status, everything said and saved; among other processes, without ado.

    The threads of their connections may not outlive the interpreter: it would abort now and then.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:  # the interpreter tries again, and would change the status
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if dist.is_initialized():
        os._exit(status)
    sys.exit(status)


@contextmanager
def rank_0_first() -> Iterator[None]:
    """Let rank 0 through the block, and the others when it is done: for downloads."""
    if rank():
        dist.barrier()
    yield
    if size() > 1 and rank() == 0:
        dist.barrier()


def wrapped(model: nn.Module) -> nn.Module:
    """Return a network whose backward pass averages gradients over the processes."""
    if size() == 1:
        return model
    known = inspect.signature(DistributedDataParallel).parameters  # torch 2.15 renamed the flag
    flag = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **{flag: False})


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network itself: what the attack runs on, since it averages no gradient."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def share(items: Tensor) -> Tensor:
    """Return the rows that are this process's."""
    return items[rank() :: size()]


def refuse_uneven(batch_size: int, attack_mode: str) -> None:
    """Raise a ValueError where a batch cannot be shared evenly, or batch norm sees one image."""
    least = 4 if attack_mode == "both" else 2
    if batch_size % size():
        raise ValueError(f"--batch-size {batch_size}: not a multiple of the {size()} processes")
    if batch_size < least * size():
        raise ValueError(
            f"--batch-size {batch_size}: each process needs {least} images with --attack-mode "
            f"{attack_mode}"
        )


def average_(tensors: list[Tensor]) -> None:
    """Replace each tensor by its mean over the processes."""
    if size() > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= size()
        for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))


def minimum_(tensor: Tensor) -> Tensor:
    """Replace a tensor, element by element, by its minimum over the processes; return it."""
    if size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
    return tensor


def reduced(numbers: tuple[int, ...], operation: dist.ReduceOp) -> list[int]:
    """Return each number reduced over the processes."""
    if size() == 1:
        return list(numbers)
    tensor = torch.tensor(numbers, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(tensor, operation)
    return tensor.tolist()


def maxima(*numbers: int) -> list[int]:
    """Return the largest of each number over the processes."""
    return reduced(numbers, dist.ReduceOp.MAX)


def anywhere(flag: object) -> bool:
    """Return whether something is true, or there, in any process."""
    return any(maxima(int(bool(flag))))


def gathered(item: object) -> list[object]:
    """Return what each process gives, in the order of their ranks."""
    found = [item] * size()
    if size() > 1:
        dist.all_gather_object(found, item)
    return found


def total(number: int) -> int:
    """Return the sum of a number over the processes."""
    return reduced((number,), dist.ReduceOp.SUM)[0]
