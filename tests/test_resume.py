"""Runs that are killed at random moments end as the uninterrupted run does."""

import contextlib
import csv
import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SmallNet, write_archive
from test_engine import Batches, flags

import checkpoint
import engine
import evaluation
import files
import keeper
import options
import parallel
import record
import resume
from models import build_model

TINY = ["--width", "8", "--epochs", "3", "--batch-size", "20", "--held-out", "20"]
TINY += ["--save-every", "0", "--train-images", "200", "--precision", "fp32"]
TINY += ["--mixup-alpha", "0.2"]
GROWING = ["--image-sizes", "16", "24", "32"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def command(data_dir, out_dir, name, *more):
    words = ["--data-dir", data_dir, "--out_dir", out_dir, *TINY, "--run-name", name, *more]
    return [ROOT / "MIX_KL_CIFAR10.py", *words]


def start(words, launcher=()):
    """Start a run in a process group of its own."""
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *launcher, *map(str, words)], env=environ, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def finish(words, launcher=()):
    process = start(words, launcher)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    return out


def log(folder):
    with (folder / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in rows]


def assert_same_run(one, other):
    assert log(one) == log(other) and len(log(one)) == 3
    for name in ("final_model.pth", "best_model.pth"):
        first, second = (checkpoint.load(folder / name) for folder in (one, other))
        assert first["epoch"] == second["epoch"] and first["selected"] == second["selected"]
        for weights in ("raw", "ema"):
            assert first[weights].keys() == second[weights].keys()
            for key, value in first[weights].items():
                assert torch.equal(value, second[weights][key]), (name, weights, key)
    momenta = [resume.load(folder / resume.NAME)["momentum"] for folder in (one, other)]
    assert all(map(torch.equal, *momenta))


def kill_at_random(words, launcher, rng, folder):
    """Kill a run and all its processes: a moment after it starts to save, or at any moment."""
    process, before = start(words, launcher), time.time()
    if rng.random() < 0.5:  # within a save: its partial file is there for some milliseconds
        while process.poll() is None and not list(folder.glob("*.partial")):
            time.sleep(0.0005)
    else:
        while process.poll() is None and not (folder / resume.NAME).exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 6))
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return time.time() - before


@pytest.mark.parametrize(
    "kills, launcher",
    [
        pytest.param(2, [], id="short"),
        pytest.param(14, [], id="long", marks=[pytest.mark.slow, pytest.mark.exhaustive]),
        pytest.param(
            6, TORCHRUN, id="two-processes", marks=[pytest.mark.slow, pytest.mark.exhaustive]
        ),
    ],
)
def test_a_run_killed_at_random_ends_as_if_nothing_had_happened(tmp_path, kills, launcher):
    data_dir, rng = write_archive(tmp_path, 10), random.Random(0)
    finish(command(data_dir, tmp_path, "whole", *GROWING), launcher)
    words = command(data_dir, tmp_path, "killed", *GROWING, "--resume")
    for _ in range(kills):
        kill_at_random(words, launcher, rng, tmp_path / "killed")
    finish(words, launcher)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert "all 3 epochs are done" in finish(words, launcher)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("number", keeper.SIGNALS)
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, number):
    data_dir = write_archive(tmp_path, 10)
    process = start(command(data_dir, tmp_path, "run", "--epochs", "500", "--save-every", "60"))
    while not (tmp_path / "run" / resume.NAME).exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (128 + number, "")
    stopped = re.search(
        r"(SIG\w+): stopped in epoch (\d+) after (\d+) of 10 steps; .*--resume (.*) goes on", out
    )
    assert stopped and stopped[1] == signal.Signals(number).name
    assert stopped[4] == str(tmp_path / "run")
    progress = resume.load(tmp_path / "run" / resume.NAME)["progress"]
    assert (progress["epoch"], progress["step"]) == (int(stopped[2]), int(stopped[3]))
    assert progress["steps"] == 10


