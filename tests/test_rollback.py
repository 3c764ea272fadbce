"""A planted collapse: what the run then does, what its log says of it, and kills on the way."""

import csv
import os
import random
import signal
from functools import partial

import pytest
import torch
from conftest import ROOT, SmallNet, write_archive
from test_engine import Batches, attack_of, flags
from test_resume import TORCHRUN, command, finish, kill_at_random, log

import checkpoint
import engine
import keeper
import record
import resume
import rollback
import schedules

FACTS = dict(model="small", num_classes=10, dataset="none", width=None,
             mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0))  # fmt: skip
RESCUED = [0.3, 0.4, 0.02, 0.35, 0.36, 0.37]  # epochs 1, 2, 3 (a collapse), 3, 4, 5
TWICE = [0.4, 0.38, 0.25, 0.02, 0.39, 0.3, 0.01, 0.3, 0.3, 0.3]  # 1-4, 2-4, 3-5 after two of them


class Run:
    """Runs whose held-out PGD accuracies are planted, and what they were seen to do."""

    def __init__(self, folder, batch, pgd, words):
        self.folder, self.batch, self.words = folder, batch, words
        self.measured = (value for value in pgd for _ in ("raw", "averaged"))
        self.attacks, self.ends, self.steps, self.kill_at = [], [], 0, None
        folder.mkdir()

    def attack_of(self, args, alpha, start):
        self.attacks.append((alpha, start))
        craft = attack_of(args, alpha, start)

        def attack(*inputs):
            self.steps += 1
            self.hear(("step", self.steps))
            return craft(*inputs)

        return attack

    def hear(self, now):
        if now == self.kill_at:
            self.kill_at = None
            os.kill(os.getpid(), signal.SIGTERM)

    def measure(self, net):
        self.hear(("measure", self.steps))
        return {"clean": 0.5, "fgsm": 0.5, "pgd10": next(self.measured)}

    def go(self, state=None, more=()):
        words = [
            "--epochs",
            "5",
            "--batch-size",
            "32",
            "--ema-decay",
            "0.9",
            "--kl-reference",
            "ema",
        ]
        args = flags(*words, *self.words, *more)
        torch.manual_seed(0)
        self.model = SmallNet()
        engine.train(
            self.model, Batches(*self.batch), attack_of=partial(self.attack_of, args),
            measure=self.measure, args=args, facts=FACTS, folder=self.folder, state=state,
        )  # fmt: skip
        return self

    def rows(self):
        with (self.folder / "log.csv").open() as file:
            return list(csv.DictReader(file))

    def column(self, name):
        return [row[name] for row in self.rows()]


@pytest.fixture
def run(tmp_path, batch, monkeypatch):
    """Make a run of the given folder, planted accuracies and flags; it notes how epochs end."""
    monkeypatch.setattr("plots.curves", lambda *_: None)
    runs, follow = [], rollback.follow

    def noting(progress, parts, args):
        before = progress.rollbacks
        follow(progress, parts, args)
        tensors = [tensor.clone() for tensor in parts.tensors()]
        changed = progress.rollbacks > before
        runs[-1].ends.append((progress.rows[-1]["epoch"], changed, tensors))

    monkeypatch.setattr(rollback, "follow", noting)

    def make(name, pgd, *words):
        runs.append(Run(tmp_path / name, batch, pgd, words))
        return runs[-1]

    return make


def test_warn_goes_on_and_leaves_no_trace_of_rollbacks(run, capsys):
    done = run("warn", RESCUED).go()
    assert done.column("epoch") == list("12345")
    assert done.column("collapse") == list("00100")
    assert "rollback_to" not in done.rows()[0] and "alpha" not in done.rows()[0]
    shown = capsys.readouterr().out
    assert "COLLAPSE: catastrophic overfitting" in shown and "stopped" not in shown
    assert resume.load(done.folder / resume.NAME)["progress"]["healthy"] == []


