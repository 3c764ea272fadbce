"""Verdicts against a plain loop, the report's arithmetic, and planted defects it must see."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import ROOT, ShortOfMemory, SmallNet
from torch import nn

import attacks
import auto_attack
import evaluation
import report
from evaluation import Attack, parse_attack

EPS = 3 / 255
SETTINGS = evaluation.Settings(epsilon=EPS, batch_size=128, seed=0)


def verdicts(model, x, y, *names, epsilon=EPS, batch_size=100, seed=0):
    chosen = [parse_attack(name) for name in names]
    settings = evaluation.Settings(epsilon=epsilon, batch_size=batch_size, seed=seed)
    found = evaluation.standing_images(model, x, y, chosen, settings)
    return [found[attack].standing for attack in chosen]


def plain_loop(model, x, y, steps, loss, restarts=1, seed=0):
    """Attack everything, drop nobody: an image falls if any iterate fools the model."""
    with torch.no_grad():
        fell = attacks.fooled(model(x), y)
    for restart in range(restarts):
        generator = torch.Generator().manual_seed(seed + 1_000_003 * restart)
        adv = attacks.start_point(x, "uniform", EPS, generator)
        for step in range(steps + 1):
            with torch.no_grad():
                fell |= attacks.fooled(model(adv), y)
            if step < steps:
                adv = attacks.pgd(model, x, y, epsilon=EPS, alpha=2 / 255, steps=1, loss=loss,
                                  start=adv)  # fmt: skip
    return ~fell


@pytest.mark.parametrize("name, steps, restarts", [
    ("pgd-3", 3, 1), ("pgd-10", 10, 1), ("pgd-5-3", 5, 3), ("cw-4", 4, 1),
])  # fmt: skip
def test_verdicts_are_those_of_the_plain_loop(fitted, name, steps, restarts):
    model, x, y = fitted
    x, y = x[:200], y[:200]
    loss = attacks.margin_loss if name.startswith("cw") else attacks.cross_entropy_loss
    expected = plain_loop(model, x, y, steps, loss, restarts)
    assert torch.equal(verdicts(model, x, y, name, batch_size=64)[0], expected)
    assert 0 < expected.sum() < 200


@pytest.mark.parametrize("name", ["fgsm", "fgsm-rs"])
def test_one_step_is_that_of_fgsm_from_its_start(fitted, name):
    model, x, y = fitted
    start = x if name == "fgsm" else evaluation.uniform_starts(x, EPS, 0)
    adv = attacks.fgsm(model, x, y, epsilon=EPS, start=start)
    expected = torch.stack([attacks.standing(model, z, y, 512) for z in (x, start, adv)]).all(0)
    assert torch.equal(verdicts(model, x, y, name)[0], expected) and 0 < expected.sum() < 512


def test_shorter_attacks_read_off_a_longer_run_are_the_same(fitted):
    model, x, y = fitted
    together = verdicts(model, x, y, "pgd-2", "pgd-5", "pgd-20", "pgd-5-2")
    for name, verdict in zip(("pgd-2", "pgd-5", "pgd-20", "pgd-5-2"), together, strict=True):
        assert torch.equal(verdicts(model, x, y, name)[0], verdict)
    two, five, twenty, restarted = together
    assert not (five & ~two).any() and not (twenty & ~five).any() and not (restarted & ~five).any()
    assert twenty.sum() < two.sum()


@pytest.mark.parametrize("name", ["clean", "fgsm", "fgsm-rs", "pgd-5", "cw-5"])
def test_batch_size_does_not_change_the_verdicts(fitted, name):
    model, x, y = fitted
    first, *others = (verdicts(model, x, y, name, batch_size=n)[0] for n in (512, 100, 7))
    assert all(torch.equal(first, other) for other in others)


def test_another_seed_is_another_start(fitted):
    _, x, _ = fitted
    first, again, other = (evaluation.uniform_starts(x, EPS, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert (first - x).abs().max() <= EPS + 1e-6


def test_epsilon_zero_gives_clean_accuracy(fitted):
    model, x, y = fitted
    names = ["clean", "fgsm", "fgsm-rs", "pgd-5", "cw-5"]
    clean, *attacked = verdicts(model, x, y, *names, epsilon=0.0)
    assert all(torch.equal(clean, verdict) for verdict in attacked)


def test_a_large_epsilon_leaves_nothing(fitted):
    model, x, y = fitted
    assert verdicts(model, x, y, "pgd-20", epsilon=64 / 255)[0].sum() == 0


def test_a_clean_mistake_counts_as_fooled_by_every_attack(fitted):
    model, x, y = fitted
    wrong = (y + 1) % 10
    for verdict in verdicts(model, x, wrong, "fgsm", "pgd-5"):
        assert not verdict[attacks.fooled(model(x), wrong)].any()


def test_one_success_in_any_restart_is_enough(fitted):
    """A model that is wrong near one start only: restarts must accumulate, not replace."""
    _, x, y = fitted
    x, y = x[:6], y[:6]

    class WrongNear(nn.Module):
        def __init__(self, restart):
            super().__init__()
            self.start = evaluation.uniform_starts(x, EPS, evaluation.RESTART * restart)

        def forward(self, images):
            near = ((images[:, None] - self.start[None]).abs().amax((2, 3, 4)) < 1e-6).any(1)
            right = nn.functional.one_hot(self.labels_of(images), 10) * 9.0
            return torch.where(near[:, None], -right, right) + 0 * images.sum((1, 2, 3))[:, None]

        def labels_of(self, images):
            return y[(images[:, None] - x[None]).abs().amax((2, 3, 4)).argmin(1)]

    for restart in range(3):
        standing = verdicts(WrongNear(restart), x, y, "pgd-2-3")[0]
        assert not standing.any()


class NanWhenPerturbed(nn.Module):
    def __init__(self, model, x):
        super().__init__()
        self.model, self.x = model, x

    def forward(self, images):
        known = (images[:, None] == self.x[None]).flatten(2).all(2).any(1)
        return torch.where(known[:, None], self.model(images), torch.nan)


def test_a_model_that_returns_nan_when_perturbed_is_not_robust(fitted):
    model, x, y = fitted
    x, y = x[:20], y[:20]
    planted = NanWhenPerturbed(model, x)
    clean, pgd = verdicts(planted, x, y, "clean", "pgd-2")
    assert clean.sum() > 10 and pgd.sum() == 0


def test_held_out_accuracies_have_the_names_they_were_asked_for(fitted):
    model, x, y = fitted
    names = {"clean": "clean", "pgd10": "pgd-10"}
    row = evaluation.accuracies(model, x, y, names=names, settings=SETTINGS)
    expected = [v.double().mean().item() for v in verdicts(model, x, y, "clean", "pgd-10")]
    assert list(row) == ["clean", "pgd10"] and list(row.values()) == expected


@pytest.mark.parametrize("text, attack", [
    ("clean", Attack("clean")), ("FGSM", Attack("fgsm", 1)), ("fgsm-rs", Attack("fgsm-rs", 1)),
    ("pgd20", Attack("pgd", 20)), ("PGD-50-10", Attack("pgd", 50, 10)), ("cw-20", Attack("cw", 20)),
])  # fmt: skip
def test_attacks_are_named_as_the_field_names_them(text, attack):
    assert parse_attack(text) == attack
    assert parse_attack(attack.name) == attack


@pytest.mark.parametrize(
    "text", ["pgd", "pgd-0", "pgd-20-0", "cw", "aa", "pgd-20-1-1", "", "pgd--1"]
)
def test_unknown_attacks_are_refused(text):
    with pytest.raises(ValueError, match=r"--attacks .*unknown; there are clean, fgsm"):
        parse_attack(text)


def measured(model, x, y, *names, **changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    rows, found, _ = evaluation.evaluate(model, x, y, list(names), settings)
    facts = {"epsilon": EPS, "recorded_clean": None}
    return report.build(facts, rows, found, y), found


@pytest.fixture
def a_report(fitted):
    return measured(*fitted, "clean", "fgsm", "pgd-2", "pgd-10", "cw-5", "pgd-10")


def test_the_report_counts_right_and_the_worst_case_is_image_by_image(a_report, fitted):
    rows, y = a_report[0]["attacks"], fitted[2]
    assert [row["attack"] for row in rows] == ["clean", "fgsm", "pgd-2", "pgd-10", "cw-5"]
    standing = verdicts(*fitted, "clean", "fgsm", "pgd-2", "pgd-10", "cw-5", batch_size=128)
    assert [row["correct"] for row in rows] == [int(verdict.sum()) for verdict in standing]
    worst = a_report[0]["worst_case"]
    assert worst["correct"] == int(torch.stack(standing).all(0).sum())
    assert worst["correct"] <= min(row["correct"] for row in rows)
    for row, verdict in zip(rows, standing, strict=True):
        assert row["accuracy"] == row["correct"] / row["n"] and row["n"] == 512
        assert row["interval"][0] < row["accuracy"] <= row["interval"][1]
        of_class_3 = verdict[y == 3].double().mean().item()
        assert row["per_class"][3] == pytest.approx(of_class_3)
    pgd = rows[3]
    assert (pgd["epsilon"], pgd["alpha"], pgd["steps"]) == (EPS, 2 / 255, 10)
    assert (pgd["restarts"], pgd["loss"], pgd["start"], pgd["seed"]) == (1, "CE", "uniform", 0)
    assert 0 < rows[2]["seconds"] < pgd["seconds"]
    assert rows[0]["passes"] == 512


def test_passes_are_counted_as_the_network_sees_them(fitted):
    model, x, y = fitted
    model = copy.deepcopy(model)
    count = auto_attack.Passes(model)
    rows = measured(model, x, y, "clean", "pgd-10-3", batch_size=64)[0]["attacks"]
    assert count.stop() == sum(row["passes"] for row in rows)


def test_the_pool_keeps_its_size_while_there_are_images(fitted):
    """All lanes work: every pass of the ascent but the last few has the full batch."""
    model, x, y = fitted
    sizes = []
    model = copy.deepcopy(model)
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    verdicts(model, x, y, "pgd-20", batch_size=32)
    sizes = sizes[16:]  # behind the clean pass
    full = max(i for i, size in enumerate(sizes) if size == 32 and sizes[:i].count(32) == i)
    assert full > 0.6 * len(sizes) and sizes[: full + 1] == [32] * (full + 1)


def test_a_cascade_attacks_survivors_only_and_ends_in_the_same_worst_case(fitted):
    names = ("clean", "pgd-5", "cw-5", "fgsm")
    apart, together = (measured(*fitted, *names, cascade=cascade)[0] for cascade in (False, True))
    assert together["worst_case"] == apart["worst_case"]
    counts = [row["correct"] for row in together["attacks"]]
    assert counts == sorted(counts, reverse=True) and counts[-1] == apart["worst_case"]["correct"]
    assert together["attacks"][2]["passes"] < apart["attacks"][2]["passes"]
    # pgd-2 is read off the run of pgd-5, before cw-5
    found = measured(*fitted, "pgd-2", "cw-5", "pgd-5", "clean", cascade=True)[1]
    counts = [int(verdict.sum()) for verdict in found.values()]
    assert list(found) == ["pgd-2", "cw-5", "pgd-5", "clean"]
    assert counts == sorted(counts, reverse=True) and counts[-1] == apart["worst_case"]["correct"]


def test_transfer_attacks_with_images_of_the_other_network(fitted):
    model, x, y = fitted
    same = measured(model, x, y, "clean", "transfer", source=model)[1]["transfer"]
    starts = evaluation.uniform_starts(x, EPS, 0)
    adv = attacks.pgd(model, x, y, epsilon=EPS, alpha=2 / 255, steps=20, start=starts)
    clean = verdicts(model, x, y, "clean")[0]
    assert torch.equal(same, clean & attacks.standing(model, adv, y, 512))
    torch.manual_seed(0)
    other = measured(model, x, y, "transfer", source=SmallNet())[1]["transfer"]
    assert other.sum() > same.sum()


def test_an_image_that_falls_in_another_process_has_fallen(fitted, monkeypatch):
    model, x, y = fitted
    upright, felled = attacks.standing(model, x, y, 512), y == y[0]
    monkeypatch.setattr(evaluation.parallel, "minimum_", lambda mine: mine * ~felled)
    settings = dataclasses.replace(SETTINGS, epsilon=0.0, source=model)  # none falls in this one
    found = evaluation.transferred(model, x, y, upright, parse_attack("transfer"), settings)
    assert torch.equal(found.standing, upright & ~felled) and (upright & felled).any()


def test_a_batch_too_large_for_the_memory_is_halved_and_no_verdict_changes(fitted, capsys):
    model, x, y = fitted
    names = ("clean", "fgsm", "pgd-3-2", "cw-2", "transfer")
    x, y, found = x[:60], y[:60], []
    for network in (model, ShortOfMemory(model, 20)):
        settings = dataclasses.replace(SETTINGS, batch_size=50, source=network)
        verdicts = evaluation.evaluate(network, x, y, list(names), settings)[1]
        found.append(torch.stack(list(verdicts.values())))
    assert torch.equal(*found) and settings.batch_size == 12
    notes = capsys.readouterr().out.splitlines()
    assert [note.split()[-1] for note in notes] == ["25", "12"]
    with pytest.raises(torch.OutOfMemoryError):
        evaluation.evaluate(ShortOfMemory(model, 0), x, y, ["clean"], settings)


def test_table_and_files_say_the_same(a_report, fitted, tmp_path):
    shown, found = a_report
    table = report.table(shown | {"warnings": ["something"]}).splitlines()
    assert len(table) == 1 + len(shown["attacks"]) + 3 and table[-1] == "warning: something"
    for line, row in zip(table[1:], shown["attacks"], strict=False):
        assert line.split()[0] == row["attack"] and f"{row['accuracy']:.2%}" in line
        assert f"{row['correct']:,}/512" in line and f"{100 * row['interval'][0]:.2f} - " in line
    assert f"{shown['worst_case']['accuracy']:.2%}" in table[-3]
    y = fitted[2]
    paths = [report.write(shown, found, y, tmp_path / "new", "r") for _ in range(3)]
    assert [path.name for path in paths] == ["r.json", "r-2.json", "r-3.json"]
    assert json.loads(paths[1].read_text()) == shown
    saved = np.load(report.verdict_file(paths[1]))
    assert all(np.array_equal(saved[name], verdict.numpy()) for name, verdict in found.items())
    assert np.array_equal(saved["labels"], y.numpy())


def test_a_class_without_images_has_no_accuracy():
    found = report.shares(torch.tensor([True, False, True]), torch.tensor([0, 0, 2]))
    assert found["per_class"] == [0.5, None, 1.0]
    line = report.table({"attacks": [], "worst_case": found}).splitlines()[-1]
    assert "lowest 50.00%" in line and "median 75.00%" in line and "highest 100.00%" in line


@pytest.mark.parametrize("correct, n, low, high", [
    (0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662),  # Wilson; Newcombe
])  # fmt: skip
def test_the_interval_is_wilsons(correct, n, low, high):
    assert report.wilson(correct, n) == pytest.approx((low, high), abs=5e-5)


def test_mcnemar_is_the_exact_binomial_test():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for n in (40, 5000):
        first, second = rng.random((2, n)) < [[0.5], [0.55]]
        a, b, p = report.mcnemar(first, second)
        assert (a, b) == ((first & ~second).sum(), (second & ~first).sum())
        assert p == pytest.approx(min(1.0, stats.binomtest(int(a), int(a + b)).pvalue))
    assert report.mcnemar(first, first) == (0, 0, 1.0)


def test_reports_side_by_side(fitted, tmp_path, script):
    paths = []
    for seed in (0, 1, 2):
        shown, found = measured(*fitted, "clean", "pgd-2", seed=seed)
        paths.append(report.write(shown, found, fitted[2], tmp_path, "r"))
    status, out, err = script("test_cifar10", "--compare", *paths)
    assert status == 0, err
    shares = [json.loads(path.read_text())["attacks"][1]["accuracy"] for path in paths]
    (line,) = (line for line in out.splitlines() if line.startswith("pgd-2"))
    assert f"{np.mean(shares):.2%}" in line and f"{100 * np.std(shares, ddof=1):.2f}" in line
    assert out.count("McNemar p = ") == 6 and "[1] against [3], clean: 0 images" in out
    verdicts = report.verdict_file(paths[1])
    whole = verdicts.read_bytes()
    for content in (b"", whole[: len(whole) // 2]):
        verdicts.write_bytes(content)
        status, _, err = script("test_cifar10", "--compare", *paths)
        assert (status, len(err.splitlines())) == (2, 1) and "is damaged; measure again" in err
    verdicts.write_bytes(whole)
    other = json.loads(paths[1].read_text()) | {"epsilon": 4 / 255}
    paths[1].write_text(json.dumps(other))
    status, out, _ = script("test_cifar10", "--compare", *paths)
    assert status == 0 and "eps 4/255)" in out
    assert "[1] and [2]: not measured alike, no test" in out and out.count("McNemar p = ") == 3
    paths[0].write_text("{}")
    status, _, err = script("test_cifar10", "--compare", *paths)
    assert (status, len(err.splitlines())) == (2, 1) and "r.json: not a report" in err


def test_reports_of_other_attacks_have_no_common_worst_case(fitted, tmp_path, script):
    def written(*names, **more):
        shown, found = measured(*fitted, *names)
        return report.write(shown | more, found, fitted[2], tmp_path, "r")

    few, many = written("clean", "pgd-2"), written("clean", "pgd-2", "cw-2")
    status, out, _ = script("test_cifar10", "--compare", few, many)
    assert status == 0 and "pgd-2: 0 images" in out and "worst case" not in out
    assert "worst case: 0 images" in script("test_cifar10", "--compare", many, many)[1]
    few, many = (
        written(*names, cascade=True) for names in (("clean", "cw-2"), ("clean", "pgd-2", "cw-2"))
    )
    _, out, _ = script("test_cifar10", "--compare", few, many)
    assert "cascade of clean pgd-2 cw-2)" in out and "not measured alike" in out
    one, other = (
        written("clean", transfer_from={"checkpoint": f"{name}.pth", "sha256": name * 8})
        for name in "ab"
    )
    _, out, _ = script("test_cifar10", "--compare", one, other)
    assert "transfer from a.pth aaaaaaaa)" in out and "clean: 0 images" in out
    assert "transfer from other networks, no test" in out and "worst case: " not in out
    same = written("clean", transfer_from={"checkpoint": "elsewhere/a.pth", "sha256": "a" * 8})
    out = script("test_cifar10", "--compare", one, same)[1]
    assert "worst case: 0 images" in out and "no test" not in out
    one, other = (
        written("clean", cascade=True, transfer_from={"checkpoint": "a.pth", "sha256": name * 8})
        for name in "ab"
    )
    assert "not measured alike" in script("test_cifar10", "--compare", one, other)[1]


def test_a_report_of_before_the_study_can_be_compared(script):
    old = ROOT / "results" / "cifar10-mix_kl" / "report.json"
    status, out, _ = script("test_cifar10", "--compare", old, old)
    assert status == 0 and "no verdicts beside both reports" in out


def odd(**changes):
    return lambda found: found.update(changes)


@pytest.mark.parametrize("change", [
    lambda found: found.pop("n"), lambda found: found["attacks"][0].pop("attack"),
    lambda found: found["attacks"][0].update(accuracy="much"), odd(epsilon=None), odd(n="many"),
    odd(worst_case={}), odd(attacks=[None]), odd(transfer_from={"checkpoint": "a.pth"}),
])  # fmt: skip
def test_what_is_no_report_is_one_line_that_names_the_file(change, a_report, tmp_path, script):
    found = json.loads(json.dumps(a_report[0]))
    change(found)
    (tmp_path / "r.json").write_text(json.dumps(found))
    status, _, err = script("test_cifar10", "--compare", tmp_path / "r.json")
    assert (status, len(err.splitlines())) == (2, 1)
    assert "r.json: not a report of this project" in err
    status, _, err = script("test_cifar10", "--compare", tmp_path / "none.json")
    assert (status, len(err.splitlines())) == (2, 1)
    assert "none.json" in err and "not a report" not in err


@pytest.mark.parametrize("content", [
    dict(clean=np.ones(512, bool)), dict(clean=np.ones(3, bool), labels=np.ones(512, int)),
    dict(clean=np.ones(512), labels=np.ones(512, int)), None,
])  # fmt: skip
def test_what_are_no_verdicts_is_one_line_that_names_the_file(
    content, a_report, fitted, tmp_path, script
):
    path = report.write(*a_report, fitted[2], tmp_path, "r")
    with report.verdict_file(path).open("wb") as file:
        np.savez(file, **content) if content else np.save(file, np.ones(512, bool))
    status, _, err = script("test_cifar10", "--compare", path, path)
    assert (status, len(err.splitlines())) == (2, 1) and "is damaged; measure again" in err


def test_measuring_moves_nothing(batch):
    model = SmallNet().train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    measured(model, *batch, "clean", "fgsm-rs", "pgd-2-2", "cw-2", batch_size=8)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.training and torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None for p in model.parameters())