@pytest.fixture
def stopped(tmp_path, script):
    """A run of one epoch of three, and the words that go on with it."""
    data_dir = write_archive(tmp_path, 10)
    words = command(data_dir, tmp_path, "run")[1:]
    assert script("MIX_KL_CIFAR10", *words, "--epochs", "1")[0] == 0
    return tmp_path / "run", [*words, "--resume"]


def test_changed_flags_are_refused_and_listed(stopped, script):
    folder, words = stopped
    before = (folder / resume.NAME).read_bytes()
    status, _, err = script("MIX_KL_CIFAR10", *words, "--lr", "0.3")
    assert (status, len(err.splitlines())) == (2, 1)
    assert "--epochs 1 -> 3" in err and "--lr 0.1 -> 0.3" in err and "--allow-changed" in err
    assert (folder / resume.NAME).read_bytes() == before
    status, out, err = script("MIX_KL_CIFAR10", *words, "--lr", "0.3", "--allow-changed")
    assert status == 0, err
    assert "note: changed since the state was saved" in out and len(log(folder)) == 3


def test_a_run_that_other_code_goes_on_with_names_both(stopped, script, monkeypatch):
    folder, words = stopped
    first = json.loads((folder / "args.json").read_text())["commit"]
    monkeypatch.setattr(checkpoint, "commit", lambda: "abc")
    words = [*words, "--allow-changed"]
    for epochs in ("2", "3", "3"):  # the last has nothing to train
        status, out, err = script("MIX_KL_CIFAR10", *words, "--epochs", epochs)
        assert status == 0, err
        assert (f"note: the code is not the one that saved the state: {first} -> abc"
                in out) is (epochs == "2")  # fmt: skip
        assert json.loads((folder / "args.json").read_text())["commit"] == f"{first}, abc"
    assert checkpoint.load(folder / "final_model.pth")["commit"] == f"{first}, abc"


def test_a_process_that_the_state_does_not_know_takes_the_sums_of_the_first(stopped, monkeypatch):
    state = resume.load(stopped[0] / resume.NAME)
    state["progress"] |= {"step": 3}
    state["processes"][0]["sums"] = torch.tensor([3.0, 2.0, 1.0])
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    args = options.parse_training(["--width", "8"], "doc", {})
    args.num_classes, args.dtype = 10, torch.float32
    model = build_model("PreActResNet18", num_classes=10, width=8)
    _, parts = engine.prepare(model, None, args)
    before = torch.get_rng_state()
    progress = resume.put_back(state, parts)
    assert progress.sums.tolist() == [3.0, 2.0, 1.0] and progress.step == 3
    assert torch.equal(torch.get_rng_state(), before)  # crops and starts of its own


def test_each_process_gets_its_own_statistics_back(batch, monkeypatch):
    args = flags("--batch-size", "32")
    _, parts = engine.prepare(SmallNet(), Batches(*batch), args)
    state = resume.taken(parts, resume.Progress(), args)
    (first,) = state["processes"]
    second = first | {"statistics": [tensor + 1 for tensor in first["statistics"]]}
    state["processes"].append(second)
    for rank in (1, 0):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        resume.put_back(state, parts)
        assert all(map(torch.equal, parts.statistics(), (first, second)[rank]["statistics"]))


def test_a_run_that_changed_what_it_logs_goes_on_again(stopped, script, monkeypatch):
    folder, words = stopped
    planted = dict(clean=0.5, fgsm=0.5, pgd10=0.4)  # no collapse
    monkeypatch.setattr(evaluation, "accuracies", lambda *_, **__: planted)
    words = [*words, "--on-collapse", "rollback"]
    assert script("MIX_KL_CIFAR10", *words, "--epochs", "2", "--allow-changed")[0] == 0
    status, _, err = script("MIX_KL_CIFAR10", *words, "--allow-changed")
    assert status == 0, err
    assert [row["alpha"] for row in log(folder)] == ["", "8.0", "8.0"]


def test_another_network_is_refused(stopped, script):
    _, words = stopped
    status, _, err = script("MIX_KL_CIFAR10", *words, "--width", "16", "--allow-changed")
    assert (status, len(err.splitlines())) == (2, 1) and "the state of another run" in err


