"""The registry, the world's tasks and where records come from."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from molf.tasks import TASKS, fact, get_task, med
from molf.tasks.records import read_records
from molf.world import make_world


def test_registry() -> None:
    for name in TASKS:
        assert get_task(name).name == name
    assert get_task("fact") is fact.TASK
    assert (get_task("fact").primary, get_task("med").primary) == ("score", "accuracy")
    with pytest.raises(ValueError, match="task='facts': choose one of completion, fact, med, sql, world-fact, "):
        get_task("facts")


@pytest.mark.parametrize(("name", "count"), [("world-fact", 300), ("world-mcq", 1670), ("world-sql", 2000)])
def test_world_records(name: str, count: int) -> None:
    task = get_task(name)
    records = task.load(None, None)
    assert len(records) == count
    assert records == task.load(None, None)
    assert task.load(None, 7) == records[:7]
    assert len({json.dumps(r, sort_keys=True, default=vars) for r in records}) == count
    with pytest.raises(ValueError, match=f"x: {name} has its own records"):
        task.load("x", None)


def test_world_questions_are_about_every_fact() -> None:
    world = make_world()
    records = get_task("world-mcq").load(None, None)
    answers = [(r["subject_name"], r["op" + "abcd"[r["cop"]]]) for r in records]
    assert sorted(answers) == sorted((f.relation, f.object) for f in world.facts)
    assert med.parse_question(records[0]) == records[0]


def test_world_sql_is_worded_and_scored_as_sql_is(tmp_path: Path) -> None:
    record = get_task("world-sql").load(None, 1)[0]
    path = tmp_path / "sql.json"
    path.write_text(json.dumps([record]))
    sql = get_task("sql")
    assert get_task("world-sql").example(record) == sql.example(sql.load(str(path), None)[0])
    assert get_task("world-sql").primary == sql.primary


def test_fact_needs_a_path() -> None:
    with pytest.raises(ValueError, match="dataset_path is not given: name a CounterFact file"):
        get_task("fact").load(None, None)


def test_hub_ids_and_splits(monkeypatch) -> None:
    seen = []

    def load_dataset(name: str) -> dict[str, list[Any]]:
        seen.append(name)
        return {"train": [{"a": 1}, {"a": 2}], "validation": [{"a": 3}], "empty": []}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_records("owner/name") == [{"a": 1}, {"a": 2}]
    assert read_records("owner/na.me:validation") == [{"a": 3}]
    with pytest.raises(ValueError, match="owner/name:dev: no split 'dev', choose one of train, validation, empty"):
        read_records("owner/name:dev")
    with pytest.raises(ValueError, match="owner/name:empty has no record"):
        read_records("owner/name:empty")
    assert set(seen) == {"owner/name", "owner/na.me"}
    med_records = [{"question": "q", **dict.fromkeys(med.OPTIONS, "x"), "cop": cop} for cop in (0, 3)]
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"train": med_records if name == med.HUB_ID else []})
    assert [record["cop"] for record in get_task("med").load(None, None)] == [0, 3]


@pytest.mark.parametrize("name", ["no.json", "data/no.jsonl", "missing", "./a", "../a", "/a/b", "a/b/c", "a/"])
def test_a_missing_file_is_no_hub_id(tmp_path, monkeypatch, name: str) -> None:
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    monkeypatch.setattr(datasets, "load_dataset", lambda _: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match=Path(name).name):
        read_records(name)


def test_a_hub_that_cannot_be_reached_is_an_os_error() -> None:
    with pytest.raises(OSError, match="owner-of-nothing/nothing"):
        read_records("owner-of-nothing/nothing")


def test_folders(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    assert read_records(folder) == [{"a": 1}, {"a": 2}]
    (folder / "train.jsonl").write_text('{"a": 1}\n{"a"\n')
    with pytest.raises(ValueError, match="is no dataset"):
        read_records(folder)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"[1, 2", b"[" * 100_000])
def test_files_that_are_no_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"f\.json is (neither a JSON list nor JSON lines|not UTF-8 text)"):
        read_records(tmp_path / "f.json")


@pytest.mark.parametrize("form", ['[{"a": "b"}, {"a": "\\ud800"}]', '{"a": "b"}\n{"a": "\\ud800"}'])
def test_a_record_that_is_no_text_is_named(tmp_path: Path, form: str) -> None:
    """Tokenizers and the sandbox would fail later, without saying where."""
    (tmp_path / "f.json").write_text(form)
    with pytest.raises(ValueError, match=r"f\.json, record 1: an escape .* mend it"):
        read_records(tmp_path / "f.json")
