"""The study: cut off by its budget and gone on with, each cell is done once and kept whole."""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest
from conftest import ROOT, write_archive

import checkpoint


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "results")
    spec = importlib.util.spec_from_file_location("study", ROOT / "results" / "study.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "study", module)  # where its dataclass looks
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(study, tmp_path, monkeypatch, capsys):
    data_dir = write_archive(tmp_path / "data", 10)
    train = "--width 8 --epochs 2 --batch-size 20 --held-out 20 --train-images 100"
    cells = [
        study.cells.Cell(
            "tiny-mix_kl-seed0",
            train,
            "--attacks clean pgd-2",
            ("final", "best"),
            more={"autoattack": "--attacks clean pgd-3 --n-examples 30"},  # the real takes minutes
        ),
        study.cells.Cell("tiny-broken-seed0", "--epochs 0", "--attacks clean"),
    ]
    monkeypatch.setitem(study.cells.SCALES, "tiny", lambda: cells)

    def call(*words):
        places = {"--out-dir": "out", "--results-dir": "results"}
        flags = [word for flag, name in places.items() for word in (flag, str(tmp_path / name))]
        words = ["tiny", "--data-dir", str(data_dir), *flags, *words]
        monkeypatch.setattr(sys, "argv", ["study.py", *words])
        capsys.readouterr()
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as ended:
            study.main()
        signal.signal(signal.SIGTERM, before)
        return ended.value.code, capsys.readouterr().out

    return call


@pytest.mark.slow
def test_a_study_that_is_cut_off_goes_on_and_keeps_each_cell_once(
    run, study, tmp_path, monkeypatch
):
    status, out = run("--budget", "0.02", "--only", "*mix_kl*")  # within the first training
    assert status == 0 and "the budget is spent" in out
    assert not (tmp_path / "results").exists()

    folder, kept = (tmp_path / name / "tiny-mix_kl-seed0" for name in ("out", "results"))
    status, _ = run("--only", "*mix_kl*", "--until", "train")
    names = {"args.json", "console.txt", "curves.png", "log.csv", "final_model.pth"}
    assert status == 0 and names <= {path.name for path in kept.iterdir()}
    assert not list(kept.glob("*report.json"))
    final = checkpoint.load(folder / "final_model.pth")
    for epoch in (1, 2):  # the best epoch is another one, then the last one
        best = {"epoch": epoch, "selected": final["selected"]}
        checkpoint.save(folder / "best_model.pth", final | best)
        (kept / "best_model.pth").unlink(missing_ok=True)
        study.keep(folder, kept, ("final", "best"))
        assert (kept / "best_model.pth").exists() is (epoch == 1)
    shares = [("", ""), ("0.3", "0.2"), ("0.2", "0.3")]  # not measured, the best, no better
    columns = ("pgd10_acc", "ema_pgd10_acc", "collapse")
    rows = [dict(zip(columns, (*pair, "0"), strict=True)) for pair in shares]
    monkeypatch.setattr(study.runs, "log_of", lambda folder: rows)
    assert "weights are gone" in run("--only", "*mix_kl*")[1]
    assert not (kept / "best_model-report.json").exists()
    rows[2]["ema_pgd10_acc"] = "0.4"
    shutil.rmtree(folder)  # another machine measures what this one has trained

    status, out = run()
    assert status == "failed: tiny-broken-seed0" and "failed with status 2" in out
    console = tmp_path / "out" / "tiny-broken-seed0" / "console.txt"
    assert "outside [1, 2147483647]" in console.read_text()
    reports = {f"{file}_model-report" for file in ("final", "best")}
    kinds = reports | {f"{file}_model-autoattack" for file in ("final", "best")}
    measured = {f"{kind}{end}" for kind in kinds for end in (".json", "-verdicts.npz")}
    assert {path.name for path in kept.iterdir()} == names | measured
    assert checkpoint.load(kept / "final_model.pth")["width"] == 8
    console = (kept / "console.txt").read_text()
    assert console.count("$ python3 test_cifar10.py") == 2  # the best epoch is the last one
    first, second = (json.loads((kept / f"{name}.json").read_text()) for name in sorted(reports))
    assert first == second
    assert json.loads((kept / "best_model-autoattack.json").read_text())["n"] == 30
    assert first["sha256"] == checkpoint.sha256(kept / "final_model.pth")

    (kept / "final_model-report.json").unlink()  # to be measured again, on other images
    assert run("--only", "*mix_kl*", "--measure-flags", "--n-examples 10")[0] == 0
    assert json.loads((kept / "final_model-report.json").read_text())["n"] == 10

    before = {path: path.stat().st_mtime_ns for path in kept.iterdir()}
    status, out = run("--only", "*mix_kl*")
    assert status == 0 and {path: path.stat().st_mtime_ns for path in kept.iterdir()} == before


@pytest.mark.parametrize("last, expected", [
    (dict(pgd10_acc="0.2", ema_pgd10_acc="0.4"), True),
    (dict(pgd10_acc="0.2", ema_pgd10_acc="0.3"), False),  # no better than before
    (dict(pgd10_acc="0.2", ema_pgd10_acc="0.4", collapse="1"), False),  # the average hides it
    (dict(pgd10_acc="0.5", ema_pgd10_acc="0.4"), False),  # the best file holds the raw weights
    (dict(pgd10_acc="0.5", ema_pgd10_acc=""), True),  # there is no average
])  # fmt: skip
def test_the_best_file_is_the_last_one_where_both_hold_the_same(study, monkeypatch, last, expected):
    rows = [dict(pgd10_acc="0.3", ema_pgd10_acc="0.2", collapse="0"), {"collapse": "0"} | last]
    monkeypatch.setattr(study.runs, "log_of", lambda folder: rows)
    assert study.runs.best_is_last(None) is expected


def test_a_stage_of_a_cell_includes_those_before_it(study, tmp_path, monkeypatch):
    more = {"whole": "--attacks cw-50", "autoattack": "--attacks autoattack"}
    cell, asked = study.cells.Cell("one", "", "--attacks pgd-50", more=more), []
    kept = tmp_path / "kept" / "one"
    kept.mkdir(parents=True)
    (kept / "log.csv").touch()

    def call(words, log, deadline):
        asked.append(words[words.index("--attacks") + 1])
        (tmp_path / "out" / "one" / "one-final_model-report.json").touch()

    monkeypatch.setattr(study, "call", call)
    places = dict(out_dir=tmp_path / "out", results_dir=tmp_path / "kept", data_dir=tmp_path)
    with pytest.raises(study.CellError, match="weights are gone"):  # and no other takes their place
        study.carry_out(cell, argparse.Namespace(until="report", device="cpu", **places), 0)
    (kept / "final_model.pth").touch()
    for until, attacks in (
        ("train", []), ("report", ["pgd-50"]), ("apgd", ["cw-50"]), ("autoattack", ["autoattack"])
    ):  # fmt: skip
        args = argparse.Namespace(until=until, device="cpu", measure_flags="", **places)
        study.carry_out(cell, args, deadline=0)
        assert asked == attacks
        asked.clear()


@pytest.mark.slow
def test_a_study_that_is_told_to_stop_waits_for_its_script(run, study, tmp_path, monkeypatch):
    begun, popen = [], study.subprocess.Popen

    def start(*words, **named):
        begun.append(popen(*words, **named))
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return begun[0]

    monkeypatch.setattr(study.subprocess, "Popen", start)
    assert run("--only", "*mix_kl*")[0] == 143
    assert [script.poll() is None for script in begun] == [False]


@pytest.mark.parametrize("name", ["study", "make_tables", "shrink"])
def test_a_script_of_results_finds_all_modules_by_itself(name, tmp_path):
    folder = str(ROOT / "results")  # a shell that runs the script puts only this on the path
    words = ["-c", f"import sys; sys.path.insert(0, {folder!r}); import {name}"]
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, *words], cwd=tmp_path, env=environ, check=True)


