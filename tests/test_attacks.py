"""The attacks against independent libraries, closed forms, and the promises of their docstrings."""

import foolbox
import pytest
import torch
import torchattacks
from torch import nn

import attacks

EPS, ALPHA = 8 / 255, 2 / 255


@pytest.fixture
def images(fitted):
    model, x, y = fitted
    return model, x[:256].contiguous(), y[:256]


def test_fgsm_is_bit_identical_to_torchattacks_and_foolbox(images):
    model, x, y = images
    ours = attacks.fgsm(model, x, y, epsilon=EPS)
    assert torch.equal(ours, torchattacks.FGSM(model, eps=EPS)(x, y))
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    theirs, _, _ = foolbox.attacks.FGSM(random_start=False)(wrapped, x, y, epsilons=EPS)
    assert torch.equal(ours, theirs)


def test_pgd_from_the_image_is_bit_identical_to_torchattacks_and_foolbox(images):
    model, x, y = images
    ours = attacks.pgd(model, x, y, epsilon=EPS, alpha=ALPHA, steps=10)
    theirs = torchattacks.PGD(model, eps=EPS, alpha=ALPHA, steps=10, random_start=False)(x, y)
    assert torch.equal(ours, theirs)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD(abs_stepsize=ALPHA, steps=10, random_start=False)
    theirs, _, _ = attack(wrapped, x, y, epsilons=EPS)
    assert torch.equal(ours, theirs)


def test_pgd_from_a_random_start_is_bit_identical_to_torchattacks_and_foolbox(images, monkeypatch):
    model, x, y = images
    eta = torch.empty_like(x).uniform_(-EPS, EPS, generator=torch.Generator().manual_seed(5))
    start = (x + eta).clamp(0, 1)
    assert torch.equal(
        start, attacks.start_point(x, "uniform", EPS, torch.Generator().manual_seed(5))
    )
    ours = attacks.pgd(model, x, y, epsilon=EPS, alpha=ALPHA, steps=10, start=start)
    # torchattacks draws its start by uniform_, foolbox by get_random_start: both are fed ours.
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "uniform_", lambda self, low, high: self.copy_(eta))
        theirs = torchattacks.PGD(model, eps=EPS, alpha=ALPHA, steps=10)(x, y)
    assert torch.equal(ours, theirs)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD(abs_stepsize=ALPHA, steps=10, random_start=True)
    attack.get_random_start = lambda x0, epsilon: x0.__class__(start)
    theirs, _, _ = attack(wrapped, x, y, epsilons=EPS)
    assert torch.equal(ours, theirs)


