"""Prompts and completions of one's own: how likely does the model find completions that it was not trained on?

A record has the strings ``prompt`` and ``completion``. The score is of held-out records, not of the trained ones: it
asks what a method learned of the data, where its training loss asks what it remembers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from .base import Task
from .prompts import Context, ended
from .records import parsed, read_records
from .scoring import score_continuations


def load(path: str | None, limit: int | None) -> list[dict[str, str]]:
    """Records from a JSON list, JSON lines, a dataset folder or the hub, at most ``limit`` of them.

    Raises:
        ValueError: If no source is given, it is empty or a record is malformed; names the source and the record.
        OSError: If the source cannot be read.
    """
    if path is None:
        raise ValueError("dataset_path is not given: name a file, folder or hub id of prompts and completions")
    return parsed(read_records(path)[:limit], parse_pair, path)


def parse_pair(record: Any) -> dict[str, str]:
    """Prompt and completion of a record.

    Raises:
        ValueError: If one is missing, empty or of another type; names it.
    """
    pair: dict[str, str] = {}
    for key in ("prompt", "completion"):
        value = record.get(key) if isinstance(record, dict) else None
        if not isinstance(value, str) or not value:
            chats = isinstance(record, dict) and ("messages" in record or isinstance(value, list))
            remedy = "; write chats as text by their template (docs/quickstart.md#chats)" if chats else ""
            raise ValueError(f"needs a non-empty string {key!r}{remedy}")
        pair[key] = value
    return pair


def example(record: dict[str, str]) -> dict[str, str]:
    """The record itself."""
    return record


def evaluate(
    model: Any,
    tokenizer: Any,
    records: Sequence[dict[str, str]],
    *,
    batch_size: int = 64,
    description: str = "evaluate",
) -> dict[str, float]:
    """How the model finds the completions, each with its EOS, as they are trained.

    ``completion_loss``: the mean of -log p over all their tokens, in nats. ``likelihood``, the primary metric: 100
    exp(-completion_loss), the geometric mean of p in percent, which is 100 over the perplexity. ``exact_match``: share
    of records, in percent, of which greedy decoding says the completion and then ends. ``truncated_prompts``, only
    where there are any: how many prompts were cut from the left to fit into the model's context.
    """
    context = Context.of(model, tokenizer)
    pairs = [(record["prompt"], ended(tokenizer, record["completion"])) for record in records]
    common: dict[str, Any] = {"batch_size": batch_size, "description": description, "context": context}
    found = score_continuations(model, tokenizer, pairs, merge=True, **common)
    loss = -math.fsum(one.logprob for one in found) / sum(one.tokens for one in found)
    metrics = {
        "likelihood": 100 * math.exp(-loss),
        "completion_loss": loss,
        "exact_match": 100 * fmean(one.greedy for one in found),
    }
    if context.truncated:
        metrics["truncated_prompts"] = context.truncated
    return metrics


TASK = Task("completion", "likelihood", load, example, evaluate, scores_trained=False)
