"""Training data as a Hugging Face dataset of prompt and completion."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..files import of_option
from ..tasks import Task
from ..tasks.prompts import Context, appends_eos, ended, tokenize_pairs

if TYPE_CHECKING:
    from datasets import Dataset

    from .arguments import MethodArguments


def load_data(task: Task, method: MethodArguments) -> tuple[Dataset, dict[str, Sequence[Any]]]:
    """The training set, and what is scored afterwards, by name.

    With ``validation_size`` or ``test_size`` that is "validation" and "test", see ``split``. Else it is "", the records
    of ``eval_dataset_path`` or, if the task scores these, the trained ones.

    Raises:
        ValueError: If the data are empty or malformed; names the source and the record.
        OSError: If they cannot be read.
    """
    from datasets import Dataset

    with of_option("dataset_path", method.dataset_path):
        records = task.load(method.dataset_path, method.max_examples)
    if method.validation_size or method.test_size:
        records, scored = split(task, records, method.validation_size, method.test_size, method.split_seed)
    elif (other := method.eval_dataset_path) is not None:
        with of_option("eval_dataset_path", other):
            scored = {"": task.load(other, None)}
    else:
        scored = {"": records} if task.scores_trained else {}
    return Dataset.from_list([task.example(record) for record in records]), scored


def split(
    task: Task, records: Sequence[Any], validation: float, test: float, seed: int
) -> tuple[list[Any], dict[str, Sequence[Any]]]:
    """Training records, and disjoint validation and test records, shuffled by ``seed`` alone.

    Where the task is to learn its records, all are trained on, and validation and test are disjoint parts of them;
    else validation and test are held out.

    Args:
        task: What the records are of.
        records: All of them.
        validation: Size of the validation part: a number of records, or below 1 a share; 0 makes none.
        test: Size of the test part, likewise.
        seed: Of the shuffle; nothing else decides the parts.

    Raises:
        ValueError: If a part is empty or nothing is left; names the sizes.
    """
    count = len(records)
    sizes = [int(size * count) if size < 1 else int(size) for size in (validation, test)]
    order = random.Random(f"molf.split/{seed}").sample(range(count), count)
    empty = any(wanted and not size for wanted, size in zip((validation, test), sizes, strict=True))
    if empty or sum(sizes) > count or (sum(sizes) == count and not task.edits):
        raise ValueError(
            f"validation_size={validation:g} and test_size={test:g} do not split {count} records of {task.name}: give "
            "sizes that leave records in every part"
        )
    parts: dict[str, Sequence[Any]] = {
        "validation": [records[i] for i in order[: sizes[0]]],
        "test": [records[i] for i in order[sizes[0] : sum(sizes)]],
    }
    rest = range(count) if task.edits else sorted(order[sum(sizes) :])
    return [records[i] for i in rest], {name: part for name, part in parts.items() if part}


def fit_examples(dataset: Any, tokenizer: Any, context: Context, name: str) -> Any:
    """The dataset, its prompts cut to the context or refused where prompt, completion and EOS exceed it.

    SFTTrainer would cut the completion off and then leave the example out. Where every example fits, the dataset
    is returned as it is; else, and where the tokenizer appends an EOS to the one that SFTTrainer adds, as a Dataset of
    tokens, which SFTTrainer takes as they are.

    Args:
        dataset: Rows with prompt and completion.
        tokenizer: The model's tokenizer.
        context: Its length and policy; it counts the prompts that were cut.
        name: What the data are, for the error message.

    Raises:
        ValueError: If an example is too long and to be refused, or its completion alone is, or a token has no
            embedding.
    """
    from datasets import Dataset

    pairs = [(row["prompt"], ended(tokenizer, row["completion"])) for row in dataset]
    limit = math.inf if context.length is None else context.length
    lengths, largest = [], 0
    for prompt, completion in tokenize_pairs(tokenizer, pairs, merge=True):
        lengths.append(len(prompt) + len(completion))
        largest = max(largest, *prompt, *completion)
    context.check(tokenizer, [[largest]])
    if max(lengths) <= limit and not appends_eos(tokenizer):
        return dataset
    rows = []
    for index, (ids, completion_ids) in enumerate(tokenize_pairs(tokenizer, pairs, merge=True)):
        try:
            ids = context.fit(ids, len(completion_ids))
        except ValueError as error:
            count = sum(length > limit for length in lengths)
            raise ValueError(f"{name}, record {index} ({count} of {len(pairs)} are too long): {error}") from error
        mask = [0] * len(ids) + [1] * len(completion_ids)
        rows.append({"input_ids": ids + completion_ids, "completion_mask": mask})
    return Dataset.from_list(rows)
