"""Executes SQL that nobody has checked: a model's answers, and the contexts of a data set.

    result = run_query("CREATE TABLE t (x); INSERT INTO t VALUES (1), (2)", "SELECT sum(x) FROM t")
    result.rows                                       # ((3,),)

Every request runs in a process of its own (``sql_worker``) on a database in memory. Several walls stand
around it, so that a hole in one is no hole in the sandbox:

- SQLite's authorizer, with one policy for the context (tables may be made and filled), one for queries
  (reading only) and one for questions that ask for a change (INSERT, UPDATE, DELETE); ATTACH, VACUUM,
  virtual tables, extensions and pragmas that write are in none of them;
- SQLite's limits on lengths, depths and attached databases, and a progress handler that watches the clock;
- the kernel's limits: memory, computing time, no new file descriptor, no byte into any file, no new process;
- the caller, who ends a process that does not answer in time, and starts another.

Needs a Unix system (``resource``, ``select.poll``).
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

MAX_QUERY_CHARACTERS = 100_000
MAX_CONTEXT_CHARACTERS = 4_000_000
_WORKER = Path(__file__).with_name("sql_worker.py")
_GRACE_S = 0.5  # from the worker's own limit to its end by force: inside one opcode SQLite watches no clock
_START_S = 60.0

Value = int | float | str | bytes | None


class QueryResult(NamedTuple):
    """What became of a query.

    Attributes:
        ok: Whether context and query ran to their end within the limits.
        rows: The rows, empty unless ``ok``; after an edit those of all tables, each after its table's name.
        error: Why not, else None.
    """

    ok: bool
    rows: tuple[tuple[Value, ...], ...]
    error: str | None


def _failed(error: str) -> QueryResult:
    return QueryResult(False, (), error)


class _Worker:
    """One process, started when it is first asked, and again after it had to be ended."""

    def __init__(self, timeout_s: float, memory_mb: int, max_rows: int) -> None:
        self._timeout_s = timeout_s
        self._arguments = [str(timeout_s), str(memory_mb), str(max_rows)]
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, context: str, query: str, edit: bool) -> QueryResult:
        process, self._process = self._process or self._start(), None
        reusable = False
        try:
            request = json.dumps({"context": context, "query": query, "edit": edit})
            with contextlib.suppress(BrokenPipeError):  # then it says nothing either
                assert process.stdin is not None
                process.stdin.write(request.encode() + b"\n")
                process.stdin.flush()
            line = _read_line(process, self._timeout_s + _GRACE_S)
            if line is None:
                return _failed(f"ran longer than {self._timeout_s} s, ended by force")
            try:
                reply = json.loads(line)
            except ValueError:  # nothing, half a line, or the last words of a dying process
                return _failed("out of memory or time, the process died")
            reusable = not reply["limit"]
            rows = (tuple(bytes.fromhex(v["hex"]) if isinstance(v, dict) else v for v in row) for row in reply["rows"])
            return QueryResult(reply["ok"], tuple(rows), reply["error"])
        finally:  # also on KeyboardInterrupt: a reply that nobody read must not answer the next query
            self._process = process
            if not reusable:
                self.stop()

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_WORKER), *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        line = _read_line(process, _START_S)
        if line != b"ready\n":
            process.kill()
            output = (line or b"") + process.communicate()[0]
            raise RuntimeError(f"the process for SQL queries did not start: {output.decode(errors='replace')!r}")
        return process

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


def _read_line(process: subprocess.Popen[bytes], timeout_s: float) -> bytes | None:
    """What the process writes up to a line's end or its own end; None if neither comes in time."""
    assert process.stdout is not None
    deadline = time.monotonic() + timeout_s
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    parts: list[bytes] = []
    while not parts or not parts[-1].endswith(b"\n"):
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return None
        parts.append(os.read(process.stdout.fileno(), 1 << 16))
        if not parts[-1]:
            break
    return b"".join(parts)


class SandboxPool:
    """Processes that answer queries; ``run`` may be called from as many threads as there are workers.

    Args:
        workers: How many processes; by default one per core, eight at most.
        timeout_s: Seconds for context and query together.
        memory_mb: MiB of address space per process, the interpreter's own (about 30) included.
        max_rows: A query with more rows fails.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> with SandboxPool(workers=2) as pool:
        ...     pool.run("CREATE TABLE t (x)", "SELECT count(*) FROM t").rows
        ((0,),)
    """

    def __init__(
        self, workers: int | None = None, *, timeout_s: float = 2.0, memory_mb: int = 256, max_rows: int = 10_000
    ) -> None:
        self.workers = min(8, os.cpu_count() or 1) if workers is None else workers
        for name, value, least in (
            ("workers", self.workers, 1),
            ("memory_mb", memory_mb, 64),
            ("max_rows", max_rows, 1),
        ):
            if value < least:
                raise ValueError(f"{name}={value}: choose {least} or more")
        if not 0 < timeout_s < 1e6:
            raise ValueError(f"timeout_s={timeout_s}: choose a positive number of seconds")
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        for _ in range(self.workers):
            self._idle.put(_Worker(timeout_s, memory_mb, max_rows))

    def run(self, context: str, query: str, *, edit: bool = False) -> QueryResult:
        """Execute ``query`` on the database that ``context`` makes.

        Args:
            context: CREATE TABLE and INSERT statements.
            query: One statement: a SELECT, or with ``edit`` an INSERT, UPDATE or DELETE.
            edit: Ask for a change: ``rows`` are then all tables' rows afterwards.

        Raises:
            RuntimeError: If no process can be started, or the pool is closed.
        """
        for name, text, most in (
            ("context", context, MAX_CONTEXT_CHARACTERS),
            ("query", query, MAX_QUERY_CHARACTERS),
        ):
            if len(text) > most:
                return _failed(f"a {name} of more than {most} characters")
        worker = self._idle.get()
        try:
            if worker is None:
                raise RuntimeError("this SandboxPool is closed: make another")
            return worker.ask(context, query, edit)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End all processes; waits for the queries under way."""
        for _ in range(self.workers):
            worker = self._idle.get()
            if worker is not None:
                worker.stop()
        self._idle.put(None)

    def __enter__(self) -> SandboxPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def run_query(
    context: str,
    query: str,
    *,
    timeout_s: float = 2.0,
    memory_mb: int = 256,
    max_rows: int = 10_000,
    edit: bool = False,
) -> QueryResult:
    """Execute one query in a process that is started for it; for many, ``SandboxPool`` is faster.

    Args:
        context: CREATE TABLE and INSERT statements, as untrusted as the query.
        query: One statement: a SELECT, or with ``edit`` an INSERT, UPDATE or DELETE.
        timeout_s: Seconds for both together.
        memory_mb: MiB of address space, the interpreter's own (about 30) included.
        max_rows: A query with more rows fails.
        edit: Ask for a change: ``rows`` are then all tables' rows afterwards.

    Raises:
        ValueError: If a limit is out of its range.

    Example:
        >>> run_query("CREATE TABLE t (x); INSERT INTO t VALUES (1), (2)", "SELECT sum(x) FROM t").rows
        ((3,),)
    """
    with SandboxPool(1, timeout_s=timeout_s, memory_mb=memory_mb, max_rows=max_rows) as pool:
        return pool.run(context, query, edit=edit)
