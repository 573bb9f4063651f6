"""Hostile SQL: nothing reaches a file, nothing outlives its limit, and the pool answers the next query."""

import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from molf.tasks import sql_sandbox
from molf.tasks.sql_sandbox import SandboxPool, run_query

TIMEOUT_S = 0.5
MARGIN_S = 2.5  # the half second of grace, the start of a process, and a machine under load
SHOP = "CREATE TABLE item (name TEXT, price REAL); INSERT INTO item VALUES ('pen', 1.5), ('ink', NULL);"
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
MANY = ", ".join(["item"] * 40)

# {out}: a path that must not come to be; {secret}: a file whose text must not come back
QUERIES = {
    "attach": "ATTACH DATABASE '{out}' AS o",
    "attach-uri": "ATTACH 'file:{out}?mode=rwc' AS o",
    "attach-expression": "ATTACH '{out}' || '' AS o",
    "attach-memory": "ATTACH ':memory:' AS o",
    "attach-commented": "/* SELECT */ -- SELECT\nATTACH '{out}' AS o",
    "detach-main": "DETACH main",
    "vacuum-into": "VACUUM INTO '{out}'",
    "vacuum-main-into": "VACUUM main INTO '{out}'",
    "vacuum": "VACUUM",
    "second-statement-attach": "SELECT 1; ATTACH '{out}' AS o",
    "second-statement-vacuum": "SELECT name FROM item; VACUUM INTO '{out}'",
    "writefile": "SELECT writefile('{out}', 'x')",
    "edit": "SELECT edit('x', 'cp /dev/stdin {out}')",
    "readfile": "SELECT readfile('{secret}')",
    "fsdir": "SELECT * FROM fsdir('/')",
    "load-extension": "SELECT load_extension('{out}')",
    "load-extension-entry": "SELECT load_extension('{secret}', 'sqlite3_init')",
    "load-extension-uppercase": "SELECT LOAD_EXTENSION('{secret}')",
    "fts3-tokenizer": "SELECT fts3_tokenizer('simple', x'4141414141414141')",
    "pragma-journal": "PRAGMA journal_mode = WAL",
    "pragma-temp-directory": "PRAGMA temp_store_directory = '{dir}'",
    "pragma-data-directory": "PRAGMA data_store_directory = '{dir}'",
    "pragma-temp-store": "PRAGMA temp_store = FILE",
    "pragma-writable-schema": "PRAGMA writable_schema = ON",
    "pragma-heap": "PRAGMA hard_heap_limit = 0",
    "pragma-trusted-schema": "PRAGMA trusted_schema = ON",
    "pragma-function": "SELECT * FROM pragma_journal_mode('wal')",
    "pragma-function-database-list": "SELECT file FROM pragma_database_list",
    "pragma-read": "PRAGMA database_list",
    "fts5-table": "CREATE VIRTUAL TABLE f USING fts5(x)",
    "csv-table": "CREATE VIRTUAL TABLE c USING csv(filename='{secret}')",
    "zipfile-table": "CREATE VIRTUAL TABLE z USING zipfile('{out}')",
    "temp-table": "CREATE TEMP TABLE t AS SELECT 1",
    "create": "CREATE TABLE t AS SELECT * FROM item",
    "drop": "DROP TABLE item",
    "delete": "DELETE FROM item",
    "insert-returning": "INSERT INTO item VALUES ('nib', 1) RETURNING name",
    "cte-update": "WITH a AS (SELECT 1) UPDATE item SET price = 0",
    "schema-update": "UPDATE sqlite_master SET sql = ''",
    "begin": "BEGIN EXCLUSIVE",
    "reindex": "REINDEX",
    "analyze": "ANALYZE",
    "many-statements": "SELECT 1;" * 5000,
    "endless-cte": f"{ENDLESS} SELECT count(*) FROM n",
    "endless-cte-rows": f"{ENDLESS} SELECT i FROM n",
    "endless-cte-sorted": f"{ENDLESS} SELECT hex(randomblob(999)) FROM n ORDER BY 1",
    "endless-cte-joined": f"{ENDLESS} SELECT max(a.i * b.i) FROM n a, n b",
    "series": "SELECT sum(value) FROM generate_series(1, 1000000000000)",
    "zeroblob": "SELECT zeroblob(2000000000)",
    "zeroblob-many": f"{ENDLESS} SELECT zeroblob(10000000) FROM n LIMIT 1000",
    "randomblob": "SELECT randomblob(2000000000)",
    "replace": "SELECT replace(hex(zeroblob(4000000)), '0', hex(zeroblob(1000000)))",
    "replace-slow": "SELECT replace(printf('%.*c', 15000000, 'a'), printf('%.*c', 7000000, 'a') || 'b', '')",
    "group-concat": f"{ENDLESS} SELECT group_concat(hex(zeroblob(100000))) FROM n",
    "json-array": f"{ENDLESS} SELECT json_group_array(hex(zeroblob(100000))) FROM n",
    "cross-join": f"SELECT count(*) FROM {', '.join(f'item i{n}' for n in range(60))}",
    "cross-join-columns": f"SELECT * FROM {', '.join(f'item i{n}' for n in range(30))}",
    "too-many-tables": f"SELECT count(*) FROM {', '.join(f'item i{n}' for n in range(100))}",
    "deep-selects": "SELECT " + "(SELECT " * 5000 + "1" + ")" * 5000,
    "deep-case": "SELECT " + "CASE WHEN 1 THEN " * 5000 + "1" + " END" * 5000,
    "deep-not": "SELECT " + "NOT " * 20000 + "1",
    "long-chain": "SELECT 1" + " + 1" * 20000,
    "compound": " UNION ALL ".join(["SELECT 1"] * 3000),
    "nul-byte": "SELECT 1\0; ATTACH '{out}' AS o",
    "nul-byte-first": "\0SELECT 1",
    "lone-surrogate": "SELECT '\ud800'",
    "megabyte-comment": "SELECT 1 /*" + "x" * 1_000_000 + "*/",
    "megabyte-literal": "SELECT '" + "x" * 1_000_000 + "'",
    "unterminated": "SELECT '",
    "empty": "",
    "newline-request": 'SELECT 1\n{"context": "", "query": "SELECT 1", "edit": false}\n(',
}
COSTLY = {  # SQLite may find a cheap and harmless answer
    "deep-parentheses": "SELECT " + "(" * 20000 + "1" + ")" * 20000,
    "printf-precision": "SELECT printf('%.*c', 2000000000, 'a')",
    "printf-width": "SELECT printf('%2000000000d', 1)",
    "like-backtracking": "SELECT printf('%.*c', 9000000, 'a') LIKE '" + "%a" * 400 + "%b'",
    "glob-backtracking": "SELECT printf('%.*c', 9000000, 'a') GLOB '" + "*a" * 400 + "*b'",
}
CONTEXTS = {
    "attach": "ATTACH '{out}' AS o; CREATE TABLE o.t (x)",
    "vacuum-into": SHOP + "VACUUM INTO '{out}'",
    "writefile": "CREATE TABLE t AS SELECT writefile('{out}', 'x') AS x",
    "readfile": "CREATE TABLE t AS SELECT readfile('{secret}') AS x",
    "load-extension": "CREATE TABLE t AS SELECT load_extension('{secret}') AS x",
    "load-extension-default": "CREATE TABLE t (x, y DEFAULT (load_extension('{secret}'))); INSERT INTO t (x) SELECT 1",
    "load-extension-view": "CREATE VIEW item AS SELECT load_extension('{secret}') AS name",
    "load-extension-trigger": SHOP + "CREATE TRIGGER g INSERT ON item BEGIN SELECT load_extension('{secret}'); END;"
    "INSERT INTO item VALUES ('x', 1)",
    "pragma-journal": "PRAGMA journal_mode = WAL; CREATE TABLE t (x)",
    "pragma-temp-directory": "PRAGMA temp_store_directory = '{dir}'",
    "pragma-writable-schema": "PRAGMA writable_schema = ON; UPDATE sqlite_master SET sql = 'x'",
    "fts5": "CREATE VIRTUAL TABLE f USING fts5(x)",
    "csv": "CREATE VIRTUAL TABLE c USING csv(filename='{secret}')",
    "dot-commands": ".output {out}\n.shell touch {out}\n.open {out}",
    "temp-table": "CREATE TEMP TABLE t (x)",
    "temp-view": "CREATE TEMP VIEW v AS SELECT 1",
    "endless-insert": f"CREATE TABLE t (x); {ENDLESS} INSERT INTO t SELECT i FROM n",
    "endless-blobs": f"CREATE TABLE t (x); {ENDLESS} INSERT INTO t SELECT randomblob(1000000) FROM n",
    "endless-view": f"CREATE VIEW item AS {ENDLESS} SELECT i AS name FROM n WHERE i < 0",
    "endless-table": f"CREATE TABLE item AS {ENDLESS} SELECT i AS name FROM n",
    "slow-index": f"CREATE TABLE t (x); CREATE INDEX i ON t (hex(zeroblob(9000000))); {ENDLESS} "
    "INSERT INTO t SELECT i FROM n LIMIT 100000",
    "view-recursion": "CREATE VIEW v AS SELECT 1 FROM w; CREATE VIEW w AS SELECT 1 FROM v; CREATE VIEW item AS SELECT"
    " 1 AS name FROM v",
    "nul-byte": "CREATE TABLE t (x);\0ATTACH '{out}' AS o",
    "eight-megabytes": "SELECT 1;" + " " * 8_000_000,
    "many-columns": f"CREATE TABLE t ({', '.join(f'c{i}' for i in range(5000))})",
}
EDITS = {
    "attach": "ATTACH '{out}' AS o",
    "vacuum-into": "VACUUM INTO '{out}'",
    "drop": "DROP TABLE item",
    "create": "CREATE TABLE t AS SELECT 1",
    "alter": "ALTER TABLE item RENAME TO t",
    "pragma": "PRAGMA writable_schema = ON",
    "schema": "DELETE FROM sqlite_master",
    "select": "SELECT * FROM item",
    "load-extension": "UPDATE item SET name = load_extension('{secret}')",
    "endless-insert": f"{ENDLESS} INSERT INTO item SELECT i, i FROM n",
    "blobs": "UPDATE item SET name = zeroblob(2000000000)",
    "two": "DELETE FROM item; DELETE FROM item",
}


