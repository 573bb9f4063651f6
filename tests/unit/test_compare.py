"""The sweep's plan and claims, the choice of learning rates, and the verdict's rule."""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest

from molf.files import write_json
from molf.report import compare
from molf.tasks import Task
from molf.train import sweep
from molf.train.data import split

COMMON = {"task": "world-fact", "model_name_or_path": "m"}


def result(method: str, rate: float, seed: int, validation: float, test: float, **more) -> dict:
    metrics = {"validation": {"score": validation}, "test": {"score": test}, "seconds": 10.0, "peak_memory_mib": 50.0}
    arguments = {"method": method, "learning_rate": rate, "seed": seed}
    return {"arguments": arguments, "status": "done", "metrics": {**metrics, **more}}


def failed(method: str, rate: float, seed: int) -> dict:
    return {"arguments": {"method": method, "learning_rate": rate, "seed": seed}, "status": "diverged", "error": "nan"}


def test_the_rate_is_chosen_on_validation_and_reported_on_test() -> None:
    results = [
        result("fft", 1e-4, 0, 50, 90), result("fft", 1e-4, 1, 52, 92),
        result("fft", 1e-3, 0, 60, 70), result("fft", 1e-3, 1, 62, 74),  # better on validation, worse on test
        result("lora", 1e-4, 0, 40, 40), result("lora", 1e-4, 1, 40, 41),
        result("lora", 1e-3, 0, 99, 99), failed("lora", 1e-3, 1),  # a rate counts with all its seeds or not at all
        failed("molf", 1e-3, 0), failed("molf", 1e-3, 1),
    ]  # fmt: skip
    rows = {row.method: row for row in compare.summarise(results, "score")}
    assert (rows["fft"].learning_rate, rows["fft"].scores) == (1e-3, {0: 70, 1: 74})
    assert (rows["lora"].learning_rate, rows["lora"].failed) == (1e-4, 1)
    assert math.isnan(rows["molf"].learning_rate)
    table = compare.markdown(list(rows.values()), "score")
    assert "| fft | 72.00 ± 2.83 | 61.00 | 0.001 |" in table
    assert "| molf | no learning rate ended well with all seeds |" in table


def test_splits_are_disjoint_and_a_matter_of_their_seed_alone() -> None:
    records = list(range(50))
    held_out, editing = (Task("t", "score", None, None, None, edits=edits) for edits in (False, True))
    train, parts = split(held_out, records, 0.2, 10, 0)
    assert (len(train), len(parts["validation"]), len(parts["test"])) == (30, 10, 10)
    assert sorted([*train, *parts["validation"], *parts["test"]]) == records
    assert split(held_out, records, 0.2, 10, 0) == (train, parts)
    assert split(held_out, records, 0.2, 10, 1) != (train, parts)
    train, parts = split(editing, records, 0.5, 0.5, 0)
    assert train == records
    assert sorted([*parts["validation"], *parts["test"]]) == records
    train, parts = split(held_out, records, 10, 0, 0)
    assert (len(train), list(parts), len(parts["validation"])) == (40, ["validation"], 10)
    for sizes in ((0.5, 0.5), (0.001, 10), (40, 20)):
        with pytest.raises(ValueError, match=r"do not split 50 records of t: give sizes"):
            split(held_out, records, *sizes, 0)


def test_equal_validation_takes_the_lower_rate() -> None:
    rows = compare.summarise([result("fft", rate, 0, 50, rate) for rate in (1e-2, 1e-4, 1e-3)], "score")
    assert rows[0].learning_rate == 1e-4


def test_better_needs_an_interval_above_zero_from_three_seeds() -> None:
    def rows(differences: list[float]) -> list[compare.Row]:
        results = [result("fft", 1e-3, seed, 1, 50) for seed in range(len(differences))]
        results += [result("molf", 1e-3, seed, 1, 50 + d) for seed, d in enumerate(differences)]
        return compare.summarise(results, "score")

    assert "+2.00 points (95 % interval -0.48 to +4.48), not distinguishable" in compare.verdict(
        rows([1, 2, 3]), [1e-3]
    )
    certain = compare.verdict(rows([1.9, 2, 2.1]), [1e-3])
    assert "+2.00 points (95 % interval +1.75 to +2.25), better" in certain
    assert "least memory" not in certain
    molf, fft = rows([1, 2, 3])
    cheap = replace(molf, seconds=fft.seconds / 2), replace(fft, memory_mib=molf.memory_mib / 2)
    costs = "Of the 2 that are not distinguishable, molf takes the least time and fft the least memory."
    assert costs in compare.verdict(cheap, [1e-3])
    assert "not distinguishable" in compare.verdict(rows([2, 2]), [1e-3])
    assert "no interval from one seed" in compare.verdict(rows([2]), [1e-3])
    assert "At the edge of the learning rates" in compare.verdict(rows([2]), [1e-3, 1e-2])
    assert "No method ended well" in compare.verdict(compare.summarise([failed("fft", 1, 0)], "score"), [1])