def test_stop_ends_at_the_collapse_and_says_so_also_when_resumed(run, capsys):
    done = run("stop", RESCUED, "--on-collapse", "stop").go()
    shown = capsys.readouterr().out
    assert done.column("collapse") == list("001")
    assert shown.endswith("stopped after epoch 3: --on-collapse stop, and the run has collapsed\n")
    done.go(done.folder / resume.NAME)
    assert done.column("epoch") == list("123")
    assert "stopped after epoch 3" in capsys.readouterr().out
    done.go(done.folder / resume.NAME, ["--on-collapse", "warn", "--resume", "--allow-changed"])
    assert done.column("epoch") == list("12345")


def test_rollback_goes_back_to_the_best_epoch_and_on_with_noise(run, capsys):
    words = ["--on-collapse", "rollback", "--delta-init", "half", "--alpha", "10"]
    done = run("back", RESCUED, *words).go()
    assert done.column("epoch") == list("123345")
    assert done.column("collapse") == list("001000")
    assert done.column("rollback_to") == ["", "", "2", "", "", ""]
    assert done.column("rollbacks") == list("000111")
    assert done.column("alpha") == ["10.0"] * 3 + ["8.0"] * 3
    assert done.column("delta_init") == ["half"] * 3 + ["noise"] * 3
    assert done.attacks == [(10, "half"), (8, "noise")]
    shown = capsys.readouterr().out
    assert (
        "rollback 1 of at most 5: epoch 3 has collapsed; back to the end of epoch 2, and on with "
        "--delta-init noise --alpha 8/255 (were half, 10/255)\n"
    ) in shown
    assert checkpoint.load(done.folder / "final_model.pth")["epoch"] == 5
    assert done.column("lr")[2] == done.column("lr")[3]  # the schedule goes back as well


def test_after_a_rollback_all_is_as_it_was_at_the_end_of_the_healthy_epoch(run):
    done = run("back", TWICE, "--on-collapse", "rollback", "--delta-init", "noise").go()
    assert [(epoch, changed) for epoch, changed, _ in done.ends][:8] == [
        (1, False), (2, False), (3, False), (4, True), (3, False), (4, False), (5, True), (4, False)
    ]  # fmt: skip
    ends = [tensors for _, _, tensors in done.ends]
    assert done.column("rollback_to")[3] == "2" and all(map(torch.equal, ends[3], ends[1]))
    assert done.column("rollback_to")[6] == "3" and all(map(torch.equal, ends[6], ends[4]))
    assert not all(map(torch.equal, ends[2], ends[4]))  # epoch 3, with either attack
    assert len(ends[0]) > 30  # weights, statistics, average and momentum
    assert done.attacks == [(8, "noise"), (6, "noise"), (4.5, "noise")]
    assert done.column("epoch") == list("123434545")


def test_a_state_that_a_rollback_undid_is_no_place_to_go_back_to(run):
    pgd = [0.4, 0.38, 0.25, 0.02, 0.3, 0.01, 0.3, 0.3, 0.3]  # 1-4, 3-4, 3-5 from epoch 2 on
    done = run("undone", pgd, "--on-collapse", "rollback").go()
    assert done.column("epoch") == list("123434345")
    assert done.column("rollback_to") == ["", "", "", "2", "", "2", "", "", ""]
    healthy = resume.load(done.folder / resume.NAME)["progress"]["healthy"]
    assert [state["epoch"] for state in healthy] == [4, 5]


def test_a_rollback_puts_the_scale_of_the_loss_back():
    model, args = SmallNet(), flags("--on-collapse", "rollback")
    _, parts = engine.prepare(model, Batches(torch.zeros(128, 3, 32, 32), torch.zeros(128)), args)
    parts.scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    progress, row = resume.Progress(), dict(epoch=1, pgd10_acc=0.4, collapse=0, rollback_to=None)
    progress.rows.append(row)
    rollback.follow(progress, parts, args)
    assert progress.rollbacks == 0
    parts.scaler.load_state_dict(parts.scaler.state_dict() | {"scale": 2.0})
    progress.epoch = 2
    progress.rows.append(dict(epoch=2, pgd10_acc=0.0, collapse=1, rollback_to=1,
                              alpha=8, delta_init="half"))  # fmt: skip
    rollback.follow(progress, parts, args)
    assert (parts.scaler.get_scale(), progress.epoch, progress.rollbacks) == (512.0, 1, 1)


