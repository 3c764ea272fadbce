"""Files that are written whole or not at all, whatever happens meanwhile."""

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO


def previous(path: Path) -> Path:
    """Return where ``write`` keeps what a file held before."""
    return path.with_name(path.name + ".prev")


def write(path: Path, fill: Callable[[BinaryIO], None], *, keep_previous: bool = False) -> None:
    """Write a file beside ``path``, flush it to the disk, then give it the name.

    A reader sees the old content or the new one; a kill or a full disk leaves the old one.

    Args:
        path: The file; replaced where it exists.
        fill: Writes the content to an open file.
        keep_previous: Whether what ``path`` held stays, as ``previous(path)``.

    Raises:
        OSError: It could not be written; ``path`` holds what it held.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        if keep_previous and path.exists():
            os.replace(path, previous(path))
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as the latter
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise OSError(
            f"{path}: cannot be written ({reason}); what it held is still there"
        ) from error
    _flush_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write(path, lambda file: file.write(text.encode()))


def probe(folder: Path, flag: str = "--out-dir") -> None:
    """Create the folder that a flag names where it is missing, and see whether it can be written.

    Raises:
        OSError: They cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\n")
    except OSError as error:
        raise OSError(
            f"{folder}: cannot be written ({error.strerror}); choose another {flag}"
        ) from error


def _flush_folder(folder: Path) -> None:
    """Make the new name survive a power cut, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
