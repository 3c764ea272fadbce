"""Processes that train together: real ones, started by torchrun, talking over gloo."""

import csv
import importlib.util
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, write_archive

import attacks
import checkpoint
import data
import engine
import options
import parallel
import resume
import schedules
import utils
from models import build_model

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TINY = ["--width", "8", "--held-out", "40", "--batch-size", "32", "--precision", "fp32"]
TINY += ["--mixup-alpha", "0.2"]


def together(cwd, *words):
    """Run a script in two processes; return exit status, standard output and standard error."""
    done = subprocess.run(
        [sys.executable, *TORCHRUN, ROOT / words[0], *map(str, words[1:])],
        cwd=cwd, env=os.environ | {"OMP_NUM_THREADS": "1"},  # torchrun's own where none is set
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def log(folder):
    with (folder / "log.csv").open() as file:
        return list(csv.DictReader(file))


def put(statistics, model):
    with torch.no_grad():
        for mine, value in zip(utils.statistics(model), statistics, strict=True):
            mine.copy_(value)


def losses_of_one_process(data_dir, epochs):
    """The same global batch in one process: each share of it normalised by its own statistics."""
    args = options.parse_training([*TINY, "--epochs", str(epochs)], "doc", {})
    args.num_classes, args.dtype = 10, torch.float32
    dataset = data.load("cifar10", 10, data_dir, False)
    batches = data.TrainingBatches(data.split_held_out(dataset.train, 40)[0][:32], 32)
    network = dict(num_classes=10, width=8, mean=dataset.mean, std=dataset.std)
    states = []
    for rank in (1, 0):
        utils.seed_everything(0, rank)
        model = build_model("PreActResNet18", **network).to(memory_format=torch.channels_last)
        states.insert(0, torch.get_rng_state())
    attack = partial(attacks.craft, epsilon=8 / 255, alpha=8 / 255, start=args.delta_init)
    optimizer = torch.optim.SGD(
        model.parameters(), torch.tensor(0.1), 0.9, weight_decay=5e-4, fused=True
    )
    losses = []
    for epoch in range(1, epochs + 1):
        rng = np.random.default_rng([0, epoch])
        ((lr, T, T_a, W, lam, _),) = schedules.plan(args, epoch, 1, rng)
        (order,) = batches.shuffled(rng)
        optimizer.zero_grad()
        begun, ended, shares = [t.clone() for t in utils.statistics(model)], [], []
        for rank in (0, 1):
            torch.set_rng_state(states[rank])
            put(begun, model)  # each process attacks on statistics of its own
            x, y = batches.load(order[rank::2])
            loss, _, _ = engine.mix_kl_step(
                model.train(), None, x, y, lam=torch.tensor(lam), T=T, T_a=T_a, W=W,
                attack=attack, args=args,
            )  # fmt: skip
            (loss / 2).backward()
            shares.append(loss.item())
            states[rank] = torch.get_rng_state()
            ended.append([t.clone() for t in utils.statistics(model)])
        put([(one + two) / 2 for one, two in zip(*ended, strict=True)], model)  # after the epoch
        optimizer.param_groups[0]["lr"].fill_(lr)
        optimizer.step()
        losses.append(sum(shares) / 2)
    return losses


@pytest.mark.slow
def test_two_processes_train_as_one_does_and_measure_the_same(tmp_path, script):
    data_dir = write_archive(tmp_path, 10, train=120)
    common = ["--data-dir", data_dir, "--out_dir", tmp_path]
    train = [*common, *TINY, "--train-images", "32", "--epochs", "20", "--run-name", "run"]
    code, out, err = together(tmp_path, "MIX_KL_CIFAR10.py", *train)
    assert code == 0, err
    assert out.count("epoch   1/20") == 1 and "2 x cpu" in out
    rows = log(tmp_path / "run")
    assert [int(row["epoch"]) for row in rows] == list(range(1, 21))
    losses = [float(row["loss"]) for row in rows]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun does: sums round by threads, and a sign may flip on that
    expected = losses_of_one_process(data_dir, 20)
    torch.set_num_threads(threads)
    assert losses == pytest.approx(expected, abs=1e-5)
    assert losses[-1] < losses[0]

    final = tmp_path / "run" / "final_model.pth"
    attacks_ = ["clean", "fgsm", "pgd-5-2", "cw-3", "transfer"]
    attacks_ += ["apgd-ce"] * bool(importlib.util.find_spec("pyautoattack"))
    measure = [*common, "--model_path", final, "--transfer-from", final, "--batch-size", "2"]
    measure += ["--attacks", *attacks_]
    code, out, err = together(tmp_path, "test_cifar10.py", *measure)
    assert code == 0, err
    assert script("test_cifar10", *measure)[0] == 0
    reports = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("run-*report*.json"))]
    assert len(reports) == 2 and out.count("worst case, image by image") == 1
    for found in reports:
        for row in found["attacks"]:
            row.pop("seconds")
    assert reports[0] == reports[1]


