"""Files that a crash leaves whole."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def of_option(name: str, path: Any, what: str = "read") -> Iterator[None]:
    """Name the option whose file or folder cannot be read or written; the system names the path at most.

    Raises:
        OSError: In place of another one.
    """
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{name}={path} cannot be {what}: {error.strerror or error}; give another path (a relative one begins in "
            f"{os.getcwd()})"
        ) from error


def claim(folder: Path, user: str, patience: int = 0) -> int:
    """Make a folder and lock it, until what is returned is closed; the system does that when a process ends.

    Nothing is left in it. A file system that has no locks for folders, as NFS has none, gives none here.

    Args:
        folder: The folder.
        user: Who else may have it, and what to do then.
        patience: Seconds to wait: what a process that was killed had started ends a little later.

    Raises:
        ValueError: If another process has it.
        OSError: If it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    for left in range(patience, -1, -1):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if not left:
                os.close(lock)
                raise ValueError(f"{folder} is in use: {user}") from error
            time.sleep(1)
        except OSError:
            break
    return lock


def write_json(path: Path, value: Any) -> None:
    """Write JSON as ``write_text`` does."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Write a file so that a crash leaves the old one or the new one, never half of one; a device or pipe stays one.

    Args:
        path: The file.
        text: What will be in it, as UTF-8.
        errors: What becomes of a character that UTF-8 does not have, as ``str.encode`` takes it.
    """
    content = text.encode("utf-8", errors)
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_bytes(content)
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file so that a crash leaves no half of it under its new name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".part")
    shutil.copy(source, partial)
    sync(partial)
    partial.replace(target)
    sync(target.parent)


def read_json(path: Path) -> dict[str, Any]:
    """The mapping that a JSON file holds.

    Raises:
        ValueError: If it is damaged or holds none; names the file.
        OSError: If it cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no mapping")
    return found


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
