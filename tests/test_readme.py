"""The README: every command parses, every flag and file is listed, nothing is invented."""

import importlib
import importlib.util
import json
import re
import shlex
import shutil

import numpy as np
import pytest
from conftest import ROOT

import evaluation
import MIX_KL_CIFAR10
import options
from models import canonical_name

README = (ROOT / "README.md").read_text()
TIMING = (ROOT / "benchmarks" / "timing.py").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.S)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if ".py" in line]
SCRIPTS = [shlex.split(re.sub(r"^.*?(?=\w+\.py|benchmarks/)", "", line)) for line in COMMANDS]
SCRIPTS = [[re.sub(r"\$\w+", "3", word) for word in words] for words in SCRIPTS]  # shell variables


def test_the_four_commands_of_the_project_stand_there_as_promised():
    for line in (
        "python3 MIX_KL_CIFAR10.py --out_dir ./output/ --data-dir cifar-data",
        "python3 MIX_KL_CIFAR100.py --out_dir ./output/ --data-dir cifar-data",
        "python3 test_cifar10.py --model_path model.pth --out_dir ./output/ --data-dir cifar-data",
        "python3 test_cifar100.py --model_path model.pth --out_dir ./output/ --data-dir cifar-data",
    ):
        assert line in COMMANDS


@pytest.mark.parametrize("words", SCRIPTS, ids=" ".join)
def test_every_command_parses(words):
    script, *flags = words
    assert (ROOT / script).is_file()
    if script.startswith("benchmarks"):
        assert set(re.findall(r"--[a-z_-]+", " ".join(flags))) <= set(
            re.findall(r"\"(--[a-z_-]+)", (ROOT / script).read_text() + TIMING)
        )
    elif script.startswith("MIX_KL"):
        defaults = importlib.import_module(script.removesuffix(".py")).DEFAULTS
        canonical_name(options.parse_training(flags, "doc", defaults).model)
    else:
        args = options.parse_measuring(flags, "doc")
        assert args.compare or [evaluation.parse_attack(name) for name in args.attacks]


def test_every_flag_is_listed_and_none_that_does_not_exist():
    listed = set(re.findall(r"`(--[A-Za-z_-]+)", README.split("## Flags")[1].split("\n## ")[0]))
    listed -= {"--help"}
    existing = set()
    for parser in (options.training_parser("doc", {}), options.measuring_parser("doc")):
        existing |= {text for action in parser._actions for text in action.option_strings}
    existing = {text for text in existing if text.startswith("--")} - {"--help"}
    assert {options.dashed([flag])[0] for flag in listed} == existing


def test_the_defaults_in_the_flag_tables_are_those_of_the_parser():
    tables = README.split("## Flags")[1].split("\n## ")[0]
    training, measuring = tables.split("Of the measuring scripts")
    parsed = options.parse_training([], "doc", MIX_KL_CIFAR10.DEFAULTS)
    measured = options.parse_measuring(["--model-path", "x"], "doc")
    count = 0
    for text, args in ((training, parsed), (measuring, measured)):
        for flag, value in re.findall(r"^\| `--([\w-]+)`.*\(default ([\w./:-]*[\w/])", text, re.M):
            found = getattr(args, flag.replace("-", "_"))
            found = 64 if found is None and flag == "width" else found  # None: each network's own
            if isinstance(found, tuple):  # the ends of a line over the run; 2:2 is 2
                found = ":".join(f"{end:g}" for end in dict.fromkeys(found))
            assert value in (str(found), f"{found:g}" if isinstance(found, float) else ""), flag
            count += 1
    assert count > 25


def test_the_tree_lists_every_file_of_the_root():
    tree = README.split("## The tree")[1].split("\n## ")[0]
    for path in ROOT.glob("*.py"):
        assert f"`{path.name}`" in tree
    for name in re.findall(
        r"`([\w./]+)`", "".join(row.split("|")[1] for row in tree.splitlines() if "|" in row)
    ):
        assert (ROOT / name).exists(), name


def test_nothing_is_left_to_fill_in():
    for page in (README, (ROOT / "results" / "README.md").read_text()):
        assert not re.search(r"^[A-Z0-9_]{3,}$| \.\.\.$", page, re.M)


def test_every_link_leads_somewhere():
    def anchors(page):
        return {
            re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
            for title in re.findall(r"^#+ (.*)$", page.read_text(), re.M)
        }

    for page in (ROOT / "README.md", ROOT / "results" / "README.md"):
        targets = re.findall(r"\]\(([^)]+)\)", page.read_text())
        assert len(targets) > 5
        for target in targets:
            path, _, anchor = target.partition("#")
            if not target.startswith("http"):
                found = page.parent / path if path else page
                assert found.exists() and (not anchor or anchor in anchors(found)), target


