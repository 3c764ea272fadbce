"""Mixup, KL, averaging and schedules against their closed forms."""

import copy
import io
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import utils


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
def test_temperature_kl_is_the_textbook_sum(temperature):
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 6, 10)) * 4

    def softmax(z):
        e = np.exp(z / temperature)
        return e / e.sum(1, keepdims=True)

    p, q = softmax(teacher), softmax(student)
    expected = temperature**2 * (p * np.log(p / q)).sum() / 6
    value = utils.temperature_kl(torch.tensor(student), torch.tensor(teacher), temperature)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    assert value > 0


def test_temperature_kl_is_zero_on_equal_logits_and_on_shifted_ones():
    z = torch.randn(5, 10, dtype=torch.float64)
    assert utils.temperature_kl(z, z, 3.0) == 0
    assert utils.temperature_kl(z, z + 100, 3.0).abs() < 1e-10


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_temperature_kl_gradient_is_as_documented(temperature):
    student = torch.randn(5, 10, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 10, dtype=torch.float64)
    utils.temperature_kl(student, teacher, temperature).backward()
    q, p = ((z / temperature).softmax(1) for z in (student.detach(), teacher))
    torch.testing.assert_close(student.grad, temperature * (q - p) / 5)


def test_temperature_kl_gradient_keeps_its_size_at_high_temperature():
    teacher = torch.randn(5, 10, dtype=torch.float64)
    sizes = []
    for temperature in (50.0, 100.0):
        student = torch.zeros(5, 10, dtype=torch.float64, requires_grad=True)
        utils.temperature_kl(student, teacher, temperature).backward()
        sizes.append(student.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)


def test_mixup_is_the_convex_combination():
    x, y = torch.rand(4, 3, 2, 2), torch.tensor([0, 2, 1, 2])
    mixed, labels = utils.mixup(x, y, torch.tensor(0.3), 3)
    for i, j in enumerate([3, 0, 1, 2]):
        torch.testing.assert_close(mixed[i], 0.3 * x[i] + 0.7 * x[j])
        expected = torch.zeros(3)
        expected[y[i]] += 0.3
        expected[y[j]] += 0.7
        torch.testing.assert_close(labels[i], expected)
    torch.testing.assert_close(labels.sum(1), torch.ones(4))


def test_mixup_at_the_ends_is_one_image():
    x, y = torch.rand(4, 3, 2, 2), torch.arange(4)
    for lam, index in ((1.0, torch.arange(4)), (0.0, torch.tensor([3, 0, 1, 2]))):
        mixed, labels = utils.mixup(x, y, torch.tensor(lam), 4)
        assert torch.equal(mixed, x[index]) and torch.equal(labels.argmax(1), y[index])


def test_lam_is_beta_distributed():
    for alpha in (0.2, 1.0):
        draws = utils.draw_lam(alpha, 4000, np.random.default_rng(0))
        assert draws.mean().item() == pytest.approx(0.5, abs=0.03)
        assert draws.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.06)
    assert (utils.draw_lam(0.0, 3, np.random.default_rng(0)) == 1).all()


@pytest.mark.parametrize("num_classes, factor", [(10, 0.7), (100, 0.5)])
def test_label_relaxation_is_label_smoothing_with_the_converted_strength(num_classes, factor):
    logits, y = torch.randn(7, num_classes, dtype=torch.float64), torch.arange(7)
    relaxed = torch.full((7, num_classes), (1 - factor) / (num_classes - 1), dtype=torch.float64)
    relaxed[torch.arange(7), y] = factor
    expected = -(relaxed * logits.log_softmax(1)).sum(1).mean()
    smoothing = utils.smoothing_of_factor(factor, num_classes)
    torch.testing.assert_close(F.cross_entropy(logits, y, label_smoothing=smoothing), expected)


def test_label_relaxation_below_chance_is_refused():
    with pytest.raises(ValueError, match=r"--factor 0\.05"):
        utils.smoothing_of_factor(0.05, 10)


