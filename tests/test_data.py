"""CIFAR files: what is read, warned of and refused; augmentation; the synthetic images."""

import hashlib
import io
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PEAK, ROOT, write_archive

import cifar
import data


def test_both_datasets_are_read_as_they_were_written(tmp_path, monkeypatch):
    for name, folder, num_classes in (
        ("cifar10", "cifar-10-batches-py", 10),
        ("cifar100", "cifar-100-python", 100),
    ):
        write_archive(tmp_path, num_classes)
        dataset = data.load(name, num_classes, tmp_path, False)
        assert (len(dataset.train), len(dataset.test), len(dataset.classes)) == (
            400,
            40,
            num_classes,
        )
        file = {"cifar10": "test_batch", "cifar100": "test"}[name]
        record = pickle.loads((tmp_path / folder / file).read_bytes())
        pixels = record["data"].reshape(40, 3, 32, 32)
        assert torch.equal(dataset.test.as_float(), torch.from_numpy(pixels) / 255)
        assert (
            dataset.test.labels.tolist() == record["labels" if num_classes == 10 else "fine_labels"]
        )
        inner = data.load(name, num_classes, tmp_path / folder, False)  # the inner folder will do
        assert torch.equal(inner.train.pixels, dataset.train.pixels)
        monkeypatch.chdir(tmp_path / folder)
        inner = data.load(name, num_classes, Path(), False)
        assert torch.equal(inner.train.pixels, dataset.train.pixels)


def test_official_files_say_nothing_and_others_one_line_with_the_counts(
    tmp_path, capsys, monkeypatch
):
    write_archive(tmp_path, 100)
    assert data.load("cifar100", 100, tmp_path, False).origin == "unofficial"
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning:") and "400 training and 40 test images" in line
    assert "(MD5 of train, test differs)" in line
    archive = data.ARCHIVES["cifar100"]
    folder = tmp_path / archive.folder
    md5 = {f: hashlib.md5((folder / f).read_bytes()).hexdigest() for f in ("train", "test")}
    signed = replace(archive, train={"train": md5["train"]}, test={"test": md5["test"]})
    monkeypatch.setitem(data.ARCHIVES, "cifar100", signed)
    assert data.load("cifar100", 100, tmp_path, False).origin == "official"
    assert capsys.readouterr().out == ""


def test_images_are_normalised_by_the_moments_of_the_data():
    """As measured on all training images; test_real measures them again."""
    assert data.ARCHIVES["cifar10"].mean == (0.4914, 0.4822, 0.4465)
    assert data.ARCHIVES["cifar10"].std == (0.2470, 0.2435, 0.2616)
    assert data.ARCHIVES["cifar100"].mean == (0.5071, 0.4865, 0.4409)
    assert data.ARCHIVES["cifar100"].std == (0.2673, 0.2564, 0.2762)


@pytest.mark.parametrize("name, folder, file, key, count", [
    ("cifar10", "cifar-10-batches-py", "batches.meta", "label_names", 10),
    ("cifar100", "cifar-100-python", "meta", "fine_label_names", 100),
])  # fmt: skip
def test_classes_have_their_names(tmp_path, name, folder, file, key, count):
    write_archive(tmp_path, count)
    names = [f"name {number}" for number in range(count)]
    (tmp_path / folder / file).write_bytes(pickle.dumps({key: names}, protocol=2))
    assert data.load(name, count, tmp_path, False).classes == tuple(names)


def test_the_md5_sums_are_those_of_torchvision():
    datasets = pytest.importorskip("torchvision.datasets")
    for archive in data.ARCHIVES.values():
        theirs = getattr(datasets, archive.title)
        assert archive.folder == theirs.base_folder
        assert list(archive.train.items()) == [tuple(pair) for pair in theirs.train_list]
        assert list(archive.test.items()) == [tuple(pair) for pair in theirs.test_list]


