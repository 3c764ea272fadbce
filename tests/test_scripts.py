"""The scripts as a user runs them: end to end on small archives and on the synthetic images."""

import csv
import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, write_archive

import checkpoint
import data
import engine
import evaluation

TINY = ["--width", "8", "--epochs", "2", "--batch-size", "50", "--held-out", "50"]


def shell(cwd, *words):
    """Run a script in a process of its own, from a folder of its own, without a terminal."""
    script = ROOT / words[0]
    done = subprocess.run(
        [sys.executable, script, *map(str, words[1:])], cwd=cwd, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("num_classes", [10, 100])
def test_the_four_commands_run_on_files_of_the_official_layout(tmp_path, num_classes):
    write_archive(tmp_path / "cifar-data", num_classes)
    train = [f"MIX_KL_CIFAR{num_classes}.py", "--out_dir", "./output/", "--data-dir", "cifar-data"]
    code, out, err = shell(tmp_path, *train, *TINY)
    assert code == 0, err
    run = tmp_path / "output" / f"cifar{num_classes}-mix_kl-seed0"
    assert {p.name for p in run.iterdir()} == {
        "args.json", "log.csv", "curves.png", "best_model.pth", "final_model.pth", "state.pth",
        "state.pth.prev",
    }  # fmt: skip
    assert "warning:" in out and "400 training and 40 test images" in out
    assert sum(line.startswith("epoch") for line in out.splitlines()) == 2
    shutil.copy(run / "final_model.pth", tmp_path / "model.pth")
    measure = [f"test_cifar{num_classes}.py", "--model_path", "model.pth", "--out_dir", "./output/"]
    code, out, err = shell(tmp_path, *measure, "--data-dir", "cifar-data")
    assert code == 0, err
    rows = [line.split()[0] for line in out.splitlines() if "/40" in line]
    assert rows == ["clean", "fgsm", "pgd-10", "pgd-20", "pgd-50", "cw-20", "cw-50", "worst"]
    (report,) = (tmp_path / "output").glob("*-report.json")
    assert json.loads(report.read_text())["n"] == 40 and str(report.name) in out
    other = 110 - num_classes
    code, out, err = shell(tmp_path, f"test_cifar{other}.py", "--model_path", "model.pth")
    assert (code, len(err.splitlines())) == (2, 1) and f"use test_cifar{num_classes}.py" in err


def read_log(folder):
    with (folder / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in rows]


def test_the_same_seed_gives_the_same_log_and_weights(tmp_path, script):
    data_dir = write_archive(tmp_path, 10)
    words = ["--data-dir", data_dir, "--out_dir", tmp_path / "out", *TINY]
    for seed in (0, 0, 1):
        assert script("MIX_KL_CIFAR10", *words, "--seed", seed)[0] == 0
    names = ["cifar10-mix_kl-seed0", "cifar10-mix_kl-seed0-2", "cifar10-mix_kl-seed1"]
    logs = [read_log(tmp_path / "out" / name) for name in names]
    assert logs[0] == logs[1] != logs[2]
    weights = [checkpoint.load(tmp_path / "out" / n / "final_model.pth")["raw"] for n in names]
    assert all(bool((weights[0][key] == weights[1][key]).all()) for key in weights[0])


@pytest.mark.parametrize("classes", [10, 100])
def test_what_training_measures_are_training_images_that_it_does_not_train_on(
    tmp_path, script, monkeypatch, classes
):
    """Selection on test images is what no number of a table survives."""
    seen, trained, train = [], [], engine.train

    def noted(model, x, y, *, names, settings):
        seen.append((x, y, names, settings.epsilon))
        return dict.fromkeys(names, 0.5)

    monkeypatch.setattr(evaluation, "accuracies", noted)
    monkeypatch.setattr(
        engine, "train", lambda *given, **words: trained.append(given[1]) or train(*given, **words)
    )
    name, data_dir = f"cifar{classes}", write_archive(tmp_path, classes)
    words = ["--data-dir", data_dir, "--out_dir", tmp_path / "out", *TINY, "--epsilon", "4"]
    assert script(f"MIX_KL_{name.upper()}", *words, "--held-out", "30")[0] == 0
    rest, held_out = data.split_held_out(data.load(name, classes, data_dir, False).train, 30)
    for x, y, names, epsilon in seen:
        assert torch.equal(x, held_out.as_float()) and torch.equal(y, held_out.labels)
        assert names == {"clean": "clean", "fgsm": "fgsm", "pgd10": "pgd-10"}
        assert epsilon == 4 / 255
    assert len(seen) == 4  # raw and averaged weights in two epochs

    def drawn(batches):
        torch.manual_seed(0)  # the same crops
        return batches.load(torch.arange(370))

    assert all(map(torch.equal, drawn(trained[0]), drawn(data.TrainingBatches(rest, 50))))
    assert len(trained[0].labels) == 370


def test_the_flags_of_attack_and_crops_reach_the_training(tmp_path, script, monkeypatch):
    seen = []

    def noted(model, batches, *, attack_of, args, **_):
        words = attack_of(args.alpha, args.delta_init).keywords
        seen.append(words | {"padding": batches.padding})

    monkeypatch.setattr(engine, "train", noted)
    words = ["--data-dir", write_archive(tmp_path, 10), "--out_dir", tmp_path / "out", *TINY]
    words += ["--baseline", "pgd_at", "--epsilon", "4", "--crop-padding", "2"]
    assert script("MIX_KL_CIFAR10", *words)[0] == 0
    assert seen == [dict(epsilon=4 / 255, alpha=1 / 255, steps=10, start="uniform", padding=2)]


def test_a_run_keeps_its_flags_and_a_named_one_is_not_overwritten(tmp_path, script):
    data_dir = write_archive(tmp_path, 10)
    words = ["--data-dir", data_dir, "--out_dir", tmp_path / "out", *TINY, "--run-name", "mine"]
    assert script("MIX_KL_CIFAR10", *words, "--factor", "0.7")[0] == 0
    flags = json.loads((tmp_path / "out" / "mine" / "args.json").read_text())
    assert flags["label_smoothing"] == pytest.approx(1 / 3) and flags["width"] == 8
    assert flags["method"] == "mix_kl" and flags["commit"]
    before = (tmp_path / "out" / "mine" / "log.csv").read_bytes()
    status, _, err = script("MIX_KL_CIFAR10", *words)
    assert (status, len(err.splitlines())) == (2, 1) and "--overwrite" in err
    assert (tmp_path / "out" / "mine" / "log.csv").read_bytes() == before
    files = {path: path.read_bytes() for path in (tmp_path / "out" / "mine").iterdir()}
    assert (
        script("MIX_KL_CIFAR10", *words, "--overwrite", "--device", "cpu", "--compile", "on")[0]
        == 2
    )
    assert {path: path.read_bytes() for path in files} == files  # refused, so nothing is replaced
    assert script("MIX_KL_CIFAR10", *words, "--overwrite")[0] == 0
    assert len(read_log(tmp_path / "out" / "mine")) == 2


@pytest.mark.parametrize("baseline", ["fgsm_at", "fgsm_rs", "n_fgsm", "pgd_at", "trades"])
def test_every_baseline_trains(tmp_path, script, baseline):
    data_dir = write_archive(tmp_path, 10, train=120)
    words = ["--data-dir", data_dir, "--out_dir", tmp_path / "out", *TINY, "--epochs", "1"]
    status, out, err = script("MIX_KL_CIFAR10", *words, "--baseline", baseline)
    assert status == 0, err
    assert f"cifar10-{baseline}-seed0" in out


@pytest.mark.parametrize("words", [
    ["--kl-reference", "clean"], ["--kl-reference", "ema", "--temperature", "4:1"],
    ["--model", "ResNet18", "--lr-schedule", "onecycle"], ["--ema-decay", "0"],
    ["--precision", "bf16", "--lr-schedule", "cosine"],
    ["--attack-steps", "2", "--delta-init", "half"],
])  # fmt: skip
def test_every_choice_of_the_method_trains(tmp_path, script, words):
    data_dir = write_archive(tmp_path, 10, train=120)
    common = ["--data-dir", data_dir, "--out_dir", tmp_path / "out", *TINY, "--epochs", "1"]
    status, _, err = script("MIX_KL_CIFAR10", *common, *words)
    assert status == 0, err


def test_mistakes_of_measuring_get_one_line(tmp_path, script):
    for words, message in [
        (["--model_path", tmp_path / "none.pth"], "none.pth: no such file"),
        (["--model_path", tmp_path, "--synthetic"], "folder"),
        (["--model_path", tmp_path / "none.pth", "--attacks", "autopilot"], "autopilot: unknown"),
        (["--model_path", tmp_path / "none.pth", "--device", "cuda:99"], "--device cuda:99"),
        ([], "required: --model-path"),
    ]:
        status, _, err = script("test_cifar10", *words)
        assert (status, len(err.splitlines())) == (2, 1) and message in err


def test_an_output_folder_that_cannot_be_written_is_one_line_before_training(tmp_path, script):
    data_dir = write_archive(tmp_path, 10)
    (tmp_path / "file").write_text("in the way")
    words = ["--data-dir", data_dir, "--out_dir", tmp_path / "file", *TINY]
    status, out, err = script("MIX_KL_CIFAR10", *words)
    assert (status, len(err.splitlines())) == (2, 1) and str(tmp_path / "file") in err
    assert "epoch" not in out


@pytest.mark.slow
def test_a_bare_state_dict_measures_as_its_checkpoint_does(tmp_path, script):
    import torch

    words = ["--synthetic", "--out_dir", tmp_path, "--train-images", "200", *TINY]
    assert script("MIX_KL_CIFAR10", *words, "--run-name", "run")[0] == 0
    saved = checkpoint.load(tmp_path / "run" / "final_model.pth")
    torch.save({f"module.{k}": v for k, v in saved["ema"].items()}, tmp_path / "bare.pth")
    common = ["--synthetic", "--n-examples", "60", "--attacks", "clean", "pgd-2"]
    reports = []
    for i, words in enumerate((
        ["--model_path", tmp_path / "run" / "final_model.pth"],
        ["--model_path", tmp_path / "bare.pth", "--model", "preactresnet18", "--width", "8"],
    )):  # fmt: skip
        out_dir = tmp_path / f"reports{i}"
        status, _, err = script("test_cifar10", *words, "--out_dir", out_dir, *common)
        assert status == 0, err
        (path,) = out_dir.glob("*.json")
        reports.append(json.loads(path.read_text()))
    for row in [row for report in reports for row in report["attacks"]]:
        row.pop("seconds")
    assert reports[0]["attacks"] == reports[1]["attacks"]


@pytest.mark.slow
def test_synthetic_images_tell_a_robust_network_from_an_undefended_one(tmp_path, script):
    """The two numbers that make the synthetic images worth something; both are printed."""
    common = ["--synthetic", "--width", "8", "--lr-schedule", "cyclic", "--lr-peak", "0.4"]
    common += ["--batch-size", "64", "--held-out", "64", "--precision", "fp32"]
    common += ["--out_dir", tmp_path]
    undefended = ["--baseline", "fgsm_at", "--epsilon", "0", "--epochs", "2"]
    robust = ["--baseline", "n_fgsm", "--epochs", "4"]
    accuracy = {}
    for name, words in (("undefended", undefended), ("robust", robust)):
        assert script("MIX_KL_CIFAR10", *common, *words, "--run-name", name)[0] == 0
        path = tmp_path / name / "final_model.pth"
        words = [
            "--attacks",
            "clean",
            "pgd-20",
            "--n-examples",
            "300",
            "--out_dir",
            tmp_path / name,
        ]
        assert script("test_cifar10", "--synthetic", "--model_path", path, *words)[0] == 0
        (report,) = (tmp_path / name).glob("*-report.json")
        rows = json.loads(report.read_text())["attacks"]
        accuracy[name] = [row["accuracy"] for row in rows]
    print(f"clean, PGD-20 on synthetic images: {accuracy}")
    # Rounding decides how far an undefended network falls: 0 to 20 % over 9 seeds and lengths.
    clean, pgd = accuracy["undefended"]
    assert clean > 0.95 and pgd < accuracy["robust"][1] / 2
    clean, pgd = accuracy["robust"]
    assert clean > 0.9 and pgd > 0.7 * clean