def test_a_plan_names_runs_by_what_they_are(tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    data.write_text("[1]")
    common = {**COMMON, "dataset_path": str(data)}
    runs = sweep.plan(["fft", "molf"], [1e-4, 1e-3], [0, 1], common, {"molf": {"expert_ranks": [16]}})
    assert len({run.key for run in runs}) == 8
    assert [run.seed for run in runs[:4]] == [0] * 4
    again = sweep.plan(["molf", "fft"], [1e-3, 1e-4], [1, 0], common, {"molf": {"expert_ranks": [16]}})
    assert {run.key for run in runs} == {run.key for run in again}
    before = runs[0].key
    data.write_text("[2]")
    assert runs[0].key != before, "other data are another run"
    (tmp_path / "folder" / "in").mkdir(parents=True)
    (run,) = sweep.plan(["fft"], [1e-3], [0], {**COMMON, "dataset_path": str(tmp_path / "folder")}, {})
    keys = [run.key]
    for name, text in (("in/a.json", "[1]"), ("in/a.json", "[2]"), ("b.json", "[2]")):
        (tmp_path / "folder" / name).write_text(text)
        keys.append(run.key)
    assert len(set(keys)) == 4, "other files of a folder, too"
    for arguments, message in (
        (([], [1e-3], [0]), "methods is empty"),
        ((["fft"], [], [0]), "learning_rates is empty"),
        ((["fft"], [1e-3, 1e-3], [0]), "twice"),
        ((["fft"], [1e-3], [0, -1]), r"seeds=\[0, -1\]: a seed is from 0"),
    ):
        with pytest.raises(ValueError, match=message):
            sweep.plan(*arguments, COMMON, {})
    with pytest.raises(ValueError, match="lora, which is not in methods"):
        sweep.plan(["fft"], [1e-3], [0], COMMON, {"lora": {}})


@pytest.mark.parametrize("option", ["learning_rate", "seed", "method", "output_dir", "eval_at_end", "dry_run"])
def test_what_the_sweep_decides_is_refused_as_an_option_of_its_runs(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} given for all methods"):
        sweep.plan(["fft"], [1e-3], [0], COMMON | {option: 1}, {})
    with pytest.raises(ValueError, match=f"{option} given for fft alone"):
        sweep.plan(["fft"], [1e-3], [0], COMMON, {"fft": {option: 1}})


@pytest.mark.parametrize("option", ["task", "dataset_path", "max_examples", "validation_size", "split_seed"])
def test_no_method_has_data_of_its_own(option: str) -> None:
    assert sweep.plan(["fft"], [1e-3], [0], COMMON | {option: 1}, {})
    with pytest.raises(ValueError, match=f"{option} given for fft alone"):
        sweep.plan(["fft"], [1e-3], [0], COMMON, {"fft": {option: 1}})


def _ends_by(folder: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> list[sweep.Run]:
    """A sweep of one run whose process says something and then does as told."""
    program = folder / "program"
    program.write_text(f"#!/bin/sh\necho routed modules: 28\n{words}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    return sweep.plan(["fft"], [1e-3], [0], COMMON, {})


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Are not ignored, as they are by what a shell without a terminal has put into the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("words", ["exit 130", "kill -INT $$"])
def test_a_run_that_was_interrupted_has_no_result(tmp_path: Path, monkeypatch, words: str) -> None:
    runs = _ends_by(tmp_path, monkeypatch, words)
    with pytest.raises(KeyboardInterrupt):
        sweep.run_sweep(runs, tmp_path / "out", workers=1, threads=1)
    assert not list((tmp_path / "out" / "results").glob("*.json"))


def test_a_run_that_was_killed_failed_by_the_signal_and_not_by_its_last_line(tmp_path: Path, monkeypatch) -> None:
    runs = _ends_by(tmp_path, monkeypatch, "kill -KILL $$")
    sweep.run_sweep(runs, tmp_path / "out", workers=1, threads=1)
    [found] = sweep.read_results(runs, tmp_path / "out")
    assert found["status"] == "failed"
    assert found["error"] == "ended by SIGKILL"


def test_a_run_whose_data_change_meanwhile_has_no_result(tmp_path: Path, monkeypatch) -> None:
    data = tmp_path / "data.json"
    data.write_text("[1]")
    _ends_by(tmp_path, monkeypatch, f"echo '[2]' > {data}")
    runs = sweep.plan(["fft"], [1e-3], [0], {**COMMON, "dataset_path": str(data)}, {})
    with pytest.raises(ValueError, match=r"data\.json changed while fft trained on it"):
        sweep.run_sweep(runs, tmp_path / "out", workers=1, threads=1)
    assert not list((tmp_path / "out" / "results").glob("*.json"))


@pytest.mark.parametrize("keep", [False, True])
def test_checkpoints_are_weights_too(tmp_path: Path, monkeypatch, keep: bool) -> None:
    out = tmp_path / "out"
    save = 'folder=$(dirname "$5")/checkpoint-1; mkdir "$folder"; touch "$folder/optimizer.pt"; exit 1'
    sweep.run_sweep(_ends_by(tmp_path, monkeypatch, save), out, workers=1, threads=1, keep_models=keep)
    assert bool(list(out.rglob("optimizer.pt"))) == keep


@pytest.mark.parametrize("text", ['{"key"', "{}", "[1]", '{"key": "another"}'])
def test_a_damaged_result_is_named(tmp_path: Path, text: str) -> None:
    runs = sweep.plan(["fft"], [1e-3], [0], COMMON, {})
    path = tmp_path / "results" / f"{runs[0].key}.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path} is damaged .* remove it"):
        sweep.read_results(runs, tmp_path)


def _counting(run: sweep.Run, folder: Path, threads: int, keep_models: bool, lock: IO[str]) -> None:
    with (folder / "executed.txt").open("a") as file:
        file.write(f"{run.key}\n")
    time.sleep(0.05)
    write_json(folder / "results" / f"{run.key}.json", {"key": run.key, "status": "done", "threads": threads})


def _sweep(folder: Path) -> None:
    sweep._execute = _counting
    runs = sweep.plan(["fft", "molf"], [1e-4, 1e-3, 1e-2], [0, 1], COMMON, {})
    sweep.run_sweep(runs, folder, workers=2, threads=4)


def test_processes_share_a_folder_and_nothing_runs_twice(tmp_path: Path) -> None:
    """Two processes with two workers each, and one more sweep afterwards: every run once, none missing."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_sweep, args=(tmp_path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    last = context.Process(target=_sweep, args=(tmp_path,))
    last.start()
    last.join(60)
    executed = (tmp_path / "executed.txt").read_text().split()
    assert len(executed) == len(set(executed)) == 12
    results = sweep.read_results(sweep.plan(["fft", "molf"], [1e-4, 1e-3, 1e-2], [0, 1], COMMON, {}), tmp_path)
    assert len(results) == 12
    assert {r["threads"] for r in results} == {2}
    assert json.loads((tmp_path / "results" / f"{executed[0]}.json").read_text())["status"] == "done"


ORPHAN = """
import sys
from pathlib import Path
from molf.train import sweep
sys.executable = sys.argv[2]
sweep.run_sweep(sweep.plan(["fft"], [1e-3], [0], {"task": "t"}, {}), Path(sys.argv[1]), workers=1, threads=1)
"""


def test_a_run_that_outlives_its_killed_sweep_keeps_its_claim(tmp_path: Path) -> None:
    """After kill -9 of the sweep alone, nobody else starts the run that still goes on; once it has ended, they may."""
    child = tmp_path / "child.sh"
    child.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    child.chmod(0o755)
    parent = subprocess.Popen([sys.executable, "-c", ORPHAN, str(tmp_path), str(child)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip()):
        assert time.monotonic() < deadline, "the run was not started"
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    (run,) = sweep.plan(["fft"], [1e-3], [0], {"task": "t"}, {})
    with sweep._claim(tmp_path, run) as lock:
        assert lock is None
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    while time.monotonic() < deadline:
        with sweep._claim(tmp_path, run) as lock:
            if lock is not None:
                return
        time.sleep(0.05)
    pytest.fail("the claim was never given up")