def record(**changes):
    good = {"data": np.zeros((4, 3072), np.uint8), "labels": [0, 1, 2, 9]}
    return pickle.dumps(good | changes, protocol=2)


BROKEN = {
    "truncated": record()[:-100],
    "empty": b"",
    "html": b"<!DOCTYPE html><html>quota exceeded</html>",
    "no labels": pickle.dumps({"data": np.zeros((4, 3072), np.uint8)}, protocol=2),
    "a list": pickle.dumps([1, 2], protocol=2),
    "float images": record(data=np.zeros((4, 3072))),
    "wrong shape": record(data=np.zeros((4, 1024), np.uint8)),
    "images as a list": record(data=[[0] * 3072] * 4),
    "too few labels": record(labels=[0, 1, 2]),
    "no images": record(data=np.zeros((0, 3072), np.uint8), labels=[]),
    "label too large": record(labels=[0, 1, 2, 10]),
    "negative label": record(labels=[0, 1, 2, -1]),
    "labels of text": record(labels=["a", "b", "c", "d"]),
    "fractional labels": record(labels=[0.5, 1.0, 2.0, 3.0]),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_file_is_refused_by_name_in_one_line(tmp_path, script, fault):
    write_archive(tmp_path, 10)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(BROKEN[fault])
    status, _, err = script("MIX_KL_CIFAR10", "--data-dir", tmp_path, "--out_dir", tmp_path / "o")
    assert status == 2 and len(err.splitlines()) == 1
    assert err.startswith("error:") and str(path) in err and "broken" in err
    assert not (tmp_path / "o").exists()


def test_a_malicious_file_is_refused_and_not_executed(tmp_path):
    import os

    target = tmp_path / "owned"

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(target),)

    path = tmp_path / "batch"
    path.write_bytes(record(labels=Malicious()))
    pickle.loads(path.read_bytes())  # an ordinary unpickler falls for it
    assert target.exists()
    target.rmdir()
    with pytest.raises(ValueError, match=r"asks for (posix|nt)\.mkdir"):
        cifar.read_batch(path, "labels", 10)
    assert not target.exists()


class Sub(np.ndarray):
    pass


def claim(shape, kind="u1"):
    """Pickle a record whose images claim another shape or type than their bytes have."""
    good = record()
    assert b"K\x04M\x00\x0c\x86" in good and b"u1" in good
    numbers = b"".join(b"\x8a\x08" + number.to_bytes(8, "little") for number in shape)
    changed = good.replace(b"K\x04M\x00\x0c\x86", numbers + b"\x86")
    return changed.replace(b"u1", kind.encode())


HOSTILE = {
    "objects": record(data=np.zeros((4, 3072), object)),
    "object dtype": claim((4, 3072), "O8"),
    "huge": claim((10**12, 3072)),
    "overflowing": claim((2**62, 3072)),
    "subclass": record(data=np.zeros((4, 3072), np.uint8).view(Sub)),
    "big endian": record(labels=np.zeros(4, ">i8")),
    "labels nested": record(labels=[[0], [1], [2], [9]]),
    "labels huge": record(labels=[2**70] * 4),
    "labels true": record(labels=[True] * 4),
    "memo": b"\x80\x02}r\xff\xff\xff\x7f.",  # 16 GB of an unpickler's memory
    "the same text": b"\x80\x02c_codecs\nencode\nq\x00X\xe8\x03\x00\x00" + b"a" * 1000
    + b"q\x010" + b"h\x00h\x01\x85R" * 1000 + b".",
    "git lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
}  # fmt: skip