def test_a_damaged_state_gives_way_to_the_one_before_it(stopped, script):
    folder, words = stopped
    path = folder / resume.NAME
    path.write_bytes(path.read_bytes()[:-100])
    status, out, err = script("MIX_KL_CIFAR10", *words, "--epochs", "1")
    assert status == 0, err
    assert "going on from state.pth.prev, which is older" in out
    for file in (path, files.previous(path)):
        file.write_bytes(b"nothing")
    status, _, err = script("MIX_KL_CIFAR10", *words, "--epochs", "1")
    assert (status, len(err.splitlines())) == (2, 1) and "no whole state" in err


def test_a_missing_path_is_an_error_and_a_missing_state_a_fresh_start(tmp_path, script):
    words = command(write_archive(tmp_path, 10), tmp_path, "new", "--epochs", "1")[1:]
    status, _, err = script("MIX_KL_CIFAR10", *words, "--resume", tmp_path / "none")
    assert (status, len(err.splitlines())) == (2, 1) and "no such state" in err
    assert not (tmp_path / "new").exists()
    assert script("MIX_KL_CIFAR10", *words, "--resume")[0] == 0


@pytest.mark.parametrize("left", record.WRITTEN[:4])
def test_a_folder_with_files_of_a_run_and_no_state_is_not_begun_anew(tmp_path, left):
    args = Namespace(resume="auto", run_name="run", out_dir=tmp_path, overwrite=False)
    assert record.start_run(args, "default", None) == tmp_path / "run"  # there is none yet
    (tmp_path / "run" / "args.json").touch()  # and now it was killed in its first epoch
    assert record.start_run(args, "default", None) == tmp_path / "run"
    (tmp_path / "run" / left).touch()
    with pytest.raises(ValueError, match=r"exists, without a state .*give --overwrite"):
        record.start_run(args, "default", None)


def test_without_a_name_the_newest_run_is_meant_and_no_older_one(tmp_path):
    args = Namespace(resume="auto", run_name=None, out_dir=tmp_path)
    for name in ("run", "run-2", "run-10", "other-11"):
        (tmp_path / name).mkdir()
        (tmp_path / name / resume.NAME).touch()
    assert resume.find(args, "run") == tmp_path / "run-10" / resume.NAME
    (tmp_path / "run-10" / resume.NAME).unlink()  # killed before it first saved: to be begun anew
    assert resume.find(args, "run") is None


def test_a_path_and_the_name_of_another_run_are_refused(stopped, script):
    folder, words = stopped
    words = [*words[:-1], "--epochs", "1", "--resume", folder]
    assert script("MIX_KL_CIFAR10", *words)[0] == 0
    status, _, err = script("MIX_KL_CIFAR10", *words, "--run-name", "new")
    assert (status, len(err.splitlines())) == (2, 1) and f"goes on in {folder}" in err
    assert not (folder.parent / "new").exists()


def test_the_flags_that_may_change_between_two_states_are_these():
    args = options.parse_training([], "doc", {})
    known = {action.dest for action in options.training_parser("doc", {})._actions}
    known &= vars(args).keys() - {"factor"}  # --label-smoothing says what it came to
    free = set()
    for key in known:
        with contextlib.suppress(ValueError):
            resume.check_flags({"args": checkpoint.plain(args) | {key: "another"}}, args)
            free.add(key)
    assert free == {
        "allow_changed", "compile", "data_dir", "debug", "device", "out_dir",
        "overwrite", "precision", "resume", "run_name", "save_every",
    }  # fmt: skip


def test_flags_that_are_not_typed_so_are_named_as_they_are_typed():
    args = Namespace(dtype=torch.float32, processes=1, allow_changed=False)
    state = {"args": {"dtype": "torch.bfloat16", "processes": 2, "allow_changed": False}}
    line = "--precision bf16 -> fp32, --nproc-per-node of torchrun 2 -> 1"
    with pytest.raises(ValueError, match=line):
        resume.check_flags(state, args)