@pytest.fixture(scope="module")
def pool():
    with SandboxPool(1, timeout_s=TIMEOUT_S, memory_mb=128, max_rows=1000) as shared:
        yield shared


@pytest.fixture
def attack(pool, tmp_path, monkeypatch):
    """Runs an attack with its paths filled in, and asserts all that must hold whatever it is."""
    folder = tmp_path / "victim"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (tmp_path / "secret").write_text("the secret text")
    paths = {"out": folder / "out.db", "dir": folder, "secret": tmp_path / "secret"}

    def fill(text):
        for name, path in paths.items():
            text = text.replace(f"{{{name}}}", str(path))
        return text

    def run(context, query, **options):
        watched = [folder, tmp_path, Path("/tmp"), Path(sql_sandbox.__file__).parent]
        before = {path for where in watched for path in where.iterdir()}
        start = time.monotonic()
        result = pool.run(fill(context), fill(query), **options)
        taken = time.monotonic() - start
        created = {path for where in watched for path in where.iterdir()} - before
        # other programs write to /tmp too, but none of them what an attack would
        assert not {path for path in created if path.parent in watched[:2] or path.suffix == ".db"}
        assert taken < TIMEOUT_S + MARGIN_S
        assert result.ok or result.rows == ()
        assert "the secret text" not in str(result)
        assert pool.run(SHOP, "SELECT count(*), max(price) FROM item") == (True, ((2, 1.5),), None)
        return result

    return run


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
def test_hostile_query(attack, query):
    result = attack(SHOP, query)
    assert not result.ok
    assert result.error