def test_a_pattern_that_names_no_cell_is_refused(run):
    assert run("--only", "lnog-*")[0] == 2


def test_every_cell_of_the_study_has_flags_that_its_scripts_take(study):
    import MIX_KL_CIFAR10
    import options

    for scale in study.cells.SCALES.values():
        cells = scale()
        assert len({cell.name for cell in cells}) == len(cells)
        for cell in cells:
            options.parse_training(cell.train.split(), "", MIX_KL_CIFAR10.DEFAULTS)
            assert cell.more.keys() <= set(study.runs.MEASUREMENTS[1:])
            for flags in (cell.measure, *cell.more.values()):
                options.parse_measuring(["--model-path", "x", *flags.split()], "")


def test_the_pairs_of_the_table_of_parts_differ_in_that_part_only(study):
    import parts

    import MIX_KL_CIFAR10
    import options

    def flags(method):
        words = study.cells.METHODS[method].split()
        return vars(options.parse_training(words, "", MIX_KL_CIFAR10.DEFAULTS))

    temperatures = {"temperature", "attack_temperature"}
    differing = [{"mixup_alpha"}, *[{"kl_weight"}] * 3, *[temperatures] * 2, *[{"attack_mode"}] * 2]
    methods = {"baseline", "method", "kl_weight", "attack_mode"} | temperatures
    differing += [methods - {"kl_weight"}, methods, methods, methods | {"delta_init", "alpha"}]
    differing.append(methods | {"delta_init", "alpha", "attack_steps"})
    compared = parts.PARTS | parts.RIVALS
    for (part, (one, other)), keys in zip(compared.items(), differing, strict=True):
        one, other = flags(one), flags(other)
        assert {key for key in one if one[key] != other[key]} == keys, part
    assert flags("kl1to4") == vars(options.parse_training([], "", MIX_KL_CIFAR10.DEFAULTS))


def test_a_table_says_how_many_of_its_runs_an_attack_has_measured(study):
    import make_tables
    import runs

    def run(**shares):
        return runs.Run("one", {"clean": 50.0, **shares}, collapsed=False, minutes=1.0)

    assert make_tables.mean([run(), run(), run()], "clean") == "50.0 ± 0.0"
    three = [run(cw=share) for share in (30.0, 32.0, 34.0)]  # two say nothing of a deviation
    assert make_tables.mean([*three, run()], "cw") == "32.0 ± 2.0 (3 of 4)"
    assert make_tables.mean([run(cw=30.0), run(cw=32.0), run()], "cw") == "31.0 (2 of 3)"
    assert make_tables.mean([run(cw=30.0), run()], "cw") == "30.0 (1 of 2)"
    assert make_tables.mean([run(), run()], "cw") == ""
