"""The process that executes untrusted SQL for ``molf.tasks.sql_sandbox``, which starts it by its path.

It imports nothing but the standard library, so that it starts in some 30 ms, gives up the right to
open files before it reads its first request, and gives every request a database of its own in memory.
A request and its reply are one line of JSON each; JSON, and not pickle, because the caller must not
trust what a process says that hostile input has been through.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sqlite3
import sys
import time
from collections.abc import Callable
from typing import Any

Reply = dict[str, Any]

READ = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE})
"""What a query may do."""

EDITS = frozenset({sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE})
"""What a query may do besides, where the question asks for a change of the data."""

BUILD = frozenset(
    {
        sqlite3.SQLITE_CREATE_TABLE,
        sqlite3.SQLITE_CREATE_INDEX,
        sqlite3.SQLITE_CREATE_VIEW,
        sqlite3.SQLITE_CREATE_TRIGGER,
        sqlite3.SQLITE_ALTER_TABLE,
        sqlite3.SQLITE_DROP_TABLE,
        sqlite3.SQLITE_DROP_INDEX,
        sqlite3.SQLITE_DROP_VIEW,
        sqlite3.SQLITE_DROP_TRIGGER,
        sqlite3.SQLITE_REINDEX,
        sqlite3.SQLITE_TRANSACTION,
    }
)
"""What a context may do besides both. Virtual, temporary and attached tables are in no policy."""

FORBIDDEN_FUNCTIONS = frozenset({"load_extension", "fts3_tokenizer", "readfile", "writefile", "edit", "sqlite_log"})
SCHEMA_PRAGMAS = frozenset({"table_info", "table_xinfo", "foreign_key_list", "index_list", "index_info"})
"""The pragmas that read the schema and can change nothing."""

MAX_RESULT_BYTES = 16 << 20
_SCHEMA_TABLES = "SELECT 1 FROM pragma_table_info('t'), pragma_foreign_key_list('t')"
_JSON_TABLES = "SELECT 1 FROM json_each('[]'), json_tree('[]')"  # they read their argument and nothing else
_LIMITS = {
    "SQLITE_LIMIT_LENGTH": 16 << 20,
    "SQLITE_LIMIT_SQL_LENGTH": 8 << 20,
    "SQLITE_LIMIT_EXPR_DEPTH": 200,
    "SQLITE_LIMIT_COMPOUND_SELECT": 100,
    "SQLITE_LIMIT_ATTACHED": 0,
    "SQLITE_LIMIT_LIKE_PATTERN_LENGTH": 1000,
    "SQLITE_LIMIT_TRIGGER_DEPTH": 100,
    "SQLITE_LIMIT_WORKER_THREADS": 0,
}


class LimitError(Exception):
    """The request ran into a limit of time or size."""


def authorizer(allowed: frozenset[int], edited: list[str]) -> Callable[..., int]:
    """SQLite's question "may this statement do that?", answered by ``allowed``; notes the edited tables."""

    def check(action: int, first: str | None, second: str | None, _database: str | None, _source: str | None) -> int:
        permitted = action in allowed
        if action == sqlite3.SQLITE_FUNCTION:
            permitted = str(second).lower() not in FORBIDDEN_FUNCTIONS
        elif action == sqlite3.SQLITE_PRAGMA:
            permitted = str(first).lower() in SCHEMA_PRAGMAS
        elif permitted and action in EDITS:
            # a CREATE writes the schema table too, so a context may; alone, SQLite refuses it to a statement
            permitted = allowed >= BUILD or not str(first).lower().startswith("sqlite_")
            edited.append(str(first))
        return sqlite3.SQLITE_OK if permitted else sqlite3.SQLITE_DENY

    return check


