"""Training data as a Hugging Face dataset of prompt and completion."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..tasks import fact

if TYPE_CHECKING:
    from datasets import Dataset


def load_pairs(path: str | Path, limit: int | None = None) -> list[dict[str, str]]:
    """Read JSON lines with the fields "prompt" and "completion".

    Raises:
        ValueError: If the file is empty or a line is malformed; names the file and the line.
        OSError: If the file cannot be read.
    """
    pairs: list[dict[str, str]] = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        if limit is not None and len(pairs) == limit:
            break
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        for key in ("prompt", "completion"):
            if not isinstance(record, dict) or not isinstance(record.get(key), str) or not record[key]:
                raise ValueError(f"{path}, line {number}: needs a non-empty string {key!r}")
        pairs.append({"prompt": record["prompt"], "completion": record["completion"]})
    if not pairs:
        raise ValueError(f"{path} has no record")
    return pairs


def load_data(task: str | None, path: str | Path, limit: int | None) -> tuple[Dataset, Sequence[fact.FactEdit]]:
    """The training set, and the edits to score afterwards if there is a task."""
    from datasets import Dataset

    edits: Sequence[fact.FactEdit] = fact.load_edits(path, limit) if task == "fact" else ()
    pairs = fact.training_pairs(edits) if edits else load_pairs(path, limit)
    return Dataset.from_list(pairs), edits
