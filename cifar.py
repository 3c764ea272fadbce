"""The batch files of CIFAR's python archives, read without executing anything in them."""

import contextlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

import reading

DTYPES = {"u1": np.uint8, "i4": np.int32, "i8": np.int64}


def text(value: object) -> object:
    """Return the text that Python 2 wrote as bytes; anything else as it is."""
    return value.decode("latin1") if isinstance(value, bytes) else value


class Kind:
    """Stands for a numpy dtype in a pickle: its name and byte order."""

    def __init__(self, name: str, *_: object) -> None:
        """Take what a pickle passes to ``numpy.dtype``."""
        self.name, self.order = text(name), "|"

    def __setstate__(self, state: tuple) -> None:
        """Take version and byte order; nothing else means anything for whole numbers."""
        self.order = text(state[1])


class Array:
    """Stands for a numpy array in a pickle, so that only its bytes take memory."""

    def __init__(self, *_: object) -> None:
        """Take what a pickle passes to numpy's ``_reconstruct``; it is always the same."""
        self.state = ()

    def __setstate__(self, state: tuple) -> None:
        """Take version, shape, dtype, order and bytes."""
        self.state = state

    def value(self) -> np.ndarray:
        """Return the array; an Exception of any class where bytes and claims do not agree."""
        _, shape, kind, fortran, raw = self.state
        if kind.order not in ("|", "<") or kind.name not in DTYPES or not isinstance(raw, bytes):
            raise ValueError(f"an array of {reading.brief(kind.name)}")
        return np.frombuffer(raw, DTYPES[kind.name]).reshape(shape, order="F" if fortran else "C")


class CifarUnpickler(pickle.Unpickler):
    """An unpickler that builds plain containers and stand-ins for arrays, and refuses the rest."""

    MODULES = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")

    def __init__(self, file: BinaryIO) -> None:
        """Take an open file; a ValueError where ``reading.scan`` finds it hostile."""
        self.left = file.seek(0, os.SEEK_END)  # characters that may become bytes
        file.seek(0)
        reading.scan(file)
        file.seek(0)
        super().__init__(file, encoding="bytes")  # what Python 2 wrote; text would be a copy more
        self.allowed = {"ndarray": "ndarray", "dtype": Kind, "_reconstruct": Array}

    def find_class(self, module: str, name: str) -> object:
        """Return what stands for the numpy constructor that the file names."""
        if module in self.MODULES and name in self.allowed:
            return self.allowed[name]
        if (module, name) == ("_codecs", "encode"):
            return self.encode
        wanted = reading.brief(f"{module}.{name}")
        raise pickle.UnpicklingError(f"it asks for {wanted}, which no CIFAR file holds")

    def encode(self, text: str, _: str = "latin1") -> bytes:
        """Return the bytes that protocol 2 spells as text, not more than the file is long."""
        self.left -= len(text)
        if self.left < 0:
            raise pickle.UnpicklingError("it holds the same text many times")
        return text.encode("latin1")


def opened(path: Path) -> dict[object, object]:
    """Return the dict that the pickle in a file holds, with stand-ins for its arrays."""
    with path.open("rb") as file:
        return {text(key): value for key, value in CifarUnpickler(file).load().items()}


def read_batch(path: Path, label_key: str, num_classes: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Return the (N, 3072) uint8 images and (N,) int64 labels of one file, and its MD5.

    Raises:
        ValueError: The file is not such a pickle, or shapes or labels are wrong; it is named.
    """
    with path.open("rb") as file:
        disguise = reading.disguise(file.read(64))
    if disguise:
        raise ValueError(f"{path}: broken: {disguise}")
    try:
        record = opened(path)
        data, labels = record["data"], record[label_key]
        data = data.value() if isinstance(data, Array) else None
        if isinstance(labels, Array):
            labels = labels.value()
        elif type(labels) is list and all(type(label) is int for label in labels):
            labels = np.array(labels, np.int64)
        else:
            raise ValueError("labels are not whole numbers")
    except Exception as error:  # a broken pickle can raise anything
        reason = reading.brief(f"{type(error).__name__}: {error}")
        size = f"{path.stat().st_size:,} bytes"
        raise ValueError(
            f"{path}: broken, truncated or not a CIFAR file ({size}; {reason}); download it again"
        ) from error
    if data is None or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise ValueError(f"{path}: broken, its images are not an (N, 3072) array of uint8")
    if labels.shape != data.shape[:1] or labels.dtype.kind != "i" or not len(labels):
        raise ValueError(f"{path}: broken, {len(data)} images but labels of shape {labels.shape}")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"{path}: broken, a label is outside 0 to {num_classes - 1}")
    return data, labels.astype(np.int64), reading.digest(path, "md5")


def read_names(path: Path, key: str) -> tuple[str, ...]:
    """Return what the labels mean; nothing where the file of names is missing or broken."""
    try:
        names = [text(name) for name in opened(path)[key]]
    except Exception:  # names decorate pictures; nothing depends on them
        return ()
    sound = all(type(name) is str and name.isprintable() for name in names)
    return tuple(name[:40] for name in names) if sound else ()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process of this machine at a time into the block; the others wait.

    The lock is on the open file: it ends with the process, however that ends. A system without
    ``fcntl`` (Windows) has that of ``msvcrt``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        try:
            import fcntl
        except ImportError:
            import msvcrt

            file.seek(0)
            while True:
                with contextlib.suppress(OSError):  # it gives up after ten seconds
                    msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
                    break
        else:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