def fetch(cursor: sqlite3.Cursor, rows: list[list[Any]], max_rows: int) -> None:
    """Append the cursor's rows, as JSON can hold them, to ``rows``.

    Raises:
        LimitError: If ``rows`` outgrows ``max_rows`` or ``MAX_RESULT_BYTES``.
    """
    size = 0
    for row in cursor:
        if len(rows) == max_rows:
            raise LimitError(f"more than {max_rows} rows")
        size += sum(len(value) if isinstance(value, str | bytes) else 8 for value in row)
        if size > MAX_RESULT_BYTES:
            raise LimitError(f"a result of more than {MAX_RESULT_BYTES >> 20} MiB")
        rows.append([{"hex": value.hex()} if isinstance(value, bytes) else value for value in row])


def execute(connection: sqlite3.Connection, context: str, query: str, edit: bool, max_rows: int) -> list[list[Any]]:
    """Run the context, then the query, each under its policy; the rows, or all tables after an edit."""
    connection.set_authorizer(authorizer(READ | EDITS | BUILD, []))
    connection.executescript(context)
    edited: list[str] = []
    connection.set_authorizer(authorizer(READ | EDITS if edit else READ, edited))
    rows: list[list[Any]] = []
    cursor = connection.execute(query)
    if not edit:
        if cursor.description is None:
            raise sqlite3.ProgrammingError("not a query")
        fetch(cursor, rows, max_rows)
        return rows
    cursor.fetchall()
    if not edited:
        raise sqlite3.ProgrammingError("no INSERT, UPDATE or DELETE")
    connection.set_authorizer(authorizer(READ, []))
    tables = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY 1"
    for (name,) in connection.execute(tables).fetchall():
        quoted, text = name.replace('"', '""'), name.replace("'", "''")
        fetch(connection.execute(f"SELECT '{text}', * FROM \"{quoted}\""), rows, max_rows)
    return rows


def answer(context: str, query: str, edit: bool, timeout_s: float, max_rows: int) -> Reply:
    """One request in a database of its own. ``limit`` in the reply: a limit was hit, start a fresh process."""
    deadline = time.monotonic() + timeout_s
    try:
        with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
            connection.text_factory = lambda raw: raw.decode("utf-8", "backslashreplace")
            connection.execute("PRAGMA temp_store = MEMORY")
            connection.execute(_SCHEMA_TABLES)  # their first use declares them, which no policy allows
            with contextlib.suppress(sqlite3.OperationalError):  # an SQLite that was built without JSON
                connection.execute(_JSON_TABLES)
            if sys.version_info >= (3, 11):  # before, the authorizer and the process's limits stand alone
                for name, value in _LIMITS.items():
                    connection.setlimit(getattr(sqlite3, name), value)
            connection.set_progress_handler(lambda: time.monotonic() > deadline, 1000)
            rows = execute(connection, context, query, edit, max_rows)
        return {"ok": True, "rows": rows, "error": None, "limit": False}
    except MemoryError:
        return {"ok": False, "rows": [], "error": "out of memory", "limit": True}
    except LimitError as error:
        return {"ok": False, "rows": [], "error": str(error), "limit": True}
    except (sqlite3.Error, sqlite3.Warning, ValueError) as error:  # ValueError: NUL bytes, lone surrogates
        late = time.monotonic() > deadline
        message = f"ran longer than {timeout_s} s" if late else f"{type(error).__name__}: {error}"
        return {"ok": False, "rows": [], "error": message, "limit": late}


def give_up_rights(memory_mb: int) -> None:
    """No file, core dump or process any more, and no more memory than ``memory_mb`` MiB."""
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        connection.execute("SELECT randomblob(1)")  # SQLite opens its source of randomness while it still may
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 3),  # the three pipes; with no free descriptor nothing can be opened or created
    ):
        resource.setrlimit(limit, (value, value))


def limit_cpu(timeout_s: float) -> None:
    """Let the kernel end this process if it computes two seconds longer than ``timeout_s``, parent or no parent."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = int(usage.ru_utime + usage.ru_stime + timeout_s) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def main(timeout_s: float, memory_mb: int, max_rows: int) -> None:
    """Answer requests from standard input until it ends."""
    give_up_rights(memory_mb)
    print("ready", flush=True)
    for line in sys.stdin:
        limit_cpu(timeout_s)
        request = json.loads(line)
        reply = answer(request["context"], request["query"], request["edit"], timeout_s, max_rows)
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
