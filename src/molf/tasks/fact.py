"""CounterFact: does the model say the new fact, in other words too, and leave its neighbours alone?

Records come in the original form (ROME: ``requested_rewrite``, ``paraphrase_prompts``,
``neighborhood_prompts``) or in the flat form (``prompt``, ``target_new``, ``ground_truth``,
``rephrase_prompt``, ``locality_prompt``, ``locality_ground_truth``).

Source: Meng, Bau, Andonian, Belinkov, "Locating and Editing Factual Associations in GPT"
    (arXiv:2202.05262), section 3.4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, harmonic_mean
from typing import Any

from .base import Task
from .prompts import Context
from .records import parsed, read_records
from .scoring import Continuation, score_continuations


@dataclass(frozen=True)
class FactEdit:
    """One counterfactual edit.

    Attributes:
        prompt: Ends where the object begins.
        target_new: The object to learn, without leading space.
        target_true: The object that the model knew.
        paraphrases: Other prompts for the same fact.
        neighbours: (prompt, true object) of facts that must stay.
    """

    prompt: str
    target_new: str
    target_true: str
    paraphrases: tuple[str, ...]
    neighbours: tuple[tuple[str, str], ...]


def parse_edit(record: dict[str, Any]) -> FactEdit:
    """An edit from a record in either form.

    Raises:
        ValueError: If a field is missing, or empty where the edit needs it.
    """
    try:
        if "requested_rewrite" in record:
            rewrite = record["requested_rewrite"]
            true = rewrite["target_true"]["str"]
            edit = FactEdit(
                rewrite["prompt"].replace("{}", rewrite["subject"], 1),
                rewrite["target_new"]["str"],
                true,
                tuple(_list(record, "paraphrase_prompts")),
                tuple((prompt, true) for prompt in _list(record, "neighborhood_prompts")),
            )
        else:
            edit = FactEdit(
                record["prompt"],
                record["target_new"],
                record["ground_truth"],
                (record["rephrase_prompt"],),
                ((record["locality_prompt"], record["locality_ground_truth"]),),
            )
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"no CounterFact record, {error} is missing or of another type") from error
    texts = [(name, getattr(edit, name)) for name in ("prompt", "target_new", "target_true")]
    texts += [("a paraphrase prompt", text) for text in edit.paraphrases]
    texts += [("a neighbourhood prompt or object", text) for pair in edit.neighbours for text in pair]
    for name, value in texts:
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"no CounterFact record, {name} is {value!r}")
    return edit


def _list(record: dict[str, Any], name: str) -> list[Any]:
    if not isinstance(record[name], list):  # a string would be a prompt per letter
        raise ValueError(f"no CounterFact record, {name} is {record[name]!r}: needs a list")
    found: list[Any] = record[name]
    return found


def load_edits(path: str | Path, limit: int | None = None) -> list[FactEdit]:
    """Read a JSON list, or JSON lines, of CounterFact records, or a dataset folder or hub id of them.

    Args:
        path: The file, folder or hub id.
        limit: Read at most this many, from the start.

    Raises:
        ValueError: If the source is empty or a record is malformed; names the source and the record.
        OSError: If the source cannot be read.
    """
    return parsed(read_records(path)[:limit], parse_edit, path)


def load(path: str | None, limit: int | None) -> list[FactEdit]:
    """``load_edits`` of a path that must be given.

    Raises:
        ValueError: If it is not given, or as in ``load_edits``.
        OSError: If the source cannot be read.
    """
    if path is None:
        raise ValueError("dataset_path is not given: name a CounterFact file, folder or hub id")
    return load_edits(path, limit)


def example(edit: FactEdit) -> dict[str, str]:
    """Prompt and completion of an edit, as SFTTrainer takes them; the loss is on the completion only."""
    return {"prompt": edit.prompt, "completion": f" {edit.target_new}"}


def evaluate(
    model: Any, tokenizer: Any, records: Sequence[FactEdit], *, batch_size: int = 64, description: str = "evaluate"
) -> dict[str, float]:
    """CounterFact's scores, in percent except the magnitudes.

    ``efficacy``: share of edits with p(new) > p(true); ``paraphrase``: of paraphrases; ``neighbourhood``:
    share of neighbours with p(true) > p(new); ties count half. ``score``: their harmonic mean, the primary
    metric. Probabilities are of the full target; ``*_first`` are of its first token. ``efficacy_magnitude``
    is the mean of p(new) - p(true). ``exact_match``: share of edits whose new object is what greedy decoding says.
    A score without prompts is left out, and of the harmonic mean too. ``truncated_prompts``, only where there are any:
    how many prompts were cut from the left to fit into the model's context.
    """
    groups: dict[str, list[tuple[str, str, str]]] = {"efficacy": [], "paraphrase": [], "neighbourhood": []}
    for edit in records:
        groups["efficacy"].append((edit.prompt, edit.target_new, edit.target_true))
        groups["paraphrase"] += [(prompt, edit.target_new, edit.target_true) for prompt in edit.paraphrases]
        groups["neighbourhood"] += [(prompt, true, edit.target_new) for prompt, true in edit.neighbours]
    pairs = [
        (prompt, f" {target}") for questions in groups.values() for prompt, *targets in questions for target in targets
    ]
    context = Context.of(model, tokenizer)
    scored = iter(
        score_continuations(model, tokenizer, pairs, batch_size=batch_size, description=description, context=context)
    )
    metrics: dict[str, float] = {}
    for name, questions in groups.items():
        results = [(next(scored), next(scored)) for _ in questions]
        if not results:
            continue
        metrics[name] = 100 * fmean(_prefers(wanted.logprob, other.logprob) for wanted, other in results)
        metrics[f"{name}_first"] = 100 * fmean(
            _prefers(wanted.first_logprob, other.first_logprob) for wanted, other in results
        )
        if name == "efficacy":
            metrics["efficacy_magnitude"] = fmean(_probability(a) - _probability(b) for a, b in results)
            metrics["exact_match"] = 100 * fmean(wanted.greedy for wanted, _ in results)
    metrics["score"] = harmonic_mean([metrics[name] for name in groups if name in metrics])
    if context.truncated:
        metrics["truncated_prompts"] = context.truncated
    return metrics


def _prefers(wanted: float, other: float) -> float:
    return 0.5 if wanted == other else float(wanted > other)


def _probability(continuation: Continuation) -> float:
    return math.exp(continuation.logprob)


TASK = Task("fact", "score", load, example, evaluate, edits=True)
