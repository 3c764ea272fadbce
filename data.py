"""CIFAR read from its own files, kept on the device as uint8 and augmented there in batches.

Torchvision is imported only to download. ``cifar`` opens the pickles.
"""

import hashlib
import importlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import cifar
import parallel
import synthetic

SIZE = 32  # image side [pixels]


@dataclass(frozen=True)
class Images:
    """Images and labels on one device."""

    pixels: Tensor  # (N, 32, 32, 3) uint8
    labels: Tensor  # (N,) int64

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> "Images":
        """Return some of the images."""
        return Images(self.pixels[index], self.labels[index])

    def first(self, count: int | None, flag: str) -> "Images":
        """Return the first ``count`` images, all where None; ``flag`` is blamed where too few."""
        if count is not None and count > len(self):
            raise ValueError(f"{flag} {count}: there are only {len(self)} images")
        return self[:count]

    def to(self, device: torch.device) -> "Images":
        """Return the same images on another device."""
        return Images(self.pixels.to(device), self.labels.to(device))

    def digest(self) -> str:
        """Return a name for these images and labels: number, and start of the SHA-256."""
        found = hashlib.sha256()
        for tensor in (self.pixels, self.labels):
            found.update(tensor.cpu().contiguous().numpy())
        return f"{len(self):,} images {found.hexdigest()[:12]}"

    def as_float(self) -> Tensor:
        """Return (N, 3, 32, 32) images in [0, 1], channels last in memory."""
        return self.pixels.permute(0, 3, 1, 2) / 255


@dataclass(frozen=True)
class Dataset:
    """A training and a test set, and what is known of their origin."""

    name: str
    classes: tuple[str, ...]  # what the labels mean
    mean: tuple[float, ...]  # per channel, of the training images in [0, 1]
    std: tuple[float, ...]
    train: Images
    test: Images
    origin: str  # "official", "unofficial" or "synthetic"

    def trained_on(self) -> str:
        """Return a name for the training images: their digest and their origin."""
        return f"{self.train.digest()} ({self.origin})"


@dataclass(frozen=True)
class Archive:
    """Where the official python archive of one dataset keeps what."""

    title: str
    folder: str
    label_key: str
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: dict[str, str]  # file -> MD5
    test: dict[str, str]
    names: tuple[str, str]  # file of the names of the classes, and their key in it


ARCHIVES = {
    "cifar10": Archive(
        "CIFAR10", "cifar-10-batches-py", "labels", 10,
        mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616),
        train=dict(
            data_batch_1="c99cafc152244af753f735de768cd75f",
            data_batch_2="d4bba439e000b95fd0a9bffe97cbabec",
            data_batch_3="54ebc095f3ab1f0389bbae665268c751",
            data_batch_4="634d18415352ddfa80567beed471001a",
            data_batch_5="482c414d41f54cd18b22e5b47cb7c3cb",
        ),
        test=dict(test_batch="40351d587109b95175f43aff81a1287e"),
        names=("batches.meta", "label_names"),
    ),
    "cifar100": Archive(
        "CIFAR100", "cifar-100-python", "fine_labels", 100,
        mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762),
        train=dict(train="16019d7e3df5f24257cddd939b257f8d"),
        test=dict(test="f0ef6b0ae62326f3e7ffdfab6717acfc"),
        names=("meta", "fine_label_names"),
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------ reading CIFAR


def read_cifar(name: str, folder: Path) -> Dataset:
    """Read an unpacked python archive, and warn in one line where it is not the official one.

    Args:
        name: A key of ``ARCHIVES``.
        folder: The archive's own folder, with the batches in it.

    Raises:
        ValueError: A file is broken.
    """
    archive = ARCHIVES[name]
    splits, changed = [], []
    for files in (archive.train, archive.test):
        parts = []
        for file, md5 in files.items():
            *part, found = cifar.read_batch(folder / file, archive.label_key, archive.num_classes)
            parts.append(part)
            changed += [file] if found != md5 else []
        pixels, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
        pixels = pixels.reshape(-1, 3, SIZE, SIZE).transpose(0, 2, 3, 1)
        pixels = torch.from_numpy(np.ascontiguousarray(pixels))
        splits.append(Images(pixels, torch.from_numpy(labels)))
    if changed:
        parallel.say(
            f"warning: {folder} is not the official archive "
            f"(MD5 of {', '.join(changed)} differs): using its "
            f"{len(splits[0]):,} training and {len(splits[1]):,} test images"
        )
    origin = "unofficial" if changed else "official"
    return Dataset(name, class_names(archive, folder), archive.mean, archive.std, *splits, origin)


def class_names(archive: Archive, folder: Path) -> tuple[str, ...]:
    """Return what the labels mean; numbered where the archive's file of names is not there."""
    file, key = archive.names
    names = cifar.read_names(folder / file, key)
    numbered = tuple(f"class {i}" for i in range(archive.num_classes))
    return names if len(names) == archive.num_classes else numbered


def missing(archive: Archive, folder: Path) -> list[Path]:
    """Return which files with images are not there."""
    paths = [folder / file for file in (*archive.train, *archive.test)]
    return [path for path in paths if not path.is_file()]


