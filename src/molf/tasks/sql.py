"""Text to SQL: does the query that the model writes give the rows that the gold query gives?

Records have the fields of ``gretelai/synthetic_text_to_sql``: ``sql_prompt`` (the question), ``sql_context``
(CREATE TABLE and maybe INSERT statements) and ``sql`` (the gold query). Where the context has no rows, as in
Spider, the tables are filled at random several times and the results must agree every time (``sql_fill``). All
SQL is executed by SQLite in a sandbox (``sql_sandbox``), whoever wrote it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import fmean
from typing import Any, NamedTuple

from tqdm import tqdm

from ..world import sql_text
from .base import Task
from .generation import generate
from .prompts import Context
from .records import parsed, read_records, text_field
from .sql_compare import is_edit, is_ordered, normalise, same_rows
from .sql_fill import fill, has_rows, mentioned_values, read_schema
from .sql_sandbox import QueryResult, SandboxPool

HUB_ID = "gretelai/synthetic_text_to_sql"
FIELDS = ("sql_prompt", "sql_context", "sql")
DATABASES = 5
"""How many random databases a query must agree on where the context has no rows."""
MOST_DATABASES = 100
"""How many are tried until the gold query gives a row on one: until then every query without rows agrees with it."""
_MARGIN = 8


class Verdict(NamedTuple):
    """What the sandbox says of a prediction; of no use but for ``gold_error`` if there is one.

    Attributes:
        correct: Whether its rows were the gold query's, on every database.
        valid: Whether it ran, on every database.
        gold_error: Why the gold query failed, else None.
        empty: Whether the gold query is a SELECT that gave no row on any database: a query that never gives one is
            correct, whatever it asks.
    """

    correct: bool
    valid: bool
    gold_error: str | None
    empty: bool = False


def load(path: str | None, limit: int | None) -> list[dict[str, str]]:
    """Questions from a JSON file, a folder or the hub (None: the hub's set), at most ``limit`` of them.

    Raises:
        ValueError: If the source is empty or a field of a record is missing or blank; names source, record and field.
        OSError: If the source cannot be read.
    """
    source = path or HUB_ID
    return parsed(
        read_records(source)[:limit], lambda record: {name: text_field(record, name) for name in FIELDS}, source
    )


def example(record: dict[str, Any]) -> dict[str, str]:
    """Context and question as prompt, the gold query as completion."""
    prompt, completion = sql_text(record)
    return {"prompt": prompt, "completion": completion}


def databases(pool: SandboxPool, record: dict[str, Any]) -> Iterator[str]:
    """The contexts to run on: the record's own if it has rows, or no tables; else it with random rows, many times."""
    context = record["sql_context"]
    schema = read_schema(pool, context)
    if not schema or has_rows(pool, context, schema):
        yield context
        return
    mentioned = mentioned_values(record["sql"], schema)
    for seed in range(MOST_DATABASES):
        yield f"{context}\n;{fill(schema, mentioned, seed)}"


def judge(pool: SandboxPool, record: dict[str, Any], prediction: str) -> Verdict:
    """Run the gold query and the prediction on the record's databases, and compare their rows.

    For a SELECT the results are compared, as bags, or as sequences if the gold query orders at its top level; for an
    INSERT, UPDATE or DELETE all tables afterwards. A prediction of the other kind is not allowed to run. Random
    databases are ``DATABASES``, and where a SELECT gives no row on them the next one on which it does.
    """
    edit = is_edit(record["sql"])
    ordered = is_ordered(record["sql"]) and not edit
    golds: list[tuple[str, QueryResult]] = []
    empty = not edit
    for context in databases(pool, record):
        gold = pool.run(context, record["sql"], edit=edit)
        if not gold.ok:
            return Verdict(False, False, gold.error)
        empty &= not gold.rows
        if gold.rows or len(golds) < DATABASES:
            golds.append((context, gold))
        if len(golds) >= DATABASES and not empty:
            break
    correct = valid = True
    for context, gold in golds:
        said = pool.run(context, prediction, edit=edit)
        valid &= said.ok
        correct &= said.ok and same_rows(said.rows, gold.rows, ordered=ordered)
    return Verdict(correct, valid, None, empty)


def evaluate(
    model: Any,
    tokenizer: Any,
    records: Sequence[dict[str, Any]],
    *,
    batch_size: int = 64,
    description: str = "evaluate",
) -> dict[str, float]:
    """Shares in percent, and counts.

    ``execution_accuracy``, the primary metric: predictions whose rows are the gold query's. ``valid_sql``:
    predictions that run. Both are shares of the records whose gold query runs; ``gold_failures`` is the number of
    the others, for which no prediction can be right. ``empty_golds``: of how many of them the gold query gives no row
    on any database, so that any query without rows counts as right. ``exact_match``: predictions that are the gold
    query but for its spelling, of all records. ``truncated_prompts``: how many prompts were cut to fit into the model's
    context.

    Raises:
        ValueError: If there is no record, or the gold query of every record fails.
    """
    if not records:
        raise ValueError("records is empty: there is nothing to evaluate")
    pairs = [example(record) for record in records]
    context = Context.of(model, tokenizer)
    longest = max(len(tokenizer(pair["completion"]).input_ids) for pair in pairs)
    said = generate(
        model,
        tokenizer,
        [pair["prompt"] for pair in pairs],
        max_new_tokens=longest + _MARGIN,
        batch_size=batch_size,
        description=description,
        context=context,
    )
    predictions = [text.strip() for text in said]
    with SandboxPool() as pool, ThreadPoolExecutor(pool.workers) as threads:
        judged = threads.map(lambda record, prediction: judge(pool, record, prediction), records, predictions)
        progress = tqdm(judged, desc=f"{description}: SQL", total=len(records), unit="query", leave=False)
        verdicts = list(progress)
    errors = [verdict.gold_error for verdict in verdicts if verdict.gold_error is not None]
    ran = [verdict for verdict in verdicts if verdict.gold_error is None]
    if not ran:
        raise ValueError(
            f"no gold query of {len(records)} records runs in SQLite, the first because of {errors[0]}: "
            "use contexts and queries in SQLite's dialect"
        )
    exact = [
        normalise(prediction, record["sql_context"]) == normalise(record["sql"], record["sql_context"])
        for prediction, record in zip(predictions, records, strict=True)
    ]
    return {
        "execution_accuracy": 100 * fmean(verdict.correct for verdict in ran),
        "exact_match": 100 * fmean(exact),
        "valid_sql": 100 * fmean(verdict.valid for verdict in ran),
        "gold_failures": len(errors),
        "empty_golds": sum(verdict.empty for verdict in ran),
        "truncated_prompts": context.truncated,
    }


TASK = Task("sql", "execution_accuracy", load, example, evaluate)
