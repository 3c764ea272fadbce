"""Thousands of damaged and hostile files: refused in one line, or read as they were; never run."""

import copy
import io
import os
import pickle
import random
import zipfile
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from conftest import SmallNet, write_archive

import checkpoint
import cifar
import data

COUNT = 2000  # of mutated files; a few seconds
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")


def build(name, *, num_classes, width, mean, std):
    """Stand for the networks of ``models``: small, and of the sizes that a file asks for."""
    if name != "SmallNet" or width is not None:
        raise ValueError(f"--model {name}: unknown")
    return SmallNet(num_classes)


def damaged(raw, rng):
    """Return the bytes of a file after one accident."""
    start, other = sorted(rng.randrange(len(raw)) for _ in range(2))
    length = min(rng.choice([1, 4, 64, 4096]), len(raw) - start)
    block, tail = raw[start : start + length], raw[start + length :]
    kind = rng.randrange(7)
    if kind == 0:
        flipped = bytearray(raw)
        for _ in range(rng.choice([1, 1, 3, 30])):
            flipped[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if kind == 1:
        return raw[:start]
    if kind == 6:  # near the end, where the list of members is
        place = len(raw) - rng.randrange(1, 200)
        return raw[:place] + rng.randbytes(rng.choice([1, 4])) + raw[place + 1 :]
    swapped = raw[other : other + length] + raw[start + length : other] + block
    changed = {
        2: rng.randbytes(length) + raw[start:],
        3: bytes(length) + tail,
        4: swapped + raw[other + length :],
        5: block + block + tail,
    }
    return raw[:start] + changed[kind]


def rewritten(raw, rng):
    """Return a zip file with right checksums in which the pickle or a storage is damaged."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(out, "w") as new:
        victim = rng.choice([n for n in old.namelist() if n.endswith(".pkl") or rng.random() < 0.2])
        for name in old.namelist():
            content = old.read(name)
            if name == victim:
                content = damaged(content, rng)
            new.writestr(name, content)
    return out.getvalue()


VALUES = [
    None, True, -1, 0, 10**9, 2**70, 0.5, float("nan"), float("inf"), "", "ema", "a\nb", b"x", (),
    [[]], {}, {1: 2}, ("raw",), torch.zeros(0), torch.zeros(3, dtype=torch.complex64),
    torch.zeros(1).expand(10**5, 10**6), torch.zeros(8, device="meta"), torch.ones(8).to_sparse(),
    torch.full((8,), float("nan")), torch.full((10,), 1e300, dtype=torch.float64), set(),
]  # fmt: skip


def revalued(content, rng):
    """Return a file of a checkpoint in which one value or one weight is another, or not there."""
    content = copy.deepcopy(content)
    place = content["raw"] if rng.random() < 0.5 else content
    key = rng.choice(sorted(place))
    value = rng.choice([*VALUES, VALUES])
    place[key] = value
    if rng.random() < 0.2:
        del place[key]
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


def opened(path):
    """Return facts and weights of a checkpoint, by the way that the scripts go."""
    saved = checkpoint.load(path)
    args = Namespace(transfer_from=None, model=None, width=None, normalize="none")
    statistics = dict(mean=(0.5,) * 3, std=(0.2,) * 3)
    name, network = checkpoint.architecture(saved, path, args, 10, statistics)
    model = checkpoint.build(build, name, network, saved, None, path)
    checkpoint.load_weights(model, saved, None, path)
    facts = {key: value for key, value in saved.items() if key != "raw"}
    return facts, model.state_dict()


def refused(error, path):
    """Return whether an error is one short line that names the file."""
    return str(path) in str(error) and len(str(error).splitlines()) == 1 and len(str(error)) < 900


def test_mutated_checkpoints(tmp_path):
    torch.manual_seed(0)
    path, rng, kept = tmp_path / "model.pth", random.Random(1), 0
    content = dict(schema="mix-kl/1", model="SmallNet", width=None, num_classes=10,
                   mean=(0.5,) * 3, std=(0.2,) * 3, dataset="cifar10", selected="raw",
                   metrics={"clean_acc": 0.5}, raw=SmallNet().state_dict())  # fmt: skip
    torch.save(content, path)
    raw, (facts, state) = path.read_bytes(), opened(path)
    shapes = {key: value.shape for key, value in state.items()}
    for index in range(COUNT):
        kind = ("bytes", "bytes", "zip", "value")[index % 4]
        make = {"bytes": damaged, "zip": rewritten}.get(kind)
        changed = make(raw, rng) if make else revalued(content, rng)
        path.write_bytes(changed)
        try:
            found_facts, found = opened(path)
        except (ValueError, FileNotFoundError) as error:
            assert refused(error, path), (index, error)
            continue
        kept += 1
        assert {key: value.shape for key, value in found.items()} == shapes, index
        assert all(value.isfinite().all() for value in found.values()), index
        if kind == "bytes":
            assert found_facts == facts, index
            assert all(torch.equal(value, state[key]) for key, value in found.items()), index
    assert kept < COUNT / 3  # zip files have padding, and some values are as good as others


def test_mutated_datasets(tmp_path, monkeypatch, capsys):
    archive = data.ARCHIVES["cifar100"]
    write_archive(tmp_path, 100, train=6, test=3)
    folder, rng = tmp_path / archive.folder, random.Random(1)
    md5 = {
        file: cifar.read_batch(folder / file, "fine_labels", 100)[2] for file in ("train", "test")
    }
    signed = replace(archive, train={"train": md5["train"]}, test={"test": md5["test"]})
    monkeypatch.setitem(data.ARCHIVES, "cifar100", signed)
    path, whole = folder / "train", data.read_cifar("cifar100", folder)
    raw, refusals = path.read_bytes(), 0
    assert whole.origin == "official" and not capsys.readouterr().out
    for index in range(COUNT):
        changed = damaged(raw, rng)
        if index % 2:  # the numbers of the images are most of the file; damage what is not
            head = len(raw) - len(raw) // 50 if rng.random() < 0.5 else 0
            changed = raw[:head] + damaged(raw[head : head + 400], rng) + raw[head + 400 :]
        path.write_bytes(changed)
        try:
            found = data.read_cifar("cifar100", folder)
        except ValueError as error:
            assert refused(error, path), (index, error)
            refusals += 1
            continue
        said = capsys.readouterr().out
        same = torch.equal(found.train.pixels, whole.train.pixels)
        assert same or (said.count("\n") == 1 and "(MD5 of train differs)" in said), index
        assert found.origin == ("official" if changed == raw else "unofficial"), index
        assert found.train.pixels.shape[1:] == (32, 32, 3), index
    assert refusals > COUNT / 10


def spliced(raw, payload, rng):
    """Return a pickle with a call at a random place between two of its instructions."""
    import pickletools

    places = [place for _, _, place in pickletools.genops(raw)][1:]
    place = rng.choice(places)
    return raw[:place] + payload + b"0" + raw[place:]


def test_a_call_planted_anywhere_is_refused_and_never_made(tmp_path):
    marker, rng = tmp_path / "owned", random.Random(0)

    class Call:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    payload = pickle.dumps(Call(), protocol=0)[:-1]
    pickle.loads(payload + b".")
    assert marker.exists()  # it works where nobody looks
    marker.rmdir()
    path, batch = tmp_path / "model.pth", tmp_path / "batch"
    torch.save(SmallNet().state_dict(), path)
    write_archive(tmp_path, 100, train=3, test=3)
    images = (tmp_path / "cifar-100-python" / "train").read_bytes()
    zipped = path.read_bytes()
    for _ in range(50):
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(zipped)) as old, zipfile.ZipFile(out, "w") as new:
            for name in old.namelist():
                content = old.read(name)
                if name.endswith(".pkl"):
                    content = spliced(content, payload, rng)
                new.writestr(name, content)
        path.write_bytes(out.getvalue())
        with pytest.raises(ValueError, match="mkdir") as error:
            checkpoint.load(path)
        assert refused(error.value, path)
        batch.write_bytes(spliced(images, payload, rng))
        with pytest.raises(ValueError, match="broken") as error:
            cifar.read_batch(batch, "fine_labels", 100)
        assert refused(error.value, batch)
    assert not marker.exists()
