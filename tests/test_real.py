"""The trained network in results/ on real CIFAR-10 images, against other people's code.

Skipped unless the environment variable CIFAR_DATA names the folder of the unpacked archive:

    CIFAR_DATA=cifar-data python -m pytest tests/test_real.py

The last test attacks 200 images by AutoAttack twice: a quarter of an hour on one core.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, Watching
from test_checks import Planted
from torch.nn import functional as F

import attacks
import checks
import data
import evaluation
from models import build_model

FOLDER = os.environ.get("CIFAR_DATA")
pytestmark = pytest.mark.skipif(not FOLDER, reason="CIFAR_DATA names no folder of real images")
MODEL = ROOT / "results" / "short-both-seed0" / "final_model.pth"
EPS, ALPHA, STEPS = 8 / 255, 2 / 255, 20
COUNT = 512  # a power of two: then torchattacks, which averages the loss, rounds as we do


def opened(path):
    """A network in results/ as any user of torch opens it, and what its file says."""
    saved = torch.load(ROOT / "results" / path, weights_only=True)
    keys = ("num_classes", "width", "mean", "std")
    model = build_model(saved["model"], **{key: saved[key] for key in keys})
    model.load_state_dict(saved[saved["selected"]])
    return model.eval(), saved


@pytest.fixture(scope="module")
def real():
    """The trained MIX-KL and the first test images."""
    model, _ = opened(MODEL)
    test = data.read_cifar("cifar10", Path(FOLDER) / "cifar-10-batches-py").test[:COUNT]
    return model, test.as_float().contiguous(), test.labels


@pytest.fixture(scope="module")
def drawn(real):
    """A uniform perturbation, and the start that our measurement makes of it."""
    _, x, _ = real
    generator = torch.Generator().manual_seed(0)
    eta = torch.empty_like(x).uniform_(-1, 1, generator=generator) * EPS
    start = evaluation.uniform_starts(x, EPS, 0)
    assert torch.equal((x + eta).clamp(0, 1), start)
    return eta, start


def verdict(real, name):
    """Return which images stand as the scripts measure it, with 64 images at a time."""
    settings = evaluation.Settings(epsilon=EPS, batch_size=64, seed=0)
    return evaluation.evaluate(*real, [name], settings)[1][name]


def by_torchattacks(model, x, y, eta, monkeypatch):
    """torchattacks draws its start by ``uniform_``, and is given ours."""
    attack = pytest.importorskip("torchattacks").PGD(model, eps=EPS, alpha=ALPHA, steps=STEPS)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "uniform_", lambda self, low, high: self.copy_(eta))
        return attack(x, y)


def by_foolbox(model, x, y, start, margin=False):
    """foolbox draws its start by ``get_random_start``, and is given ours."""
    foolbox = pytest.importorskip("foolbox")
    from foolbox.attacks.carlini_wagner import best_other_classes

    def margin_loss(wrapped, labels):
        def loss(images):
            logits, rows = wrapped(images), range(len(labels))
            return (logits[rows, best_other_classes(logits, labels)] - logits[rows, labels]).sum()

        return loss

    attack = foolbox.attacks.LinfPGD(abs_stepsize=ALPHA, steps=STEPS, random_start=True)
    attack.get_random_start = lambda x0, epsilon: x0.__class__(start)
    if margin:
        attack.get_loss_fn = margin_loss
    return attack(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), x, y, epsilons=EPS)[0]


def by_hand(model, x, y, start, margin=False):
    """A plain loop that shares no line with attacks.py."""
    adv = start.clone()
    for _ in range(STEPS):
        adv.requires_grad_()
        logits = model(adv)
        if margin:
            others = logits.masked_fill(F.one_hot(y, logits.shape[1]).bool(), -1e9)
            loss = (others.max(1).values - logits[range(len(y)), y]).sum()
        else:
            loss = -logits.log_softmax(1)[range(len(y)), y].sum()
        loss.backward()
        adv = adv.detach() + ALPHA * adv.grad.sign()
        adv = torch.clamp(x + torch.clamp(adv - x, -EPS, EPS), 0, 1)
    return adv


def test_pgd_20_is_that_of_two_libraries_and_of_a_plain_loop(real, drawn, monkeypatch):
    model, x, y = real
    eta, start = drawn
    ours = attacks.pgd(model, x, y, epsilon=EPS, alpha=ALPHA, steps=STEPS, start=start)
    standing = verdict(real, f"pgd-{STEPS}")
    assert 0.3 * COUNT < standing.sum() < 0.5 * COUNT
    for attack in (
        lambda seen: by_torchattacks(seen, x, y, eta, monkeypatch),
        lambda seen: by_foolbox(seen, x, y, start),
        lambda seen: by_hand(seen, x, y, start),
    ):
        seen = Watching(model, y)
        theirs = attack(seen)
        assert torch.equal(theirs, ours)
        assert torch.equal(seen.standing(x, theirs), standing)


def test_cw_20_is_that_of_foolbox_with_another_margin_and_of_a_plain_loop(real, drawn):
    model, x, y = real
    _, start = drawn
    ours = attacks.cw(model, x, y, epsilon=EPS, alpha=ALPHA, steps=STEPS, start=start)
    standing = verdict(real, f"cw-{STEPS}")
    assert 0.3 * COUNT < standing.sum() < 0.5 * COUNT
    for attack in (by_foolbox, by_hand):
        seen = Watching(model, y)
        theirs = attack(seen, x, y, start, margin=True)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)
        assert torch.equal(seen.standing(x, theirs), standing)


def test_the_margin_is_that_of_torchattacks(real):
    """Its ``f`` takes the largest of 0 and each side's logits, so only where those are above 0."""
    model, x, y = real
    theirs = pytest.importorskip("torchattacks").CW(model, kappa=1e9)
    with torch.no_grad():
        logits = model(x)
    rows = [(row[None], label[None]) for row, label in zip(logits, y, strict=True)]
    ours = torch.stack([attacks.margin_loss(*row) for row in rows])
    others = logits.masked_fill(F.one_hot(y, 10).bool(), -1).amax(1)
    comparable = (others > 0) & (logits.gather(1, y[:, None]).squeeze(1) > 0)
    assert comparable.sum() > 0.8 * COUNT
    torch.testing.assert_close(ours[comparable], -theirs.f(logits, y)[comparable])


