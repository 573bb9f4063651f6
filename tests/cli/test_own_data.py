"""Prompts and completions of one's own by the command line: training, what is held out, scores, and the comparison."""

import json
from pathlib import Path
from typing import Any

import pytest

from molf.assets import BUNDLED_MODEL
from molf.cli import main
from molf.report.content import score
from molf.report.runs import read_runs
from molf.tasks import get_task

COMMON = [
    "--model_name_or_path", str(BUNDLED_MODEL), "--num_train_epochs", "1", "--gradient_checkpointing", "false",
    "--use_cpu", "true", "--disable_tqdm", "true",
]  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A file of 20 records of the bundled world, with a field that is nobody's."""
    task = get_task("world-fact")
    path = tmp_path / "data.jsonl"
    rows = [{**task.example(record), "id": i} for i, record in enumerate(task.load(None, 20))]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def trained(out: Path, *options: object) -> dict[str, Any]:
    words = ["train", *COMMON, "--method", "molf", "--expert_ranks", "2", *map(str, options), "--output_dir", str(out)]
    assert main(words) == 0
    return json.loads((out / "metrics.json").read_text())


def evaluated(out: Path, *options: object) -> dict[str, float]:
    assert main(["eval", "--use_cpu", "--task", "completion", "--output", str(out), *map(str, options)]) == 0
    return json.loads(out.read_text())["metrics"]


def test_only_what_was_not_trained_is_scored(tmp_path: Path, data: Path) -> None:
    assert "likelihood" not in trained(tmp_path / "all", "--dataset_path", data)
    other = tmp_path / "other.json"
    other.write_text(json.dumps([json.loads(line) for line in data.read_text().splitlines()[:7]]))
    held = "--dataset_path", data, "--eval_dataset_path", other, "--eval_strategy", "epoch", "--save_strategy", "no"
    metrics = trained(tmp_path / "other", *held)
    assert metrics["likelihood"] > 0
    expected = evaluated(tmp_path / "eval.json", "--model", tmp_path / "other", "--dataset_path", other)
    assert {name: metrics[name] for name in expected} == expected
    log = json.loads((tmp_path / "other" / "trainer_state.json").read_text())["log_history"]
    entry = next(entry for entry in log if "eval_loss" in entry)
    assert entry["eval_likelihood"] == expected["likelihood"]
    assert entry["eval_completion_loss"] == pytest.approx(entry["eval_loss"], rel=1e-5), "TRL's own, with its end"


def test_parts_are_split_off_and_scored(tmp_path: Path, data: Path) -> None:
    metrics = trained(tmp_path / "run", "--dataset_path", data, "--validation_size", "0.2", "--test_size", "6")
    assert metrics["steps"] == 2, "10 of 20 records in batches of 8"
    assert metrics["validation"]["likelihood"] > 0
    assert metrics["test"]["completion_loss"] > 0


def test_a_validation_part_alone_is_evaluated(tmp_path: Path, data: Path) -> None:
    options = "--dataset_path", data, "--validation_size", "4", "--eval_strategy", "epoch", "--save_strategy", "no"
    metrics = trained(tmp_path / "run", *options)
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert [e["eval_likelihood"] for e in log if "eval_loss" in e] == [metrics["validation"]["likelihood"]]
    assert score(read_runs([tmp_path / "run"])[0]) == ("likelihood", metrics["validation"]["likelihood"])


def test_a_held_out_completion_that_cannot_be_scored_is_refused_before_training(
    tmp_path: Path, data: Path, capsys
) -> None:
    other = tmp_path / "long.jsonl"
    other.write_text(json.dumps({"prompt": "Ada", "completion": " Alder" * 2000}))
    options = ["--dataset_path", str(data), "--eval_dataset_path", str(other)]
    assert main(["train", *COMMON, *options, "--output_dir", str(tmp_path / "run")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "long.jsonl, record 0 (1 of 1 are too long)" in line
    assert not (tmp_path / "run" / "metrics.json").exists()
    metrics = trained(tmp_path / "unscored", *options, "--eval_at_end", "false")
    assert "likelihood" not in metrics


def test_methods_are_compared_on_own_data(tmp_path: Path, data: Path, capsys) -> None:
    """Without a task: a fifth is held out for validation, and a fifth for the test that no choice saw."""
    options = ["--dataset_path", str(data), "--methods", "fft", "molf", "--learning_rates", "1e-3", "--seeds", "0"]
    assert main(["compare", *COMMON, *options, "--output_dir", str(tmp_path / "out")]) == 0
    assert "Best on the test split: " in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["primary"] == "likelihood"
    assert [run["metrics"]["steps"] for run in results["runs"]] == [2, 2], "12 of 20 records in batches of 8"
    assert all(row["validation"] > 0 for row in results["rows"])
