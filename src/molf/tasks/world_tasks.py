"""The three tasks on the bundled world, without any download: facts to edit, four-way questions, SQL questions.

Their records come from ``molf.world`` and are the same in every run; prompts, completions and scores are those of
``fact``, ``med`` and ``sql``. ``limit`` takes a prefix, so fewer records are some of the same ones.
"""

from __future__ import annotations

import random
from typing import Any

from ..world import counterfactual_edits, make_world, multiple_choice, sql_question
from . import fact, med, sql
from .base import Task

EDITS = 300
SQL_QUESTIONS = 2000


def _own_source(name: str, path: str | None) -> None:
    if path is not None:
        raise ValueError(f"{path}: {name} has its own records; leave the path out")


def load_facts(path: str | None, limit: int | None) -> list[fact.FactEdit]:
    """300 counterfactual edits of the world, those of ``molf demo``."""
    _own_source("world-fact", path)
    return [fact.parse_edit(record) for record in counterfactual_edits(make_world(), EDITS)][:limit]


def load_questions(path: str | None, limit: int | None) -> list[dict[str, Any]]:
    """A four-way question about each of the world's 1,670 facts, shuffled."""
    _own_source("world-mcq", path)
    world = make_world()
    rng = random.Random("molf.tasks/world-mcq")
    facts = rng.sample(world.facts, len(world.facts))
    return [multiple_choice(world, one, rng) for one in facts][:limit]


def load_sql(path: str | None, limit: int | None) -> list[dict[str, Any]]:
    """2,000 different SQL questions, each over a table of its own."""
    _own_source("world-sql", path)
    world = make_world()
    rng = random.Random("molf.tasks/world-sql")
    records: dict[tuple[str, ...], dict[str, Any]] = {}
    while len(records) < SQL_QUESTIONS:
        record = sql_question(world, rng)
        records.setdefault(tuple(record.values()), record)
    return list(records.values())[:limit]


FACT = Task("world-fact", "score", load_facts, fact.example, fact.evaluate, edits=True)
MCQ = Task("world-mcq", "accuracy", load_questions, med.example, med.evaluate)
SQL = Task("world-sql", "execution_accuracy", load_sql, sql.example, sql.evaluate)
