"""What several tests share: a small network, a seeded batch, small archives, a counter of FLOPs."""

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.timing import Flops

ROOT = Path(__file__).resolve().parent.parent


# For processes that measure themselves. Not ru_maxrss: that begins with the memory of pytest, whose
# child the process is, and so hides all that is less.
PEAK = """
def peak():
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))
"""


class SmallNet(nn.Module):
    """Two convolutions with batch norm: enough for every code path, and fast."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(16)
        self.linear = nn.Linear(16, num_classes)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return self.linear(x.mean((2, 3)))


class ShortOfMemory(nn.Module):
    """A network on a GPU whose memory does for a few images at a time."""

    def __init__(self, model, limit):
        super().__init__()
        self.model, self.limit = model, limit
        self.eval()

    def forward(self, x):
        if len(x) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.model(x)


class Watching(nn.Module):
    """A network that notes which images any forward pass got wrong, whoever makes the pass."""

    def __init__(self, model, y):
        super().__init__()
        self.model, self.y = model, y
        self.fell = torch.zeros_like(y, dtype=torch.bool)
        self.eval()  # itself too: libraries put back the mode that they found

    def forward(self, x):
        logits = self.model(x)
        if len(x) == len(self.y):  # libraries may probe with fewer
            self.fell |= logits.detach().argmax(1) != self.y
        return logits

    def standing(self, *more):
        """Return the images that stood in all passes, and do in those of ``more`` images."""
        with torch.no_grad():
            for x in more:
                self(x)
        return ~self.fell


def flops(function):
    """Return the floating-point operations that a call makes in convolutions and products."""
    with Flops() as counter:
        function()
    return counter.total


@pytest.fixture
def net():
    torch.manual_seed(0)
    return SmallNet()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(32, 3, 32, 32, generator=generator)
    return x, torch.randint(10, (32,), generator=generator)


@pytest.fixture(scope="session")
def fitted():
    """A small network that has learned 512 synthetic images by heart, and the images."""
    import data

    images = data.drawn(10, train=512, test=1).train
    x, y = images.as_float(), images.labels
    torch.manual_seed(0)
    model = SmallNet()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for epoch in range(25):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - epoch / 25)
        for part in torch.randperm(len(x)).split(64):
            loss = nn.functional.cross_entropy(model(x[part]), y[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    assert (model(x).argmax(1) == y).float().mean() > 0.8
    return model, x, y


def write_archive(folder, num_classes, train=400, test=40, seed=0):
    """Write random images in the layout of the official python archive; return the root folder."""
    rng = np.random.default_rng(seed)

    def dump(path, n):
        labels = [int(label) for label in rng.integers(num_classes, size=n)]
        record = {"data": rng.integers(256, size=(n, 3072), dtype=np.uint8)}
        record["labels" if num_classes == 10 else "fine_labels"] = labels
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(record, protocol=2))

    if num_classes == 10:
        for part in range(1, 6):
            dump(folder / "cifar-10-batches-py" / f"data_batch_{part}", train // 5)
        dump(folder / "cifar-10-batches-py" / "test_batch", test)
    else:
        dump(folder / "cifar-100-python" / "train", train)
        dump(folder / "cifar-100-python" / "test", test)
    return folder


def label_as_predicted(folder, model):
    """Give the test images of CIFAR-10 the labels that a model predicts, so that most are right."""
    path = folder / "cifar-10-batches-py" / "test_batch"
    record = pickle.loads(path.read_bytes())
    pixels = torch.from_numpy(record["data"]).view(-1, 3, 32, 32)
    with torch.no_grad():
        record["labels"] = model(pixels / 255).argmax(1).tolist()
    path.write_bytes(pickle.dumps(record, protocol=2))


@pytest.fixture
def script(monkeypatch, capsys):
    """Call a script's main through ``options.run``: returns (exit status, stdout, stderr)."""
    import importlib

    import options

    def call(name, *words):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        capsys.readouterr()
        try:
            options.run(importlib.import_module(name).main)
            status = 0
        except SystemExit as error:
            status = error.code or 0
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return call
