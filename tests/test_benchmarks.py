"""The benchmarks run, and count what they claim; their times are not tested."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, label_as_predicted, write_archive

import checkpoint
from models import build_model


def run(cwd, name, *words):
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / name, *map(str, words), "--json", "found.json"],
        cwd=cwd, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((cwd / "found.json").read_text())[0]


@pytest.mark.parametrize("name", [path.name for path in (ROOT / "benchmarks").glob("*_*.py")])
def test_a_benchmark_offers_rounds_where_it_takes_any(name):
    text = (ROOT / "benchmarks" / name).read_text()
    assert ("parser(__doc__, rounds=" in text) == bool(re.search(r"(args|given)\.rounds", text))


def test_scaling_trains_on_the_device_that_is_named(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    scaling, commands = importlib.import_module("scaling"), []

    def run(command, **_):
        commands.append(command)
        folder = Path(command[command.index("--out_dir") + 1]) / "run"
        folder.mkdir()
        (folder / "log.csv").write_text("train_seconds\n2\n")

    monkeypatch.setattr(scaling.subprocess, "run", run)
    assert scaling.images_per_second(8, 16, 1, 3, "cuda:1") == 24
    assert commands[0][commands[0].index("--device") + 1] == "cuda:1"


@pytest.mark.slow
def test_step_speed_compares_ours_with_both_loops(tmp_path):
    out, found = run(tmp_path, "step_speed.py", "--width", 8, "--batch-size", 16, "--rounds", 2)
    names = [row["step"] for row in found["rows"]]
    assert names[:2] == ["FGSM-RS loop, fp32", "prior-guided loop, fp32"] and len(names) == 4
    assert found["rows"][0]["x FGSM-RS"] == 1 and found["machine"]["torch"] in out
    work = [row["GFLOP/s"] * row["seconds"] for row in found["rows"]]
    assert work == pytest.approx([work[0], 8 / 6 * work[0], *[5 / 6 * work[0]] * 2])
    assert all(0 < row["of matrix peak"] < 2 for row in found["rows"])


@pytest.mark.slow
def test_step_profile_shares_the_time_out(tmp_path):
    words = ["--width", 8, "--batch-size", 16, "--rounds", 2, "--precision", "fp32"]
    _, found = run(tmp_path, "step_profile.py", *words)
    rows = {row["operation"]: row for row in found["rows"]}
    passes = 3  # each half of the attack, and training
    assert rows["convolution"]["calls"] == rows["convolution_backward"]["calls"] == passes * 20
    assert 0.98 < sum(row["share"] for row in rows.values()) <= 1


@pytest.mark.slow
def test_evaluation_gives_the_verdicts_of_the_plain_loop_for_fewer_flops(tmp_path):
    write_archive(tmp_path, 10)
    torch.manual_seed(0)
    statistics = dict(mean=(0.5,) * 3, std=(0.25,) * 3)
    model = build_model("PreActResNet18", num_classes=10, width=8, **statistics).eval()
    with torch.no_grad():  # one class less ahead of the others, so that the attack fells some
        model.linear.bias -= 0.3 * model(torch.rand(64, 3, 32, 32)).mean(0)
    label_as_predicted(tmp_path, model)
    facts = dict(model="PreActResNet18", width=8, num_classes=10, dataset="cifar10")
    facts |= statistics | dict(selected="raw", raw=model.state_dict())
    checkpoint.save(tmp_path / "m.pth", facts)
    words = ["--model_path", "m.pth", "--data-dir", ".", "--n-examples", 40, "--attack", "pgd-5-3"]
    out, found = run(tmp_path, "eval_speed.py", *words)
    assert "verdicts that differ: 0 of 40" in out
    assert 0 < found["rows"][1]["standing"] < 40
    assert found["rows"][1]["x fewer FLOPs"] > 2.5


@pytest.mark.slow
def test_save_cost_compares_both_savings_with_an_epoch(tmp_path):
    words = ["--width", 8, "--batch-size", 16, "--rounds", 2]
    _, found = run(tmp_path, "save_cost.py", *words)
    epoch, state, files, both = found["rows"]
    assert epoch["what"] == "3062 training steps" and state["MB"] > 2 and files["MB"] > 2
    assert both["seconds"] == pytest.approx(state["seconds"] + files["seconds"])
    assert both["share"] == pytest.approx(both["seconds"] / epoch["seconds"])
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


@pytest.mark.slow
def test_data_speed_shows_both_pipelines(tmp_path):
    pytest.importorskip("torchvision")
    _, found = run(tmp_path, "data_speed.py", "--batch-size", 32, "--rounds", 2)
    assert [row["images/s"] > 0 for row in found["rows"]] == [True, True]