@pytest.mark.parametrize("fault", HOSTILE)
def test_hostile_files_are_refused_in_one_line(tmp_path, fault):
    path = tmp_path / "batch"
    path.write_bytes(HOSTILE[fault])
    with pytest.raises(ValueError, match="broken") as error:
        cifar.read_batch(path, "labels", 10)
    assert str(error.value).startswith(str(path)) and len(str(error.value).splitlines()) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_hostile_files_take_no_memory(tmp_path):
    for fault, raw in HOSTILE.items():
        (tmp_path / fault).write_bytes(raw)
    code = (
        PEAK
        + """
import contextlib, pathlib, sys
sys.path.insert(0, sys.argv[1])
import cifar
before = peak()
for path in pathlib.Path(sys.argv[2]).iterdir():
    with contextlib.suppress(ValueError):
        cifar.read_batch(path, "labels", 10)
print((peak() - before) / 2**20)
"""
    )
    command = [sys.executable, "-c", code, str(ROOT), str(tmp_path)]
    assert float(subprocess.run(command, capture_output=True, check=True).stdout) < 16  # MB


def large(spelling):
    """Pickle 10,000 images with one wrong label, as Python 2 or as a protocol of ours does."""
    pixels = np.random.default_rng(0).integers(256, size=(10_000, 3072), dtype=np.uint8)
    labels = [0] * 9_999 + [10]
    if spelling != "python 2":
        return pickle.dumps({"data": pixels, "labels": labels}, protocol=spelling)
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
    array += b"M\x10'M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN"
    array += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + pixels.nbytes.to_bytes(4, "little")
    array += pixels.tobytes() + b"tb"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + pickle.dumps(labels, 2)[2:-1] + b"u."


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("spelling", ["python 2", 2, 4])
def test_a_large_hostile_file_takes_at_most_twice_its_size(tmp_path, spelling):
    path = tmp_path / "batch"
    path.write_bytes(large(spelling))
    code = (
        PEAK
        + """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
import cifar, utils
utils.keep_freed_memory()
before = peak()
try:
    cifar.read_batch(pathlib.Path(sys.argv[2]), "labels", 10)
except ValueError as error:
    print(peak() - before, error)
"""
    )
    command = [sys.executable, "-c", code, str(ROOT), str(path)]
    shown = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    taken, message = shown.split(maxsplit=1)
    assert "a label is outside 0 to 9" in message
    assert int(taken) <= 2 * path.stat().st_size + 2**22


