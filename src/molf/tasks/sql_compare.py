"""When two SQL queries are the same: as text after normalisation, or by their rows.

What is parsed here may be a model's answer. The parser executes nothing, and input that is too long or too
deep for it is compared as plain text.
"""

from __future__ import annotations

import logging
import re
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError, TokenError
from sqlglot.tokenizer_core import Token, TokenType

from .sql_sandbox import Value

logging.getLogger("sqlglot").setLevel(
    logging.ERROR
)  # its warnings would be about a model's words, on the user's screen

MAX_CHARACTERS = 20_000
_OPENING = (TokenType.L_PAREN, TokenType.L_BRACKET)
_CLOSING = (TokenType.R_PAREN, TokenType.R_BRACKET)
_ZERO = 2**12 * sys.float_info.epsilon
"""What the order of its terms can make of a sum that is 0, for terms up to some thousands: a smaller float is 0."""
_EDITS = (TokenType.INSERT, TokenType.UPDATE, TokenType.DELETE, TokenType.REPLACE)
_AFTER_REPLACE = (TokenType.INTO, TokenType.STRING)
"""REPLACE is a name but before INTO; at a query's beginning sqlglot has all that follows in one string."""


def parse(query: str) -> exp.Expression | None:
    """The syntax tree of one SQLite statement; None if there is none, too much of it, or several."""
    if len(query) > MAX_CHARACTERS:
        return None
    try:
        trees = [tree for tree in sqlglot.parse(query, read="sqlite") if tree is not None]
    except (SqlglotError, RecursionError):
        return None
    return trees[0] if len(trees) == 1 and isinstance(trees[0], exp.Expression) else None


def normalise(query: str, context: str = "") -> str:
    """The query in one spelling: spaces, letter case of keywords and names, quotes, comments, final semicolon.

    Args:
        query: The query; what SQLite's grammar as sqlglot knows it does not cover keeps its words as they are.
        context: The CREATE TABLE statements. SQLite takes "text" for a string if it names nothing, and so does this.

    Example:
        >>> normalise('select  Name from People where city = "Rome" ;', "CREATE TABLE people (name, city)")
        "SELECT name FROM people WHERE city = 'Rome'"
    """
    tree = parse(query)
    if tree is None:
        return " ".join(query.split()).rstrip("; ")
    names = {word.lower() for word in re.findall(r"\w+", re.sub("'[^']*'", "", context))}
    try:
        for column in list(tree.find_all(exp.Column)):
            name = column.this
            if isinstance(name, exp.Identifier) and name.quoted and not column.table and name.name.lower() not in names:
                column.replace(exp.Literal.string(name.name))
        for identifier in tree.find_all(exp.Identifier):
            plain = re.fullmatch(r"[A-Za-z_]\w*", identifier.name) is not None
            identifier.replace(exp.to_identifier(identifier.name.lower(), quoted=not plain))
        return tree.sql(dialect="sqlite", comments=False)
    except (SqlglotError, RecursionError):
        return " ".join(query.split()).rstrip("; ")


def _top_level(query: str) -> list[Token]:
    """The tokens outside of all brackets; none if the query is no sequence of tokens."""
    try:
        tokens = sqlglot.tokenize(query[:MAX_CHARACTERS], read="sqlite")
    except TokenError:
        return []
    depth = 0
    found = []
    for token in tokens:
        depth += (token.token_type in _OPENING) - (token.token_type in _CLOSING)
        if depth == 0:
            found.append(token)
    return found


def is_ordered(query: str) -> bool:
    """Whether the query orders its result: ORDER BY at its top level, not in a subquery or window."""
    tokens = _top_level(query)
    apart = any((a.text.upper(), b.text.upper()) == ("ORDER", "BY") for a, b in pairwise(tokens))  # by a comment
    return apart or any(token.token_type == TokenType.ORDER_BY for token in tokens)


def is_edit(query: str) -> bool:
    """Whether the statement, after its WITH clause if it has one, is an INSERT, UPDATE, DELETE or REPLACE."""
    kinds = [token.token_type for token in _top_level(query)]
    verbs = [
        kind
        for kind, after in pairwise([*kinds, TokenType.SEMICOLON])
        if kind in (*_EDITS, TokenType.SELECT, TokenType.VALUES)
        and (kind != TokenType.REPLACE or after in _AFTER_REPLACE)
    ]
    return bool(verbs) and verbs[0] in _EDITS


def same_rows(left: Sequence[tuple[Value, ...]], right: Sequence[tuple[Value, ...]], *, ordered: bool = False) -> bool:
    """Whether two results are the same bag of rows, or with ``ordered`` the same sequence.

    Columns count in their order and without their names. 1 equals 1.0, and floats are compared by nine significant
    digits, and below ``_ZERO`` as 0, because a sum depends on the order of its terms; but a whole one beside an integer
    exactly.
    """
    exact = {i for row in (*left, *right) for i, value in enumerate(row) if isinstance(value, int)}
    a, b = ([tuple(_comparable(v, i in exact) for i, v in enumerate(row)) for row in rows] for rows in (left, right))
    return a == b if ordered else Counter(a) == Counter(b)


def _comparable(value: Value, exact: bool) -> Value:
    if isinstance(value, float):
        value = 0.0 if abs(value) < _ZERO else value
        return int(value) if exact and value.is_integer() else float(f"{value:.9g}")
    return value
