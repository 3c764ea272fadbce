"""The step against textbook loops, its cost in FLOPs, and what a run leaves behind."""

import copy
import csv
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SmallNet, flops
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import attacks
import data
import engine
import keeper
import options
import plots
import record
import resume
import schedules
import utils
from models import build_model

EPS = 8 / 255


def typed(*words):
    args = options.parse_training(list(words), "doc", {})
    args.num_classes, args.dtype = 10, torch.float32
    return args


def flags(*words):
    """Flags of an attack on running statistics, unless the words say otherwise."""
    return typed("--attack-mode", "eval", *words)


def attack_of(args, alpha=None, start=None):
    return partial(
        attacks.craft, epsilon=args.epsilon / 255, alpha=(alpha or args.alpha) / 255,
        steps=args.attack_steps, start=start or args.delta_init,
    )  # fmt: skip


LAM = torch.tensor(0.3)


class Batches:
    """The same batch twice an epoch, not augmented."""

    def __init__(self, x, y, count=2):
        self.x, self.y, self.count = x, y, count

    def __len__(self):
        return self.count

    def shuffled(self, rng):
        return torch.arange(len(self.y)).repeat(self.count, 1)

    def load(self, index):
        return self.x[index], self.y[index]


def one_step(model, x, y, args, average=None):
    T, T_a, W = args.temperature[0], args.attack_temperature[0], args.kl_weight[0]
    return engine.mix_kl_step(
        model, average, x, y, lam=LAM, T=T, T_a=T_a, W=W, attack=attack_of(args), args=args
    )


def textbook_fgsm(model, x, y, eta, alpha, radius, mode):
    adv = (x + eta).clamp(0, 1).requires_grad_()
    model.train(mode == "train")
    (grad,) = torch.autograd.grad(F.cross_entropy(model(adv), y), adv)
    model.train()
    delta = (adv.detach() + alpha * grad.sign() - x).clamp(-radius, radius)
    return (x + delta).clamp(0, 1)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", ["fgsm_at", "fgsm_rs", "n_fgsm"])
def test_baselines_are_the_textbook_loops_bit_by_bit(name, mode, batch):
    """Three optimiser steps of ours and of the loop in the paper, losses compared by equality."""
    args, losses = flags("--baseline", name, "--attack-mode", mode), []
    x, y = batch
    for ours in (True, False):
        torch.manual_seed(0)
        model = build_model("PreActResNet18", num_classes=10, width=8).train()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            if ours:
                loss, _, _ = one_step(model, x, y, args)
            else:
                size = {"fgsm_at": 0, "fgsm_rs": EPS, "n_fgsm": 2 * EPS}[name]
                eta = torch.empty_like(x).uniform_(-1, 1) * size if size else torch.zeros_like(x)
                alpha = 10 / 255 if name == "fgsm_rs" else EPS
                radius = float("inf") if name == "n_fgsm" else EPS
                adv = textbook_fgsm(model, x, y, eta, alpha, radius, mode)
                loss = F.cross_entropy(model(adv), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:3] == losses[3:] and len(set(losses)) == 3


