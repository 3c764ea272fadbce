"""Planted mistakes: each gets the warning that is meant for it, an honest network gets none."""

import copy
import re
from argparse import Namespace

import pytest
import torch
from conftest import SmallNet
from torch import nn
from torch.nn import functional as F

import checkpoint
import checks
import evaluation
import referee
import report

EPS = 3 / 255  # the small fitted network is robust to this, more or less


class Planted(nn.Module):
    """A network with something done to its images or its logits."""

    def __init__(self, model, before=None, after=None):
        super().__init__()
        self.model = model
        self.before, self.after = before or (lambda x: x), after or (lambda z: z)

    def forward(self, x):
        return self.after(self.model(self.before(x)))


def rounded(x):
    return (x * 64).round() / 64


def nan_backward(x):
    return x + (x - x.detach()).sqrt()  # the root of 0: infinity times 0 goes back


def nan_where_perturbed(known):
    def after(x):
        same = (x[:, None] == known[None]).flatten(2).all(2).any(1)
        return torch.where(same[:, None, None, None], x, torch.nan)

    return after


MISTAKES = {
    "softmax output": (dict(after=lambda z: z.softmax(1)), "look like probabilities"),
    "logits x 30": (dict(after=lambda z: 30 * z), "the softmax saturates"),
    "logits x 0.2": (dict(after=lambda z: 0.2 * z), "are multiplied by 32"),
    "dropout left on": (dict(after=lambda z: F.dropout(z, 0.3)), "identical forward passes differ"),
    "normalised twice": (dict(before=lambda x: (x - 0.5) / 0.25), "far below the 9"),
    "constant output": (dict(after=lambda z: 0 * z), "is chance"),
    "gradients cut by rounding": (dict(before=rounded), "gradient is zero or not finite on 100%"),
    "gradients that are NaN": (dict(before=nan_backward), "gradient is zero or not finite on 100%"),
}


def warnings_of(model, x, y, recorded=0.9):
    return checks.of_the_network(model, x, y, epsilon=EPS, recorded=recorded)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_gets_the_warning_meant_for_it(name, fitted):
    model, x, y = fitted
    changes, message = MISTAKES[name]
    found = warnings_of(Planted(model, **changes), x[:256], y[:256])
    assert any(message in text for text in found), found


def test_a_network_that_survives_a_perturbation_of_64_is_seen(fitted):
    model, x, y = fitted
    x, y = x[:128], y[:128]

    def nearest(z):  # the gradient goes through
        return x[torch.cdist(z.flatten(1), x.flatten(1)).argmin(1)] + z - z.detach()

    (found,) = warnings_of(Planted(model, before=nearest), x, y)
    assert "PGD-20 at 64/255 leaves 100%" in found


def test_a_whole_file_is_opened_with_its_weights(fitted, tmp_path):
    content = {
        "schema": checkpoint.SCHEMA, "model": "small", "num_classes": 10, "dataset": "cifar10",
        "width": None, "mean": (0.5,) * 3, "std": (0.25,) * 3, "selected": "raw",
        "raw": fitted[0].state_dict(),
    }  # fmt: skip
    torch.save(content, tmp_path / "model.pth")
    model, _, _ = referee.open_network(
        tmp_path / "model.pth", lambda *_, **__: SmallNet(),
        Namespace(transfer_from=None, model=None, width=None, normalize=None, weights=None),
        classes=10, mean=(0.5,) * 3, std=(0.25,) * 3,
    )  # fmt: skip
    assert torch.equal(model(fitted[1][:8]), fitted[0](fitted[1][:8]))


def test_logits_that_break_where_perturbed_are_seen(fitted):
    model, x, y = fitted
    model = Planted(model, before=nan_where_perturbed(x[:64]))
    (found,) = warnings_of(model, x[:64], y[:64])
    assert "non-finite logits on 0 clean and 64 slightly changed images of 64" in found


def test_an_honest_network_gets_no_warning(fitted):
    model, x, y = fitted
    assert warnings_of(model, x[:256], y[:256]) == []
    settings = evaluation.Settings(epsilon=EPS, batch_size=128, seed=0)
    names = ["clean", "fgsm", "pgd-5", "pgd-20", "cw-20"]
    rows, verdicts, _ = evaluation.evaluate(model, x, y, names, settings)
    measured = report.build({"epsilon": EPS, "recorded_clean": 0.9}, rows, verdicts, y)
    assert referee.warnings(model, x, y, measured, False) == []


def test_a_few_clean_hits_say_nothing(fitted):
    model, x, y = fitted
    right = (model(x).argmax(1) == y).nonzero().squeeze(1)[: checks.ENOUGH - 1]
    assert warnings_of(Planted(model, before=rounded), x[right], y[right]) == []


