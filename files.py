"""Files that are written whole or not at all, whatever happens meanwhile; a lock on one."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
        OSError: It could not be written; what ``path`` held is there, or in ``previous(path)``.
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
        where = "still there" if path.exists() else f"in {previous(path).name}"
        held = f"; what it held is {where}" if path.exists() or previous(path).exists() else ""
        raise OSError(f"{path}: cannot be written ({reason}){held}") from error
    _flush_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write(path, lambda file: file.write(text.encode()))


@contextmanager
def held(path: Path, busy: str) -> Iterator[None]:
    """Let one process at a time into the block, and remove the file with its lock behind it.

    The lock ends with the process, however that ends. Windows and some file systems have none: the
    block is entered all the same.

    Raises:
        ValueError: Another process is in there; ``busy`` is the message.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except (BlockingIOError, FileNotFoundError):  # the other one has just removed its file
            free = False
        except OSError:
            free = True
        if not free:
            raise ValueError(busy)
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()


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
