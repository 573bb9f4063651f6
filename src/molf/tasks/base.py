"""What a task is. Adding one is one file with a ``TASK`` and one line in ``molf.tasks.TASKS``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class Evaluate(Protocol):
    """Scores a model on records: metric names to numbers, shares in percent."""

    def __call__(
        self, model: Any, tokenizer: Any, records: Sequence[Any], *, batch_size: int = 64, description: str = "evaluate"
    ) -> dict[str, float]:
        """Leave the model in the mode that it was in; show progress under ``description``."""
        ...


@dataclass(frozen=True)
class Task:
    """A task: records, training examples and an evaluator.

    Attributes:
        name: As on the command line.
        primary: The metric that methods are compared by; more is better.
        load: Records from a file, folder or hub id (None: the task's own source), at most ``limit`` of them.
        example: A record's prompt and completion, {"prompt": ..., "completion": ...}; the loss is on the completion.
        evaluate: The evaluator; it builds its prompts with ``example``, so that they are the trained ones.
        edits: Whether the task is to learn its records, so that it is scored on records that it was trained on.
        scores_trained: Whether the trained records are scored where no others are given.
    """

    name: str
    primary: str
    load: Callable[[str | None, int | None], list[Any]]
    example: Callable[[Any], dict[str, str]]
    evaluate: Evaluate
    edits: bool = False
    scores_trained: bool = True