def test_ci_and_makefile_run_the_same_command():
    assert "make test" in (ROOT / ".ci" / "run").read_text() and "`make test`" in README


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "results")
    spec = importlib.util.spec_from_file_location("tables", ROOT / "results" / "make_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_epoch_that_was_not_measured_has_empty_cells_in_the_tables(tables, monkeypatch):
    row = {"epoch": "1", "clean_acc": "", "fgsm_acc": "", "pgd10_acc": "", "collapse": "0"}
    monkeypatch.setattr(tables.runs, "log_of", lambda folder: [row])
    assert tables.control()[-1] == "| 1 |  |  |  |  |  |  |  |  |"


def test_a_seed_that_is_not_yet_measured_counts_nowhere(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(tables.runs, "HERE", tmp_path)
    for seed in (0, 1):
        one = ROOT / "results" / "steep-fgsm_rs-seed0"
        shutil.copytree(one, tmp_path / f"new-fgsm_rs-seed{seed}")
    assert tables.study("new")[2].endswith("| last | 2 |  |  |  | 2 |  |")  # none lived
    (tmp_path / "new-fgsm_rs-seed1" / "final_model-report.json").unlink()
    assert tables.study("new")[2].endswith("| last | 1 |  |  |  | 1 |  |")


def test_a_seed_that_collapsed_is_counted_and_not_averaged(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(tables.runs, "HERE", tmp_path)
    for seed in (0, 1, 2):  # the third lived
        one = ROOT / "results" / f"steep-fgsm_rs-seed{seed}"
        shutil.copytree(one, tmp_path / f"steep15-fgsm_rs-seed{seed}")
    assert tables.headline()[2].endswith("| last | 39.8 | 22.1 | 20.1 | 2 of 3 | 7.6 |")
    row = {"standing_after": {"apgd-t": 21, "square": 20}, "n": 100}
    for name, share in {"apgd": 0.21, "autoattack": 0.2}.items():
        found = json.dumps({"attacks": [row | {"attack": name, "accuracy": share}]})
        (tmp_path / "steep15-fgsm_rs-seed2" / f"final_model-{name}.json").write_text(found)
    end = "| last | 39.8 | 22.1 | 20.1 | 21.0 | 20.0 | 2 of 3 | 7.6 |"
    assert tables.headline()[2].endswith(end)
    (tmp_path / "steep15-fgsm_rs-seed2" / "final_model-apgd.json").unlink()  # the other says it too
    assert tables.headline()[2].endswith(end)
    shutil.rmtree(tmp_path / "steep15-fgsm_rs-seed2")
    assert tables.headline()[2].endswith("| last |  |  |  | 2 of 2 |  |")


def test_a_part_is_judged_by_the_seeds_that_lived_with_it_and_without(
    tables, tmp_path, monkeypatch
):
    monkeypatch.setattr(tables.runs, "HERE", tmp_path)
    for method, source in (("kl", "train8"), ("kl0", "fgsm_rs")):
        for seed in range(3):  # of FGSM-RS's only the third lived
            one = ROOT / "results" / f"steep-{source}-seed{seed}"
            shutil.copytree(one, tmp_path / f"steep15-{method}-seed{seed}")
    _, _, row = tables.TABLES["parts"]()
    assert row == "| KL 1 | 16/255, slow warm-up | -9.5 | +0.1 | -0.1 | 1 | 0 of 3 | 2 of 3 |"
    row = {"attack": "apgd", "accuracy": 0.2, "standing_after": {"apgd-t": 20}, "n": 100}
    for folder in tmp_path.glob("*-seed2"):
        (folder / "final_model-apgd.json").write_text(json.dumps({"attacks": [row]}))
        stand = 1090 if "kl0" in folder.name else 1050  # the report is of the first 1000
        verdicts = np.arange(1100) < stand
        np.savez(folder / "final_model-whole-verdicts.npz", **{"cw-50": verdicts})
    _, _, row = tables.TABLES["parts"]()
    assert row.endswith("| -9.5 | +0.1 | -0.1 | -40.0 | +0.0 | 1 | 0 of 3 | 2 of 3 |")
    shutil.rmtree(tmp_path / "steep15-kl0-seed2")
    _, _, row = tables.TABLES["parts"]()
    assert row == "| KL 1 | 16/255, slow warm-up |  |  |  | 0 | 0 of 2 | 2 of 2 |"


def test_an_interval_of_three_seeds_is_students(tables):
    stats = pytest.importorskip("scipy.stats")
    low, high = stats.t.interval(0.95, 2, loc=2, scale=3**-0.5)
    assert tables.parts.interval([1, 2, 3]) == f"+2.0 [{low:.1f}, +{high:.1f}]"
    assert tables.parts.interval([-0.01, 2]) == "+0.0, +2.0"
    for seeds, quantile in tables.parts.STUDENT.items():
        assert quantile == pytest.approx(stats.t.ppf(0.975, seeds - 1), abs=0.005)


def test_the_tables_of_results_are_those_of_the_files(tables):
    for page in tables.PAGES:
        text = page.read_text()
        assert tables.rebuilt(text) == text
    assert (ROOT / "results" / "runs.csv").read_text() == tables.runs.listed()
    names = re.findall("<!-- table (.*) -->", "".join(page.read_text() for page in tables.PAGES))
    assert sorted(names) == sorted(tables.TABLES)
    assert len(tables.short()) > 3 and "| collapse |" in "".join(tables.control())
    changed = README.replace("|  | N-FGSM | last | 65.2 |", "|  | N-FGSM | last | 75.2 |")
    assert changed != README and tables.rebuilt(changed) == README