@pytest.mark.parametrize("query", COSTLY.values(), ids=COSTLY)
def test_costly_query(attack, query):
    result = attack(SHOP, query)
    assert result.error or result.rows in (((0,),), ((1,),), ((None,),))


@pytest.mark.parametrize("query", ["zeroblob", "series", "pragma-journal", "attach", "nul-byte"])
def test_a_file_of_the_working_folder_stays_as_it_is(attack, query):
    Path("out.db").write_bytes(b"")
    attack(SHOP, QUERIES[query])
    assert Path("out.db").read_bytes() == b""


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_hostile_context(attack, context):
    result = attack(context, "SELECT name FROM item")
    assert not result.ok
    assert result.error


@pytest.mark.parametrize("query", EDITS.values(), ids=EDITS)
def test_hostile_edit(attack, query):
    result = attack(SHOP, query, edit=True)
    assert not result.ok
    assert result.error


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ("endless-cte", f"ran longer than {TIMEOUT_S} s"),  # the worker's own clock; else ", ended by force"
        ("replace-slow", f"ran longer than {TIMEOUT_S} s, ended by force"),
        ("load-extension", "OperationalError: not authorized to use function: load_extension"),
        ("attach-memory", "DatabaseError: not authorized"),
        ("zeroblob", "DataError: string or blob too big"),
        ("megabyte-literal", "a query of more than 100000 characters"),
    ],
)
def test_the_outer_wall_is_the_one_that_holds(attack, query, error):
    """Where two walls stop the same attack, the inner one must not hide a hole in the outer."""
    if query == "zeroblob" and sys.version_info < (3, 11):
        pytest.skip("Python 3.10 cannot set SQLite's limits")
    assert attack(SHOP, QUERIES[query]).error == error