def test_what_no_flag_sets_is_not_named_and_a_factor_is_its_label_smoothing():
    words = ["--label-smoothing", "0.25"]
    args = options.parse_training(words, "doc", {})
    args.num_classes = 10
    state = {"args": checkpoint.plain(args)}
    state["args"] |= {"method": "fast", "num_classes": 100, "factor": 0.775}
    resume.check_flags(state, args)
    args.label_smoothing = 0.5
    with pytest.raises(
        ValueError, match=r"the run: --label-smoothing 0\.25 -> 0\.5; .* in out/run,"
    ):
        resume.check_flags(state, args, Path("out/run/state.pth"))


def test_the_spelling_of_a_network_may_change(stopped, script):
    _, words = stopped
    words = [*words, "--epochs", "1", "--model", "preact-resnet18"]
    status, out, err = script("MIX_KL_CIFAR10", *words)
    assert (status, err) == (0, "") and "PreActResNet18" in out


def test_a_run_does_not_go_on_with_other_images(stopped, script, tmp_path):
    """Other images are held out of them, on which the epochs before may have trained."""
    folder, words = stopped
    kept = json.loads((folder / "args.json").read_text())["images"]
    assert re.fullmatch(r"[\d,]+ images [0-9a-f]{12} \([\w ]+\)", kept)
    path = resume.load(folder / resume.NAME)
    path["args"]["images"] = "9 images 0123456789ab (official)"
    checkpoint.save(folder / resume.NAME, path)
    status, _, err = script("MIX_KL_CIFAR10", *words, "--epochs", "2")
    assert status == 2 and f"--data-dir 9 images 0123456789ab (official) -> {kept};" in err


@pytest.mark.parametrize("before, after", [
    (["--ema-decay", "0"], ["--ema-decay", "0.9"]), (["--ema-decay", "0.9"], ["--ema-decay", "0"]),
    (["--precision", "fp32"], ["--precision", "fp16"]),
])  # fmt: skip
def test_a_run_goes_on_with_an_average_or_a_precision_that_it_had_not(
    tmp_path, script, before, after
):
    words = command(write_archive(tmp_path, 10), tmp_path, "run", "--resume", "--allow-changed")[1:]
    assert script("MIX_KL_CIFAR10", *words, *before, "--epochs", "1")[0] == 0
    status, out, err = script("MIX_KL_CIFAR10", *words, *after, "--epochs", "2")
    assert status == 0, err
    assert "note: changed since the state was saved" in out and len(log(tmp_path / "run")) == 2


def test_a_loss_that_is_not_finite_exits_with_3_and_leaves_the_last_good_state(stopped, script):
    folder, words = stopped
    kept = {path.name: path.read_bytes() for path in folder.glob("*.pth*")}
    loud = ["--lr", "1e30", "--allow-changed", "--save-every", "60"]
    status, _, err = script("MIX_KL_CIFAR10", *words, *loud)
    assert (status, len(err.splitlines())) == (3, 1) and "the loss is" in err
    assert "holds the last good state" in err
    assert {path.name: path.read_bytes() for path in folder.glob("*.pth*")} == kept


@pytest.fixture
def watched(tmp_path):
    """A keeper of a run of 25 steps an epoch, and what it looks at."""
    torch.manual_seed(0)
    model = SmallNet()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    parts = resume.Parts(model, None, optimizer, torch.amp.GradScaler("cpu", enabled=False))
    progress = resume.Progress(sums=torch.zeros(3))
    args = Namespace(save_every=15, on_collapse="warn", epochs=20)
    return keeper.Keeper(tmp_path, parts, progress, args, 25), progress