def linear_model(num_classes):
    """A linear model, images whose ball the box never cuts, and the margin over its dual norm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, num_classes)).double()
    x = torch.rand(400, 3, 8, 8, dtype=torch.float64) * 0.6 + 0.2
    weight, logits = model[1].weight.detach(), model(x).detach()
    y = logits.argmax(1)
    # Image i stands against class j as long as its margin exceeds eps ||w_y - w_j||_1.
    margins = logits.gather(1, y[:, None]) - logits
    norms = (weight[y][:, None] - weight[None]).abs().sum(2)
    return model, x, y, torch.where(norms > 0, margins / norms, torch.inf).amin(1)


@pytest.mark.parametrize("attack", [attacks.pgd, attacks.cw])
@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9])
def test_on_a_linear_model_robust_accuracy_is_the_closed_form(attack, quantile):
    model, x, y, slack = linear_model(2)
    epsilon = slack.quantile(quantile).item()
    adv = attack(model, x, y, epsilon=epsilon, alpha=epsilon / 4, steps=20)
    assert torch.equal(~attacks.fooled(model(adv), y), slack > epsilon)
    assert 0.08 < (slack <= epsilon).double().mean() < 0.92
    once = attacks.fgsm(model, x, y, epsilon=epsilon)
    assert torch.equal(~attacks.fooled(model(once), y), slack > epsilon)


@pytest.mark.parametrize("attack", [attacks.pgd, attacks.cw])
def test_nothing_falls_that_provably_stands(attack):
    model, x, y, slack = linear_model(5)
    epsilon = slack.median().item()
    adv = attack(model, x, y, epsilon=epsilon, alpha=epsilon / 4, steps=20)
    fell = attacks.fooled(model(adv), y)
    assert not (fell & (slack > epsilon)).any() and fell.double().mean() > 0.35


def test_attacks_leave_no_trace(net, batch):
    x, y = batch
    net.train()
    net.bn1.eval()  # a mode of its own
    modes = [module.training for module in net.modules()]
    state = {key: value.clone() for key, value in net.state_dict().items()}
    original, rng = x.clone(), torch.get_rng_state()
    for attack in (attacks.pgd, attacks.cw):
        attack(net, x, y, epsilon=EPS, alpha=ALPHA, steps=2)
    attacks.fgsm(net, x, y, epsilon=EPS)
    attacks.start_point(x, "uniform", EPS, torch.Generator().manual_seed(0))
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), rng) and torch.equal(x, original)


def test_attacks_restore_the_mode_when_the_model_raises(batch):
    tf32, kinds = [], (torch.backends.cudnn, torch.backends.cuda.matmul)
    kinds[1].allow_tf32 = True  # as an environment may set it

    class Broken(nn.Module):
        def forward(self, x):
            tf32.extend(kind.allow_tf32 for kind in kinds)
            raise RuntimeError("planted")

    model = Broken().train()
    with pytest.raises(RuntimeError, match="planted"):
        attacks.fgsm(model, *batch, epsilon=EPS)
    after, kinds[1].allow_tf32 = [kind.allow_tf32 for kind in kinds], False
    assert model.training
    assert tf32 == [False, False] and after == [True, True]  # TF32 is no fp32


def test_attacks_run_in_fp32_and_eval_mode_inside_autocast_and_no_grad(net, batch):
    x, y = batch
    expected = attacks.pgd(net.eval(), x, y, epsilon=EPS, alpha=ALPHA, steps=3)
    net.train()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(attacks.pgd(net, x, y, epsilon=EPS, alpha=ALPHA, steps=3), expected)


@pytest.mark.parametrize("kind", attacks.STARTS)
def test_starts_and_crafted_images_are_where_they_should_be(net, batch, kind):
    x, y = batch
    torch.manual_seed(3)
    start = attacks.start_point(x, kind, EPS)
    radius = {"zero": 0, "uniform": EPS, "half": EPS / 2, "noise": 2 * EPS}[kind]
    inside = (x > 2 * EPS) & (x < 1 - 2 * EPS)
    eta = (start - x)[inside]
    assert eta.abs().max() <= radius + 1e-6
    if kind == "half":
        assert (eta.abs() - radius).abs().max() < 1e-6
    elif radius:
        assert eta.abs().max() > 0.99 * radius and abs(eta.mean()) < 0.01 * radius
        assert abs(eta.std() - radius / 3**0.5) < 0.01 * radius
    assert start.min() >= 0 and start.max() <= 1
    adv, _ = attacks.craft(
        net, x, lambda z: attacks.cross_entropy_loss(z, y), epsilon=EPS, alpha=EPS, start=kind
    )
    assert adv.min() >= 0 and adv.max() <= 1
    reach = (adv - x).abs().max()
    assert reach <= EPS + 1e-6 if kind != "noise" else 2.9 * EPS < reach <= 3 * EPS + 1e-6


def test_unknown_start_is_refused(batch):
    with pytest.raises(ValueError, match="choose one of zero, uniform"):
        attacks.start_point(batch[0], "random", EPS)


def test_craft_returns_the_logits_of_the_start_in_the_mode_of_the_caller(net, batch):
    x, y = batch
    net.train()
    torch.manual_seed(7)
    start = attacks.start_point(x, "uniform", EPS)
    torch.manual_seed(7)
    _, logits = attacks.craft(
        net, x, lambda z: attacks.cross_entropy_loss(z, y), epsilon=EPS, alpha=EPS
    )
    assert torch.equal(logits, net(start).detach()) and not logits.requires_grad


def test_epsilon_zero_changes_nothing(fitted):
    model, x, y = fitted
    assert torch.equal(attacks.pgd(model, x, y, epsilon=0.0, alpha=ALPHA, steps=3), x)
    assert torch.equal(attacks.fgsm(model, x, y, epsilon=0.0), x)


def test_attack_raises_the_loss_and_more_steps_raise_it_more(fitted):
    model, x, y = fitted
    losses = [
        attacks.cross_entropy_loss(
            model(attacks.pgd(model, x, y, epsilon=EPS, alpha=ALPHA, steps=steps)), y
        ).item()
        for steps in (0, 1, 5, 20)
    ]
    assert losses == sorted(losses) and losses[3] > 2 * losses[0]


def test_margin_loss_is_the_textbook_one_and_cw_ignores_the_logit_scale(fitted):
    model, x, y = fitted
    logits = torch.randn(50, 10, dtype=torch.float64)
    labels = torch.randint(10, (50,))
    expected = sum(
        max(z for j, z in enumerate(row) if j != label) - row[label]
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True)
    )
    assert abs(attacks.margin_loss(logits, labels).item() - expected) < 1e-9

    class Scaled(nn.Module):
        def forward(self, images):
            return 32 * model(images)  # a power of two: exact

    sizes = dict(epsilon=EPS, alpha=ALPHA, steps=5)
    assert torch.equal(attacks.cw(Scaled(), x, y, **sizes), attacks.cw(model, x, y, **sizes))


def test_a_non_finite_logit_counts_as_fooled():
    logits = torch.tensor([[2.0, 1.0], [2.0, float("nan")], [float("inf"), 0.0], [1.0, 2.0]])
    assert attacks.fooled(logits, torch.tensor([0, 0, 0, 0])).tolist() == [False, True, True, True]