def test_weight_average_is_its_closed_form():
    model = nn.BatchNorm1d(1).double()
    average = utils.WeightAverage(model)
    value, history = model.weight.item(), []
    for t in range(60):
        with torch.no_grad():
            model.weight.fill_(math.sin(t))
        model.num_batches_tracked += 1
        average.update(model, torch.tensor(utils.pull(0.8, t), dtype=torch.float64))
        decay = min(0.8, (1 + t) / (10 + t))
        value = decay * value + (1 - decay) * math.sin(t)
        history.append(decay)
    assert average.model.weight.item() == pytest.approx(value, rel=1e-12)
    assert history[0] == 0.1 and history[-1] == 0.8
    assert average.model.num_batches_tracked == 60
    assert not average.model.training and not average.model.weight.requires_grad
    assert model.weight.requires_grad and model.training


def test_resized_images_keep_the_range_the_mean_and_the_layout_and_lose_the_fine_detail():
    x = torch.rand(8, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    assert utils.resized(x, 32) is x
    for side in (16, 24):
        small = utils.resized(x, side)
        assert small.shape == (8, 3, side, side) and 0 <= small.min() and small.max() <= 1
        assert small.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(small.mean(), x.mean(), atol=0.01, rtol=0)
    board = torch.arange(32) % 2 * torch.ones(1, 3, 32, 1)  # stripes a pixel wide: grey, no moire
    torch.testing.assert_close(
        utils.resized(board, 16)[..., 2:-2], torch.full((1, 3, 16, 12), 0.5), atol=0.01, rtol=0
    )


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_statistics_held_records_nothing_and_uses_what_its_mode_says(net, batch, mode):
    x, _ = batch
    net.train()
    net(x)  # running statistics that are neither those of the start nor of the batch
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with utils.statistics_held(net, mode):
        held = net(x)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(module.training for module in net.modules())
    plain = copy.deepcopy(net)
    assert torch.equal(held, plain.train(mode == "train")(x))
    assert not torch.equal(held, plain.train(mode != "train")(x))
    net(x)
    assert not torch.equal(net.bn1.running_mean, before["bn1.running_mean"])


def test_statistics_held_gives_the_mode_back_when_the_model_raises(net):
    net.train()
    with pytest.raises(RuntimeError), utils.statistics_held(net, "eval"):
        raise RuntimeError("planted")
    assert net.training and net.bn1.track_running_stats


def test_seed_everything_seeds_every_generator():
    import random

    def draw():
        utils.seed_everything(3)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw() == draw()


def test_each_process_draws_noise_of_its_own():
    def draw(seed, rank):
        utils.seed_everything(seed, rank)
        return torch.rand(1).item(), np.random.rand()

    assert draw(3, 0) == draw(3, 0)
    found = [draw(seed, rank) for seed in (3, 4) for rank in (0, 1, 2)]
    assert len(set(found)) == 6


def test_devices_and_precisions(monkeypatch):
    assert utils.pick_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="--device nonsense: not available"):
        utils.pick_device("nonsense")
    assert utils.pick_precision("bf16", SimpleNamespace(type="cpu")) == torch.bfloat16
    monkeypatch.setattr(utils, "has_fast_bf16", lambda device: False)
    assert utils.pick_precision("auto", torch.device("cpu")) == torch.float32
    monkeypatch.setattr(utils, "has_fast_bf16", lambda device: True)
    assert utils.pick_precision("auto", torch.device("cpu")) == torch.bfloat16


@pytest.mark.parametrize(
    "cpuinfo, fast",
    [
        ("vendor_id : GenuineIntel\nflags : avx512f avx512_bf16 amx_bf16", True),
        ("vendor_id : GenuineIntel\nflags : avx512f avx512_bf16", False),
        ("vendor_id : AuthenticAMD\nflags : avx512f avx512_bf16", True),
        ("vendor_id : AuthenticAMD\nflags : avx2", False),
    ],
)
def test_bf16_is_chosen_where_the_processor_gains_by_it(monkeypatch, cpuinfo, fast):
    monkeypatch.setattr("builtins.open", lambda path: io.StringIO(cpuinfo))
    assert utils.has_fast_bf16(torch.device("cpu")) == fast


def test_keep_freed_memory_stops_the_page_faults_of_large_tensors():
    import subprocess
    import sys

    if not sys.platform.startswith("linux"):
        pytest.skip("glibc only")
    program = (
        "import resource, torch, utils; torch.set_num_threads(1); utils.keep_freed_memory()\n"
        "def work():\n"
        "    for _ in range(20): [torch.ones(1 << 20) for _ in range(24)]\n"
        "work(); a = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "work(); print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - a)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert int(done.stdout) < 20_000  # 20 rounds of 96 MB would be 490,000 faults
