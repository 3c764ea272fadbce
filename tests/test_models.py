"""The networks: sizes as published, no dead parameters, normalisation inside."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT, flops
from torch import nn
from torch.nn import functional as F

import checkpoint
from models import MODELS, build_model, canonical_name

PARAMETERS = {
    ("PreActResNet18", 10): 11_172_170,
    ("PreActResNet18", 100): 11_218_340,
    ("ResNet18", 10): 11_173_962,
    ("ResNet18", 100): 11_220_132,
    ("WideResNet34-10", 10): 46_160_474,
    ("WideResNet34-10", 100): 46_218_164,
    ("WideResNet28-10", 10): 36_479_194,
    ("WideResNet16-4", 10): 2_748_890,
}


# Of results/short-both-seed0/final_model.pth on an image made by arithmetic, at commit c02776d.
LOGITS = [1.068, 1.551, 0.440, -0.640, -1.508, -1.809, 0.018, -2.363, 3.748, -0.511]


@pytest.mark.parametrize("name, num_classes", PARAMETERS)
def test_number_of_parameters_is_the_published_one(name, num_classes):
    with torch.device("meta"):
        model = MODELS[name](num_classes=num_classes)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name, num_classes]


@pytest.mark.parametrize("name, billions", [
    ("PreActResNet18", 0.5554), ("ResNet18", 0.5554), ("WideResNet28-10", 5.2433),
    ("WideResNet34-10", 6.6589),
])  # fmt: skip
def test_a_forward_pass_costs_the_published_number_of_products(name, billions):
    model, x = MODELS[name](num_classes=10).eval(), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert flops(lambda: model(x)) == pytest.approx(2e9 * billions, rel=1e-3)


def test_a_wide_network_begins_with_the_published_deviations():
    torch.manual_seed(0)
    for weight in MODELS["WideResNet16-4"](num_classes=10).block3.parameters():
        if weight.dim() == 4 and weight.shape[2] == 3:  # He et al., arXiv:1502.01852, fan-out
            fan_out = 9 * weight.shape[0]
            assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)


def test_a_wide_network_is_its_definition():
    """Of arXiv:1605.07146 in the form that is used here: a shortcut begins behind norm and relu."""
    torch.manual_seed(0)
    model, x = build_model("WideResNet16-4", num_classes=10).train(), torch.rand(2, 3, 32, 32)

    def active(norm, z):
        return F.batch_norm(z, None, None, norm.weight, norm.bias, True).relu()

    out = model.conv1(x)
    for block in (b for stage in (model.block1, model.block2, model.block3) for b in stage.layer):
        z = active(block.bn1, out)
        out = out if block.convShortcut is None else block.convShortcut(z)
        out = out + block.conv2(active(block.bn2, block.conv1(z)))
    expected = model.fc(active(model.bn1, out).mean((2, 3)))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_resnet_is_that_of_torchvision_with_a_stem_for_small_images():
    networks = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    theirs = networks.resnet18(num_classes=10)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    ours, x = build_model("ResNet18", num_classes=10), torch.rand(2, 3, 32, 32)
    renamed = {
        key.replace("downsample", "shortcut").replace("fc.", "linear."): value
        for key, value in theirs.state_dict().items()
    }
    ours.load_state_dict(ours.state_dict() | renamed)  # which refuses a name that it does not know
    torch.testing.assert_close(ours.train()(x), theirs.train()(x), rtol=1e-4, atol=1e-5)


def test_trained_weights_mean_what_they_meant():
    """The logits of a committed network, which has its accuracy on real images (test_real)."""
    path = ROOT / "results" / "short-both-seed0" / "final_model.pth"
    saved = checkpoint.load(path)
    words = {key: saved[key] for key in ("num_classes", "width", "mean", "std")}
    model = build_model(saved["model"], **words)
    checkpoint.load_weights(model, saved, None, path)
    x = (37 * torch.arange(3 * 32 * 32) % 251).view(1, 3, 32, 32) / 250
    assert model.eval()(x)[0].tolist() == pytest.approx(LOGITS, abs=2e-3)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_gradient_for_any_number_of_classes(name):
    model = build_model(name, num_classes=42, width=None if name.startswith("Wide") else 8)
    logits = model(torch.rand(2, 3, 32, 32))
    assert logits.shape == (2, 42)
    F.cross_entropy(logits, torch.tensor([3, 41])).backward()
    dead = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead


@pytest.mark.parametrize("name", ["ResNet18", "PreActResNet18"])
def test_no_batch_and_no_number_of_threads_crashes_the_backward_pass(name):
    code = f"""if True:
        import torch, models
        model = models.build_model("{name}", num_classes=10, width=8)
        for dtype in (torch.float32, torch.bfloat16):
            for threads in (2, 3, 4):
                torch.set_num_threads(threads)
                for count in (3, 4, 39, 41):
                    x = torch.rand(count, 3, 32, 32).to(memory_format=torch.channels_last)
                    model = model.to(memory_format=torch.channels_last)
                    with torch.autocast("cpu", dtype, dtype != torch.float32):
                        model(x).float().square().sum().backward()
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_width_scales_the_channels():
    model = build_model("preactresnet18", num_classes=10, width=16)
    assert model.conv1.weight.shape[0] == 16
    assert model.linear.weight.shape == (10, 128)


@pytest.mark.parametrize("name", ["ResNet18", "PreActResNet18", "WideResNet16-4"])
def test_normalisation_is_inside_and_travels_with_the_weights(name):
    torch.manual_seed(0)
    mean, std = (0.2, 0.4, 0.6), (0.1, 0.2, 0.3)
    inside = build_model(name, num_classes=10, mean=mean, std=std).eval()
    outside = build_model(name, num_classes=10).eval()
    state = inside.state_dict()
    plain = {key: value for key, value in state.items() if not key.startswith("normalize")}
    outside.load_state_dict(outside.state_dict() | plain)
    x = torch.rand(2, 3, 32, 32)
    z = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(inside(x), outside(z))
    assert {"normalize.mean", "normalize.std"} <= set(state)
    assert not any(key.startswith("normalize") for key, _ in inside.named_parameters())


def test_names_are_forgiving_and_unknown_ones_list_all():
    assert canonical_name("preact_resnet18") == "PreActResNet18"
    assert canonical_name("wideresnet-34-10") == "WideResNet34-10"
    with pytest.raises(ValueError, match=r"--model VGG: unknown; .*WideResNet34-10"):
        canonical_name("VGG")
    with pytest.raises(ValueError, match="only for the ResNets"):
        build_model("WideResNet16-4", num_classes=10, width=16)
    with pytest.raises(ValueError, match="--width 12: must be a multiple of 8"):
        build_model("ResNet18", num_classes=10, width=12)
