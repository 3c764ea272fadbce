"""Model files: round trips, and a clear line for each file that is not one."""

import os
import pickle
import subprocess
import sys
import zipfile
from argparse import Namespace

import pytest
import torch
from conftest import PEAK, ROOT, SmallNet
from test_engine import flags

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
    nothing = Namespace(transfer_from=None, model=None, width=None)
    name, network = checkpoint.architecture(content, saved, nothing, 10, STATISTICS)
    model = build_model(name, **network)
    assert checkpoint.load_weights(model, content, None, saved) == "raw"
    assert all(torch.equal(v, content["raw"][k]) for k, v in model.state_dict().items())
    assert not list(saved.parent.glob("*.partial"))


def test_a_checkpoint_says_its_flags_and_versions():
    facts = checkpoint.facts(flags("--epsilon", "4"), "cifar10", "ResNet18", {})
    assert facts["args"]["epsilon"] == 4 and facts["versions"].keys() == {"torch", "python"}


def test_a_checkpoint_says_which_images_its_run_left_alone():
    flags = dict(held_out=1000, train_images=4000, images="5,000 images ab (official)", seed=1)
    found = checkpoint.split({"dataset": "cifar10", "args": flags})
    assert found == {"dataset": "cifar10", **{key: flags[key] for key in checkpoint.SPLIT}}
    old = checkpoint.split({"dataset": "cifar10", "args": {"held_out": 5}})
    assert old == dict(dataset="cifar10", held_out=5, train_images=None, images=None)
    for args in (None, [], {}, *({**flags, key: [3]} for key in checkpoint.SPLIT)):
        assert checkpoint.split({"args": args}) is None


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
        checkpoint.architecture(
            content, path, Namespace(transfer_from=None, model=None, width=None), 10, STATISTICS
        )
    args = Namespace(transfer_from=None, model="small", width=8, normalize="none")
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
    args = Namespace(transfer_from=None, model=None, width=None, model_path=saved)
    with pytest.raises(ValueError, match=r"cifar10 \(10 classes\); use test_cifar10\.py"):
        checkpoint.architecture(content, saved, args, 100, STATISTICS)
    with pytest.raises(ValueError, match="holds a ResNet18; leave --model VGG out"):
        checkpoint.architecture(
            content, saved, Namespace(transfer_from=None, model="VGG", width=None), 10, STATISTICS
        )
    with pytest.raises(ValueError, match="is 8 wide; leave --width 16 out"):
        checkpoint.architecture(
            content, saved, Namespace(transfer_from=None, model=None, width=16), 10, STATISTICS
        )
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
    "truncated": (lambda data: data[: len(data) // 2], "truncated"),
    "empty": (lambda data: b"", "empty (0 bytes)"),
    "html": (lambda data: b"\n<!DOCTYPE html><html></html>", "an HTML page"),
    "git lfs": (
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid",
        "a Git LFS pointer",
    ),
    "bit flipped": (flip, "checksums do not agree"),
    "text": (lambda data: b"hello\nyou", "text (9 bytes)"),
    "picture": (lambda data: b"\x89PNG\r\n" + bytes(100), "something else (106 bytes)"),
    "followed": (lambda data: data + bytes(9), "truncated"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_files_are_refused_in_one_line(saved, script, fault):
    damage, message = FAULTS[fault]
    saved.write_bytes(damage(saved.read_bytes()))
    status, _, err = script("test_cifar10", "--model_path", saved, "--synthetic")
    assert status == 2 and len(err.splitlines()) == 1
    assert err.startswith(f"error: {saved}") and message in err and ".prev" not in err


def test_a_truncated_file_names_its_size_and_the_one_before_it(saved):
    whole = saved.read_bytes()
    saved.write_bytes(whole[:1000])
    saved.with_name("model.pth.prev").write_bytes(whole)
    with pytest.raises(ValueError, match=r"1,000 bytes.*truncated.*; try .*model\.pth\.prev$"):
        checkpoint.load(saved)


def test_a_folder_and_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a folder; name a file in it"):
        checkpoint.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        checkpoint.load(tmp_path / "none.pth")


def test_a_malicious_file_is_refused_and_not_executed(tmp_path):
    target, path = tmp_path / "owned", tmp_path / "bad.pth"

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(target),)

    for zipped in (True, False):
        torch.save({"raw": Malicious()}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=r"asks for (posix|nt)\.mkdir, which no checkpoint"):
            checkpoint.load(path)
    assert not target.exists()


def test_files_from_before_torch_1_6_are_read_and_their_damage_is_refused(tmp_path, net):
    path = tmp_path / "old.pt"
    torch.save(net.state_dict(), path, _use_new_zipfile_serialization=False)
    found = checkpoint.load(path)["raw"]
    assert all(torch.equal(value, found[key]) for key, value in net.state_dict().items())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        checkpoint.load(path)


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.pth"
    torch.save([1, 2, 3], path)
    with pytest.raises(ValueError, match="neither a checkpoint of this project nor a state dict"):
        checkpoint.load(path)


def long(state):  # a view of one number as a terabyte of them
    return state | {"linear.bias": torch.zeros(1).expand(10**6, 10**6)}


WRONG = {
    "classes huge": dict(num_classes=10**9), "classes of text": dict(num_classes="10"),
    "classes true": dict(num_classes=True), "classes missing": dict(num_classes=None),
    "width huge": dict(width=10**9), "width negative": dict(width=-8), "width odd": dict(width=9),
    "width large": dict(width=65528), "mean short": dict(mean=(0.5, 0.5)),
    "mean nan": dict(mean=(0.5, 0.5, float("nan"))), "std zero": dict(std=(0.2, 0.0, 0.2)),
    "std list of text": dict(std=["0.2"] * 3), "raw none": dict(raw=None),
    "raw a list": dict(raw=[1]),
    "raw empty": dict(raw={}), "raw of numbers": dict(raw={"a": 1.0}),
    "selected": dict(selected="x"),
    "selected unhashable": dict(selected=["raw"]), "selected absent": dict(selected="ema"),
    "model unknown": dict(model="VGG\n"), "model strange": dict(model="VGG"),
    "model": dict(model=3),
    "dataset": dict(dataset=None), "metrics": dict(metrics=[1]), "newer": dict(schema="mix-kl/2"),
    "metrics of text": dict(metrics={"clean_acc": "0.9"}), "key": {"raw": {3: torch.zeros(3)}},
    "complex": lambda s: s | {"linear.bias": torch.zeros(10, dtype=torch.complex64)},
    "sparse": lambda s: s | {"linear.bias": torch.zeros(10).to_sparse()},
    "meta": lambda s: s | {"linear.bias": torch.zeros(10, device="meta")},
    "expanded": long,
    "missing": lambda s: {k: v for k, v in s.items() if k != "linear.bias"},
    "another shape": lambda s: s | {"linear.bias": torch.zeros(11)},
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_whole_files_of_wrong_content_are_refused_in_one_line(saved, script, fault):
    content, change = checkpoint.load(saved), WRONG[fault]
    change = {"raw": change(content["raw"])} if callable(change) else change
    torch.save(content | change, saved)
    status, _, err = script("test_cifar10", "--model_path", saved, "--synthetic")
    assert status == 2 and len(err.splitlines()) == 1 and len(err) < 600
    assert err.startswith(f"error: {saved}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_not_finite_have_an_exit_code_of_their_own(saved, value):
    content = checkpoint.load(saved)
    content["raw"]["linear.bias"] = torch.full((10,), value, dtype=torch.float64)
    model = build_model("ResNet18", num_classes=10, width=8)
    with pytest.raises(
        checkpoint.DivergedError, match="not finite; the training had diverged"
    ) as found:
        checkpoint.load_weights(model, content, None, saved)
    assert found.value.exit_code == 3 and isinstance(found.value, ValueError)


def rezipped(path, change, method=zipfile.ZIP_STORED):
    """Write a zip file again, each member as ``change(name, bytes)``, with right checksums."""
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members:
            archive.writestr(*change(name, data))


HOSTILE = """
import sys, pathlib
sys.path.insert(0, {root!r})
import checkpoint, models, torch
from argparse import Namespace
good, bad = map(pathlib.Path, sys.argv[1:])
def load(path):
    saved = checkpoint.load(path)
    nothing = Namespace(transfer_from=None, model=None, width=None)
    name, network = checkpoint.architecture(saved, path, nothing, 10, {{}})
    model = checkpoint.build(models.build_model, name, network, saved, None, path)
    checkpoint.load_weights(model, saved, None, path)
load(good)
before = peak()
try:
    load(bad)
except ValueError as error:
    print(peak() - before, error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("fault", ["compressed", "wide", "expanded", "global", "storage case"])
def test_hostile_files_take_no_memory(saved, tmp_path, fault):
    bad, content = tmp_path / "bad.pth", checkpoint.load(saved)
    if fault == "wide":
        content["width"] = 4096
    elif fault == "expanded":
        content["raw"] = long(content["raw"])
    elif fault == "compressed":
        content["raw"]["linear.bias"] = torch.zeros(50_000_000)
    torch.save(content, bad)
    if fault == "compressed":
        rezipped(bad, lambda name, data: (name, data), zipfile.ZIP_DEFLATED)
    elif fault == "global":  # the safe unpickler of torch knows bytearray, which takes a length
        call = b"cbuiltins\nbytearray\nJ\xff\xff\xff\x2f\x85R0."
        rezipped(bad, lambda n, d: (n, d[:-1] + call if n.endswith(".pkl") else d))
    elif fault == "storage case":
        rezipped(bad, lambda name, data: (name.replace("data/0", "data/A"), data))
    command = [sys.executable, "-c", PEAK + HOSTILE.format(root=str(ROOT)), saved, bad]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    taken, message = done.stdout.split(maxsplit=1)
    assert str(bad) in message and int(taken) <= 2 * bad.stat().st_size + 2**24


STATE = """
import sys, pathlib
sys.path.insert(0, {root!r})
import resume
good, bad = map(pathlib.Path, sys.argv[1:])
resume.load(good)
before = peak()
try:
    resume.load(bad)
except ValueError as error:
    print(peak() - before, error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_compressed_state_takes_no_memory(tmp_path):
    good, bad = tmp_path / "good.pth", tmp_path / "bad.pth"
    torch.save({"schema": "mix-kl-state/1", "args": {}}, good)
    torch.save({"schema": "mix-kl-state/0", "raw": torch.zeros(50_000_000)}, bad)
    rezipped(bad, lambda name, data: (name, data), zipfile.ZIP_DEFLATED)
    command = [sys.executable, "-c", PEAK + STATE.format(root=str(ROOT)), good, bad]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    taken, message = done.stdout.split(maxsplit=1)
    assert "compressed" in message and int(taken) <= 2 * bad.stat().st_size + 2**24


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_a_large_file_that_does_not_fit_takes_at_most_twice_its_size(saved, tmp_path, dtype):
    bad, content = tmp_path / "bad.pth", checkpoint.load(saved)
    state = build_model("ResNet18", num_classes=10).state_dict()
    state = {key: value.to(dtype) for key, value in state.items()}
    state["stray"] = torch.zeros(3)
    torch.save(content | {"width": None, "raw": state}, bad)
    command = [sys.executable, "-c", PEAK + HOSTILE.format(root=str(ROOT)), saved, bad]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    taken, message = done.stdout.split(maxsplit=1)
    assert "stray" in message and int(taken) <= 2 * bad.stat().st_size + 2**22


def test_runs_never_share_a_folder(tmp_path):
    folders = [record.run_folder(tmp_path / "out", None, "run", False).name for _ in range(3)]
    assert folders == ["run", "run-2", "run-3"]
    record.run_folder(tmp_path / "out", "mine", "run", False)
    for name in record.WRITTEN:
        (tmp_path / "out" / "mine" / name).write_text("old")
    with pytest.raises(ValueError, match="choose another --run-name, or add --overwrite"):
        record.run_folder(tmp_path / "out", "mine", "run", False)
    assert (tmp_path / "out" / "mine" / "log.csv").read_text() == "old"
    mine = record.run_folder(tmp_path / "out", "mine", "run", True)
    assert len(list(mine.iterdir())) == len(record.WRITTEN)  # it could still be refused
    record.begin_files(mine, Namespace(epochs=3), "abc", None)
    assert [path.name for path in mine.iterdir()] == ["args.json"]  # no model of the old run
    for name in ("a/b", ".."):
        with pytest.raises(ValueError, match=f"--run-name {name}: a name, not a path"):
            record.run_folder(tmp_path / "out", name, "run", False)


def test_a_run_that_was_killed_before_its_first_state_is_begun_anew(tmp_path):
    args = Namespace(resume="auto", run_name="run", out_dir=tmp_path, overwrite=False)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json").touch()
    assert record.start_run(args, "default", None) == tmp_path / "run"
    (tmp_path / "run" / "final_model.pth").touch()
    with pytest.raises(ValueError, match=str(tmp_path / "run")):
        record.start_run(args, "default", None)


def test_the_revision_is_that_of_git(monkeypatch):
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    except OSError:
        head = ""
    checkpoint.commit.cache_clear()
    assert checkpoint.commit().startswith(head[:12] or "unknown")
    checkpoint.commit.cache_clear()
    with monkeypatch.context() as patch:  # unpacked inside another repository
        patch.setattr(checkpoint, "__file__", str(ROOT / "tests" / "checkpoint.py"))
        assert checkpoint.commit() == "unknown"
    checkpoint.commit.cache_clear()
    assert checkpoint.commit().startswith(head[:12] or "unknown")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: (_ for _ in ()).throw(OSError()))
    assert checkpoint.commit().startswith(head[:12] or "unknown")  # that of the code that runs
    checkpoint.commit.cache_clear()
    assert checkpoint.commit() == "unknown"
    checkpoint.commit.cache_clear()