def test_the_process_itself_cannot_open_a_file(tmp_path):
    """The kernel's wall alone, as if the authorizer had a hole."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import sql_worker, sqlite3; sql_worker.give_up_rights(128)\n"
        "for attempt in (lambda: open(sys.argv[2], 'w'),\n"
        "                lambda: sqlite3.connect(':memory:').execute('VACUUM INTO ?', [sys.argv[2]]),\n"
        "                lambda: sqlite3.connect(sys.argv[2]).execute('CREATE TABLE t (x)'),\n"
        "                lambda: bytearray(1 << 30)):\n"
        "    try: attempt()\n"
        "    except (OSError, sqlite3.OperationalError, MemoryError) as error: print(type(error).__name__)\n"
    )
    arguments = [sys.executable, "-I", "-c", code, str(Path(sql_sandbox.__file__).parent), str(tmp_path / "out")]
    output = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    assert output == ["OSError", "OperationalError", "OperationalError", "MemoryError"]
    assert list(tmp_path.iterdir()) == []


def test_the_worker_imports_the_standard_library_alone():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import sql_worker; print(*sys.modules)"
    arguments = [sys.executable, "-I", "-S", "-c", code, str(Path(sql_sandbox.__file__).parent)]
    modules = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    assert "sqlite3" in modules
    assert not {"torch", "transformers", "molf", "numpy"} & set(modules)
    assert len(modules) < 120


def test_values_come_back_as_they_were():
    values = "(NULL), (0), (-9223372036854775808), (1.5), (1e300), (1e999), ('é\n\"'), (''), (x''), (x'00ff'), ('{}')"
    result = run_query(f"CREATE TABLE t (x); INSERT INTO t VALUES {values}", "SELECT x FROM t")
    assert result.ok, result.error
    expected = [None, 0, -(2**63), 1.5, 1e300, math.inf, 'é\n"', "", b"", b"\0\xff", "{}"]
    assert [(type(row[0]), row[0]) for row in result.rows] == [(type(value), value) for value in expected]


def test_text_that_is_no_utf8_comes_back_readable():
    assert run_query("", "SELECT CAST(x'ff41' AS TEXT)").rows == (("\\xffA",),)


def test_an_edit_returns_all_tables_afterwards(pool):
    context = SHOP + "CREATE TABLE log (x INTEGER PRIMARY KEY AUTOINCREMENT); INSERT INTO log VALUES (7)"
    result = pool.run(context, "DELETE FROM item WHERE price IS NULL", edit=True)
    assert result.rows == (("item", "pen", 1.5), ("log", 7))
    result = pool.run(context, "WITH a AS (SELECT 8) INSERT INTO log SELECT * FROM a RETURNING x", edit=True)
    assert result.rows == (("item", "pen", 1.5), ("item", "ink", None), ("log", 7), ("log", 8))


def test_requests_see_nothing_of_each_other(pool):
    assert pool.run("CREATE TABLE t (x)", "SELECT * FROM t").ok
    assert "no such table" in pool.run("", "SELECT * FROM t").error


def test_limits_of_rows_and_result(pool):
    numbers = f"{ENDLESS} SELECT i FROM n LIMIT "
    assert len(pool.run("", numbers + "1000").rows) == 1000
    assert pool.run("", numbers + "1001").error == "more than 1000 rows"
    assert "MiB" in pool.run("", f"{ENDLESS} SELECT hex(zeroblob(500000)) FROM n LIMIT 100").error


def test_a_worker_that_was_killed_is_replaced(pool):
    pool.run("", "SELECT 1")
    worker = pool._idle.get()
    os.kill(worker._process.pid, 9)
    pool._idle.put(worker)
    assert "died" in pool.run("", "SELECT 1").error
    assert pool.run("", "SELECT 1").ok


def test_threads_share_the_pool():
    """More threads than workers; half of the queries are killed, and every reply belongs to its query."""
    with SandboxPool(2, timeout_s=0.2) as pool, ThreadPoolExecutor(4) as threads:

        def ask(number):
            return pool.run("", f"{ENDLESS} SELECT count(*) FROM n" if number % 10 == 0 else f"SELECT {number}")

        for number, result in enumerate(threads.map(ask, range(40))):
            assert result.rows == (() if number % 10 == 0 else ((number,),))


def test_no_process_is_left_behind():
    """Not even that of a query under way: closing waits for it."""
    with SandboxPool(1, timeout_s=0.3) as pool, ThreadPoolExecutor(1) as threads:
        pool.run("", "SELECT 1")
        worker = pool._idle.get()
        process = worker._process
        pool._idle.put(worker)
        under_way = threads.submit(pool.run, "", f"{ENDLESS} SELECT count(*) FROM n")
        while not pool._idle.empty():
            time.sleep(0.01)
    assert "longer than 0.3 s" in under_way.result().error
    assert process.poll() is not None
    with pytest.raises(RuntimeError, match="closed"):
        pool.run("", "SELECT 1")


def test_an_interrupted_query_answers_no_later_one(pool, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    pool.run("", "SELECT 1")
    with monkeypatch.context() as patch:
        patch.setattr(sql_sandbox, "_read_line", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pool.run("", "SELECT 'of the interrupted query'")
    assert pool.run("", "SELECT 2").rows == ((2,),)


def test_a_process_that_does_not_start_says_why(monkeypatch, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('no resource module here')")
    monkeypatch.setattr(sql_sandbox, "_WORKER", broken)
    with pytest.raises(RuntimeError, match="no resource module here"):
        run_query("", "SELECT 1")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"timeout_s": 0}, "timeout_s=0"),
        ({"timeout_s": math.nan}, "timeout_s=nan"),
        ({"memory_mb": 8}, "memory_mb=8"),
        ({"max_rows": 0}, "max_rows=0"),
    ],
)
def test_limits_out_of_range(options, name):
    with pytest.raises(ValueError, match=name):
        run_query("", "SELECT 1", **options)


def test_a_pool_starts_a_process_once_and_not_per_query(monkeypatch):
    """What makes it fast, without a clock: 50 ordinary queries, failing ones among them, in one process."""
    started = []
    start = sql_sandbox._Worker._start
    monkeypatch.setattr(sql_sandbox._Worker, "_start", lambda self: started.append(1) or start(self))
    with SandboxPool(1) as pool:
        for number in range(50):
            assert pool.run(SHOP, "SELECT nothing" if number % 5 == 0 else "SELECT * FROM item").ok is (number % 5 > 0)
    assert len(started) == 1


@pytest.mark.slow
def test_two_hundred_queries_per_second():
    with SandboxPool(2) as pool, ThreadPoolExecutor(2) as threads:
        pool.run(SHOP, "SELECT 1")
        start = time.monotonic()
        results = list(threads.map(lambda _: pool.run(SHOP, "SELECT name FROM item ORDER BY price"), range(1000)))
        rate = len(results) / (time.monotonic() - start)
    assert all(result.ok for result in results)
    assert rate > 200


def test_json_tables_are_read() -> None:
    """SQLite declares them at their first use, which no policy allows: every query of them failed."""
    context = "CREATE TABLE t (x); INSERT INTO t VALUES ('[1, 2]')"
    assert run_query(context, "SELECT value FROM t, json_each(t.x)").rows == ((1,), (2,))
    assert run_query(context, "SELECT count(*) FROM t, json_tree(t.x)").rows == ((3,),)
