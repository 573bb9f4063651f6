"""Records of a task from a JSON file, a dataset folder or the hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

Record = TypeVar("Record")


def read_records(source: str | Path) -> list[Any]:
    """All records of a source, as they are.

    Args:
        source: A file with a JSON list or JSON lines; else a folder or hub id that ``datasets`` reads, of which the
            first split is taken, or the one named behind a colon (``openlifescienceai/medmcqa:validation``).

    Raises:
        ValueError: If there is no record, the file is no JSON or the split does not exist; names the source.
        OSError: If the source cannot be read.
    """
    path = Path(source)
    records = _read_json(path) if path.is_file() or not _is_dataset(str(source)) else _read_dataset(str(source))
    if not records:
        raise ValueError(f"{source} has no record")
    return records


def parsed(records: Iterable[Any], parse: Callable[[Any], Record], source: str | Path) -> list[Record]:
    """What ``parse`` makes of every record.

    Raises:
        ValueError: Of the first that it refuses; names the source and the record.
    """
    found = []
    for index, record in enumerate(records):
        try:
            found.append(parse(record))
        except ValueError as error:
            raise ValueError(f"{source}, record {index}: {error}") from error
    return found


def read_text(path: Path) -> str:
    """A file's text, UTF-8 with or without a byte order mark. JSON lines end at a newline and nowhere else.

    Raises:
        ValueError: If it is not UTF-8; names the file.
        OSError: If it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def text_field(record: Any, name: str) -> str:
    """A record's field that must be a string with something in it.

    Raises:
        ValueError: If it is missing, blank or of another type; names the field.
    """
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} is {'missing' if value is None else repr(value)}: needs a non-empty string")
    return value


def _is_dataset(source: str) -> bool:
    """A folder, or what the hub calls a dataset: owner/name, maybe with a split."""
    owner, slash, name = source.partition("/")
    named = bool(owner and slash and name) and "/" not in name and owner not in (".", "..", "~")
    return Path(source).is_dir() or (named and not name.endswith((".json", ".jsonl")))


def _read_json(path: Path) -> list[Any]:
    text = read_text(path)
    is_list = text.lstrip().startswith("[")
    records: list[Any] = []
    for number, piece in [(1, text)] if is_list else enumerate(text.split("\n"), 1):
        try:
            records += json.loads(piece) if is_list else [json.loads(piece)] if piece.strip() else []
        except (ValueError, RecursionError) as error:
            line = number + getattr(error, "lineno", 1) - 1
            reason = getattr(error, "msg", error)
            raise ValueError(f"{path} is neither a JSON list nor JSON lines: {reason} (line {line})") from error
    for index, record in enumerate(records):
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{path}, record {index}: an escape \\ud800 to \\udfff without its other half; mend it ({error})"
            ) from error
    return records


def _read_dataset(source: str) -> list[Any]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetBuildError

    name, colon, split = (source, "", "") if Path(source).is_dir() else source.partition(":")
    try:
        splits = load_dataset(name)
    except DatasetBuildError as error:
        raise ValueError(f"{source} is no dataset: {error.__cause__ or error}") from error
    if colon and split not in splits:
        raise ValueError(f"{source}: no split {split!r}, choose one of {', '.join(splits)}")
    return list(splits[split or next(iter(splits))])