def test_epochs_that_are_trained_again_differ_by_what_torch_draws_alone(run, monkeypatch):
    drawn, plan = [], schedules.plan

    def noting(args, epoch, steps, rng):
        rows = plan(args, epoch, steps, rng)
        order = rng.bit_generator.state  # decides the order, which is drawn next
        drawn.append((epoch, [row.lam for row in rows], order, torch.get_rng_state()))
        return rows

    monkeypatch.setattr(schedules, "plan", noting)
    run("back", RESCUED, "--on-collapse", "rollback", "--mixup-alpha", "1").go()
    first, again = (one for one in drawn if one[0] == 3)
    assert first[:3] == again[:3] and not torch.equal(first[3], again[3])


def test_an_epoch_that_was_not_measured_is_no_place_to_go_back_to(run):
    words = ["--on-collapse", "rollback", "--measure-every", "2", "--epochs", "6"]
    done = run("gaps", [0.4, 0.01, 0.4, 0.4], *words).go()
    assert done.column("epoch") == list("12343456")
    assert done.column("rollback_to") == ["", "", "", "2", "", "", "", ""]
    assert done.column("pgd10_acc") == ["", "0.4", "", "0.01", "", "0.4", "", "0.4"]
    ends = [tensors for _, _, tensors in done.ends]
    assert all(map(torch.equal, ends[3], ends[1]))


def test_the_remedies_are_noise_then_smaller_steps():
    rs = flags("--baseline", "fgsm_rs", "--epsilon", "16")
    assert [rollback.remedy(rs, n) for n in range(4)] == [
        (20, "uniform"), (16, "noise"), (12, "noise"), (9, "noise")
    ]  # fmt: skip
    small = flags("--baseline", "fgsm_rs", "--alpha", "4")
    assert rollback.remedy(small, 1) == (4, "noise")
    pgd = flags("--baseline", "pgd_at", "--epsilon", "16")
    assert [rollback.remedy(pgd, n) for n in range(3)] == [
        (4, "uniform"), (3, "uniform"), (2.25, "uniform")
    ]  # fmt: skip


def test_the_rollbacks_end_with_a_line(run, capsys):
    pgd = [0.4] + [0.01] * (rollback.LIMIT + 1)
    done = run("limit", pgd, "--on-collapse", "rollback", "--delta-init", "half").go()
    assert done.column("epoch") == ["1"] + ["2"] * 6
    assert done.column("rollback_to") == ["", *"11111", ""]
    assert done.column("alpha")[1:4] == ["8.0", "8.0", "6.0"]
    line = (
        "stopped after epoch 2: --on-collapse rollback, and the run has collapsed after 5 rollbacks"
    )
    assert capsys.readouterr().out.splitlines()[-1] == line
    done.go(done.folder / resume.NAME)
    assert len(done.rows()) == 7 and capsys.readouterr().out.splitlines()[-1] == line


def test_a_run_that_turns_to_rollback_after_its_last_healthy_epoch_stops(run, capsys):
    done = run("late", [0.4, 0.4, 0.01])
    done.kill_at = ("step", 5)
    with pytest.raises(SystemExit):
        done.go()
    words = ["--on-collapse", "rollback", "--resume", "--allow-changed"]
    done.go(done.folder / resume.NAME, words)
    assert done.column("epoch") == list("123") and done.column("rollbacks") == ["", "", "0"]
    assert "has collapsed and no state is healthy" in capsys.readouterr().out


def test_a_collapsed_epoch_is_not_the_best(run):
    """The raw weights are dead, the average still has the highest accuracy so far."""
    done = run("dead", [])
    done.measured = iter([0.3, 0.3, 0.01, 0.4, 0.31, 0.31, 0.01, 0.5, 0.3, 0.3])
    best = checkpoint.load(done.go().folder / "best_model.pth")
    assert done.column("collapse") == list("01010") and best["epoch"] == 3