@pytest.mark.parametrize("path", [
    "short-both-seed0/final_model.pth", "cifar10-fgsm_rs/model.pth", "cifar10-n_fgsm/model.pth",
])  # fmt: skip
def test_an_honestly_trained_network_raises_no_warning(path, real):
    _, x, y = real
    model, saved = opened(path)
    recorded = saved["metrics"]["ema_clean_acc"]
    assert checks.of_the_network(model, x[:256], y[:256], epsilon=EPS, recorded=recorded) == []


@pytest.mark.parametrize("scale", [0.2, 30])
def test_a_planted_scale_of_the_logits_is_flagged(scale, real):
    model, x, y = real
    scaled = Planted(model, after=lambda logits: scale * logits)
    found = checks.of_the_network(scaled, x[:256], y[:256], epsilon=EPS)
    assert any("where the logits are multiplied by" in warning for warning in found), found


@pytest.mark.slow
def test_autoattack_by_the_script_is_a_direct_call_of_the_library(real, tmp_path):
    autoattack = pytest.importorskip("pyautoattack").AutoAttack
    count, batch = 200, 64  # several batches, the last one smaller
    words = f"--attacks clean autoattack --n-examples {count} --batch-size {batch} --seed 0"
    subprocess.run(
        [sys.executable, ROOT / "test_cifar10.py", "--model_path", MODEL, "--data-dir", FOLDER,
         "--out_dir", tmp_path, *words.split()], check=True,
    )  # fmt: skip
    (path,) = tmp_path.glob("*-verdicts.npz")
    found = np.load(path)

    model, x, y = (part[:count] if isinstance(part, torch.Tensor) else part for part in real)
    adversary = autoattack(model, norm="Linf", eps=EPS, seed=0, version="standard", device="cpu")
    adversary.verbose = False
    x_adv, _ = adversary.run_standard_evaluation(x, y, batch_size=batch)
    assert (x_adv - x).abs().max() <= EPS + 1e-6
    with torch.no_grad():
        standing = torch.cat([model(part).argmax(1) for part in x_adv.split(batch)]) == y
    assert np.array_equal(found["labels"], y.numpy())
    assert np.array_equal(found["autoattack"], standing.numpy())
    assert 0.2 * count < standing.sum() < found["clean"].sum()
    (path,) = tmp_path.glob("*-report.json")
    row = json.loads(path.read_text())["attacks"][1]
    assert row["correct"] == standing.sum() == row["standing_after"]["square"]
