"""Files from elsewhere, opened so that nothing in them is executed and memory stays bounded."""

import hashlib
import pickletools
import warnings
import zipfile
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

ZIP = b"PK\x03\x04"  # how files of torch.save begin
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # and those from before torch 1.6
END = b"PK\x05\x06"  # the last record of a zip file, 22 bytes where it bears no comment
TYPES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
GLOBALS = {f"torch{device} {name}Storage" for name in TYPES for device in ("", ".cuda")} | {
    "collections OrderedDict", "torch Size", "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2",
}  # fmt: skip


def brief(value: object) -> str:
    """Return at most 120 characters of an error or of a name from a file, on one line."""
    text = str(value) or type(value).__name__
    return " ".join(text[:1000].split())[:120]


def disguise(head: bytes) -> str:
    """Return what a file is where its first bytes (64 or more) give it away, else nothing."""
    text = head.lstrip().lower()
    if not head:
        return "empty (0 bytes); copy or download it again"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "this is an HTML page; download it again"
    if text.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer; run git lfs pull"
    return ""


def digest(path: Path, kind: str) -> str:
    """Return the hash of a file, such as its ``md5`` or ``sha256``, read a block at a time."""
    found = hashlib.new(kind)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def scan(file: BinaryIO, allowed: set[str] | None = None) -> None:
    """Read one pickle without running it; the file is left behind it.

    Args:
        file: At the start of the pickle.
        allowed: Its globals, as ``module name``; None leaves them to the unpickler.

    Raises:
        ValueError: It is broken, asks for another global, or numbers its memo so that an unpickler
            would reserve far more memory than the file is long.
    """
    for count, (code, value, _) in enumerate(pickletools.genops(file)):
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and value > count:
            raise ValueError("its memo is not numbered in order")
        if allowed is None:
            continue
        if code.name in ("GLOBAL", "INST") and value not in allowed:
            raise ValueError(f"it asks for {value.replace(' ', '.')}, which no checkpoint needs")
        if code.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            raise ValueError(f"it uses {code.name}, which torch.save does not write")


def scan_zip(file: BinaryIO, size: int) -> None:
    """Refuse a zip file that torch.save did not write, or that is damaged.

    Args:
        file: At its start.
        size: Of the file [bytes].

    Raises:
        ValueError: Members are compressed, overlap, have equal names or wrong checksums, or the
            pickle among them does not pass ``scan``.
    """
    file.seek(max(0, size - 22))
    if file.read(4) != END:
        raise ValueError("truncated: its list of members is not at its end")
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(m.compress_type != zipfile.ZIP_STORED or m.flag_bits & 1 for m in members):
            raise ValueError("compressed, as torch.save never writes it")
        if sum(max(m.file_size, m.compress_size) for m in members) > size:
            raise ValueError("its members are longer than the file")
        if len({m.filename.lower() for m in members}) < len(members):
            raise ValueError("two members have the same name")
        stored = [m.filename.split("/", 2)[2] for m in members if "/data/" in m.filename]
        if not all(name.isascii() and name.isdigit() for name in stored):
            raise ValueError("its storages are not numbered")  # torch finds others in any case
        damaged = archive.testzip()
        if damaged:
            raise ValueError(f"damaged, its checksums do not agree ({brief(damaged)})")
        pickles = [m for m in members if m.filename.endswith(".pkl")]
        if len(pickles) != 1 or pickles[0].filename.count("/") != 1:
            raise ValueError("it does not hold one data.pkl, as torch.save writes it")
        with archive.open(pickles[0]) as opened:
            scan(opened, GLOBALS)


def read(path: Path) -> object:
    """Return what ``torch.save`` wrote, from a file that nobody vouches for.

    The globals of its pickle are compared with a short list before ``torch.load`` (always with
    ``weights_only``) sees the file; storages may not be longer than the file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not such a file; the message says in one line what it is instead.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir():
        raise ValueError(f"{path}: a folder; name a file in it")
    if not path.is_file():
        raise ValueError(f"{path}: a device or a pipe; name an ordinary file")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
        if disguise(head):
            raise ValueError(f"{path}: not a checkpoint: {disguise(head)}")
        if not head.startswith((ZIP, LEGACY)):
            kind = "text" if head.isascii() and b"\0" not in head else "something else"
            raise ValueError(f"{path}: not a whole checkpoint: {kind} ({size:,} bytes)")
        file.seek(0)
        try:
            if head.startswith(ZIP):
                scan_zip(file, size)
            else:
                for _ in range(5):  # magic number, protocol, machine, content, keys of storages
                    scan(file, GLOBALS)
            file.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can raise anything
            before = path.with_name(path.name + ".prev")
            hint = f"; try {before}" if before.is_file() else "; copy or download it again"
            raise ValueError(
                f"{path}: not a whole checkpoint ({size:,} bytes): {brief(error)}{hint}"
            ) from error


def tensors(state: object, limit: int) -> dict[str, Tensor]:
    """Return a state dict that is safe to compute with, as a plain dict.

    Args:
        state: What a file holds in the place of one.
        limit: What their storages may take; copies of tensors that share one, twice that [bytes].

    Raises:
        ValueError: It is none, or a tensor is sparse, complex, without storage or longer than it.
    """
    if not isinstance(state, dict) or not state:
        raise ValueError("not a dict of tensors")
    state = dict(dict.items(state))  # an OrderedDict from a file may shadow its own methods
    storages, total = {}, 0
    for key, value in state.items():
        if type(key) is not str or not isinstance(value, Tensor):
            raise ValueError(f"not a dict of tensors ({brief(repr(key))})")
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise ValueError(f"{brief(key)} is not an ordinary tensor")
        if value.dtype.is_complex:
            raise ValueError(f"{brief(key)} holds {value.dtype}")
        storage = value.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        total += value.numel() * value.element_size()
        if value.numel() * value.element_size() > storage.nbytes() or total > 2 * limit:
            raise ValueError(f"{brief(key)} claims more numbers than the file holds")
    if sum(storages.values()) > limit:
        raise ValueError("it claims more numbers than the file holds")
    return {key: value.detach() for key, value in state.items()}
