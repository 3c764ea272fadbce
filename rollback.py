"""The way back from a collapse: healthy states of a run, and a gentler attack from there on.

The verdict, ``record.collapsed``, compares with the better of the two measured epochs before. So
the states at the end of these two are kept, and the better one is the one to go back to.
"""

from argparse import Namespace

import torch

import parallel
import resume

LIMIT = 5  # rollbacks of a run
SHRINK = 0.75  # of the attack's step, where the start of N-FGSM is not enough


def remedy(args: Namespace, rollbacks: int) -> tuple[float, str]:
    """Return step [1/255] and start of the attack after so many rollbacks.

    The first changes to the start of N-FGSM, arXiv:2202.01181, and a step of at most epsilon; where
    the start was that already, as it is from then on, or the attack takes several steps, which that
    start keeps in no ball, the step shrinks by a quarter.
    """
    alpha, start = args.alpha, args.delta_init
    for _ in range(rollbacks):
        if start == "noise" or args.attack_steps > 1:
            alpha *= SHRINK
        else:
            alpha, start = min(alpha, args.epsilon), "noise"
    return alpha, start


def columns(progress: resume.Progress, args: Namespace) -> dict[str, object]:
    """Return what the log says of rollbacks in its last epoch; nothing where none is asked for.

    ``alpha`` and ``delta_init`` are those that the epoch was trained with, after ``rollbacks`` of
    them. On a collapse ``rollback_to`` is the epoch at whose end the run goes on.
    """
    if args.on_collapse != "rollback":
        return {}
    alpha, start = remedy(args, progress.rollbacks)
    able = progress.rows[-1]["collapse"] and progress.rollbacks < LIMIT and progress.healthy
    return {
        "alpha": alpha, "delta_init": start, "rollbacks": progress.rollbacks,
        "rollback_to": best(progress.healthy)["epoch"] if able else None,
    }  # fmt: skip


def best(healthy: list[dict[str, object]]) -> dict[str, object]:
    """Return the healthy state with the highest PGD-10 accuracy."""
    return max(healthy, key=lambda state: state["pgd10_acc"])


def follow(progress: resume.Progress, parts: resume.Parts, args: Namespace) -> None:
    """Keep the state of a healthy epoch, or go back to one; the attack is a gentler one then.

    All processes must call this; random states are left alone, so that epochs which are trained
    again see other crops and starts.
    """
    row = progress.rows[-1]
    if args.on_collapse != "rollback" or row["pgd10_acc"] is None:
        return
    if not row["collapse"]:
        state = {"epoch": row["epoch"], "pgd10_acc": row["pgd10_acc"]} | resume.learned(parts)
        progress.healthy = [*progress.healthy[-1:], on_cpu(state)]
    if row["rollback_to"] is None:
        return
    state = best(progress.healthy)
    resume.put_learned(state, parts)
    progress.healthy = [kept for kept in progress.healthy if kept["epoch"] <= state["epoch"]]
    progress.epoch, progress.rollbacks = state["epoch"], progress.rollbacks + 1
    alpha, start = remedy(args, progress.rollbacks)
    parallel.say(
        f"rollback {progress.rollbacks} of at most {LIMIT}: epoch {row['epoch']} has collapsed; "
        f"back to the end of epoch {state['epoch']}, and on with --delta-init {start} --alpha "
        f"{alpha:g}/255 (were {row['delta_init']}, {row['alpha']:g}/255)"
    )


def on_cpu(value: object) -> object:
    """Return a copy of nested dicts and lists of tensors, in the memory of the host."""
    if isinstance(value, dict):
        return {key: on_cpu(item) for key, item in value.items()}
    if isinstance(value, list):
        return [on_cpu(item) for item in value]
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


def stopped(progress: resume.Progress, args: Namespace) -> str:
    """Return why a run ends at its last epoch, which has collapsed; empty where it goes on."""
    if not progress.rows or not progress.rows[-1]["collapse"] or args.on_collapse == "warn":
        return ""
    if args.on_collapse == "stop":
        return "--on-collapse stop, and the run has collapsed"
    if progress.rows[-1].get("rollback_to") is not None:
        return ""
    why = f"after {progress.rollbacks} rollbacks" if progress.healthy else "and no state is healthy"
    return f"--on-collapse rollback, and the run has collapsed {why}"
