"""Verdicts against a plain loop, the report's arithmetic, and planted defects it must see."""

import json

import pytest
import torch
from conftest import SmallNet
from torch import nn

import attacks
import evaluation
import report as report_module
from evaluation import Attack, parse_attack

EPS = 3 / 255


def verdicts(model, x, y, *names, epsilon=EPS, batch_size=100, seed=0):
    chosen = [parse_attack(name) for name in names]
    found = evaluation.standing_images(
        model, x, y, chosen, epsilon=epsilon, batch_size=batch_size, seed=seed
    )
    return [found[attack][0] for attack in chosen]


def plain_loop(model, x, y, steps, loss, restarts=1, seed=0):
    """Attack everything, drop nobody: an image falls if any iterate fools the model."""
    with torch.no_grad():
        fell = attacks.fooled(model(x), y)
    for restart in range(restarts):
        generator = torch.Generator().manual_seed(seed + restart)
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
            self.start = evaluation.uniform_starts(x, EPS, restart)

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
    row = evaluation.accuracies(model, x, y, names=names, epsilon=EPS, batch_size=128, seed=0)
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


@pytest.fixture
def report(fitted):
    model, x, y = fitted
    names = ["clean", "fgsm", "pgd-2", "pgd-10", "cw-5", "pgd-10"]
    return evaluation.evaluate(model, x, y, names, epsilon=EPS, batch_size=128, seed=0)


def test_the_report_counts_right_and_the_worst_case_is_image_by_image(report, fitted):
    rows = report["attacks"]
    assert [row["attack"] for row in rows] == ["clean", "fgsm", "pgd-2", "pgd-10", "cw-5"]
    standing = verdicts(*fitted, "clean", "fgsm", "pgd-2", "pgd-10", "cw-5", batch_size=128)
    assert [row["correct"] for row in rows] == [int(verdict.sum()) for verdict in standing]
    worst = report["worst_case"]
    assert worst["correct"] == int(torch.stack(standing).all(0).sum())
    assert worst["correct"] <= min(row["correct"] for row in rows)
    for row in rows:
        assert row["accuracy"] == row["correct"] / row["n"] and row["n"] == 512
    pgd = rows[3]
    assert (pgd["epsilon"], pgd["alpha"], pgd["steps"]) == (EPS, 2 / 255, 10)
    assert (pgd["restarts"], pgd["loss"], pgd["start"], pgd["seed"]) == (1, "CE", "uniform", 0)
    assert 0 < rows[2]["seconds"] < pgd["seconds"]
    assert report["machine"]["torch"] == str(torch.__version__)


def test_table_and_json_say_the_same(report, tmp_path):
    table = report_module.table(report).splitlines()
    assert (
        len(table) == 1 + len(report["attacks"]) + 1
        and len({len(line) for line in table[1:-1]}) == 1
    )
    for line, row in zip(table[1:], report["attacks"], strict=False):
        assert line.split()[0] == row["attack"] and f"{row['accuracy']:.2%}" in line
        assert f"{row['correct']:,}/512" in line
    assert table[-1].endswith(f"{report['worst_case']['accuracy']:.2%}")
    paths = [report_module.write(report, tmp_path / "new", "r") for _ in range(3)]
    assert [path.name for path in paths] == ["r.json", "r-2.json", "r-3.json"]
    assert json.loads(paths[1].read_text()) == report


def test_measuring_moves_nothing(batch):
    model = SmallNet().train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    evaluation.evaluate(model, *batch, ["clean", "fgsm-rs", "pgd-2-2", "cw-2"], epsilon=EPS,
                        batch_size=8, seed=0)  # fmt: skip
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.training and torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None for p in model.parameters())
