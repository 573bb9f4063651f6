"""An export's folder: built beside its place, and put there in one step."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..files import claim, of_option, read_json, sync, write_json

RECORD = "export.json"
"""What every export holds, and what tells one from any other folder."""


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A folder to build in, which takes the place of ``target`` if the block ends well.

    It is ``.NAME.part`` beside the target. Everything is on the disk before the exchange, which is one step of the file
    system: a process that is killed at any moment leaves the older export whole, or the new one. What it left
    half-built is removed by the next export to the same target.

    Args:
        target: Where the export goes: unused, or an older export and nothing else.

    Raises:
        ValueError: If it holds anything else, someone else is exporting to it, or the file system cannot exchange
            folders.
        OSError: If it cannot be written.
    """
    target = target.resolve()
    _check_replaceable(target)
    file = next((path for path in target.parents if path.exists() and not path.is_dir()), None)
    if file is not None:
        raise ValueError(f"output_dir={target}: {file} is a file; choose another folder")
    stage = target.with_name(f".{target.name}.part")
    with of_option("output_dir", target, "written"):
        lock = claim(stage, "another export to the same output_dir is running")
    try:
        _empty(stage)
        if target.exists():
            _check_exchange(stage)
        yield stage
        _sync(stage)
        _check_replaceable(target)  # once more, because the work takes its time
        if target.exists():
            _exchange(stage, target)
        else:
            stage.rename(target)
        sync(target.parent)
    except SafetensorError as error:  # such as a full disk; whoever reads a file names it himself
        raise OSError(f"{target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)  # what failed, or the older export
        os.close(lock)


def record(stage: Path, report: dict[str, Any]) -> None:
    """Write ``export.json``, the last file of an export, with the names of all: others are someone else's."""
    report["files"] = [*_files(stage), RECORD]
    write_json(stage / RECORD, report)


def _files(folder: Path) -> list[str]:
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(str(path.relative_to(folder)) for path in found)


def _check_replaceable(target: Path) -> None:
    if not target.exists():
        return
    if not (target / RECORD).is_file():
        raise ValueError(f"output_dir={target} is there and no export of molf: choose another folder")
    listed = read_json(target / RECORD).get("files")
    others = [name for name in _files(target) if not isinstance(listed, list) or name not in listed]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise ValueError(
            f"output_dir={target} holds {', '.join(others[:3])}{more}, which its {RECORD} does not list and an export "
            "would remove: move them away, or choose another folder"
        )


def _empty(stage: Path) -> None:
    for path in stage.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _check_exchange(stage: Path) -> None:
    """Before the work, not after it."""
    one, other = stage / "one", stage / "other"
    one.mkdir()
    other.mkdir()
    try:
        _exchange(one, other)
    except OSError as error:
        raise ValueError(
            f"output_dir is on a file system that cannot exchange two folders in one step ({error}): remove the older "
            "export, or choose another output_dir"
        ) from error
    _empty(stage)


def _exchange(one: Path, other: Path) -> None:
    """Exchange two folders in one step. ``os.replace`` cannot: it refuses a target that is not empty.

    Raises:
        OSError: If the system has no such call, or the file system none.
    """
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        raise OSError("this system has no renameat2")
    if call(here, os.fsencode(one), here, os.fsencode(other), exchange):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(other))


def _sync(folder: Path) -> None:
    """Wait until the folder and all that is in it are on the disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)
