"""Training data as a Hugging Face dataset of prompt and completion."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..tasks import Task
from ..tasks.prompts import Context, tokenize_pair

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


def load_data(
    task: Task | None, path: str | None, limit: int | None, eval_path: str | None = None
) -> tuple[Dataset, Sequence[Any]]:
    """The training set, and the records to score afterwards: those of ``eval_path``, else the trained ones.

    Raises:
        ValueError: If the data are empty or malformed; names the source and the record.
        OSError: If they cannot be read.
    """
    from datasets import Dataset

    if task is None:
        return Dataset.from_list(load_pairs(str(path), limit)), ()
    records = task.load(path, limit)
    scored = records if eval_path is None else task.load(eval_path, None)
    return Dataset.from_list([task.example(record) for record in records]), scored


def fit_examples(dataset: Any, tokenizer: Any, context: Context, name: str) -> Any:
    """The dataset, its prompts cut to the context or refused where prompt, completion and EOS exceed it.

    SFTTrainer would cut the completion off and then leave the example out. Where every example fits, the dataset
    is returned as it is; else as a Dataset of tokens, which SFTTrainer takes as they are.

    Args:
        dataset: Rows with prompt and completion.
        tokenizer: The model's tokenizer.
        context: Its length and policy; it counts the prompts that were cut.
        name: What the data are, for the error message.

    Raises:
        ValueError: If an example is too long and to be refused, or its completion alone is.
    """
    from datasets import Dataset

    pairs = [(row["prompt"], row["completion"] + tokenizer.eos_token) for row in dataset]
    lengths = [len(ids) for ids in tokenizer([prompt + completion for prompt, completion in pairs]).input_ids]
    limit = context.length
    if limit is None or max(lengths) <= limit:
        return dataset
    rows = []
    for index, (prompt, completion) in enumerate(pairs):
        ids, completion_ids = tokenize_pair(tokenizer, prompt, completion)
        try:
            ids = context.fit(ids, len(completion_ids))
        except ValueError as error:
            count = sum(length > limit for length in lengths)
            raise ValueError(f"{name}, record {index} ({count} of {len(lengths)} are too long): {error}") from error
        mask = [0] * len(ids) + [1] * len(completion_ids)
        rows.append({"input_ids": ids + completion_ids, "completion_mask": mask})
    return Dataset.from_list(rows)
