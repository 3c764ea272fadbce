"""Model files: round trips, and a clear line for each file that is not one."""

import os
import pickle
import subprocess
from argparse import Namespace

import pytest
import torch
from conftest import SmallNet

import checkpoint
import record
from models import build_model

STATISTICS = dict(mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.2))


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.pth"
    state = build_model("ResNet18", num_classes=10, width=8).state_dict()
    content = dict(model="ResNet18", width=8, num_classes=10, mean=(0.5,) * 3, std=(0.2,) * 3)
    checkpoint.save(path, content | dict(dataset="cifar10", raw=state, selected="raw"))
    return path


def test_what_is_saved_comes_back(saved):
    content = checkpoint.load(saved)
    assert (content["schema"], content["model"], content["width"]) == ("mix-kl/1", "ResNet18", 8)
    name, network = checkpoint.architecture(content, saved, Namespace(model=None), 10, STATISTICS)
    model = build_model(name, **network)
    assert checkpoint.load_weights(model, content, None, saved) == "raw"
    assert all(torch.equal(v, content["raw"][k]) for k, v in model.state_dict().items())
    assert not list(saved.parent.glob("*.partial"))


def test_a_failed_save_leaves_the_old_file(saved):
    before = saved.read_bytes()
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        checkpoint.save(saved, {"bad": lambda: 0})
    assert saved.read_bytes() == before


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_a_bare_state_dict_loads_with_its_prefix_and_the_network_named(tmp_path, prefix):
    path, net = tmp_path / "bare.pth", SmallNet()
    torch.save({prefix + key: value for key, value in net.state_dict().items()}, path)
    content = checkpoint.load(path)
    with pytest.raises(ValueError, match=r"bare state dict; name its network with --model"):
        checkpoint.architecture(content, path, Namespace(model=None), 10, STATISTICS)
    args = Namespace(model="small", width=8, normalize="none")
    found = checkpoint.architecture(content, path, args, 10, STATISTICS)
    assert found == ("small", {"num_classes": 10, "width": 8})
    args.normalize = "dataset"
    _, network = checkpoint.architecture(content, path, args, 10, STATISTICS)
    assert network == {"num_classes": 10, "width": 8} | STATISTICS
    other = SmallNet()
    checkpoint.load_weights(other, content, None, path)
    assert torch.equal(other.conv1.weight, net.conv1.weight)


def test_a_prefix_on_some_keys_only_is_not_stripped(tmp_path):
    state = SmallNet().state_dict()
    state["module.conv1.weight"] = state.pop("conv1.weight")
    with pytest.raises(ValueError, match="does not fit this network"):
        checkpoint.load_weights(SmallNet(), {"raw": state, "selected": "raw"}, None, "f.pth")


def test_faults_of_content_have_their_line(saved):
    content = checkpoint.load(saved)
    args = Namespace(model=None, width=None, model_path=saved)
    with pytest.raises(ValueError, match=r"cifar10 \(10 classes\); use test_cifar10\.py"):
        checkpoint.architecture(content, saved, args, 100, STATISTICS)
    with pytest.raises(ValueError, match="--model VGG: the file holds a ResNet18"):
        checkpoint.architecture(content, saved, Namespace(model="VGG"), 10, STATISTICS)
    with pytest.raises(ValueError, match="holds no ema weights"):
        checkpoint.load_weights(SmallNet(), content, "ema", saved)
    with pytest.raises(ValueError, match="does not fit this network"):
        checkpoint.load_weights(SmallNet(), content, None, saved)
    content["raw"]["linear.bias"][3] = float("nan")
    with pytest.raises(ValueError, match=r"linear\.bias is not finite"):
        checkpoint.load_weights(SmallNet(), content, None, saved)


def flip(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


FAULTS = {
    "truncated": (lambda data: data[: len(data) // 2], "not a whole checkpoint"),
    "empty": (lambda data: b"", "not a whole checkpoint"),
    "html": (lambda data: b"\n<!DOCTYPE html><html></html>", "an HTML page"),
    "bit flipped": (flip, "checksums do not agree"),
    "text": (lambda data: b"hello", "not a whole checkpoint"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_files_are_refused_in_one_line(saved, script, fault):
    damage, message = FAULTS[fault]
    saved.write_bytes(damage(saved.read_bytes()))
    status, _, err = script("test_cifar10", "--model_path", saved, "--synthetic")
    assert status == 2 and len(err.splitlines()) == 1
    assert err.startswith(f"error: {saved}") and message in err


def test_a_malicious_file_is_refused_and_not_executed(tmp_path):
    target, path = tmp_path / "owned", tmp_path / "bad.pth"

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(target),)

    torch.save({"raw": Malicious()}, path)
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        checkpoint.load(path)
    assert not target.exists()


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.pth"
    torch.save([1, 2, 3], path)
    with pytest.raises(ValueError, match="neither a checkpoint of this project nor a state dict"):
        checkpoint.load(path)


def test_runs_never_share_a_folder(tmp_path):
    folders = [record.run_folder(tmp_path / "out", None, "run", False).name for _ in range(3)]
    assert folders == ["run", "run-2", "run-3"]
    record.run_folder(tmp_path / "out", "mine", "run", False)
    (tmp_path / "out" / "mine" / "log.csv").write_text("old")
    with pytest.raises(ValueError, match="choose another --run-name, or add --overwrite"):
        record.run_folder(tmp_path / "out", "mine", "run", False)
    assert (tmp_path / "out" / "mine" / "log.csv").read_text() == "old"
    record.run_folder(tmp_path / "out", "mine", "run", True)
    assert not (tmp_path / "out" / "mine" / "log.csv").exists()


def test_the_revision_is_that_of_git(monkeypatch):
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    except OSError:
        head = ""
    assert checkpoint.commit().startswith(head[:12] or "unknown")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: (_ for _ in ()).throw(OSError()))
    assert checkpoint.commit() == "unknown"
