"""The networks: sizes as published, no dead parameters, normalisation inside."""

import pytest
import torch
from torch.nn import functional as F

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


@pytest.mark.parametrize("name, num_classes", PARAMETERS)
def test_number_of_parameters_is_the_published_one(name, num_classes):
    with torch.device("meta"):
        model = MODELS[name](num_classes=num_classes)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name, num_classes]


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_gradient_for_any_number_of_classes(name):
    model = build_model(name, num_classes=42, width=None if name.startswith("Wide") else 8)
    logits = model(torch.rand(2, 3, 32, 32))
    assert logits.shape == (2, 42)
    F.cross_entropy(logits, torch.tensor([3, 41])).backward()
    dead = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead


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