def processes_below(parent):
    """Return rank -> process number of the children of torchrun."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status, environ = (folder / "status").read_text(), (folder / "environ").read_bytes()
        except OSError:
            continue
        rank = re.search(rb"(?:^|\0)RANK=(\d+)", environ)
        if f"PPid:\t{parent}\n" in status and rank:
            found[int(rank[1])] = int(folder.name)
    return found


def scheduled(*commands, **pipes):
    """Start one process a command, as a scheduler does; return them by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    found = []
    for rank, words in enumerate(commands):
        environ = os.environ | dict(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1", SLURM_LOCALID=str(rank),
            SLURM_PROCID=str(rank), SLURM_STEP_NUM_TASKS=str(len(commands)),
        )  # fmt: skip
        found.append(subprocess.Popen([sys.executable, *map(str, words)], env=environ, **pipes))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "scheduler"])
def test_a_killed_process_ends_the_others_with_a_line_and_a_whole_checkpoint(tmp_path, launcher):
    """Torchrun stops the others itself; under a scheduler they must notice."""
    data_dir = write_archive(tmp_path, 10, train=120)
    words = [ROOT / "MIX_KL_CIFAR10.py", "--data-dir", data_dir, "--out_dir", tmp_path, *TINY]
    words += ["--epochs", "5000", "--run-name", "run"]
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if launcher == "torchrun":
        started = subprocess.Popen([sys.executable, *TORCHRUN, *map(str, words)], **pipes)
        children = lambda: processes_below(started.pid)  # noqa: E731
    else:
        both = scheduled(words, words, **pipes)
        started = both[0]
        children = lambda: {rank: process.pid for rank, process in enumerate(both)}  # noqa: E731
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "final_model.pth").exists():
            assert started.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(children()[1], signal.SIGKILL)
        _, err = started.communicate(timeout=60)
    finally:
        started.kill()
    assert started.returncode not in (0, None)
    assert re.search(r"error: rank 0: (told to stop|another process is gone)", err), err
    saved = checkpoint.load(tmp_path / "run" / "final_model.pth")
    assert saved["epoch"] >= 1


SLOW_DISK = """
import sys, time
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, {root!r})
import torch
import files, keeper, options, parallel, resume

write = files.write

def slowly(*args, **kwargs):
    time.sleep(2)
    write(*args, **kwargs)

def main(argv):
    parallel.start("cpu")
    keeper.files.write = slowly
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    parts = resume.Parts(model, None, optimizer, scaler)
    progress = resume.Progress(sums=torch.zeros(3))
    args = Namespace(save_every=15, on_collapse="", epochs=1)
    folder = None if parallel.rank() else Path(argv[0])
    watch = keeper.Keeper(folder, parts, progress, args, 10_000)
    with parallel.together(), watch.listening():
        (Path(argv[0]) / str(parallel.rank())).touch()
        for progress.step in range(1, 10_000):
            time.sleep(0.02)
            watch.after_step()

options.run(main)
"""


