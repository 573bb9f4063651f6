"""``molf train`` with every kind of task: what it scores, and what it refuses before it writes."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from molf.assets import BUNDLED_MODEL
from molf.cli import main
from molf.cli.train import parse
from molf.tasks import get_task
from molf.train.run import train
from molf.world import counterfactual_edits, make_world

OPTIONS = [
    "--model_name_or_path", str(BUNDLED_MODEL), "--method", "lora", "--expert_ranks", "2", "--num_train_epochs", "1",
    "--per_device_train_batch_size", "8", "--gradient_checkpointing", "false", "--save_strategy", "no",
    "--use_cpu", "true", "--disable_tqdm", "true",
]  # fmt: skip


def command(out: Path, *arguments: object) -> list[str]:
    return ["train", *OPTIONS, "--output_dir", str(out), *map(str, arguments)]


def metrics_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "metrics.json").read_text())


def med_file(path: Path, count: int, **changes: Any) -> Path:
    rows = [{**record, "cop": record["cop"] + 1, **changes} for record in get_task("world-mcq").load(None, count)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def refused(capsys, *arguments: object) -> str:
    """Exit status 2, one line, and no run directory."""
    out = Path(str(arguments[0]))
    capsys.readouterr()
    assert main(command(out, *arguments[1:])) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("molf: error:")]
    assert len(lines) == 1
    assert not out.exists()
    return lines[0]


def test_med_on_a_file_with_a_test_file(tmp_path, capsys) -> None:
    """The scores are those of the test file: its subjects are not the training file's."""
    data = med_file(tmp_path / "train.jsonl", 24, subject_name="Skin")
    test = med_file(tmp_path / "test.jsonl", 30, subject_name="Dental")
    out = tmp_path / "run"
    arguments = ["--task", "med", "--dataset_path", data, "--max_examples", 16, "--eval_dataset_path", test]
    assert main(command(out, *arguments)) == 0
    printed = capsys.readouterr().out
    assert f"{data}: cop counts from 1\n" in printed
    assert f"{test}: cop counts from 1\n" in printed
    metrics = metrics_of(out)
    assert metrics["steps"] == 2
    assert metrics["accuracy"] == pytest.approx(metrics["accuracy/Dental"])
    assert "accuracy/Skin" not in metrics
    assert metrics["invalid_answers"] == metrics["truncated_prompts"] == 0
    assert "truncated_examples" not in metrics


def test_a_task_with_its_own_records(tmp_path) -> None:
    out = tmp_path / "run"
    assert main(command(out, "--task", "world-fact", "--max_examples", 16)) == 0
    assert metrics_of(out)["steps"] == 2
    assert "score" in metrics_of(out)


def test_fact_scored_on_other_edits(tmp_path, facts) -> None:
    """One edit whose two objects are the same word: every comparison is a tie, whatever was trained."""
    edit = counterfactual_edits(make_world(), 1)[0]
    edit["requested_rewrite"]["target_new"] = edit["requested_rewrite"]["target_true"]
    other = tmp_path / "other.json"
    other.write_text(json.dumps([edit]))
    out = tmp_path / "run"
    arguments = ["--task", "fact", "--dataset_path", facts, "--max_examples", 8, "--eval_dataset_path", other]
    assert main(command(out, *arguments)) == 0
    assert [metrics_of(out)[name] for name in ("efficacy", "paraphrase", "neighbourhood")] == [50, 50, 50]


def test_long_prompts_are_cut_or_refused(tmp_path, capsys) -> None:
    """The bundled model takes 256 tokens; one question of the eight is longer."""
    rows = get_task("world-mcq").load(None, 8)
    rows[5]["question"] = "Mira Knoll plays the violin. " * 60 + rows[5]["question"]
    data = tmp_path / "long.json"
    data.write_text(json.dumps([{**row, "cop": "ABCD"[row["cop"]]} for row in rows]))
    arguments = ["--task", "med", "--dataset_path", data]
    line = refused(capsys, tmp_path / "refused", *arguments, "--long_prompts", "refuse")
    assert f"{data}, record 5 (1 of 8 are too long): a prompt of " in line
    assert "exceed the context of 256 tokens: shorten it, or set long_prompts to truncate" in line
    short = med_file(tmp_path / "short.jsonl", 8)
    late = ["--task", "med", "--dataset_path", short, "--eval_dataset_path", data, "--long_prompts", "refuse"]
    assert f"{data}, record 5" in refused(capsys, tmp_path / "refused", *late)
    assert main(command(tmp_path / "run", *arguments)) == 0
    metrics = metrics_of(tmp_path / "run")
    assert (metrics["truncated_examples"], metrics["truncated_prompts"]) == (1, 1)
    assert metrics["invalid_answers"] == 0


def test_what_is_refused(tmp_path, capsys) -> None:
    out = tmp_path / "run"
    assert "task='facts': choose one of completion, fact, med, sql" in refused(capsys, out, "--task", "facts")
    assert "dataset_path is not given" in refused(capsys, out)
    assert "dataset_path is not given: name a CounterFact" in refused(capsys, out, "--task", "fact")
    assert "world-mcq has its own records" in refused(capsys, out, "--task", "world-mcq", "--dataset_path", "x")
    assert "long_prompts='drop'" in refused(capsys, out, "--task", "med", "--long_prompts", "drop")
    data = med_file(tmp_path / "bad.jsonl", 4, opb=None)
    line = refused(capsys, out, "--task", "med", "--dataset_path", data)
    assert f"{data}, record 0: opb is missing" in line
    test = med_file(tmp_path / "test.jsonl", 40)
    assert "bad.jsonl" in refused(capsys, out, "--task", "med", "--dataset_path", test, "--eval_dataset_path", data)
    assert "openlifescienceai/medmcqa" in refused(capsys, out, "--task", "med")  # offline


@pytest.mark.parametrize("packed", ["packing", "eval_packing"])
def test_wrapped_rows_are_no_longer_than_the_context(tmp_path, packed: str) -> None:
    """1,024 tokens by default, of which the bundled model takes 256; a resumed run still compares what was given."""
    seen = []

    class Look(TrainerCallback):
        def on_train_begin(self, *args: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
            seen.extend(batch["input_ids"].shape[1] for batch in train_dataloader)

        def on_evaluate(self, *args: Any, eval_dataloader: Any = None, **kwargs: Any) -> None:
            seen.extend(batch["input_ids"].shape[1] for batch in eval_dataloader)

    words = ["--task", "world-fact", "--max_examples", "60", f"--{packed}", "true", "--packing_strategy", "wrapped"]
    words += ["--eval_strategy", "epoch"]
    out = tmp_path / "run"
    words = [*command(out, *words)[1:], "--save_strategy", "epoch", "--eval_at_end", "false"]
    train(*parse(words), [Look()])
    assert max(seen) == 256
    assert json.loads((out / "run.json").read_text())["training"]["max_length"] == 1024
    (out / "metrics.json").unlink()
    assert main(["train", *words, "--resume_from_checkpoint", "last"]) == 0