def test_two_processes_download_once(tmp_path):
    code = """
import sys, time, types, pathlib
sys.path[:0] = sys.argv[1:3]
import data
from conftest import ROOT, write_archive
folder = pathlib.Path(sys.argv[3])
def cifar10(root, download):
    with (folder / "downloads").open("a") as file:
        file.write("x")
    time.sleep(1)
    write_archive(folder, 10)
sys.modules["torchvision.datasets"] = types.SimpleNamespace(CIFAR10=cifar10)
print(len(data.load("cifar10", 10, folder, False).train))
"""
    command = [sys.executable, "-c", code, str(ROOT), str(ROOT / "tests"), str(tmp_path)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert all(process.communicate()[0].split()[-1] == "400" for process in started)
    assert (tmp_path / "downloads").read_text() == "x"


@pytest.mark.parametrize("module, name", [
    ("builtins", "eval"), ("os", "system"), ("numpy", "load"), ("numpy", "fromfile"),
    ("numpy.core.multiarray", "fromfile"), ("_codecs", "decode"), ("numpy", "dtype.__reduce__"),
])  # fmt: skip
def test_the_unpickler_knows_nothing_but_arrays(module, name):
    with pytest.raises(pickle.UnpicklingError, match="no CIFAR file holds"):
        cifar.CifarUnpickler(io.BytesIO(b"N.")).find_class(module, name)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_arrays_of_every_pickle_protocol_are_read(tmp_path, protocol):
    good = {"data": np.full((2, 3072), 7, np.uint8), "labels": [3, 4]}
    (tmp_path / "batch").write_bytes(pickle.dumps(good, protocol=protocol))
    pixels, labels, _ = cifar.read_batch(tmp_path / "batch", "labels", 10)
    assert (pixels == 7).all() and labels.tolist() == [3, 4]


def test_a_failed_download_names_the_file_and_both_ways_out(tmp_path, script, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")

    def offline(root, download):
        assert (root, download) == (str(tmp_path), True)
        raise OSError("Name or service not known")

    monkeypatch.setattr(datasets, "CIFAR10", offline)
    status, _, err = script("test_cifar10", "--model_path", checkpoint_in(tmp_path), "--data-dir",
                            tmp_path)  # fmt: skip
    assert status == 2 and len(err.splitlines()) == 1
    missing = tmp_path / "cifar-10-batches-py" / "data_batch_1"
    assert str(missing) in err and "Name or service not known" in err
    assert "--data-dir" in err and "--synthetic" in err


def test_a_successful_download_is_used(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    monkeypatch.setattr(datasets, "CIFAR10", lambda root, download: write_archive(tmp_path, 10))
    assert len(data.load("cifar10", 10, tmp_path, False).train) == 400


def checkpoint_in(folder):
    import checkpoint
    from models import build_model

    content = dict(model="ResNet18", width=8, num_classes=10, mean=(0.5,) * 3, std=(0.2,) * 3)
    state = build_model("ResNet18", num_classes=10, width=8).state_dict()
    path = folder / "model.pth"
    checkpoint.save(path, content | dict(dataset="cifar10", raw=state, selected="raw"))
    return path


@pytest.mark.parametrize("padding", [0, 2, 4])
def test_crop_and_flip_are_those_of_an_image_at_a_time(padding):
    """Every augmented image is the padded original at one of its corners, flipped or not."""
    reach = 2 * padding + 1
    torch.manual_seed(0)
    pixels = torch.randint(256, (64, 32, 32, 3), dtype=torch.uint8)
    batches = data.TrainingBatches(data.Images(pixels, torch.arange(64)), 16, padding)
    padded = np.pad(pixels.numpy(), ((0, 0), *2 * [(padding, padding)], (0, 0)))
    corners, flips = [], []
    for x, y in map(batches.load, batches.shuffled(np.random.default_rng(0))):
        assert x.is_contiguous(memory_format=torch.channels_last) and x.dtype == torch.float32
        for image, label in zip(
            (x * 255).round().byte().permute(0, 2, 3, 1).numpy(), y, strict=True
        ):
            found = [
                (top, left, flip)
                for top in range(reach) for left in range(reach) for flip in (False, True)
                if (padded[label, top:top + 32, left:left + 32][:, :: 1 - 2 * flip] == image).all()
            ]  # fmt: skip
            assert len(found) == 1
            corners.append(found[0][:2])
            flips.append(found[0][2])
    assert 20 <= sum(flips) <= 44 and len(set(corners)) > reach**2 / 3
    assert {c for corner in corners for c in corner} == set(range(reach))


def test_every_corner_is_drawn_with_and_without_flip_and_no_other_memory_is_read():
    pixels = torch.randint(256, (2, 32, 32, 3), generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(torch.uint8)
    padded = np.pad(pixels[1].numpy(), ((4, 4), (4, 4), (0, 0)))
    views = [padded[i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
    expected = {view.tobytes() for view in views} | {view[:, ::-1].tobytes() for view in views}
    batches = data.TrainingBatches(data.Images(pixels, torch.arange(2)), 2)
    torch.manual_seed(0)
    x, y = batches.load(torch.ones(3000, dtype=torch.int64))
    images = (x * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert {image.tobytes() for image in images} == expected and len(expected) == 162
    assert (y == 1).all()


def test_an_epoch_sees_every_image_once_in_a_new_order():
    images = data.Images(torch.zeros(50, 32, 32, 3, dtype=torch.uint8), torch.arange(50))
    batches = data.TrainingBatches(images, 16)
    first, again, other = (
        batches.shuffled(np.random.default_rng([0, epoch])).flatten().tolist()
        for epoch in (1, 1, 2)
    )
    assert len(batches) == 3 and len(set(first)) == len(set(other)) == 48
    assert first == again != other
    with pytest.raises(ValueError, match="--batch-size 64: there are only 50"):
        data.TrainingBatches(images, 64)


def test_held_out_images_are_apart_always_the_same_and_leave_the_generator_alone():
    images = data.Images(torch.zeros(50, 1, 1, 1, dtype=torch.uint8), torch.arange(50))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    train, held_out = data.split_held_out(images, 10)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = data.split_held_out(images, 10)[1]
    assert torch.equal(held_out.labels, again.labels)
    assert sorted(train.labels.tolist() + held_out.labels.tolist()) == list(range(50))
    with pytest.raises(ValueError, match="--held-out 50: there are only 50"):
        data.split_held_out(images, 50)
    with pytest.raises(ValueError, match="--n-examples 51: there are only 50"):
        images.first(51, "--n-examples")


@pytest.mark.parametrize("train_images", [None, 25, 38])
def test_the_images_a_run_left_alone_are_all_but_those_it_trained_on(train_images):
    dataset = data.drawn(10, train=50, test=10)
    train, held_out = data.split_held_out(dataset.train, 12)
    train = train.first(train_images, "--train-images")
    split = dict(dataset=dataset.name, images=None, held_out=12, train_images=train_images)
    left = data.not_trained_on(dataset, split, "run.pth")
    assert len(left) == 50 - len(train)
    assert torch.equal(left[-12:].pixels, held_out.pixels)  # which chose the best epoch: last
    assert torch.equal(left[-12:].labels, held_out.labels)
    trained, known = ({image.numpy().tobytes() for image in part.pixels} for part in (train, left))
    assert not trained & known
    assert trained | known == {image.numpy().tobytes() for image in dataset.train.pixels}


def test_images_of_which_a_checkpoint_says_something_else_are_not_called_held_out():
    dataset = data.drawn(10, train=50, test=10)
    images = f"{dataset.train.digest()} (synthetic)"
    split = dict(dataset="synthetic10", images=images, held_out=12, train_images=None)
    assert len(data.not_trained_on(dataset, split, "run.pth")) == 12
    for wrong, why in (
        (None, "run.pth does not say which images"),
        (split | dict(dataset="cifar10"), "run.pth was trained on cifar10, not on synthetic10"),
        (split | dict(images="50 images ab (official)"), "was trained on 50 images ab .official."),
    ):
        with pytest.raises(ValueError, match=why):
            data.not_trained_on(dataset, wrong, "run.pth")


@pytest.mark.parametrize("num_classes", [10, 100])
def test_synthetic_images_are_deterministic_and_balanced(num_classes):
    torch.manual_seed(0)
    np.random.seed(0)
    first = data.load("cifar10", num_classes, None, True)
    second = data.drawn(num_classes, train=6000, test=1000)
    assert torch.equal(first.train.pixels, second.train.pixels)
    assert torch.equal(first.test.labels, second.test.labels)
    assert first.train.pixels.shape == (6000, 32, 32, 3) and first.origin == "synthetic"
    counts = first.train.labels.bincount(minlength=num_classes)
    assert counts.min() > 0.5 * 6000 / num_classes
    assert 15 < first.train.pixels.float().std() < 40  # some contrast, and hardly any clipping
    assert ((first.train.pixels == 0) | (first.train.pixels == 255)).float().mean() < 0.001


def test_a_digest_names_pixels_and_labels_wherever_they_lie():
    pixels, labels = torch.arange(2 * 32 * 32 * 3).view(2, 32, 32, 3).byte(), torch.arange(2)
    name = data.Images(pixels, labels).digest()
    assert re.fullmatch("2 images [0-9a-f]{12}", name)
    moved = pixels.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert data.Images(moved, labels).digest() == name
    assert data.Images(pixels ^ 1, labels).digest() != name
    assert data.Images(pixels, labels + 1).digest() != name