def fail_at(monkeypatch, name, times):
    """Let the files of a name be written but for those of the given times, from 1; return when."""
    write, calls = keeper.files.write, []

    def failing(path, *args, **kwargs):
        calls.append(path.name)
        if path.name == name and calls.count(name) in times:
            raise OSError(f"{path}: cannot be written (planted)")
        write(path, *args, **kwargs)

    monkeypatch.setattr(keeper.files, "write", failing)


def test_the_best_epoch_stays_the_best_where_the_final_one_could_not_be_written(run, monkeypatch):
    fail_at(monkeypatch, "final_model.pth", [2])
    done = run("best", [0.2, 0.4, 0.3, 0.3, 0.3]).go()
    assert checkpoint.load(done.folder / "best_model.pth")["epoch"] == 2
    assert checkpoint.load(done.folder / "final_model.pth")["epoch"] == 5


def test_the_state_stays_before_an_epoch_whose_files_could_not_be_written(run, monkeypatch):
    """Also where others are due within the epoch after it."""
    fail_at(monkeypatch, "final_model.pth", [2])
    done, saved, save = run("before", [0.3] * 5, "--save-every", "0"), [], keeper.Keeper.save

    def noting(watch):
        save(watch)
        saved.append(resume.load(done.folder / resume.NAME)["progress"]["epoch"])

    monkeypatch.setattr(keeper.Keeper, "save", noting)
    done.go()
    # After each of two steps, and at the end of the epoch; the files of epoch 2 are not there.
    assert saved == [1, 1, 2, 2, 2, 2, 2, 2, 4, 4, 4, 5, 5, 5, 6]


def test_other_flags_of_a_collapse_are_refused_when_resumed(run):
    done = run("flags", RESCUED).go()
    for words, text in (
        (["--on-collapse", "rollback"], "--on-collapse warn -> rollback"),
        (["--measure-every", "2"], "--measure-every 1 -> 2"),
    ):
        with pytest.raises(ValueError, match=text):
            done.go(done.folder / resume.NAME, words)


@pytest.mark.parametrize("pgd, steps", [(RESCUED, 12), (TWICE, 18)])
def test_a_run_killed_anywhere_around_a_rollback_ends_as_the_uninterrupted_one(run, pgd, steps):
    words = ["--on-collapse", "rollback"]
    whole = run("whole", pgd, *words).go()
    assert whole.steps == steps
    moments = [(what, n) for n in range(5, steps) for what in ("step", "measure")]
    moments = [(what, n) for what, n in moments if what == "step" or n % 2 == 0]
    for what, number in moments:
        killed = run(f"{what}{number}", pgd, *words)
        killed.kill_at = (what, number)
        with pytest.raises(SystemExit) as exit_:
            killed.go()
        assert exit_.value.code == 143
        killed.go(killed.folder / resume.NAME)
        assert log(whole.folder) == log(killed.folder)
        assert_same_state(whole.folder, killed.folder)


def assert_same_state(one, other):
    first, second = (resume.load(folder / resume.NAME) for folder in (one, other))
    for name in ("raw", "ema"):
        assert all(torch.equal(value, second[name][key]) for key, value in first[name].items())
    assert all(map(torch.equal, first["momentum"], second["momentum"]))
    for mine, theirs in zip(first["processes"], second["processes"], strict=True):
        assert torch.equal(mine["torch"], theirs["torch"])
    first, second = first["progress"], second["progress"]
    assert (first["epoch"], first["rollbacks"]) == (second["epoch"], second["rollbacks"])
    for mine, theirs in zip(first["healthy"], second["healthy"], strict=True):
        assert mine["epoch"] == theirs["epoch"]
        assert all(torch.equal(value, theirs["raw"][key]) for key, value in mine["raw"].items())


