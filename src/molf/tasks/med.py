"""MedMCQA: four-way medical questions, by the likelihood of the four letters and by generation.

Records have ``question``, ``opa`` to ``opd``, ``cop`` (the correct option) and maybe ``subject_name``. The hub's set
counts ``cop`` from 0, other copies of it from 1: which one a file does is read off the whole file and printed.

Source: Pal, Umapathi, Sankarasubbu, "MedMCQA: A Large-scale Multi-Subject Multi-Choice Dataset for Medical domain
    Question Answering" (arXiv:2203.14371).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from statistics import fmean
from typing import Any

from ..world import multiple_choice_text
from .base import Task
from .generation import generate
from .prompts import Context
from .records import parsed, read_records, text_field
from .scoring import score_continuations

HUB_ID = "openlifescienceai/medmcqa"
LETTERS = "ABCD"
OPTIONS = ("opa", "opb", "opc", "opd")
_ANSWER = re.compile(r"\W*([A-D])(?![-'’]\w)\s*(?:$|[^\w\s]|\n)")
_ANSWER_TOKENS = 8


def first_option(records: Sequence[Any], source: str) -> int:
    """Whether ``cop`` counts from 0 or from 1, from all records of a source.

    Raises:
        ValueError: If a number is in neither 0..3 nor 1..4, or if all numbers are in both; names the source.
    """
    found = {cop: i for i, cop in reversed(list(enumerate(_numbers(records)))) if cop is not None}
    strange = [cop for cop in found if not 0 <= cop <= 4]
    if strange or {0, 4} <= found.keys():
        cop = strange[0] if strange else 4
        also = "" if strange else ", and another record has cop 0"
        raise ValueError(f"{source}, record {found[cop]}: cop is {cop}{also}: use 0..3 or 1..4 throughout the file")
    if found and not {0, 4} & found.keys():
        raise ValueError(
            f"{source}: cop is one of {sorted(found)} in every record, which may count from 0 or from 1: "
            "write the letters A to D instead"
        )
    return int(4 in found)


def _numbers(records: Sequence[Any]) -> list[int | None]:
    """The ``cop`` of every record that has a number there."""
    cops = [record.get("cop") if isinstance(record, dict) else None for record in records]
    return [cop if isinstance(cop, int) and not isinstance(cop, bool) else None for cop in cops]


def parse_question(record: Any, first: int = 0) -> dict[str, Any]:
    """A record with ``cop`` counted from 0; ``subject_name`` is "Unknown" where there is none.

    Args:
        record: A MedMCQA record; ``cop`` is a number or a letter.
        first: The number of option A.

    Raises:
        ValueError: If a field is missing or of another type; names it.
    """
    question: dict[str, Any] = {"question": text_field(record, "question")}
    for name in OPTIONS:
        value = record.get(name)
        if not isinstance(value, str):  # an empty option occurs; one that is not there is a wrong file
            raise ValueError(f"{name} is {'missing' if value is None else repr(value)}: needs a string")
        question[name] = value
    cop = record.get("cop")
    if isinstance(cop, str) and len(cop) == 1 and cop.upper() in LETTERS:
        question["cop"] = LETTERS.index(cop.upper())
    elif isinstance(cop, int) and not isinstance(cop, bool) and 0 <= cop - first < len(LETTERS):
        question["cop"] = cop - first
    else:
        raise ValueError(f"cop is {'missing' if cop is None else repr(cop)}: needs the number of the correct option")
    question["subject_name"] = text_field(record, "subject_name") if record.get("subject_name") else "Unknown"
    return question


def load(path: str | None, limit: int | None) -> list[dict[str, Any]]:
    """Questions from a JSON file, a folder or the hub (None: the hub's MedMCQA), at most ``limit`` of them.

    Raises:
        ValueError: If the source is empty, a record is malformed or ``cop`` is ambiguous; names source and record.
        OSError: If the source cannot be read.
    """
    source = path or HUB_ID
    records = read_records(source)
    first = first_option(records, source)
    questions = parsed(records[:limit], lambda record: parse_question(record, first), source)
    if any(cop is not None for cop in _numbers(records)):
        _say(f"{source}: cop counts from {first}")
    return questions


@cache
def _say(message: str) -> None:
    """Print a message the first time it comes up."""
    print(message, flush=True)


def example(record: dict[str, Any]) -> dict[str, str]:
    """The question with its options as prompt, the letter as completion."""
    prompt, completion = multiple_choice_text(record)
    return {"prompt": prompt, "completion": completion}


def parse_answer(text: str) -> int | None:
    """The option that a generated text begins with, such as " B", "(B)" or "B. Aspirin"; None if with none.

    The letter is followed by the end, a new line or punctuation: "A patient" begins with an article.
    """
    match = _ANSWER.match(text)
    return LETTERS.index(match[1]) if match else None


def evaluate(
    model: Any,
    tokenizer: Any,
    records: Sequence[dict[str, Any]],
    *,
    batch_size: int = 64,
    description: str = "evaluate",
) -> dict[str, float]:
    """Accuracies in percent, and counts.

    ``accuracy``, the primary metric: the letter with the highest log-likelihood is the correct one; k letters that
    tie share the point. ``accuracy/<subject>``: of one subject. ``accuracy_generated``: greedy decoding begins with
    the correct letter. ``invalid_answers``: how many generated answers begin with no letter of an option.
    ``truncated_prompts``: how many questions were cut from the left to fit into the model's context.
    """
    prompts = [example(record)["prompt"] for record in records]
    pairs = [(prompt, f" {letter}") for prompt in prompts for letter in LETTERS]
    context = Context.of(model, tokenizer)
    common: dict[str, Any] = {"batch_size": batch_size, "description": description, "context": context}
    scored = [answer.logprob for answer in score_continuations(model, tokenizer, pairs, **common)]
    said = generate(model, tokenizer, prompts, max_new_tokens=_ANSWER_TOKENS, **common)
    answers = [parse_answer(text) for text in said]
    points: dict[str, list[float]] = {}
    for index, record in enumerate(records):
        letters = scored[len(LETTERS) * index : len(LETTERS) * (index + 1)]
        best = [i for i, logprob in enumerate(letters) if logprob == max(letters)]
        point = (record["cop"] in best) / len(best)
        points.setdefault(record["subject_name"], []).append(point)
    correct = [answer == record["cop"] for answer, record in zip(answers, records, strict=True)]
    return {
        "accuracy": 100 * fmean(point for subject in points.values() for point in subject),
        "accuracy_generated": 100 * fmean(correct),
        "invalid_answers": answers.count(None),
        "truncated_prompts": context.truncated,
        **{f"accuracy/{subject}": 100 * fmean(points[subject]) for subject in sorted(points)},
    }


TASK = Task("med", "accuracy", load, example, evaluate)
