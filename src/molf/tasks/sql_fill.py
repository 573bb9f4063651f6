"""Random rows for a database that has tables and no rows, so that queries on it can be told apart.

A query that is wrong often gives the right result on one database, and always on an empty one. So the tables
are filled several times, with few different values (so that joins and groups meet), with the values that the gold
query mentions and their neighbours, and with keys that hold.

Source: Zhong, Yu, Klein, "Semantic Evaluation for Text-to-SQL with Distilled Test Suites" (arXiv:2010.02840),
    section 3: the fuzzing, without the distillation to a small set of databases.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from typing import NamedTuple

from sqlglot import exp

from .sql_compare import parse
from .sql_sandbox import SandboxPool

ROWS = 24
"""At most this many rows per table and at least half of it, or fewer where a key has no more values."""

_TRIES = 8
_WORDS = "amber birch cedar dune ember fjord grove heath iris jade kelp lotus maple north opal pine quartz reed".split()
_TIMES = re.compile("DATE|TIME")
_NUMBERS = re.compile("INT|REAL|FLOA|DOUB|NUM|DEC|YEAR")
_COMPARISONS = (exp.EQ, exp.NEQ, exp.GT, exp.GTE, exp.LT, exp.LTE, exp.Like, exp.Glob, exp.In, exp.Between)

_SCHEMA = """
SELECT m.name, p.name, p.type, p.pk, p."notnull", f.id, f."table", f."to"
FROM sqlite_master AS m JOIN pragma_table_info(m.name) AS p
LEFT JOIN pragma_foreign_key_list(m.name) AS f ON f."from" = p.name COLLATE NOCASE
WHERE m.type = 'table' AND m.name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY m.rowid, p.cid, f.id, f.seq
"""


class Column(NamedTuple):
    """A column: its declared type, its place in the primary key from 1 (0: not in it), and whether NULL is out."""

    name: str
    type: str
    key: int
    required: bool


class ForeignKey(NamedTuple):
    """Columns of a table and the columns of ``parent`` that they refer to."""

    parent: str
    columns: tuple[tuple[str, str], ...]


class Table(NamedTuple):
    """A table as SQLite declared it."""

    name: str
    columns: dict[str, Column]
    foreign_keys: tuple[ForeignKey, ...]


def read_schema(pool: SandboxPool, context: str) -> dict[str, Table]:
    """The tables that the context makes, by their names in small letters; none if the context fails.

    The context is untrusted, so it is SQLite in the sandbox that reads it.
    """
    columns: dict[str, dict[str, Column]] = defaultdict(dict)
    names: dict[str, str] = {}
    keys: dict[str, dict[int, tuple[str, list[tuple[str, str | None]]]]] = defaultdict(dict)
    for row in pool.run(context, _SCHEMA).rows:
        table, name, declared, key, required, foreign, parent, target = row
        column = Column(str(name), str(declared).upper(), int(key or 0), bool(required))
        low = str(table).lower()
        names[low] = str(table)
        columns[low][column.name.lower()] = column
        if foreign is not None:
            pairs = keys[low].setdefault(int(foreign), (str(parent).lower(), []))[1]
            pairs.append((column.name.lower(), None if target is None else str(target).lower()))
    schema = {}
    for low, name in names.items():
        resolved = []
        for parent, pairs in keys[low].values():
            there = columns.get(parent, {})
            primary = sorted((c for c in there.values() if c.key), key=lambda c: c.key)
            targets = [to or (primary[i].name.lower() if i < len(primary) else "") for i, (_, to) in enumerate(pairs)]
            if all(target in there for target in targets):
                resolved.append(ForeignKey(parent, tuple(zip((c for c, _ in pairs), targets, strict=True))))
        schema[low] = Table(name, columns[low], tuple(resolved))
    return schema


def has_rows(pool: SandboxPool, context: str, schema: dict[str, Table]) -> bool:
    """Whether any table has a row."""
    if not schema:
        return False
    checks = ", ".join(f"(EXISTS (SELECT 1 FROM {_quoted(table.name)}))" for table in schema.values())
    return pool.run(context, f"SELECT max(column1) FROM (VALUES {checks})").rows == ((1,),)


def mentioned_values(query: str, schema: dict[str, Table]) -> dict[str, list[str]]:
    """SQL literals that the query compares columns with, and their neighbours, by column name in small letters."""
    tree = parse(query)
    found: dict[str, list[str]] = defaultdict(list)
    known = {name for table in schema.values() for name in table.columns}
    for node in tree.find_all(*_COMPARISONS) if tree is not None else ():
        columns, texts = [], []
        jokers = "%" if isinstance(node, exp.Like) else ""
        for column in node.find_all(exp.Column):
            if column.name.lower() in known:
                columns.append(column.name.lower())
            elif isinstance(column.this, exp.Identifier) and column.this.quoted:
                texts.append(_text(column.name.strip(jokers)))  # "x" is a string where nothing is x
        for literal in node.find_all(exp.Literal):
            texts += [_text(literal.name.strip(jokers))] if literal.is_string else _neighbours(literal.name)
        for name in columns:
            found[name] += texts
    return found


def fill(schema: dict[str, Table], mentioned: dict[str, list[str]], seed: int) -> str:
    """INSERT statements that fill every table.

    Args:
        schema: From ``read_schema``.
        mentioned: From ``mentioned_values``.
        seed: The same seed gives the same rows.

    Returns:
        SQL to append to the context. Primary keys are unique. A foreign key repeats a row of its parent; in a circle
        of tables, and in the first row of a table that refers to itself, it is NULL.
    """
    rng = random.Random(f"molf.sql_fill/{seed}")
    made: dict[str, list[dict[str, str]]] = {}
    mentioned = _of_parents_too(schema, mentioned)
    for low in _parents_first(schema):
        table = schema[low]
        made[low] = []
        seen: set[tuple[str, ...]] = set()
        keys = [name for name, column in table.columns.items() if column.key]
        words = {name: _same_named(name, schema, made) for name, column in table.columns.items() if _is_text(column)}
        for _ in range(rng.randrange(ROWS // 2, ROWS + 1)):
            for _ in range(_TRIES):
                row = _row(table, made, mentioned, words, rng)
                key = tuple(row[name] for name in keys) if row else ()
                if row and (not keys or key not in seen):
                    made[low].append(row)
                    seen.add(key)
                    break
    lines = []
    for low, content in made.items():
        if content:
            names = ", ".join(_quoted(column.name) for column in schema[low].columns.values())
            values = ", ".join(f"({', '.join(row[name] for name in schema[low].columns)})" for row in content)
            lines.append(f"INSERT OR IGNORE INTO {_quoted(schema[low].name)} ({names}) VALUES {values};")
    return "\n".join(lines)


def _of_parents_too(schema: dict[str, Table], mentioned: dict[str, list[str]]) -> dict[str, list[str]]:
    """The mentioned values, those of a foreign key for the columns that it refers to as well."""
    found = {name: list(values) for name, values in mentioned.items()}
    for table in schema.values():
        for mine, to in (pair for key in table.foreign_keys for pair in key.columns if pair[0] != pair[1]):
            found[to] = [*found.get(to, []), *mentioned.get(mine, [])]
    return found


def _same_named(name: str, schema: dict[str, Table], made: dict[str, list[dict[str, str]]]) -> list[str]:
    """The values of that name in tables made before, where one's primary key has it: a reference that is not declared.

    Numbers need it not: they are few enough to meet.
    """
    tables = [low for low, table in schema.items() if name in table.columns and _is_text(table.columns[name])]
    if not any(schema[low].columns[name].key for low in tables):
        return []
    return [row[name] for low in tables for row in made.get(low, []) if row[name] != "NULL"]


def _parents_first(schema: dict[str, Table]) -> list[str]:
    order: dict[str, None] = {}
    waiting = [(name, False) for name in reversed(schema)]
    entered = set()
    while waiting:
        name, left = waiting.pop()
        if left:
            order[name] = None
        elif name not in entered:
            entered.add(name)
            waiting.append((name, True))
            waiting += [(key.parent, False) for key in schema[name].foreign_keys]
    return list(order)


def _row(
    table: Table,
    made: dict[str, list[dict[str, str]]],
    mentioned: dict[str, list[str]],
    words: dict[str, list[str]],
    rng: random.Random,
) -> dict[str, str]:
    """A row as SQL literals; empty if the parents' rows do not fit together."""
    row: dict[str, str] = {}
    for key in table.foreign_keys:
        parents = made.get(key.parent, [])
        fitting = [row_ for row_ in parents if all(row.get(mine, row_[to]) == row_[to] for mine, to in key.columns)]
        if fitting:
            parent = rng.choice(fitting)
            row |= {mine: parent[to] for mine, to in key.columns}
        elif parents and any(mine in row for mine, _ in key.columns):
            return {}
        else:
            row |= {mine: "NULL" for mine, _ in key.columns if not table.columns[mine].key and mine not in row}
    for name, column in table.columns.items():
        if name not in row:
            row[name] = _literal(column, mentioned.get(name, []), words.get(name, []), rng)
    return row


