"""Random flags of the training script: each combination is a finished run or one clear line."""

import argparse
import random
import signal
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
from conftest import write_archive

import checkpoint
import options

TINY = ["--width", "8", "--epochs", "1", "--batch-size", "20", "--held-out", "20"]
TINY += ["--train-images", "40", "--precision", "fp32"]
TEXTS = ["0", "1", "2", "3", "0.5", "0.999", "8", "8/255", "4:1", "1e-3", "16", "1e30"]
NASTY = [
    "", " ", "-1", "-0", "nan", "inf", "-inf", "1e400", "1e-320", "x", "None", "8/0", "8/8/8",
    "4:0", "4:", ":", "0x10", "1_0", "1" + "0" * 400, "9" * 5000, "2147483648", "99999999",
    "18446744073709551616", "é", "../..", "a/b", "n" * 300, "--lr", "1;2", "%s", "{}",
]  # fmt: skip
OWN = {  # what is tried in the place of TEXTS: what fits a tiny run, and what a flag means
    "epochs": ["1", "2"], "attack_steps": ["1", "2"], "width": ["8", "16", "12", "1024.0"],
    "batch_size": ["2", "7", "20", "39", "40", "41"], "held_out": ["1", "33", "60", "99", "100"],
    "train_images": ["20", "33", "40", "41", "81"], "device": ["cpu", "auto"],
    "model": ["resnet-18", "PreActResNet18", "WideResNet34-10", "VGG"], "run_name": ["a", "b c"],
    "seed": ["0", "7", "2147483647"],
}  # fmt: skip
DEVICES = ["cuda:99", "meta", "tpu", "cuda:-1", "cpu:99", "mps", "xpu", "cpu,cuda"]
LONG = {"epochs", "attack_steps", "width"}  # of these, NASTY may hold legal values that take days
UNKNOWN = ["--lrr=1", "--epo=3", "-x", "stray", "--no-debug", "--width8", "--epsilon16", "---lr"]


class HungError(BaseException):
    """A run took too long; no handler of errors takes it for one."""


def parsed(action, text):
    """Return whether a flag takes a value."""
    try:
        action.type(text) if action.type else text
    except (argparse.ArgumentTypeError, TypeError, ValueError):
        return False
    return True


def values(action, nasty, paths):
    """Return what to try as the value of a flag."""
    if action.choices:
        return ["", "X", "auto,fp32"] if nasty else list(action.choices)
    if action.dest in paths:
        return paths[action.dest][nasty]
    if action.dest == "device" and nasty:
        return DEVICES
    if nasty:
        long = action.dest in LONG
        return [text for text in NASTY if not (long and parsed(action, text))]
    return OWN.get(action.dest) or [text for text in TEXTS if parsed(action, text)]


def combination(actions, paths, rng):
    """Return the words of one to six random flags."""
    words = []
    for action in rng.sample(actions, rng.randint(1, 6)):
        flag = rng.choice(action.option_strings)
        flag = flag.replace("-", "_").replace("__", "--", 1) if rng.random() < 0.3 else flag
        nasty = rng.random() < 0.15
        if action.nargs == 0:
            words += [f"{flag}=1"] if nasty else [flag]
            continue
        value = rng.choice(values(action, nasty, paths))
        words += [flag] if value is None else [f"{flag}={value}"]
    return words + ([rng.choice(UNKNOWN)] if rng.random() < 0.05 else [])


def verdict(status, out, err, folder):
    """Return what is wrong with the end of a run, or ``finished`` or ``refused``."""
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    if status == 0:
        models = list(folder.rglob("final_model.pth"))
        whole = len(models) == 1 and "epoch " in out and not lines
        epochs = whole and checkpoint.load(models[0])["epoch"]
        return "finished" if epochs in (1, 2) else f"finished without its files: {lines}"
    if status not in (2, 3):
        return f"status {status}: {lines}"
    clear = len(lines) == 1 and "error: " in lines[0] and 20 < len(lines[0]) < 6000
    return "refused" if clear else f"status {status} without one clear line: {lines}"


@pytest.fixture
def paths(tmp_path, monkeypatch):
    """Values of the flags that take a path, good ones and others, and no network."""

    def fetch(*_, **__):
        raise OSError("no network")

    fake = SimpleNamespace(CIFAR10=fetch)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", fake)
    data_dir = write_archive(tmp_path / "data", 10, train=100, test=20)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    file, empty, none = (str(tmp_path / name) for name in ("file", "empty", "none"))
    return {
        "data_dir": ([str(data_dir), f"{data_dir}/cifar-10-batches-py"], [file, empty, none, ""]),
        "out_dir": (["runs", "runs/deep/er"], [file, f"{file}/x", "n" * 300]),
        "resume": ([None, "auto"], [file, empty, none, "", "x" * 5000]),
    }


@pytest.mark.parametrize("count", [
    pytest.param(40, id="40"),
    pytest.param(500, id="500", marks=[pytest.mark.slow, pytest.mark.exhaustive]),
])  # fmt: skip
def test_random_flags_end_in_a_run_or_in_one_line(tmp_path, script, paths, monkeypatch, count):
    def hung(*_):
        raise HungError

    before = signal.signal(signal.SIGALRM, hung)
    actions = [
        action for action in options.training_parser("doc", {})._actions
        if action.dest not in ("help", "debug", "synthetic")
    ]  # fmt: skip
    rng, faults, ends = random.Random(count), [], Counter()
    for number in range(count):
        words, folder = combination(actions, paths, rng), tmp_path / f"run{number}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        common = ["--data-dir", paths["data_dir"][0][0], "--out-dir", folder / "out", *TINY]
        signal.alarm(120)
        try:
            found = verdict(*script("MIX_KL_CIFAR10", *common, *words), folder)
        except (Exception, HungError) as error:
            found = f"{type(error).__name__}: {error}"
        finally:
            signal.alarm(0)
        ends[found] += found in ("finished", "refused")
        if found not in ("finished", "refused"):
            faults.append(f"{number}: {[word[:60] for word in words]}: {found[:300]}")
    signal.signal(signal.SIGALRM, before)
    print(dict(ends))
    assert not faults, "\n".join(faults)
    assert min(ends["finished"], ends["refused"]) > count / 10
