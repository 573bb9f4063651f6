"""Evaluation while training goes on: the loss and the task's metrics of a few records, which leave no trace in it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class ScoredEvaluation:
    """Mixin for a Trainer: its evaluation also scores a task, and training goes on as if there had been none.

    The metrics stand beside ``eval_loss`` in the same entry of the log, so that ``metric_for_best_model`` knows them.
    Under several processes each scores the same records.

    Attributes:
        score: The metrics of a model by name; None for the loss alone.

    Example:
        class MyTrainer(ScoredEvaluation, Trainer): ...
    """

    score: Callable[[Any], dict[str, float]] | None = None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The Trainer's, with the generators of random numbers put back: its DataLoader draws a seed from torch's."""
        with undisturbed():
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)  # type: ignore[misc]
        return metrics

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with _known_metric():  # of a schedule that goes by it
            metrics: dict[str, float] = super()._evaluate(*args, **kwargs)  # type: ignore[misc]
        return metrics

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        with _known_metric():
            better: bool = super()._determine_best_metric(*args, **kwargs)  # type: ignore[misc]
        return better

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """The Trainer's, with the task's metrics among its own."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)  # type: ignore[misc]
        if self.score is not None:
            model: Any = self.model  # type: ignore[attr-defined]
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in self.score(model).items()})
        return output


@contextmanager
def _known_metric() -> Iterator[None]:
    """Raise the Trainer's KeyError of a metric_for_best_model that there is not as a ValueError, without its advice."""
    try:
        yield
    except KeyError as error:
        if "metric_for_best_model" not in str(error):
            raise
        raise ValueError(error.args[0].partition(" Please ")[0]) from error


@contextmanager
def undisturbed() -> Iterator[None]:
    """Put the generators of Python, numpy and torch (CPU and current GPU) back to where they were."""
    python, arrays = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


def few(records: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` of the records, at even distances, because files are often sorted.

    Example:
        >>> few("abcdefgh", 3)
        ['a', 'c', 'f']
        >>> few("ab", 3)
        ['a', 'b']
    """
    count = min(count, len(records))
    return [records[i * len(records) // count] for i in range(count)]