def test_plain_flags_are_fgsm_rs(batch):
    words = ["--mixup-alpha", "0", "--temperature", "1", "--kl-weight", "0"]
    plain = flags(*words, "--delta-init", "uniform", "--alpha", "10")
    results = []
    for args in (plain, flags("--baseline", "fgsm_rs")):
        torch.manual_seed(1)
        results.append(one_step(SmallNet().train(), *batch, args)[0].item())
    assert results[0] == results[1]


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_whole_method_is_its_formula(batch, mode):
    """Mixup, T of the attack, smoothed hard term and KL to the start, written out."""
    x, y = batch
    args = flags("--mixup-alpha", "1", "--temperature", "3", "--attack-temperature", "5",
                 "--kl-weight", "2", "--label-smoothing", "0.1", "--attack-mode", mode,
                 "--delta-init", "half")  # fmt: skip
    torch.manual_seed(0)
    model = SmallNet().train()
    rng = torch.get_rng_state()
    loss, hard, kl = one_step(copy.deepcopy(model), x, y, args)

    torch.set_rng_state(rng)
    labels = F.one_hot(y, 10).float()
    x_, y_ = (LAM * a + (1 - LAM) * a[[-1, *range(len(x) - 1)]] for a in (x, labels))
    start = (x_ + EPS / 2 * torch.empty_like(x_).uniform_(-1, 1).sign()).clamp(0, 1)
    start.requires_grad_()
    logits = model.train(mode == "train")(start)
    q = (logits / 5).softmax(1)
    divergence = (torch.xlogy(y_, y_) - y_ * q.log()).sum()
    (grad,) = torch.autograd.grad(divergence, start)
    adv = (x_ + (start.detach() + EPS * grad.sign() - x_).clamp(-EPS, EPS)).clamp(0, 1)
    out = model.train()(adv)
    y_hat = 0.9 * y_ + 0.1 / 10
    hard_ = -(y_hat * out.log_softmax(1)).sum(1).mean()
    p, r = (logits.detach() / 3).softmax(1), (out / 3).softmax(1)
    kl_ = 9 * (p * (p.log() - r.log())).sum(1).mean()
    torch.testing.assert_close(hard, hard_, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(kl, kl_, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(loss, hard + 2 * kl)


@pytest.mark.parametrize("count", [32, 7, 1])
def test_both_attacks_half_on_each_statistics_and_compares_the_half_of_the_batchs(batch, count):
    x, y = (part[:count] for part in batch)
    args = flags("--attack-mode", "both", "--mixup-alpha", "1", "--kl-weight", "2")
    torch.manual_seed(0)
    model = SmallNet().train()
    model(batch[0])  # running statistics that are neither those of the start nor of the batch
    loss, hard, kl = one_step(twin := copy.deepcopy(model), x, y, args)

    torch.manual_seed(0)
    SmallNet()
    labels = F.one_hot(y, 10).float()
    x_, y_ = (LAM * a + (1 - LAM) * a[[-1, *range(count - 1)]] for a in (x, labels))
    half, images, starts = (count + 1) // 2, [], []
    for part, mode in ((slice(half), "train"), (slice(half, None), "eval")):
        start = (x_[part] + torch.empty_like(x_[part]).uniform_(-2 * EPS, 2 * EPS)).clamp(0, 1)
        logits = copy.deepcopy(model).train(mode == "train")(start.requires_grad_())
        raised = F.cross_entropy(logits / 2, y_[part], reduction="sum")
        (grad,) = torch.autograd.grad(raised, start)
        images.append((start + EPS * grad.sign()).clamp(0, 1).detach())
        starts.append(logits.detach())
    out = model(torch.cat(images))
    torch.testing.assert_close(hard, F.cross_entropy(out, y_))
    torch.testing.assert_close(kl, utils.temperature_kl(out[:half], starts[0], 2.0))
    torch.testing.assert_close(loss, hard + 2 * kl)
    for mine, theirs in zip(twin.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)  # the pass that trains recorded, no other


def test_trades_is_its_formula(batch):
    x, y = batch
    args = flags("--baseline", "trades")
    torch.manual_seed(0)
    model = SmallNet().train()
    with torch.no_grad():
        model.linear.weight *= 20  # predictions that the attack can move
    rng, twin = torch.get_rng_state(), copy.deepcopy(model)
    loss, _, _ = one_step(twin, x, y, args)
    ours = torch.autograd.grad(loss, list(twin.parameters()))

    torch.set_rng_state(rng)
    adv = (x + torch.empty_like(x).uniform_(-1, 1) * EPS).clamp(0, 1)
    model.eval()
    target = model(x).detach().log_softmax(1)
    for _ in range(10):
        adv.requires_grad_()
        raised = len(x) * F.kl_div(
            model(adv).log_softmax(1), target, reduction="batchmean", log_target=True
        )
        (grad,) = torch.autograd.grad(raised, adv)
        adv = attacks.project(adv.detach() + EPS / 4 * grad.sign(), x, EPS)
    model.train()
    clean = model(x)
    kl = F.kl_div(model(adv).log_softmax(1), clean.softmax(1), reduction="batchmean")
    expected = F.cross_entropy(clean, y) + 6 * kl
    torch.testing.assert_close(loss, expected)
    theirs = torch.autograd.grad(expected, list(model.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("target", ["labels", "clean"])
def test_the_attack_raises_a_sum_so_that_half_precision_keeps_its_gradient(target, batch):
    """The loss of eight equal images is eight times that of one; as a mean it would be the same."""
    x, y = batch[0][:1], batch[1][:1]
    losses = []

    def attack(model, images, loss):
        losses.append(float(loss(model(1 - images).detach())))
        return images, model(images).detach()

    args = flags("--mixup-alpha", "0", "--attack-target", target, "--attack-mode", "eval")
    for n in (1, 8):
        torch.manual_seed(0)
        model = SmallNet()
        with torch.no_grad():
            model.linear.weight *= 50  # logits that differ
        engine.mix_kl_step(
            model, None, x.repeat(n, 1, 1, 1), y.repeat(n), lam=torch.tensor(1.0),
            T=torch.tensor(2.0), T_a=torch.tensor(2.0), W=torch.tensor(1.0), attack=attack,
            args=args,
        )  # fmt: skip
    assert losses[1] == pytest.approx(8 * losses[0], rel=1e-3) and losses[0] > 0


def test_every_kl_is_computed_in_fp32(batch, monkeypatch):
    """Autocast on a CPU, unlike on a GPU, leaves log_softmax in half precision."""
    kinds, real = [], utils.temperature_kl

    def noting(*args):
        kinds.extend(arg.dtype for arg in args[:2])
        return real(*args)

    monkeypatch.setattr(utils, "temperature_kl", noting)
    args = flags("--attack-target", "clean", "--mixup-alpha", "0", "--attack-mode", "both")
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        engine.mix_kl_step(
            SmallNet(), None, *batch, lam=torch.tensor(1.0), T=torch.tensor(2.0),
            T_a=torch.tensor(2.0), W=torch.tensor(1.0), args=args,
            attack=partial(attacks.craft, epsilon=0.03, alpha=0.03),
        )  # fmt: skip
    assert set(kinds) == {torch.float32} and len(kinds) == 2 * 3


@pytest.mark.parametrize("reference", ["start", "clean", "ema"])
def test_the_reference_gets_no_gradient_and_is_the_right_pass(reference, batch):
    x, y = batch
    args = flags("--kl-reference", reference, "--mixup-alpha", "0", "--delta-init", "zero",
                 "--kl-weight", "3")  # fmt: skip
    torch.manual_seed(0)
    model = SmallNet().train()
    average = utils.WeightAverage(SmallNet())
    twin = copy.deepcopy(model)
    loss, hard, kl = one_step(twin, x, y, args, average.model)
    (grad,) = torch.autograd.grad(kl, twin.linear.weight, retain_graph=True)
    with utils.statistics_held(model, "eval"):
        teacher = (average.model(x) if reference == "ema" else model(x)).detach()
        adv, _ = attack_of(args)(model, x, lambda z: F.cross_entropy(z / 2, y, reduction="sum"))
    expected = utils.temperature_kl(model(adv), teacher, 2.0)
    torch.testing.assert_close(kl, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, model.linear.weight)[0])
    torch.testing.assert_close(loss, hard + 3 * kl)


def test_a_clean_reference_with_its_own_hard_term_gets_no_gradient_from_the_kl(batch):
    x, y = batch
    words = ["--hard-term", "clean", "--kl-reference", "clean", "--mixup-alpha", "0"]
    gradients = []
    for gradient in ("student", "both"):
        torch.manual_seed(0)
        model = SmallNet().train()
        _, _, kl = one_step(model, x, y, flags(*words, "--kl-gradient", gradient))
        gradients.append(torch.autograd.grad(kl, model.linear.weight)[0])
    torch.manual_seed(0)
    model = SmallNet().train()
    with utils.statistics_held(model, "eval"):
        adv, _ = attack_of(flags())(model, x, lambda z: F.cross_entropy(z / 2, y, reduction="sum"))
    expected = utils.temperature_kl(model(adv), model(x).detach(), 2.0)
    (through_the_student,) = torch.autograd.grad(expected, model.linear.weight)
    torch.testing.assert_close(gradients[0], through_the_student, rtol=1e-3, atol=1e-7)
    assert not torch.allclose(gradients[1], through_the_student, rtol=1e-2)


@pytest.mark.parametrize("words, cost", [
    ([], 5),
    (["--attack-mode", "eval"], 5),
    (["--mixup-alpha", "0.2"], 5),
    (["--kl-reference", "clean"], 6),
    (["--kl-reference", "ema"], 6),
    (["--baseline", "fgsm_rs"], 5),
    (["--baseline", "pgd_at"], 23),
    (["--baseline", "trades"], 27),
])  # fmt: skip
def test_a_step_costs_what_the_readme_says(words, cost):
    x, y = torch.rand(4, 3, 32, 32), torch.arange(4)
    model = build_model("PreActResNet18", num_classes=10, width=16).train()
    average = utils.WeightAverage(model).model
    forward = flops(lambda: model(x))
    args = typed(*words)
    total = flops(lambda: one_step(model, x, y, args, average)[0].backward())
    assert total / forward == pytest.approx(cost, rel=0.01)
    craft = flops(lambda: attack_of(flags())(model, x, lambda z: F.cross_entropy(z, y)))
    assert craft / forward == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_passes_of_a_step_are_in_the_precision_of_the_flag(dtype, batch):
    args, model, seen = flags("--batch-size", "32"), SmallNet(), set()
    args.dtype = dtype
    model.conv2.register_forward_hook(lambda _, __, out: seen.add(out.dtype))
    build, _ = engine.prepare(model, Batches(*batch), args)
    build(attack_of(args), 32)(torch.arange(32), torch.ones(len(schedules.Row._fields)))
    assert seen == {dtype}


@pytest.mark.parametrize("reference, mode", [
    ("start", "eval"), ("clean", "eval"), ("ema", "eval"), ("start", "both"), ("clean", "both"),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_weight_learns_under_autocast(reference, mode, dtype, batch):
    """Autocast can hand a pass weights that another pass cast without a gradient."""
    model = build_model("PreActResNet18", num_classes=10, width=8)
    args = flags("--kl-reference", reference, "--epochs", "1", "--batch-size", "32",
                 "--attack-mode", mode, "--mixup-alpha", "0.2", "--kl-weight", "2")  # fmt: skip
    args.dtype = dtype
    before = {key: value.clone() for key, value in model.named_parameters()}
    build, _ = engine.prepare(model, Batches(*batch), args)
    step = build(attack_of(args), 32)
    row = engine.train_one_epoch(step, Batches(*batch), resume.Progress(), args)
    assert all(not torch.equal(value, before[key]) for key, value in model.named_parameters())
    assert row["loss"] == pytest.approx(row["hard_loss"] + 2 * row["kl"], rel=1e-3)


@pytest.mark.parametrize("words, weights", [
    (["--kl-weight", "3", "--kl-warmup", "0.5"], [0, 1.5, 3, 3]),
    (["--kl-weight", "1:5"], [1, 2, 3, 4]),
    (["--kl-weight", "0:4"], [0, 1, 2, 3]),
    (["--kl-weight", "0:4", "--kl-reference", "clean"], [0, 1, 2, 3]),
    (["--kl-weight", "4:0", "--kl-warmup", "0.5"], [0, 1.5, 2, 1]),
])  # fmt: skip
def test_the_weight_of_the_kl_term_is_a_line_over_the_run_and_can_be_faded_in(
    words, weights, batch
):
    args = flags("--epochs", "2", "--batch-size", "32", *words)
    model = SmallNet()
    build, _ = engine.prepare(model, Batches(*batch), args)
    step = build(attack_of(args), 32)
    found = []
    for epoch in (1, 2):
        for row in schedules.plan(args, epoch, 2, np.random.default_rng(0)):
            loss, hard, kl = step(torch.arange(32), torch.tensor(row))
            found.append(float((loss - hard) / kl))
    assert found == pytest.approx(weights, rel=1e-2, abs=1e-3)


def test_a_step_uses_each_number_of_its_row_for_what_it_is(batch, monkeypatch):
    seen, whole = [], engine.mix_kl_step

    def noted(*given, **words):
        seen.append((float(words["T"]), float(words["T_a"])))
        return whole(*given, **words)

    monkeypatch.setattr(engine, "mix_kl_step", noted)
    args = flags("--epochs", "2", "--batch-size", "32", "--temperature", "4:2",
                 "--attack-temperature", "3:1", "--ema-decay", "0.2")  # fmt: skip
    model = SmallNet()
    build, parts = engine.prepare(model, Batches(*batch), args)
    step, expected = build(attack_of(args), 32), model.conv1.weight.detach().clone()
    decays = iter([1 / 10, 2 / 11, 0.2, 0.2])  # min(decay, (1 + t) / (10 + t)), t over the run
    for epoch in (1, 2):
        for row in schedules.plan(args, epoch, 2, np.random.default_rng(0)):
            step(torch.arange(32), torch.tensor(row))
            expected.lerp_(model.conv1.weight.detach(), 1 - next(decays))  # the new weights
    torch.testing.assert_close(parts.average.model.conv1.weight, expected)
    assert seen == [(4, 3), (3.5, 2.5), (3, 2), (2.5, 1.5)]


def test_the_flags_of_the_optimiser_reach_it(batch):
    args = flags("--momentum", "0.5", "--nesterov", "--weight-decay", "0.01", "--batch-size", "32")
    _, parts = engine.prepare(SmallNet(), Batches(*batch), args)
    (group,) = parts.optimizer.param_groups
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.5, True, 0.01)


class Waits(TorchDispatchMode):
    """Names the operations that read a value back from the device, as ``.item()`` does."""

    READS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique2")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket.__name__
        masks = args[1] if name.startswith("index") and isinstance(args[1], (list, tuple)) else ()
        masked = any(t is not None and t.dtype == torch.bool for t in masks)
        if name in self.READS or masked:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("words", [
    [], ["--attack-mode", "both", "--mixup-alpha", "0.2"], ["--kl-reference", "ema"],
    ["--baseline", "trades"],
])  # fmt: skip
def test_nothing_in_a_step_waits_for_the_device(words, batch):
    model = build_model("PreActResNet18", num_classes=10, width=8)
    args = flags(*words, "--batch-size", "32")
    batches = data.TrainingBatches(
        data.Images((batch[0].permute(0, 2, 3, 1) * 255).byte(), batch[1]), 32
    )
    build, _ = engine.prepare(model, batches, args)
    step = build(attack_of(args), 32)
    with Waits() as waits:
        step(torch.arange(32), torch.ones(len(schedules.Row._fields)))
    assert waits.seen == []
    with Waits() as waits:  # the planted ones are seen
        torch.ones(1).item(), float(torch.ones(1)), torch.ones(2)[torch.tensor([True, False])]
    assert len(waits.seen) == 3


def test_only_the_training_pass_records_statistics(batch):
    model = SmallNet().train()
    one_step(model, *batch, flags("--kl-reference", "clean"))
    assert model.bn1.num_batches_tracked == 1


def rows_of(pgd, fgsm=None):
    """Rows of a log by their PGD and FGSM accuracies; None where an epoch was not measured."""
    fgsm = fgsm or [0.5] * len(pgd)
    return [{"pgd10_acc": p, "fgsm_acc": f} for p, f in zip(pgd, fgsm, strict=True)]


@pytest.mark.parametrize("pgd, fgsm, verdict", [
    ([0.40, 0.42, 0.01], None, True),  # at once
    ([0.40, 0.25, 0.15], [0.3] * 3, True),  # within two epochs
    ([0.40, 0.33, 0.27, 0.22], [0.4] * 4, False),  # slowly: robust overfitting, not a collapse
    ([0.40, 0.42, 0.25], None, False),  # by less than half
    ([0.127, 0.097, 0.001], [0.182, 0.150, 0.083], True),  # measured: FGSM-RS at eps 16
    ([0.000], [0.110], True),  # measured: MIX-KL, collapsed before its first measured epoch
    ([0.042], [0.105], True),  # measured: FGSM-RS, whose PGD accuracy never was high
    ([0.081], [0.146], False),  # measured: FGSM-RS, ill, one epoch before
    ([0.151], [0.159], False),  # measured: a healthy network
    ([0.40, 0.42, 0.10], [0.5, 0.5, 0.1], False),  # both fell alike: the network is just worse
    ([0.04, 0.00], [0.04, 0.04], False),  # noise
    ([0.10, 0.20, 0.30], None, False),
    ([0.00], [0.04], False),
    ([0.40, None, 0.42, None, None], None, False),  # the last one was not measured
    ([0.40, None, None, 0.25, None, 0.15], [0.3] * 6, True),  # within two measured epochs
    ([0.40, None, 0.33, None, 0.27, None, 0.19], [0.3] * 7, False),  # the best is three of them ago
    ([None, None, 0.30], None, False),
])  # fmt: skip
def test_a_collapse_is_announced_and_nothing_else_is(pgd, fgsm, verdict):
    assert record.collapsed(rows_of(pgd, fgsm)) is verdict


@pytest.fixture
def tiny_run(tmp_path, batch):
    def run(name, *words, pgd=None):
        args = flags("--attack-mode", "both", "--epochs", "3", "--batch-size", "32", *words)
        torch.manual_seed(args.seed)
        model = SmallNet()
        folder = tmp_path / name
        folder.mkdir()
        measured = iter(pgd or [])

        def measure(net):
            with torch.no_grad(), attacks.measuring(net, batch[0]):
                clean = (net(batch[0]).argmax(1) == batch[1]).float().mean().item()
            return {"clean": clean, "fgsm": 0.5, "pgd10": next(measured, 0.25)}

        facts = {
            "model": "small", "num_classes": 10, "dataset": "none", "width": None,
            "mean": (0.5, 0.5, 0.5), "std": (1.0, 1.0, 1.0),
        }  # fmt: skip
        engine.train(
            model, Batches(*batch), attack_of=partial(attack_of, args), measure=measure, args=args,
            facts=facts, folder=folder,
        )  # fmt: skip
        with (folder / "log.csv").open() as file:
            return folder, list(csv.DictReader(file)), model

    return run


def test_the_training_images_grow_and_the_measured_ones_do_not(tiny_run, monkeypatch):
    seen, forward = [], SmallNet.forward

    def noting(self, x):
        seen.append((self.training, x.shape[-1]))
        return forward(self, x)

    monkeypatch.setattr(SmallNet, "forward", noting)
    words = ["--attack-mode", "train", "--kl-reference", "ema"]
    tiny_run("growing", "--image-sizes", "16", "24", "32", *words)
    trained = [side for training, side in seen if training]
    assert trained == [16] * 4 + [24] * 4 + [32] * 4  # two steps of attack and training an epoch
    assert {16, 24, 32} == {side for training, side in seen if not training}  # the average sees x~


def test_a_run_leaves_log_curves_and_checkpoints(tiny_run):
    import checkpoint

    pgd = [0.3, 0.2, 0.5, 0.1, 0.4, 0.3]  # raw and averaged by turns
    folder, rows, model = tiny_run("run", pgd=pgd)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert {"lr", "loss", "hard_loss", "kl", "clean_acc", "ema_pgd10_acc", "collapse"} <= set(
        rows[0]
    )
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    best = checkpoint.load(folder / "best_model.pth")
    assert (best["epoch"], best["selected"]) == (2, "raw")
    final = checkpoint.load(folder / "final_model.pth")
    assert (final["epoch"], final["selected"]) == (3, "ema")
    assert all(torch.equal(v, final["raw"][k]) for k, v in model.state_dict().items())
    assert not torch.equal(final["raw"]["conv1.weight"], final["ema"]["conv1.weight"])
    folder, _, _ = tiny_run("averaged", pgd=[0.4, 0.2, 0.3, 0.5, 0.4, 0.3])
    best = checkpoint.load(folder / "best_model.pth")
    assert (best["epoch"], best["selected"]) == (2, "ema")  # where the raw ones are at their worst


def test_epochs_that_are_not_due_are_trained_alike_and_leave_their_accuracies_empty(
    tiny_run, capsys, monkeypatch
):
    import checkpoint

    drawn = []
    monkeypatch.setattr("plots.curves", lambda rows, collapses, path: drawn.append(len(rows)))
    words = ["--epochs", "5", "--ema-decay", "0.9"]
    _, every, whole = tiny_run("every", *words)
    capsys.readouterr()
    pgd = [0.4, 0.3, 0.26, 0.1, 0.3, 0.3]  # epochs 2, 4, 5: raw and averaged by turns
    folder, rows, model = tiny_run("second", *words, "--measure-every", "2", pgd=pgd)
    accuracies = [key for key in rows[0] if key.endswith("_acc")]
    assert len(accuracies) == 6 and rows[0].keys() == every[0].keys() and drawn[5:] == [1, 2, 4, 5]
    for row, full in zip(rows, every, strict=True):
        measured = row["epoch"] in "245"
        assert all((row[key] != "") is measured for key in accuracies)
        assert (row["loss"], row["lr"], row["kl"]) == (full["loss"], full["lr"], full["kl"])
        assert row["collapse"] == "0"
    assert all(map(torch.equal, whole.state_dict().values(), model.state_dict().values()))
    shown = capsys.readouterr().out.splitlines()
    assert ["PGD-10" in line for line in shown] == [False, True, False, True, True]
    assert checkpoint.load(folder / "best_model.pth")["epoch"] == 2
    assert checkpoint.load(folder / "final_model.pth")["epoch"] == 5


def test_a_run_that_ends_in_an_unmeasured_epoch_leaves_a_checkpoint_that_opens(tmp_path):
    import checkpoint

    row = dict.fromkeys(("clean_acc", "fgsm_acc", "pgd10_acc")) | dict(
        epoch=1, lr=0.1, loss=2.0, hard_loss=2.0, kl=0.0, collapse=0
    )
    facts = dict(model="small", num_classes=10, dataset="none", width=None,
                 mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0))  # fmt: skip
    progress = resume.Progress(rows=[row])
    record.write_epoch(tmp_path, progress, SmallNet(), None, facts, keep=False)
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]
    record.write_epoch(tmp_path, progress, SmallNet(), None, facts)
    final = checkpoint.load(tmp_path / "final_model.pth")
    assert final["metrics"]["loss"] == 2.0 and "clean_acc" not in final["metrics"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "best_model.pth").exists()


def test_the_state_is_saved_in_the_first_and_in_each_measured_epoch(tiny_run, monkeypatch):
    saved = []
    monkeypatch.setattr(keeper.Keeper, "save", lambda watch: saved.append(watch.progress.epoch))
    tiny_run("saves", "--epochs", "5", "--measure-every", "2")
    assert saved == [1, 2, 3, 5, 6]  # before the first is measured; then the epochs that follow


def test_a_loss_that_is_not_finite_ends_the_run(tiny_run):
    with pytest.raises(ValueError, match=r"epoch 1: the loss is .*--lr"):
        tiny_run("nan", "--lr", "1e30")


def test_the_schedules_reach_the_optimiser(tiny_run):
    words = ["--lr", "0.4", "--lr-schedule", "cyclic", "--lr-peak", "0.5", "--temperature", "4:1"]
    words += ["--kl-weight", "0:6"]
    _, rows, _ = tiny_run("lr", *words)
    # The log holds the last batch's: progress 1/6, 3/6, 5/6 of three epochs of two batches.
    assert [float(row["lr"]) for row in rows] == pytest.approx([0.4 / 3, 0.4, 0.4 / 3])
    assert [float(row["temperature"]) for row in rows] == pytest.approx([3.5, 2.5, 1.5])
    assert [float(row["kl_weight"]) for row in rows] == pytest.approx([1, 3, 5])


def test_the_line_of_an_epoch_shows_percentages():
    row = dict(epoch=2, lr=0.1, loss=1.5, clean_acc=0.5, fgsm_acc=0.25, pgd10_acc=0.125,
               train_seconds=10, eval_seconds=2, collapse=0)  # fmt: skip
    shown = record.line(row, 9)
    assert (
        "held-out clean 50.00%" in shown
        and "epoch   2/9" in shown
        and "PGD-10 12.50%" in shown
        and "12 s" in shown
    )
    assert "averaged" not in shown and "COLLAPSE" not in shown
    shown = record.line(row | dict(clean_acc=None, fgsm_acc=None, pgd10_acc=None), 9)
    assert shown == "epoch   2/9  lr 0.1000  loss 1.5000  12 s"


def test_the_accuracies_of_raw_and_averaged_weights_have_names_of_their_own(net):
    def measure(measured):
        return {"clean": 0.7 if measured is net else 0.8}

    row = record.accuracies(net, utils.WeightAverage(net), measure)
    assert (row["clean_acc"], row["ema_clean_acc"]) == (0.7, 0.8)


def test_a_collapse_is_a_red_bar_in_the_curves(tmp_path, monkeypatch):
    drawn, figure = [], plots.figure
    monkeypatch.setattr(plots, "figure", lambda *size: drawn.append(figure(*size)) or drawn[-1])
    row = dict(lr=0.1, loss=1, hard_loss=1, kl=0, clean_acc=0.5, fgsm_acc=0.4, pgd10_acc=0.3)
    plots.curves([row | {"epoch": epoch} for epoch in (1, 2, 3)], [2], tmp_path / "curves.png")
    lines = drawn[0].axes[0].lines
    assert [line.get_xdata()[0] for line in lines if line.get_color() == "tab:red"] == [2]


def test_engine_flags_need_nothing_else(batch):
    """The step reads these flags and no others, so a caller can give them by hand."""
    names = "mixup_alpha num_classes kl_reference kl_weight hard_term attack_target kl_gradient"
    names += " attack_mode"
    full = flags()
    args = SimpleNamespace(**{k: getattr(full, k) for k in [*names.split(), "label_smoothing"]})
    loss, _, _ = engine.mix_kl_step(
        SmallNet().train(), None, *batch, lam=LAM, T=2.0, T_a=2.0, W=1.0, attack=attack_of(full),
        args=args,
    )  # fmt: skip
    assert loss.isfinite()


def test_a_graph_is_refused_where_there_is_no_gpu(batch):
    args = flags("--compile", "on", "--batch-size", "32")
    with pytest.raises(ValueError, match="--compile on: a CUDA graph needs a GPU"):
        engine.prepare(SmallNet(), Batches(*batch), args)
