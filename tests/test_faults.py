"""Every fault that users of such code report, planted in a real run of a script.

Each row plants one fault, runs a script in a process of its own, and looks at the line, the exit
status and what was there before. The numbers are those of a catalogue of 26 faults.
"""

import argparse
import csv
import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from conftest import ROOT, write_archive

import checkpoint
import resume

TINY = ["--width", "8", "--batch-size", "20", "--held-out", "20", "--train-images", "40"]
TINY += ["--precision", "fp32", "--save-every", "60", "--run-name", "run", "--data-dir", "."]
OFFLINE = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy")} | {"no_proxy": ""}
ROWS = []


def row(name, *marks):
    """Put a function into the table under a name that begins with the number of its fault."""

    def add(function):
        ROWS.append(pytest.param(function, id=name, marks=marks))
        return function

    return add


class Place:
    """A folder with tiny archives and a finished run of two epochs, and the scripts run there."""

    def __init__(self, folder):
        self.folder, self.run = folder, folder / "output" / "run"
        self.bad = folder / "bad.pth"  # where faults of a checkpoint go

    def start(self, script, *words, env=(), cwd=None, stdout=subprocess.PIPE):
        environ = os.environ | {"OMP_NUM_THREADS": "1"} | dict(env)
        return subprocess.Popen(
            [sys.executable, ROOT / script if isinstance(script, str) else script,
             *map(str, words)],
            cwd=cwd or self.folder, env=environ, text=True, start_new_session=True,
            stdout=stdout, stderr=subprocess.PIPE,
        )  # fmt: skip

    def train(self, *words, **more):
        return self.start("MIX_KL_CIFAR10.py", *TINY, *words, **more)

    def measure(self, *words, **more):
        words = ["--data-dir", ".", "--attacks", "clean", "pgd-2", *words]
        return self.start("test_cifar10.py", *words, **more)

    def contents(self):
        """Return the SHA-256 of each file here."""
        paths = [p for p in self.folder.rglob("*") if p.is_file()]
        return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}

    def plant(self, change, source="final_model.pth"):
        """Write a file of the run, its bytes changed, as ``bad.pth``."""
        self.bad.write_bytes(change((self.run / source).read_bytes()))
        return ["--model_path", "bad.pth"]

    def plant_content(self, change):
        """Write a checkpoint of the run, its content changed, as ``bad.pth``."""
        content = checkpoint.load(self.run / "final_model.pth")
        torch.save(change(content), self.bad)
        return ["--model_path", "bad.pth"]


def ended(process, status, seconds=120):
    """Return stdout and stderr of a process that must end with a status and without traceback."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == status, (out, err)
    assert "Traceback" not in (out or "") + err
    return out, err


def refused(place, start, line, status=2):
    """Hold a run against a line, its only one on stderr; nothing that was there may change."""
    before = place.contents()
    _, err = ended(start(), status)
    assert len(err.splitlines()) == 1 and err.startswith("error: "), err
    assert re.search(line, err), err
    after = place.contents()
    assert {path: after.get(path) for path in before} == before
    loads(place.run)


def loads(run):
    """Open all that a run left."""
    for name in ("final_model.pth", "best_model.pth"):
        torch.load(run / name, weights_only=True)
        checkpoint.load(run / name)
    resume.load(run / resume.NAME)


def log(run):
    with (run / "log.csv").open() as file:
        return list(csv.DictReader(file))


@contextmanager
def disk(folder, size):
    """Mount a disk of its own size, of memory."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def wait_for(process, condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A folder with archives and a run of two epochs in it; never written to again."""
    place = Place(tmp_path_factory.mktemp("finished"))
    write_archive(place.folder, 10, train=100, test=20)
    ended(place.train("--epochs", 2), 0)
    loads(place.run)
    return place.folder


@pytest.fixture
def place(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "place")
    return Place(tmp_path / "place")


# ---------------------------------------------------------------------------------- checkpoints