def download(archive: Archive, folder: Path) -> None:
    """Download an archive, once where several processes ask; ``load`` lists what it raises."""
    first = missing(archive, folder)[0]
    try:
        with cifar.locked(folder.parent / f".{archive.folder}.lock"):
            if not missing(archive, folder):  # another process has been here
                return
            parallel.say(f"{first} not found: downloading {archive.title} to {folder.parent}")
            datasets = importlib.import_module("torchvision.datasets")
            getattr(datasets, archive.title)(str(folder.parent), download=True)
    except Exception as error:  # no network, no space, no torchvision: the way out is the same
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise FileNotFoundError(
            f"{first} not found, and the download failed ({reason}); give the folder that holds "
            f"{archive.folder}/ with --data-dir, or use the built-in images with --synthetic"
        ) from error


def load(name: str, num_classes: int, data_dir: Path, use_synthetic: bool) -> Dataset:
    """Return a dataset, downloaded through torchvision (with a progress bar) where missing.

    Args:
        name: A key of ``ARCHIVES``.
        num_classes: Number of classes of the synthetic images.
        data_dir: The folder that holds the archive's folder, or that folder itself.
        use_synthetic: Whether to return the built-in images in its place.

    Raises:
        FileNotFoundError: It is not there and cannot be downloaded.
        ValueError: A file is broken.
    """
    if use_synthetic:
        return drawn(num_classes, train=6000, test=1000)
    archive = ARCHIVES[name]
    inside = data_dir.absolute().name == archive.folder  # also where it is .
    folder = data_dir if inside else data_dir / archive.folder
    if missing(archive, folder):
        download(archive, folder)
    return read_cifar(name, folder)


def drawn(num_classes: int, *, train: int, test: int) -> Dataset:
    """Return the built-in synthetic images."""
    parts = synthetic.draw(num_classes, (train, test))
    splits = [Images(*map(torch.from_numpy, part)) for part in parts]
    names = tuple(f"class {i}" for i in range(num_classes))
    name, half, quarter = f"synthetic{num_classes}", (0.5,) * 3, (0.25,) * 3
    return Dataset(name, names, half, quarter, *splits, "synthetic")


# ------------------------------------------------------------------------------------------ batches


def split_held_out(images: Images, count: int) -> tuple[Images, Images]:
    """Return the images without ``count`` of them, and those; the choice is always the same."""
    if count >= len(images):
        raise ValueError(f"--held-out {count}: there are only {len(images)} training images")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    order = order.to(images.labels.device)
    return images[order[count:]], images[order[:count]]


def not_trained_on(dataset: Dataset, split: dict[str, object] | None, path: Path) -> Images:
    """Return the training images that a network never saw, those that chose nothing first.

    Args:
        dataset: What it was trained on.
        split: How its run shared them, as ``checkpoint.split`` says.
        path: Its file, for messages.

    Returns:
        The images that ``--train-images`` left out, then the held-out ones.

    Raises:
        ValueError: The file does not say, or names other images.
    """
    if split is None:
        raise ValueError(f"--held-out: {path} does not say which images it was trained on")
    here = {"dataset": dataset.name, "images": dataset.trained_on()}
    for key, found in here.items():
        if split[key] not in (None, found):
            raise ValueError(
                f"--held-out: {path} was trained on {split[key]}, not on {found}; see --data-dir"
            )
    train, held_out = split_held_out(dataset.train, split["held_out"])
    left_out = train[split["train_images"] or len(train) :]
    pixels = torch.cat([left_out.pixels, held_out.pixels])
    return Images(pixels, torch.cat([left_out.labels, held_out.labels]))


class TrainingBatches:
    """Shuffled batches of augmented images, gathered on the device.

    The padded uint8 images lie there twice, as they are and flipped. ``windows`` views each pixel
    as the corner of an image, so that crop and flip are only an index, and a batch copies whole
    rows. The last incomplete batch is dropped: batch norm never sees a few images.
    """

    def __init__(self, images: Images, batch_size: int, padding: int = 4) -> None:
        """Pad the images once; raise a ValueError where they do not fill one batch.

        ``padding`` is the width of the black border that crops may reach into, in pixels.
        """
        if len(images) < batch_size:
            raise ValueError(f"--batch-size {batch_size}: there are only {len(images)} images")
        self.padding, self.wide = padding, SIZE + 2 * padding
        padded = F.pad(images.pixels, (0, 0, *4 * [padding]))
        both = torch.stack([padded, padded.flip(2)])
        corners = both.numel() // 3 - (SIZE - 1) * (self.wide + 1)  # the last has a whole image
        self.windows = both.as_strided((corners, SIZE, 3 * SIZE), (3, 3 * self.wide, 1))
        self.labels = images.labels
        self.batch_size = batch_size

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return len(self.labels) // self.batch_size

    def shuffled(self, rng: np.random.Generator) -> Tensor:
        """Return the (batches, B) indices of an epoch; each image comes at most once."""
        order = torch.from_numpy(rng.permutation(len(self.labels)))
        order = order[: len(self) * self.batch_size].view(len(self), self.batch_size)
        return order.to(self.labels.device)

    def load(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, 3, 32, 32) images in [0, 1], cropped and flipped, and (B,) labels."""
        count, device = len(index), index.device
        top, left = torch.randint(2 * self.padding + 1, (2, count), device=device)
        flip = torch.rand(count, device=device) < 0.5
        left = torch.where(flip, 2 * self.padding - left, left)
        image = index + len(self.labels) * flip
        pixels = self.windows.index_select(0, (image * self.wide + top) * self.wide + left)
        return pixels.view(count, SIZE, SIZE, 3).permute(0, 3, 1, 2) / 255, self.labels[index]