def _literal(column: Column, mentioned: list[str], words: list[str], rng: random.Random) -> str:
    """A random SQL literal that suits the column's declared type."""
    if not column.key and not column.required and rng.random() < 0.05:
        return "NULL"
    for likely in (mentioned, words):
        if likely and rng.random() < 0.5:
            return rng.choice(likely)
    if "BOOL" in column.type:
        return str(rng.randrange(2))
    if _TIMES.search(column.type):
        day = f"{rng.randrange(1990, 2024)}-{rng.randrange(1, 13):02}-{rng.randrange(1, 29):02}"
        return _text(f"{day} {rng.randrange(24):02}:{rng.randrange(60):02}:00" if "TIME" in column.type else day)
    if _NUMBERS.search(column.type):
        if column.key:
            return str(rng.randrange(1, 3 * ROWS))
        whole = "INT" in column.type or rng.random() < 0.5
        return str(rng.randrange(30) if whole else rng.randrange(8000) / 4)
    word, number = rng.choice(_WORDS), rng.randrange(ROWS)
    if column.key:
        return _text(f"{word} {number}")
    return _text(rng.choice((word, word, word, f"{word} {number}", str(number))))  # numbers: some sum up a TEXT column


def _is_text(column: Column) -> bool:
    return not ("BOOL" in column.type or _TIMES.search(column.type) or _NUMBERS.search(column.type))


def _neighbours(number: str) -> list[str]:
    return [str(int(number) + step) for step in (-1, 0, 0, 1)] if re.fullmatch(r"\d{1,15}", number) else [number]


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