@row("F1 truncated")
def truncated(place):
    words = place.plant(lambda raw: raw[: len(raw) // 2])
    shutil.copy(place.run / "final_model.pth", place.folder / "bad.pth.prev")
    line = r"bad\.pth: not a whole checkpoint \([\d,]+ bytes\): truncated.*; try bad\.pth\.prev$"
    refused(place, lambda: place.measure(*words), line)


@row("F1 truncated state", pytest.mark.slow)
def truncated_state(place):
    path = place.run / resume.NAME
    path.write_bytes(path.read_bytes()[:5000])
    out, err = ended(place.train("--epochs", 2, "--resume"), 0)
    assert re.search(r"warning: .*state\.pth.*truncated.*going on from state\.pth\.prev", out)
    assert err == "" and len(log(place.run)) == 2
    loads(place.run)


@row("F2 empty")
def empty(place):
    words = place.plant(lambda raw: b"")
    line = r"bad\.pth: .*empty \(0 bytes\); copy or download it again$"
    refused(place, lambda: place.measure(*words), line)


@row("F2 empty, with --debug")
def empty_debug(place):
    words = place.plant(lambda raw: b"")
    process = place.measure(*words, "--debug")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" in err and "bad.pth" in err


@row("F3 HTML page")
def html(place):
    words = place.plant(lambda raw: b"<!DOCTYPE html><html><title>Quota exceeded</title></html>")
    line = r"bad\.pth: not a checkpoint: this is an HTML page; download it again$"
    refused(place, lambda: place.measure(*words), line)


@row("F4 one flipped bit")
def flipped(place):
    def flip(raw):
        middle = len(raw) // 2
        return raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :]

    words = place.plant(flip)
    assert torch.load(place.bad, weights_only=True)  # torch itself takes it
    line = r"bad\.pth: .*checksums do not agree.*; copy or download it again$"
    refused(place, lambda: place.measure(*words), line)


class Malicious:
    """Makes a folder where it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def armed(marker):
    """Return an object that acts when unpickled, after seeing that it does."""
    pickle.loads(pickle.dumps(Malicious(marker)))
    marker.rmdir()
    return Malicious(marker)


@row("F5 malicious checkpoint")
def malicious(place):
    marker = place.folder / "owned"
    words = place.plant_content(lambda content: content | {"epoch": armed(marker)})
    line = r"bad\.pth: .*asks for (posix|nt)\.mkdir, which no checkpoint needs"
    refused(place, lambda: place.measure(*words), line)
    assert not marker.exists()


@row("F5 malicious state")
def malicious_state(place):
    marker = place.folder / "owned"
    bad = place.run / "bad.pth"
    torch.save({"schema": resume.SCHEMA, "args": armed(marker)}, bad)
    line = r"--resume.*bad\.pth.*asks for (posix|nt)\.mkdir"
    refused(place, lambda: place.train("--resume", bad), line)
    assert not marker.exists()


@row("F6 a Namespace in the file")
def namespace(place):
    def plain(value):
        if isinstance(value, dict):
            return all(type(key) is str and plain(entry) for key, entry in value.items())
        if isinstance(value, (list, tuple)):
            return all(map(plain, value))
        return value is None or type(value) in (str, int, float, bool, torch.Tensor)

    for name in ("final_model.pth", "state.pth"):
        assert plain(torch.load(place.run / name, weights_only=True))
    words = place.plant_content(lambda content: content | {"args": argparse.Namespace(lr=1)})
    line = r"bad\.pth: .*asks for argparse\.Namespace, which no checkpoint needs"
    refused(place, lambda: place.measure(*words), line)


@row("F7 wrong architecture")
def architecture(place):
    words = place.plant(lambda raw: raw)
    line = r"holds a PreActResNet18; leave --model ResNet18 out$"
    refused(place, lambda: place.measure(*words, "--model", "ResNet18"), line)


@row("F7 wrong architecture of a bare file")
def bare_architecture(place):
    words = place.plant_content(lambda content: content["ema"])
    line = r"bad\.pth: does not fit this network .*; see --model$"
    refused(place, lambda: place.measure(*words, "--model", "ResNet18", "--width", 8), line)


@row("F8 wrong classes")
def classes(place):
    words = place.plant_content(lambda c: c | {"num_classes": 100, "dataset": "cifar100"})
    line = r"bad\.pth: trained on cifar100 \(100 classes\); use test_cifar100\.py$"
    refused(place, lambda: place.measure(*words), line)


@row("F9 prefix on all keys", pytest.mark.slow)
def prefixed(place):
    words = place.plant_content(lambda c: {f"module.{k}": v for k, v in c["ema"].items()})
    out, _ = ended(place.measure(*words, "--model", "PreActResNet18", "--width", 8), 0)
    assert "worst case" in out


@row("F9 prefix on some keys")
def partly_prefixed(place):
    def change(content):
        state = content["ema"]
        return {k if "conv" in k else f"module.{k}": v for k, v in state.items()}

    words = [*place.plant_content(change), "--model", "PreActResNet18", "--width", 8]
    refused(place, lambda: place.measure(*words), r"bad\.pth: does not fit .*; see --model$")


def infinite(content):
    state = dict(content["ema"])
    key = next(key for key in state if key.endswith("conv1.weight"))
    state[key] = state[key].clone().fill_(float("nan"))
    return content | {"ema": state}


@row("F10 NaN weights")
def nan_weights(place):
    words = place.plant_content(infinite)
    line = r"bad\.pth: .*conv1\.weight is not finite; the training had diverged"
    refused(place, lambda: place.measure(*words), line, status=3)


@row("F10 NaN weights in a state")
def nan_state(place):
    state = resume.load(place.run / resume.NAME)
    state["raw"][next(iter(state["raw"]))].fill_(float("inf"))
    bad = place.run / "bad.pth"
    torch.save(state, bad)
    line = rf"bad\.pth: its weights are not finite; try --resume {re.escape(str(bad))}\.prev$"
    refused(place, lambda: place.train("--epochs", 2, "--resume", bad), line, status=3)


# -------------------------------------------------------------------------------- training runs


@row("F11 NaN loss")
def nan_loss(place):
    before = {path.name: path.read_bytes() for path in place.run.glob("*.pth*")}
    words = ["--resume", "--allow-changed", "--epochs", 9, "--lr", "1e30"]
    out, err = ended(place.train(*words), 3)
    assert len(err.splitlines()) == 1 and "epoch   3/9" not in out
    found = re.search(r"epoch 3: the loss is .* after step (\d+), lr 1e\+30; try a smaller", err)
    assert found and int(found[1]) <= 10 and re.search(r"state\.pth holds the last good state", err)
    assert {path.name: path.read_bytes() for path in place.run.glob("*.pth*")} == before
    loads(place.run)


@row("F12 kill -9 while saving", pytest.mark.slow)
def killed(place):
    words = ["--resume", "--epochs", 5, "--allow-changed"]
    process = place.train(*words)
    wait_for(process, lambda: list(place.run.glob("*.pth.partial")))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    loads(place.run)
    assert len(log(place.run)) < 5
    ended(place.train(*words), 0)
    assert [int(entry["epoch"]) for entry in log(place.run)] == [*range(1, 6)]
    loads(place.run)


@row("F13 disk full in mid run", pytest.mark.slow)
def disk_full(place):
    with disk(place.folder / "disk", "20m") as folder:
        run, words = folder / "run", ["--out_dir", "disk", "--epochs", 6]
        process = place.train(*words)
        wait_for(process, (run / "final_model.pth").exists)  # the last of an epoch
        with suppress(OSError), (folder / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass
        out, err = ended(process, 2)
        assert re.search(r"warning: .*cannot be written \(.*; the run goes on", out)
        line = r"error: .*disk/run/.*: cannot be written \(.*make room, and add --resume disk/run "
        assert len(err.splitlines()) == 1 and re.search(line, err), err
        loads(run)
        assert "epoch   6/6" in out and resume.load(run / resume.NAME)["progress"]["epoch"] < 7
        (folder / "filler").unlink()
        ended(place.train(*words, "--resume"), 0)
        assert len(log(run)) == 6 and checkpoint.load(run / "final_model.pth")["epoch"] == 6


@row("F13 disk too small before the first epoch")
def disk_small(place):
    with disk(place.folder / "disk", "8m") as folder:
        shutil.copy(place.run / "final_model.pth", folder / "other.pth")
        line = r"disk/run: \d+ MB free, the run needs \d+ MB; make room, or choose another --out-d"
        refused(place, lambda: place.train("--out_dir", "disk"), line)


@row("F13 room for a run that goes on", pytest.mark.slow)
def disk_of_a_run(place):
    """Its own files are replaced, so the disk that held the run holds the rest of it."""
    with disk(place.folder / "disk", "14m") as folder:
        shutil.copytree(place.run, folder / "run")
        words = ["--out_dir", "disk", "--resume", "--allow-changed", "--epochs", 3]
        ended(place.train(*words), 0)
        loads(folder / "run")


def unheard():
    """Yield a number and a standard output that takes nothing: a full disk's, a closed pipe's."""
    reader, pipe = os.pipe()
    os.close(reader)
    for number, writer in enumerate((os.open("/dev/full", os.O_WRONLY), pipe)):
        yield number, writer
        os.close(writer)


@row("F13 disk full behind standard output, or its reader gone")
def silenced(place):
    for number, writer in unheard():
        words = ["--epochs", 1, "--run-name", f"new{number}"]
        assert ended(place.train(*words, stdout=writer), 0) == (None, "")
        loads(place.folder / "output" / f"new{number}")


@row("F13 the same while measuring: the report is written")
def measured_in_silence(place):
    for number, writer in unheard():
        words = ["--model_path", place.run / "final_model.pth", "--out_dir", f"told{number}"]
        assert ended(place.measure(*words, stdout=writer), 0) == (None, "")
        assert list((place.folder / f"told{number}").glob("*report.json"))


@row("F14 read-only folder")
def read_only(place):
    with disk(place.folder / "disk", "20m") as folder:
        shutil.copytree(place.run, folder / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        words = ["--out_dir", "disk"]
        line = r"disk(/run)?: cannot be written \(Read-only file system\); choose another --out-dir"
        refused(place, lambda: place.train(*words, "--resume", "--epochs", 2), line)
        before = place.contents()
        model = ["--model_path", place.run / "final_model.pth"]
        out, err = ended(place.measure(*model, *words), 2)
        assert re.search(line, err) and "pgd" not in out and place.contents() == before


@row("F14 a file in the place of the folder")
def file_in_the_way(place):
    (place.folder / "file").write_text("mine")
    line = r"file/below: cannot be written \(Not a directory\); choose another --out-dir"
    refused(place, lambda: place.train("--out_dir", "file/below"), line)


def interrupted(place, *signals):
    """Send signals to a run after its first new state; return status and stdout."""
    path = place.run / resume.NAME
    before = path.read_bytes()

    def is_newer():
        try:
            return path.read_bytes() != before
        except FileNotFoundError:  # between the two renames of a save
            return False

    process = place.train("--resume", "--epochs", 900, "--allow-changed")
    wait_for(process, is_newer)
    for number in signals:
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert err == "" and "Traceback" not in out
    loads(place.run)
    return process.returncode, out


@row("F15 SIGTERM")
def terminated(place):
    status, out = interrupted(place, signal.SIGTERM)
    assert status == 143 and re.search(
        r"SIGTERM: stopped in epoch \d+ .*--resume output/run goes on", out
    )


@row("F15 Ctrl-C", pytest.mark.slow)
def ctrl_c(place):
    status, out = interrupted(place, signal.SIGINT)
    assert status == 130 and re.search(
        r"SIGINT: stopped in epoch \d+ .*--resume output/run goes on", out
    )


@row("F15 a second signal", pytest.mark.slow)
def second_signal(place):
    status, out = interrupted(place, signal.SIGINT, signal.SIGTERM)
    assert status in (130, 143) and "stopped in epoch" not in out


@row("F16 nothing to resume at a path")
def no_state(place):
    line = r"--resume nowhere: no such state; leave the value out to find it$"
    refused(place, lambda: place.train("--run-name", "new", "--resume", "nowhere"), line)
    assert not (place.folder / "output" / "new").exists()


@row("F16 nothing to resume anywhere", pytest.mark.slow)
def fresh_start(place):
    before = place.contents()
    words = ["--run-name", "new", "--resume", "--epochs", 1]
    out, _ = ended(place.train(*words), 0)
    assert "resumed" not in out and before.items() <= place.contents().items()
    loads(place.folder / "output" / "new")


@row("F17 resume with changed flags")
def changed_flags(place):
    line = r"--resume: flags that change the run: .*--epsilon 8\.0 -> 4\.0.*--lr 0\.1 -> 0\.3.*"
    line += "give them as before to go on in output/run, or --allow-changed$"
    words = ["--epochs", 2, "--resume", "--lr", 0.3, "--epsilon", 4]
    refused(place, lambda: place.train(*words), line)


@row("F18 the folder holds another run")
def taken_folder(place):
    line = r"output/run: exists; choose another --run-name, or add --overwrite$"
    refused(place, lambda: place.train("--epochs", 1), line)


# ----------------------------------------------------------------------------- data and machine


@row("F19 truncated data file")
def truncated_data(place):
    path = place.folder / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(path.read_bytes()[:-100])
    line = r"data_batch_3: broken, truncated or not a CIFAR file \([\d,]+ bytes.*download it again$"
    refused(place, lambda: place.train("--run-name", "new"), line)


@row("F19 HTML page in the place of data")
def html_data(place):
    (place.folder / "cifar-10-batches-py" / "test_batch").write_bytes(b"<html>404</html>")
    words = ["--model_path", place.run / "final_model.pth"]
    line = r"test_batch: broken: this is an HTML page; download it again$"
    refused(place, lambda: place.measure(*words), line)


@row("F19 malicious data file")
def malicious_data(place):
    marker, path = place.folder / "owned", place.folder / "cifar-10-batches-py" / "data_batch_1"
    path.write_bytes(pickle.dumps({"data": armed(marker), "labels": []}, protocol=2))
    line = r"data_batch_1: broken.*asks for (posix|nt)\.mkdir.*download it again$"
    refused(place, lambda: place.train("--run-name", "new"), line)
    assert not marker.exists()


@row("F20 no network")
def offline(place):
    pytest.importorskip("torchvision")
    (place.folder / "cifar-10-batches-py" / "data_batch_2").unlink()
    line = r"data_batch_2 not found, and the download failed \(.*\); give the folder that holds "
    line += r"cifar-10-batches-py/ with --data-dir, or use the built-in images with --synthetic$"
    refused(place, lambda: place.train("--run-name", "new", env=OFFLINE), line)


MIRROR = """
import pathlib, sys, time, types
def fetch(root, download):
    sys.path.append({tests!r})
    from conftest import write_archive
    with open("downloads", "a") as file:
        file.write("x")
    time.sleep(2)
    write_archive(pathlib.Path(root), 10, train=100, test=20)
sys.modules["torchvision.datasets"] = types.SimpleNamespace(CIFAR10=fetch)
"""


@row("F21 two downloads at once", pytest.mark.slow)
def two_downloads(place):
    shutil.rmtree(place.folder / "cifar-10-batches-py")
    (place.folder / "mirror").mkdir()
    text = MIRROR.format(tests=str(ROOT / "tests"))
    (place.folder / "mirror" / "sitecustomize.py").write_text(text)
    env = {"PYTHONPATH": "mirror"}
    processes = [place.train("--run-name", name, "--epochs", 1, env=env) for name in ("one", "two")]
    assert all("epoch   1/1" in ended(process, 0)[0] for process in processes)
    assert (place.folder / "downloads").read_text() == "x"
    loads(place.run)


@row("F22 no GPU")
def no_gpu(place):
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    words = ["--run-name", "new", "--device", "cuda"]
    line = r"--device cuda: not available \(.*\); --device auto takes what is here$"
    refused(place, lambda: place.train(*words, env=hidden), line)


SHORT_OF_MEMORY = """
import runpy, sys, torch
_, limit, script, *words = sys.argv
sys.path.insert(0, script.rpartition("/")[0])
from models.preact_resnet import PreActResNet
forward = PreActResNet.forward
def small(self, x):
    if len(x) > int(limit):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\\nMore.")
    return forward(self, x)
PreActResNet.forward = small
sys.argv = [script, *words]
runpy.run_path(script, run_name="__main__")
"""


@row("F23 GPU out of memory in training")
def memory_training(place):
    (place.folder / "short.py").write_text(SHORT_OF_MEMORY)
    words = [10, ROOT / "MIX_KL_CIFAR10.py", *TINY, "--run-name", "new"]
    line = r"the GPU is out of memory \(CUDA out of memory.*\); try a smaller --batch-size, --prec"
    refused(place, lambda: place.start(Path("short.py"), *words), line)


@row("F23 GPU out of memory in measuring", pytest.mark.slow)
def memory_measuring(place):
    (place.folder / "short.py").write_text(SHORT_OF_MEMORY)
    found = []
    for limit, size in ((5, 20), (20, 5)):
        words = ["--data-dir", ".", "--model_path", "output/run/final_model.pth", "--batch-size",
                 size, "--attacks", "clean", "pgd-3-2", "--out_dir", f"limit{limit}"]  # fmt: skip
        words = [limit, ROOT / "test_cifar10.py", *words]
        out, _ = ended(place.start(Path("short.py"), *words), 0)
        notes = [line for line in out.splitlines() if "note: out of GPU memory" in line]
        assert [re.findall(r"--batch-size (\d+)$", line) for line in notes][:2] == (
            [["10"], ["5"]] if size > limit else []
        )
        report = json.loads(next((place.folder / f"limit{limit}").glob("*.json")).read_text())
        found.append([(entry["attack"], entry["correct"]) for entry in report["attacks"]])
    assert found[0] == found[1]


@row("F24 a last batch of one image", pytest.mark.slow)
def odd_sizes(place):
    words = ["--run-name", "new", "--epochs", 1, "--train-images", 41, "--held-out", 1]
    out, _ = ended(place.train(*words), 0)
    assert "on 41 images" in out
    state = checkpoint.load(place.folder / "output" / "new" / "final_model.pth")["raw"]
    counts = [int(value) for key, value in state.items() if key.endswith("num_batches_tracked")]
    assert counts and set(counts) == {2}  # the one image left over went nowhere


WRONG_IMAGES = """
import sys
sys.path.insert(0, sys.argv[1])
import attacks, options, torch
kinds = {"range": torch.full((2, 3, 32, 32), 255.0), "dtype": torch.zeros(2, 3, 32, 32).byte(),
         "shape": torch.zeros(3, 32, 32), "nan": torch.full((2, 3, 32, 32), float("nan"))}
def main(argv):
    for name in argv[1:-1]:
        try:
            attack(kinds[name])
        except ValueError as error:
            print(name, error)
    attack(kinds[argv[-1]])
def attack(x):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(10))
    attacks.pgd(model, x, torch.zeros(2, dtype=torch.long), epsilon=0.1, alpha=0.1, steps=1)
options.run(main)
"""


@row("F25 images that are none")
def wrong_images(place):
    (place.folder / "wrong.py").write_text(WRONG_IMAGES)
    process = place.start(Path("wrong.py"), ROOT, "nan", "dtype", "shape", "range")
    out, err = ended(process, 2)
    assert [line.split()[0] for line in out.splitlines()] == ["nan", "dtype", "shape"]
    assert "divide uint8 images by 255" in out and "(N, C, H, W)" in out
    line = r"error: images in \[255, 255\]: an attack takes them in \[0, 1\]; normalise inside"
    assert len(err.splitlines()) == 1 and re.match(line, err)


@row("F26 log spoilt after the state was saved")
def spoilt_log(place):
    path = place.run / "log.csv"
    text = path.read_text()
    path.write_text(text + text + "3,nan\n" + "\x00garbage")
    ended(place.train("--epochs", 2, "--resume"), 0)
    assert path.read_text() == text
    loads(place.run)


@pytest.mark.parametrize("fault", ROWS)
def test_fault(place, fault):
    fault(place)


def test_the_table_has_all_26_faults():
    numbers = {int(re.match(r"F(\d+) ", entry.id)[1]) for entry in ROWS}
    assert numbers == set(range(1, 27))