def test_within_an_epoch_the_state_is_saved_every_so_many_minutes(watched, monkeypatch):
    watch, progress = watched
    now, saved = [watch.saved], []
    monkeypatch.setattr(keeper.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(keeper.files, "write", lambda *_, **__: saved.append(progress.step))
    for step in range(1, 26):
        progress.step, now[0] = step, now[0] + 4 * 60 + 1  # 4 minutes and a second a step
        watch.after_step()
    assert saved == [4, 8, 12, 16, 20, 24, 25]  # the last before what is measured, which takes long


def test_the_end_of_a_short_epoch_is_not_saved_twice(watched, monkeypatch):
    watch, progress = watched
    progress.epoch = 2
    now, saved = [watch.saved + 59], []
    monkeypatch.setattr(keeper.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(keeper.files, "write", lambda *_, **__: saved.append(progress.step))
    progress.step = 25
    watch.after_step()
    assert saved == []
    now[0] += 2
    watch.after_step()
    assert saved == [25]


def test_the_first_epoch_saves_its_state_before_it_is_measured(watched, tmp_path):
    watch, progress = watched
    progress.step = 24
    watch.after_step()
    assert not (tmp_path / resume.NAME).exists()
    progress.step = 25
    watch.after_step()
    assert resume.load(tmp_path / resume.NAME)["progress"]["step"] == 25


def test_an_epoch_that_has_another_number_of_steps_begins_anew(watched, tmp_path, capsys):
    watch, progress = watched
    progress.epoch, progress.step, progress.steps, progress.sums = 2, 5, 25, torch.ones(3)
    watch.save()
    for steps, step in ((25, 5), (10, 0)):
        found = resume.progress_of(tmp_path / resume.NAME, watch.parts, watch.args, steps)
        assert (found.epoch, found.step, found.steps) == (2, step, steps)
        assert bool(torch.as_tensor(found.sums).any()) is bool(step)
    assert "note: epoch 2 begins anew: it has 10 steps, not 25\n" in capsys.readouterr().out


@pytest.mark.parametrize("changed, due", [
    (dict(), False),
    (dict(measured=True), True),
    (dict(seconds=61), True),
    (dict(epoch=1), True),  # a folder without a state could not be gone on from
    (dict(failure=OSError("disk full")), True),
    (dict(heard=signal.SIGTERM), True),
])  # fmt: skip
def test_an_epoch_that_takes_seconds_is_written_where_it_matters(
    watched, monkeypatch, changed, due
):
    watch, progress = watched
    now = watch.written + changed.pop("seconds", 59)
    monkeypatch.setattr(keeper.time, "monotonic", lambda: now)
    watch.saved = now  # the state was saved before it was known that nothing is measured
    measured, progress.epoch = changed.pop("measured", False), changed.pop("epoch", 2)
    for name, value in changed.items():
        setattr(watch, name, value)
    assert watch.keeps(measured) is due


def test_where_one_process_has_a_reason_to_write_all_of_them_do(watched, monkeypatch):
    watch, progress = watched
    progress.epoch = 2
    assert not watch.keeps(False)
    monkeypatch.setattr(keeper.parallel, "maxima", lambda *mine: [1] * len(mine))
    assert watch.keeps(False)


@pytest.mark.parametrize("save_every, written", [(15, [4, 7, 10]), (0.5, [3, 5, 7, 9])])
def test_epochs_that_are_not_measured_are_written_a_minute_apart_or_sooner(
    watched, monkeypatch, save_every, written
):
    watch, progress = watched
    watch.args.save_every = save_every
    now, found = [watch.written], []
    monkeypatch.setattr(keeper.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(watch, "save", lambda: found.append(progress.epoch))
    for progress.epoch in range(2, 11):  # the first is always written
        now[0] += 25
        watch.after_epoch(watch.keeps(measured=False))
    assert found == written


@pytest.mark.parametrize("due", [True, False])
def test_a_signal_during_the_save_of_an_epoch_ends_the_run_and_one_after_another_waits(
    watched, monkeypatch, due
):
    watch, _ = watched
    saved = []

    def write(*_, **__):
        saved.append(1)
        watch.heard = signal.SIGTERM

    monkeypatch.setattr(keeper.files, "write", write)
    if not due:
        watch.heard = signal.SIGTERM  # after ``due`` was asked for: the next step saves and stops
    with pytest.raises(SystemExit) if due else contextlib.nullcontext():
        watch.after_epoch(due)
    assert saved == [1] * due


@pytest.mark.parametrize("seconds, looks", [(0.9, [1, 10, 20, 25]), (1.1, list(range(1, 26)))])
def test_several_processes_agree_after_each_slow_step_and_each_tenth_quick_one(
    watched, monkeypatch, seconds, looks
):
    watch, progress = watched
    progress.epoch, agreed = 2, []  # the first saves its state at its end
    monkeypatch.setattr(keeper.parallel, "size", lambda: 2)
    monkeypatch.setattr(
        keeper.parallel, "maxima", lambda *all_: agreed.append(progress.step) or list(all_)
    )
    for step in range(1, 26):
        progress.step, progress.seconds = step, step * seconds
        watch.after_step()
    assert agreed == looks


@pytest.mark.parametrize("second, later, ends", [
    (signal.SIGTERM, 1.0, False), (signal.SIGTERM, 3.0, True), (signal.SIGINT, 0.1, True),
])  # fmt: skip
def test_a_signal_that_torchrun_passes_on_counts_once(watched, monkeypatch, second, later, ends):
    watch, _ = watched
    now, ended = [100.0], []
    monkeypatch.setattr(keeper.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(keeper.os, "_exit", ended.append)
    with watch.listening():
        signal.raise_signal(signal.SIGTERM)
        now[0] += later
        signal.raise_signal(second)
    assert watch.heard == signal.SIGTERM and ended == ([128 + second] if ends else [])


def test_a_loss_that_is_not_finite_is_seen_within_ten_steps(watched):
    watch, progress = watched
    for step in range(1, 10):
        progress.step = step
        if step == 3:
            progress.sums = progress.sums + float("nan")
        watch.after_step()
    progress.step = 10
    with pytest.raises(checkpoint.DivergedError, match="after step 10"):
        watch.after_step()


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda *a: done.append("fsync") or fsync(*a))
    monkeypatch.setattr(os, "replace", lambda *a: done.append("replace") or replace(*a))
    files.write_text(tmp_path / "file", "new")
    assert done == ["fsync", "replace", "fsync"]  # content, name, folder


def test_a_full_disk_leaves_the_old_file_and_one_line(tmp_path):
    path = tmp_path / "file"
    files.write_text(path, "old")

    def fill(file):
        file.write(b"new")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"cannot be written .*No space left.*what it held is still"):
        files.write(path, fill)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_state_that_could_not_get_its_name_is_said_to_be_in_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "file"
    with pytest.raises(OSError, match=r"file: cannot be written \(no\)$"):  # it held nothing
        files.write(path, lambda file: (_ for _ in ()).throw(OSError("no")))
    files.write_text(path, "old")
    with pytest.raises(OSError, match=r"what it held is in file\.prev$"):
        files.write(path, lambda file: os.unlink(file.name), keep_previous=True)
    assert files.previous(path).read_text() == "old"


def test_a_second_process_is_kept_out_of_a_run_that_trains(stopped, script):
    folder, words = stopped
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for more in (words, [*words[:-1], "--overwrite"]):
        with record.alone_in(folder):
            status, _, err = script("MIX_KL_CIFAR10", *more, "--epochs", "1")
        assert (status, len(err.splitlines())) == (2, 1)
        assert f"{folder}: another process trains here" in err
        assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert script("MIX_KL_CIFAR10", *words, "--epochs", "1")[0] == 0


def test_a_lock_is_none_where_the_file_system_has_none_or_its_file_is_gone(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    fcntl = pytest.importorskip("fcntl")
    with files.held(path, "busy"):
        path.unlink()  # as the process that just ended does
        with files.held(path, "busy"):
            pass
    lock = fcntl.flock
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="busy"):
        patch.setattr(fcntl, "flock", lambda *a: lock(*a) or path.unlink())
        with files.held(path, "busy"):
            pass
    none = OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(none))
    with files.held(path, "busy"), files.held(path, "busy"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_is_seen_before_the_first_epoch(tmp_path, script, monkeypatch):
    words = command(write_archive(tmp_path, 10), tmp_path, "run")[1:]
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("", (), {"free": 1000}))
    status, out, err = script("MIX_KL_CIFAR10", *words)
    assert (status, len(err.splitlines())) == (2, 1) and "the run needs" in err
    assert "epoch " not in out and not (tmp_path / "run").exists()  # the name is free again