def test_a_few_images_that_happen_to_be_hard_raise_no_alarm(fitted):
    """One in eight sets of 20 images, at an accuracy of 65 %, has at most half of them right."""
    model, x, _ = fitted
    x = x[:20]
    y = model(x).argmax(1)
    y[:10] = (y[:10] + 1) % 10
    assert warnings_of(model, x, y, 0.65) == []
    assert warnings_of(model, x[: checks.ENOUGH - 1], (y[: checks.ENOUGH - 1] + 1) % 10) == []


def test_probing_moves_nothing(fitted):
    model, x, y = fitted
    model = copy.deepcopy(model).train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    warnings_of(model, x[:32], y[:32])
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.training and torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None for p in model.parameters())


def rows_of(**accuracies):
    rows = []
    for name, accuracy in accuracies.items():
        steps = int("0" + re.sub(r"\D", "", name))
        row = {"attack": name, "steps": steps, "restarts": 1, "accuracy": accuracy, "n": 1000}
        rows.append(row | {"alpha": 2 / 255, "epsilon": 8 / 255})
    return rows


@pytest.mark.parametrize("rows, message", [
    (rows_of(pgd20=0.50, cw50=0.42), "CE-PGD leaves 50.0%, cw50 only 42.0%"),
    (rows_of(pgd20=0.50, autoattack=0.40), "autoattack only 40.0%"),
    (rows_of(pgd20=0.50, apgd=0.40), "apgd only 40.0%"),
    (rows_of(fgsm=0.30, pgd10=0.40), "FGSM leaves 30.0%, less than PGD (40.0%)"),
    (rows_of(pgd10=0.40, transfer=0.35), "transfer, which sees no gradient, leaves 35.0%"),
    (rows_of(pgd10=0.40, square=0.30), "square, which sees no gradient, leaves 30.0%"),
])  # fmt: skip
def test_attacks_that_contradict_each_other_are_seen(rows, message):
    (found,) = checks.of_the_rows(rows)
    assert message in found


def test_attacks_that_agree_get_no_warning():
    rows = rows_of(clean=0.65, fgsm=0.43, pgd10=0.41, pgd50=0.40, cw50=0.38, autoattack=0.36)
    rows[-1]["standing_after"] = {"apgd-ce": 380, "apgd-t": 361, "fab-t": 361, "square": 360}
    assert checks.of_the_rows(rows) + checks.of_the_parts(rows) == []
    rows[-1]["standing_after"]["square"] = 350
    (found,) = checks.of_the_parts(rows)
    assert "square, which sees no gradient, fools 11 images" in found
    # in "plus" two attacks by gradient follow, and the counts go on falling
    plus = {"apgd-ce": 400, "apgd-dlr": 390, "fab": 390, "square": 370, "apgd-t": 361, "fab-t": 360}
    rows[-1]["standing_after"] = plus
    (found,) = checks.of_the_parts(rows)
    assert "fools 20 images" in found


def test_steps_that_cannot_cross_the_ball_are_warned_of_and_blame_no_network():
    def at(size, **accuracies):
        rows = [row | {"epsilon": size / 255} for row in rows_of(**accuracies)]
        return checks.of_the_steps(rows), checks.of_the_rows(rows)

    short, blamed = at(32, fgsm=0.3, pgd10=0.5, cw50=0.3, square=0.3)
    assert short == ["pgd10: 10 steps of 2/255 cannot cross a ball of 32/255; take more steps"]
    assert blamed == []
    default = dict(pgd10=0.4, pgd20=0.3, pgd50=0.3, cw20=0.3, cw50=0.3)
    assert at(16, fgsm=0.35, **default) == ([], [])  # pgd-10 is too short, those after it are not
    assert "FGSM leaves 20.0%, less than PGD (30.0%)" in at(16, fgsm=0.2, **default)[1][0]
    assert at(5, pgd5=0.3, cw4=0.3)[0][0].startswith("cw4: 4 steps of 2/255 cannot cross")


def test_accuracies_of_a_cascade_are_not_compared(fitted, monkeypatch):
    monkeypatch.setattr(checks, "of_the_network", lambda *_, **__: [])
    measured = {"epsilon": EPS, "recorded_clean": None, "attacks": rows_of(pgd20=0.5, cw50=0.3)}
    found = [referee.warnings(None, *fitted[1:], measured, cascade) for cascade in (False, True)]
    assert [len(texts) for texts in found] == [1, 0]


def test_accuracy_that_rises_with_epsilon_is_seen():
    assert checks.of_the_sweep({0.0: 0.6, 0.03: 0.4, 0.06: 0.41}) == []
    (found,) = checks.of_the_sweep({0.0: 0.6, 8 / 255: 0.3, 16 / 255: 0.4})
    assert "rises from 30.0% to 40.0% as eps grows from 8 to 16 / 255" in found