@pytest.mark.slow
def test_no_process_ends_at_a_signal_before_the_state_is_written(tmp_path):
    """Its launcher would end the others, and the one that writes with them."""
    (tmp_path / "slow.py").write_text(SLOW_DISK.format(root=str(ROOT)))
    both = scheduled(*[[tmp_path / "slow.py", tmp_path]] * 2, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not all((tmp_path / rank).exists() for rank in "01"):
            assert both[0].poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        both[0].send_signal(signal.SIGUSR1)  # the other hears of it
        assert both[1].wait(timeout=60) == 128 + signal.SIGUSR1
        assert resume.load(tmp_path / resume.NAME)["progress"]["step"] > 0
        assert both[0].wait(timeout=60) == 128 + signal.SIGUSR1
    finally:
        for process in both:
            process.kill()


def test_a_scheduler_that_names_no_address_gets_one_line(script, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_LOCALID", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    status, _, err = script("MIX_KL_CIFAR10", "--synthetic")
    assert (status, len(err.splitlines())) == (2, 1)
    assert "4 processes, but MASTER_ADDR is not set" in err


@pytest.mark.parametrize("names", [
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
], ids=["torchrun", "srun", "mpirun"])  # fmt: skip
def test_each_launcher_is_known_by_its_names(names, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in zip(names, "040", strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="4 processes, but MASTER_ADDR is not set"):
        parallel.start("cpu")


def test_a_process_that_is_not_told_its_gpu_gets_one_line(monkeypatch):
    """Alone it would train the whole run, beside the others."""
    for name, value in dict(RANK="1", WORLD_SIZE="2", MASTER_ADDR="x", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="2 processes, but LOCAL_RANK is not set"):
        parallel.start("auto")


def test_processes_that_cannot_meet_get_one_line(script, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for name, value in dict(
            RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(taken.getsockname()[1]),
        ).items():  # fmt: skip
            monkeypatch.setenv(name, value)
        status, _, err = script("MIX_KL_CIFAR10", "--synthetic", "--device", "cpu")
        assert (status, len(err.splitlines())) == (2, 1)
        assert "rank 0: the 2 processes cannot find each other at 127.0.0.1:" in err
    status, _, err = script("MIX_KL_CIFAR10", "--synthetic", "--device", "cuda:1")
    assert status == 2 and "--device cuda:1: each of 2 processes takes a GPU of its own" in err


@pytest.mark.slow
def test_processes_that_found_different_states_do_not_go_on(tmp_path):
    """As with an --out-dir that each machine has for itself."""
    words = [ROOT / "MIX_KL_CIFAR10.py", "--data-dir", write_archive(tmp_path, 10, train=120)]
    words += [*TINY, "--train-images", "32", "--epochs", "1", "--run-name", "run", "--resume"]
    mine, other = ([*words, "--out_dir", tmp_path / name] for name in ("mine", "other"))
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    for process in scheduled(mine, mine, **pipes):
        assert process.wait(timeout=120) == 0
    log_before = (tmp_path / "mine" / "run" / "log.csv").read_bytes()
    both = scheduled(mine, other, **pipes)
    lines = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [2, 2]
    assert any("--resume: the processes found different states" in text for text in lines), lines
    assert (tmp_path / "mine" / "run" / "log.csv").read_bytes() == log_before


@pytest.mark.parametrize("text, says", [
    ("[gloo/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1", "another process is gone"),
    ("NCCL error: unhandled system error. Last error: No space left on /dev/shm", "cannot talk"),
])  # fmt: skip
def test_an_error_between_processes_is_called_what_it_is(text, says):
    with pytest.raises(ConnectionError, match=says) as found, parallel.together():
        raise torch.distributed.DistBackendError(text)
    assert text[-20:] in str(found.value)


@pytest.mark.parametrize("end, status", [(ValueError("no"), 2), (SystemExit(143), 143)])
def test_among_others_a_process_ends_without_unwinding_the_interpreter(monkeypatch, end, status):
    """Else the threads of its connections abort it, in one of six refused runs that were counted.

    The stand-in for os._exit raises: a second exit, by the interpreter, would be seen.
    """

    class Left(BaseException):
        pass

    def main(_):
        print("said before", end="")
        raise end

    def leave(code):
        raise Left(code, sys.stdout.buffer.getvalue())

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))  # as a pipe is: held back
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(sys, "argv", ["MIX_KL_CIFAR10.py"])
    with pytest.raises(Left) as left:
        options.run(main)
    assert left.value.args == (status, b"said before")


def test_a_single_process_shares_with_nobody():
    assert (parallel.rank(), parallel.size()) == (0, 1)
    items = torch.arange(5.0)
    parallel.average_([items])
    assert torch.equal(parallel.share(items), torch.arange(5.0))
    assert torch.equal(parallel.minimum_(items), torch.arange(5.0))
    model = torch.nn.Linear(2, 2)
    assert parallel.wrapped(model) is model is parallel.unwrapped(model)


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch, batch):
    monkeypatch.setattr(parallel, "size", lambda: 3)
    args = options.parse_training([], "doc", {})
    with pytest.raises(ValueError, match="--batch-size 128: not a multiple of the 3 processes"):
        engine.prepare(torch.nn.Linear(1, 1), None, args)
    for args.attack_mode, args.batch_size, least in (("both", 9, 4), ("train", 3, 2)):
        line = f"--batch-size {args.batch_size}: each process needs {least} images with --attack-m"
        with pytest.raises(ValueError, match=line):
            engine.prepare(torch.nn.Linear(1, 1), None, args)
