"""A measurement as the user runs it: sweeps, pictures, other people's files, export, kills."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import ROOT, label_as_predicted, write_archive

import attacks
import auto_attack
import checkpoint
import data
import evaluation
import export
import pictures
import referee
import utils
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
    out = measure(script, case, "--attacks", "clean", "fgsm-rs", "pgd-2", "--n-examples", "20")
    found = report_of(case)
    assert found["sha256"] == checkpoint.sha256(case / "model.pth")
    assert (found["dataset"], found["origin"], found["test_images"]) == (
        "cifar10",
        "unofficial",
        40,
    )
    assert found["n"] == 20 and len(found["attacks"][0]["per_class"]) == 10
    assert [row["attack"] for row in found["attacks"]] == ["clean", "fgsm-rs", "pgd-2"]
    assert any("is chance" in text for text in found["warnings"])
    assert all(f"warning: {text}" in out for text in found["warnings"])
    verdicts = np.load(next((case / "out").glob("*-verdicts.npz")))
    assert int(verdicts["pgd-2"].sum()) == found["attacks"][2]["correct"]


def test_held_out_images_are_measured_where_the_file_says_which_they_are(case, script):
    words = ["test_cifar10", "--model_path", case / "model.pth", "--data-dir", case]
    words += ["--out_dir", case / "out", "--attacks", "clean", "--held-out"]
    status, _, err = script(*words)
    assert status == 2 and "model.pth does not say which images it was trained on" in err
    saved = checkpoint.load(case / "model.pth")
    train = data.load("cifar10", 10, case, False).train
    args = dict(held_out=15, train_images=30, images=f"{train.digest()} (unofficial)")
    checkpoint.save(case / "model.pth", saved | {"args": args})
    status, out, err = script(*words, "--n-examples", "20")
    count = len(train) - 30
    assert status == 0, err
    assert f"20 of {count} held-out training images of cifar10" in out
    found = report_of(case)
    assert (found["n"], found["image_set"]) == (20, "held-out training")
    assert found["split"]["train_images"] == 30
    labels = np.load(next((case / "out").glob("*-verdicts.npz")))["labels"]
    left_out = data.split_held_out(train, 15)[0].labels[30:50]
    assert labels.tolist() == left_out.tolist()
    status, _, err = script(*words, "--export", case / "claim")
    assert status == 2 and "--export: claims accuracy on test images" in err
    path = next((case / "out").glob("*report.json"))
    (case / "test.json").write_text(json.dumps(found | {"image_set": "test"}))
    status, out, err = script("test_cifar10", "--compare", path, case / "test.json")
    assert status == 0 and "not measured alike, no test" in out


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


def test_pictures_have_the_number_of_their_report_and_none_is_overwritten(
    case, script, monkeypatch
):
    measure(script, case, "--attacks", "clean")
    words = ["--attacks", "clean", "--n-examples", "2", "--pictures"]
    measure(script, case, *words)
    for sizes in (["0", "8"], ["4", "8"]):
        measure(script, case, *words, "--eps", *sizes)
    ends = ["-images-2", "-sweep", "-sweep-2", "-eps8-images", "-eps8-images-2"]
    names = {path.name for path in (case / "out").glob("*.png")}
    assert {f"{case.name}-model{end}.png" for end in ends} <= names and len(names) == 2 + 3 * 3

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    status, _, err = script(
        "test_cifar10", "--model_path", case / "model.pth", "--data-dir", case, "--out_dir",
        case / "out", *words,
    )  # fmt: skip
    assert (status, len(err.splitlines())) == (2, 1)
    assert f"{case.name}-model-images-3.png: cannot be written" in err


def test_the_picture_of_the_method_compares_with_the_start(case, tmp_path, monkeypatch):
    model, seen, real = random_network().eval(), [], utils.temperature_kl
    x, y = torch.rand(4, 3, 32, 32), torch.arange(4)
    monkeypatch.setattr(attacks, "start_point", lambda x, *_: x)
    monkeypatch.setattr(utils, "temperature_kl", lambda *given: seen.append(given) or real(*given))
    pictures.method(model, x, y, tuple("abcdefghij"), 8 / 255, tmp_path / "method.png")
    with torch.no_grad():
        torch.testing.assert_close(seen[1][1], model(x[:1]))  # (b) has no Mixup


def test_the_flags_of_measuring_reach_the_attacks_and_the_report(case, script, monkeypatch):
    saved = checkpoint.load(case / "model.pth")
    saved |= {"ema": random_network(seed=1).state_dict(), "selected": "ema"}
    checkpoint.save(case / "model.pth", saved)
    other = random_network(seed=2).state_dict()
    checkpoint.save(case / "other.pth", saved | {"raw": other, "selected": "raw"})
    seen, evaluate = {}, evaluation.evaluate

    def noted(model, x, y, names, settings):
        seen.update(
            epsilon=settings.epsilon, seed=settings.seed, cascade=settings.cascade,
            batch_size=settings.batch_size,
            raw=torch.equal(model.conv1.weight, saved["raw"]["conv1.weight"]),
            other=torch.equal(settings.source.conv1.weight, other["conv1.weight"]),
        )  # fmt: skip
        return evaluate(model, x, y, names, settings)

    monkeypatch.setattr(evaluation, "evaluate", noted)
    words = ["--attacks", "clean", "transfer", "--transfer-from", case / "other.pth"]
    words += ["--epsilon", "4", "--seed", "5", "--cascade", "--batch-size", "7", "--weights", "raw"]
    measure(script, case, *words)
    assert seen == dict(epsilon=4 / 255, seed=5, cascade=True, batch_size=7, raw=True, other=True)
    found = report_of(case)
    assert found["transfer_from"]["sha256"] == checkpoint.sha256(case / "other.pth")
    assert found["machine"].keys() == {"hardware", "python", "torch"}


@pytest.mark.parametrize("weights, accuracy", [("raw", 0.9), ("ema", 0.8)])
def test_the_recorded_accuracy_is_that_of_the_weights_that_are_measured(case, weights, accuracy):
    saved = checkpoint.load(case / "model.pth") | {"selected": weights}
    saved |= {"ema": saved["raw"], "metrics": {"clean_acc": 0.9, "ema_clean_acc": 0.8}}
    checkpoint.save(case / "model.pth", saved)
    args = Namespace(transfer_from=None, model=None, width=None, normalize=None)
    _, _, facts = referee.open_network(
        case / "model.pth", build_model, args, classes=10, **STATISTICS
    )
    assert facts["recorded_clean"] == accuracy


def test_the_flags_of_a_bare_file_are_for_the_one_of_two_that_names_no_network(case, script):
    """The first is a PreActResNet-18 that says so, the other a ResNet-18 that does not."""
    torch.save(random_network("ResNet18").state_dict(), case / "other.pth")
    words = ["--attacks", "transfer", "--transfer-from", case / "other.pth"]
    measure(script, case, *words, "--model", "ResNet18", "--width", "8")
    found = report_of(case)
    assert found["model"] == "PreActResNet18" and found["transfer_from"]["model"] == "ResNet18"
    words = ["test_cifar10", "--model_path", case / "model.pth", "--attacks", "transfer"]
    words += ["--transfer-from", case / "model.pth", "--data-dir", case]
    for flag, value in (("--model", "ResNet18"), ("--width", 8), ("--normalize", "none")):
        status, _, err = script(*words, flag, value)
        assert status == 2 and f"{flag}: both files name their network; leave it out" in err


@pytest.mark.parametrize("words, message", [
    (["--attacks", "clean", "transfer"], "name the other checkpoint with --transfer-from"),
    (["--transfer-from", "other.pth", "--attacks", "clean"], "add it to --attacks"),
    (["--attacks", "pgd-2", "autoattack"], "pip install -r requirements-eval.txt"),
    (["--export", "old"], "--export old: exists; name a new folder"),
    (["--export", "/proc/x/new"], "/proc/x: cannot be written"),
    (["--export", "new", "--cascade"], "leave --cascade out"),
    (["--export", "new", "--eps", "4", "16"], "at --epsilon; add that size to --eps"),
    (["--eps", "4", "8"], "need matplotlib; pip install -r requirements.txt"),
    (["--pictures"], "need matplotlib; pip install -r requirements.txt"),
])  # fmt: skip
def test_what_would_fail_after_hours_is_refused_before_anything_is_read(
    case, script, monkeypatch, words, message
):
    monkeypatch.setattr(auto_attack, "LIBRARIES", ("no_such_library",))
    monkeypatch.setattr(referee, "find_spec", lambda name: None if "--export" not in words else 1)
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


def test_a_checkpoint_that_says_what_its_images_go_through_refuses_normalize(case, script):
    words = ["--model_path", case / "model.pth", "--data-dir", case, "--normalize", "none"]
    status, _, err = script("test_cifar10", *words, "--out_dir", case / "out")
    assert (status, len(err.splitlines())) == (2, 1)
    assert "model.pth: normalises by itself; leave --normalize none out" in err


def test_a_bare_state_dict_is_exported_without_a_claim_of_its_training(case, script):
    torch.save(random_network().state_dict(), case / "bare.pth")
    flags = ["--attacks", "clean", "--eps", "0", "4", "--epsilon", "4"]
    for file, words, known in (
        ("bare.pth", ["--model", "PreActResNet18", "--width", "8"], None),
        ("model.pth", [], False),
    ):
        out = measure(script, case, *words, *flags, "--export", case / file[:4], file=file)
        assert "note: --export: no autoattack_acc in the claim; add autoattack" in out
        claim = json.loads((case / file[:4] / "claim.json").read_text())
        assert (claim["additional_data"], claim["autoattack_acc"]) == (known, None)
        assert claim["eps"] == "4/255"
        assert "MIX-KL" not in (case / file[:4] / "model.py").read_text()


def test_an_accuracy_that_rises_with_eps_is_warned_of_in_the_report(case, script, monkeypatch):
    monkeypatch.setattr(referee.checks, "NOISE", -1.0)  # every accuracy rises
    out = measure(script, case, "--attacks", "clean", "--eps", "0", "4")
    small, large = (
        json.loads((case / "out" / f"{case.name}-model-eps{size}-report.json").read_text())
        for size in (0, 4)
    )
    (text,) = (text for text in large["warnings"] if "as eps grows from 0 to 4" in text)
    assert text.startswith("clean: accuracy rises") and out.count(f"warning: {text}") == 1
    assert not any("as eps grows" in text for text in small["warnings"])


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


def test_the_claim_of_a_sweep_is_that_at_epsilon(case, script):
    words = ["--attacks", "clean", "--eps", "0", "4", "8", "--epsilon", "4"]
    measure(script, case, *words, "--export", case / "new")
    claim = json.loads((case / "new" / "claim.json").read_text())
    expected = {"eps": "4/255", "n": 16, "dataset": "cifar10", "threat_model": "Linf"}
    assert {key: claim[key] for key in expected} == expected


def test_sizes_are_measured_once_each_and_in_their_order(case, script):
    out = measure(script, case, "--attacks", "clean", "fgsm", "--eps", "8", "0", "4", "8/255",
                  "0.0313725", "0.03137")  # fmt: skip
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


def test_the_journals_of_a_sweep_live_until_its_last_size_is_reported(case, script, monkeypatch):
    measured, seen = referee.evaluation.evaluate, []

    def evaluate(*args):
        rows, verdicts, _ = measured(*args)
        seen.append([path.exists() for path in journals])
        journals.append(args[-1].journal / f".journal-{len(journals)}.json")
        journals[-1].write_text("{}")
        return rows, verdicts, journals[-1:]

    journals = []
    monkeypatch.setattr(referee.evaluation, "evaluate", evaluate)
    measure(script, case, "--attacks", "clean", "--eps", "0", "4", "8")
    assert seen == [[], [True], [True, True]] and not any(path.exists() for path in journals)


@pytest.mark.slow
def test_a_measurement_killed_at_random_ends_in_the_report_of_an_uninterrupted_one(case):
    pytest.importorskip("pyautoattack", reason="pip install -r requirements-eval.txt")
    label_as_predicted(case, random_network().eval())
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
    assert len(list((case / "out").glob(".*.json"))) == 1  # autoattack could go on from it


def journal_size(folder):
    """Return how many batches the journals in a folder hold."""
    sizes = []
    for path in folder.glob(".*.json"):
        try:
            sizes.append(len(json.loads(path.read_text())))
        except (OSError, ValueError):
            continue
    return sum(sizes)


def test_help_imports_little_and_says_first_what_a_newcomer_needs():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / "test_cifar10.py", "--help"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "torchvision" not in done.stderr
    assert "matplotlib" not in done.stderr
    flags = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  --")]
    assert flags[:2] == ["--model-path", "--attacks"]
