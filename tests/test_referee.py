"""A measurement as the user runs it: sweeps, pictures, other people's files, export, kills."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import ROOT, write_archive

import auto_attack
import checkpoint
import data
import export
import referee
from models import build_model

STATISTICS = dict(mean=data.ARCHIVES["cifar10"].mean, std=data.ARCHIVES["cifar10"].std)


def random_network(name="PreActResNet18", seed=0, **words):
    torch.manual_seed(seed)
    words = dict(num_classes=10) | ({} if name.startswith("Wide") else {"width": 8}) | words
    return build_model(name, **words, **STATISTICS)


@pytest.fixture
def case(tmp_path):
    """A folder of images, and a checkpoint of a network with random weights."""
    write_archive(tmp_path, 10)
    facts = dict(model="PreActResNet18", width=8, num_classes=10, dataset="cifar10", **STATISTICS)
    checkpoint.save(
        tmp_path / "model.pth", facts | {"raw": random_network().state_dict(), "selected": "raw"}
    )
    return tmp_path


def measure(script, case, *words, file="model.pth"):
    status, out, err = script(
        "test_cifar10", "--model_path", case / file, "--data-dir", case, "--out_dir", case / "out",
        "--n-examples", "16", *words,
    )  # fmt: skip
    assert status == 0, err
    return out


def report_of(case):
    (path,) = (case / "out").glob("*report.json")
    return json.loads(path.read_text())


def test_the_report_says_what_was_measured(case, script):
    out = measure(script, case, "--attacks", "clean", "fgsm-rs", "pgd-2")
    found = report_of(case)
    assert found["sha256"] == checkpoint.sha256(case / "model.pth")
    assert (found["dataset"], found["origin"], found["test_images"]) == (
        "cifar10",
        "unofficial",
        40,
    )
    assert found["n"] == 16 and len(found["attacks"][0]["per_class"]) == 10
    assert [row["attack"] for row in found["attacks"]] == ["clean", "fgsm-rs", "pgd-2"]
    assert any("is chance" in text for text in found["warnings"])
    assert all(f"warning: {text}" in out for text in found["warnings"])
    verdicts = np.load(next((case / "out").glob("*-verdicts.npz")))
    assert int(verdicts["pgd-2"].sum()) == found["attacks"][2]["correct"]


def test_a_sweep_measures_each_size_and_draws_the_curve(case, script):
    out = measure(script, case, "--attacks", "pgd-2", "--eps", "0", "4", "8/255")
    names = sorted(path.name for path in (case / "out").iterdir() if path.suffix == ".json")
    stem = f"{case.name}-model"
    assert names == [f"{stem}-eps{size}-report.json" for size in (0, 4, 8)]
    assert (case / "out" / f"{stem}-sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "eps 0     eps 4     eps 8" in out
    assert json.loads((case / "out" / names[2]).read_text())["epsilon"] == 8 / 255


def test_pictures_are_drawn(case, script):
    measure(script, case, "--attacks", "clean", "--pictures")
    for name in ("images", "surface", "method"):
        picture = case / "out" / f"{case.name}-model-{name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000


def test_transfer_takes_its_images_from_the_other_file(case, script):
    torch.save(random_network(seed=1).state_dict(), case / "other.pth")
    words = ["--model", "preact-resnet-18", "--width", "8", "--attacks", "clean", "transfer"]
    measure(script, case, *words, "--transfer-from", case / "other.pth")
    found = report_of(case)
    assert [row["attack"] for row in found["attacks"]] == ["clean", "transfer"]
    assert found["transfer_from"]["sha256"] == checkpoint.sha256(case / "other.pth")


def test_the_flags_of_a_bare_file_are_for_the_one_of_two_that_names_no_network(case, script):
    """The first is a PreActResNet-18 that says so, the other a ResNet-18 that does not."""
    torch.save(random_network("ResNet18").state_dict(), case / "other.pth")
    words = ["--attacks", "transfer", "--transfer-from", case / "other.pth"]
    measure(script, case, *words, "--model", "ResNet18", "--width", "8")
    found = report_of(case)
    assert found["model"] == "PreActResNet18" and found["transfer_from"]["model"] == "ResNet18"


@pytest.mark.parametrize("words, message", [
    (["--attacks", "clean", "transfer"], "name the other checkpoint with --transfer-from"),
    (["--transfer-from", "other.pth", "--attacks", "clean"], "add it to --attacks"),
    (["--attacks", "pgd-2", "autoattack"], "pip install -r requirements-eval.txt"),
    (["--export", "old"], "--export old: exists; name a new folder"),
    (["--export", "/proc/x/new"], "/proc/x: cannot be written"),
    (["--export", "new", "--cascade"], "leave --cascade out"),
])  # fmt: skip
def test_what_would_fail_after_hours_is_refused_before_anything_is_read(
    case, script, monkeypatch, words, message
):
    monkeypatch.setattr(auto_attack, "LIBRARIES", ("no_such_library",))
    monkeypatch.chdir(case)
    (case / "old").mkdir()
    status, out, err = script("test_cifar10", "--model_path", "no-such-file.pth", *words)
    assert (status, len(err.splitlines()), out) == (2, 1, "") and message in err


@pytest.mark.parametrize("name", ["PreActResNet18", "WideResNet16-4"])
@pytest.mark.parametrize("nested", [None, "state_dict", "model", "net"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_state_dicts_of_public_code_load(tmp_path, name, nested, prefix):
    """They normalise outside the network, and some carry layers that no forward pass calls."""
    network = random_network(name).eval()
    state = {k: v for k, v in network.state_dict().items() if not k.startswith("normalize.")}
    if name.startswith("Wide"):
        state |= {f"sub_{k}": v for k, v in state.items() if k.startswith("block1.")}
    state = {prefix + key: value for key, value in state.items()}
    torch.save({nested: state, "epoch": 3} if nested else state, tmp_path / "public.pth")
    saved = checkpoint.load(tmp_path / "public.pth")
    fresh = random_network(name, seed=9).eval()
    checkpoint.load_weights(fresh, saved, None, tmp_path / "public.pth")
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(fresh(x), network(x))


def test_a_bare_state_dict_is_normalised_as_the_flag_says(case, script):
    network = random_network()
    state = {k: v for k, v in network.state_dict().items() if not k.startswith("normalize.")}
    torch.save(state, case / "bare.pth")
    words = ["--model", "PreActResNet18", "--width", "8", "--attacks", "clean", "pgd-1"]
    for flag in (["--normalize", "dataset"], ["--normalize", "none"]):
        measure(script, case, *words, *flag, file="bare.pth")
    measure(script, case, "--attacks", "clean", "pgd-1")
    verdicts = {p.name: np.load(p)["pgd-1"] for p in (case / "out").glob("*.npz")}
    stem = f"{case.name}-bare-report"
    own = verdicts[f"{case.name}-model-report-verdicts.npz"]
    assert np.array_equal(verdicts[f"{stem}-verdicts.npz"], own)
    assert len(verdicts) == 3
    x, mean, std = torch.rand(4, 3, 32, 32), *(torch.tensor(v) for v in STATISTICS.values())
    same = {"dataset": x, "none": x * std[:, None, None] + mean[:, None, None]}
    for normalize, images in same.items():
        args = Namespace(
            transfer_from=None, model="PreActResNet18", width=8, normalize=normalize, weights=None
        )
        opened, _, _ = referee.open_network(
            case / "bare.pth", build_model, args, classes=10, **STATISTICS
        )
        assert torch.allclose(opened(x), network.eval()(images), atol=1e-4)


def test_one_image_has_pictures_and_the_export_is_whole_or_not_there(case, script, monkeypatch):
    words = ["--attacks", "clean", "--n-examples", "1", "--pictures", "--export"]
    out = measure(script, case, *words, case / "new")
    assert out.count(".png") == 3 and f"export: {case / 'new'}" in out
    names = {"model.py", "weights.pt", "claim.json"}
    assert {path.name for path in (case / "new").iterdir()} == names

    def full(*_, **__):
        raise RuntimeError("enforce fail: file write failed")

    monkeypatch.setattr(torch, "save", full)
    before = set(case.iterdir())
    status, _, err = script(
        "test_cifar10", "--model_path", case / "model.pth", "--data-dir", case, "--out_dir",
        case / "out", *words, case / "full",
    )  # fmt: skip
    assert (status, len(err.splitlines())) == (2, 1) and "cannot be written" in err
    assert set(case.iterdir()) == before


def test_sizes_are_measured_once_each_and_in_their_order(case, script):
    out = measure(script, case, "--attacks", "clean", "fgsm", "--eps", "8", "0", "4", "8/255")
    assert re.findall(r"^eps (\d+)/255$", out, re.M) == ["0", "4", "8"]
    assert re.search(r"^attack +eps 0 +eps 4 +eps 8$", out, re.M)


@pytest.mark.parametrize("name", ["PreActResNet18", "ResNet18", "WideResNet16-4"])
def test_the_export_loads_in_a_fresh_process_with_the_same_logits(tmp_path, name):
    network = random_network(name).eval()
    words = dict(num_classes=10, width=None if name.startswith("Wide") else 8, **STATISTICS)
    found = {"dataset": "cifar10", "epsilon": 8 / 255, "n": 10, "sha256": "s"}
    found["attacks"] = [
        {"attack": "clean", "accuracy": 0.5},
        {"attack": "autoattack", "accuracy": 0.25},
    ]
    folder = export.write(tmp_path / "export", network, name, words, found)
    x = torch.rand(3, 3, 32, 32)
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch; sys.path.insert(0, 'export'); from model import load_model; "
        "torch.save(load_model()(torch.load('x.pt')).detach(), 'z.pt'); "
        "assert not {'models', 'engine', 'utils'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    logits = torch.load(tmp_path / "z.pt")
    torch.testing.assert_close(logits, network(x).detach(), rtol=0, atol=0)
    claim = json.loads((folder / "claim.json").read_text())
    assert (claim["clean_acc"], claim["autoattack_acc"], claim["eps"]) == (50.0, 25.0, "8/255")
    with pytest.raises(FileExistsError):
        export.write(folder, network, name, words, found)


@pytest.mark.slow
def test_a_measurement_killed_at_random_ends_in_the_report_of_an_uninterrupted_one(case):
    pytest.importorskip("pyautoattack", reason="pip install -r requirements-eval.txt")
    label_as_predicted(case)
    words = (
        f"{ROOT}/test_cifar10.py --model_path model.pth --data-dir . --n-examples 12 --epsilon 1"
    )
    words = [
        *words.split(),
        "--batch-size",
        "4",
        "--attacks",
        "clean",
        "pgd-5",
        "apgd-ce",
        "square",
    ]
    command = [sys.executable, *map(str, words)]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    quiet = dict(cwd=case, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    subprocess.run([*command, "--out_dir", "whole"], check=True, **quiet)
    for more in (1, 2):
        started = subprocess.Popen([*command, "--out_dir", "out"], **quiet)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and journal_size(case / "out") < more:
            time.sleep(0.02)
        started.send_signal(signal.SIGKILL)
        started.wait()
    assert journal_size(case / "out") >= 2
    subprocess.run([*command, "--out_dir", "out"], check=True, **quiet)
    found = [
        json.loads(next((case / d).glob("*report.json")).read_text()) for d in ("whole", "out")
    ]
    for shown in found:
        for row in shown["attacks"]:
            row.pop("seconds")
    assert found[0] == found[1]
    assert not list((case / "out").glob(".*.json"))  # the journals are gone


def label_as_predicted(folder):
    """Give the test images the labels that the random network predicts, so that most are right."""
    path = folder / "cifar-10-batches-py" / "test_batch"
    record = pickle.loads(path.read_bytes())
    images = data.Images(
        torch.from_numpy(record["data"]).view(-1, 3, 32, 32).permute(0, 2, 3, 1), None
    )
    with torch.no_grad():
        record["labels"] = random_network().eval()(images.as_float()).argmax(1).tolist()
    path.write_bytes(pickle.dumps(record, protocol=2))


def journal_size(folder):
    """Return how many batches the journals in a folder hold."""
    sizes = []
    for path in folder.glob(".*.json"):
        try:
            sizes.append(len(json.loads(path.read_text())))
        except (OSError, ValueError):
            continue
    return sum(sizes)


def test_help_is_quick_and_says_first_what_a_newcomer_needs():
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / "test_cifar10.py", "--help"],
        capture_output=True, text=True,
    )  # fmt: skip
    seconds = time.monotonic() - began
    assert done.returncode == 0 and "torchvision" not in done.stderr
    assert "matplotlib" not in done.stderr
    flags = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  --")]
    assert flags[:2] == ["--model-path", "--attacks"] and seconds < 10