def test_a_signal_while_the_last_epoch_is_measured_finds_a_run_that_is_done(run, capsys):
    done = run("done", RESCUED)
    done.kill_at = ("measure", 10)
    done.go()
    assert done.kill_at is None and len(done.rows()) == 5
    assert "SIGTERM" not in capsys.readouterr().out


def test_live_rows_are_those_that_no_rollback_undid():
    def row(epoch, to=None):
        return {"epoch": epoch, "rollback_to": to, "pgd10_acc": 0.1 if to else 0.4, "fgsm_acc": 0.5}

    rows = [row(1), row(2), row(3), row(4, to=2), row(3), row(4, to=3), row(4)]
    live = record.live(rows)
    assert len(live) == 4 and all(a is rows[i] for a, i in zip(live, (0, 1, 4, 6), strict=True))
    assert not record.collapsed(rows)
    assert record.collapsed([*rows[:3], rows[3] | {"rollback_to": None}])


def test_the_curves_of_a_run_with_rollbacks_are_drawn_from_live_rows(run, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "plots.curves",
        lambda rows, collapses, _: drawn.append(([r["epoch"] for r in rows], collapses)),
    )
    run("drawn", RESCUED, "--on-collapse", "rollback").go()
    assert drawn[-1] == ([1, 2, 3, 4, 5], [3]) and drawn[2] == ([1, 2], [3])


def test_the_disk_must_hold_the_healthy_states_as_well(tmp_path, monkeypatch, batch):
    free = {}
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("", (), free))
    for policy, files in (("warn", 6), ("rollback", 12)):
        args = flags("--on-collapse", policy, "--batch-size", "32")
        _, parts = engine.prepare(SmallNet(), Batches(*batch), args)
        size = sum(t.numel() * t.element_size() for t in parts.tensors())
        free["free"] = files * size
        keeper.Keeper(tmp_path, parts, resume.Progress(), args, 2)
        free["free"] -= 1
        with pytest.raises(ValueError, match="the run needs"):
            keeper.Keeper(tmp_path, parts, resume.Progress(), args, 2)
        keeper.Keeper(tmp_path, parts, resume.Progress(epoch=args.epochs + 1), args, 2)  # done


PLANTED = """import sys
from pathlib import Path

sys.path.insert(0, {root!r})
import evaluation, files, MIX_KL_CIFAR10, options, resume

state = Path(sys.argv[sys.argv.index("--out_dir") + 1], sys.argv[-1], resume.NAME)
begun = state.exists() or files.previous(state).exists()
done = len(resume.load(state)["progress"]["rows"]) if begun else 0
measured = (value for value in {pgd}[done:] for _ in ("raw", "averaged"))


def accuracies(*_, **__):
    return dict(clean=0.5, fgsm=0.5, pgd10=next(measured))


evaluation.accuracies = accuracies
options.run(MIX_KL_CIFAR10.main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param([], id="one-process"),
        pytest.param(TORCHRUN, id="two-processes", marks=pytest.mark.exhaustive),
    ],
)
def test_processes_killed_at_random_around_a_rollback_end_as_if_nothing_had_happened(
    tmp_path, launcher
):
    program = tmp_path / "planted.py"
    program.write_text(PLANTED.format(root=str(ROOT), pgd=[0.4, 0.39, 0.02, 0.38, 0.37]))
    words = [program, *command(write_archive(tmp_path, 10), tmp_path, "run")[1:-2]]
    words += ["--on-collapse", "rollback"]
    shown = finish([*words, "--run-name", "whole"], launcher)
    assert "epoch 3 has collapsed; back to the end of epoch 1" in shown
    words, rng = [*words, "--resume", "--run-name", "killed"], random.Random(0)
    for _ in range(4):
        kill_at_random(words, launcher, rng, tmp_path / "killed")
    finish(words, launcher)
    assert log(tmp_path / "whole") == log(tmp_path / "killed")
    assert [row["epoch"] for row in log(tmp_path / "whole")] == list("12323")
    assert_same_state(tmp_path / "whole", tmp_path / "killed")
