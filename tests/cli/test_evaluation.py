"""``--eval_strategy``: loss and score while training goes on, on the same bits as without, each point once."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_resume import assert_identical
from transformers import TrainerCallback

from molf.assets import BUNDLED_MODEL
from molf.cli import main
from molf.cli.train import parse
from molf.train.evaluation import undisturbed
from molf.train.run import train as run

COMMON = [
    "--model_name_or_path", str(BUNDLED_MODEL), "--num_train_epochs", "2", "--per_device_train_batch_size", "4",
    "--gradient_accumulation_steps", "2", "--learning_rate", "1e-3", "--gradient_checkpointing", "false",
    "--logging_steps", "1", "--use_cpu", "true", "--disable_tqdm", "true",
]  # fmt: skip
TASK = ["--task", "world-fact", "--max_examples", "32"]
EVERY_TWO = ["--eval_strategy", "steps", "--eval_steps", "2"]


def train(out: Path, *options: str) -> dict[str, Any]:
    """What a run leaves: weights, routing, metrics and the log."""
    assert main(["train", *COMMON, *options, "--output_dir", str(out)]) == 0
    routing = out / "routing.jsonl"
    return {
        "weights": load_file(next(out.glob("*model.safetensors"))),
        "routing": routing.read_text() if routing.exists() else None,
        "metrics": json.loads((out / "metrics.json").read_text()),
        "log": json.loads((out / "trainer_state.json").read_text())["log_history"],
    }


def points(run: dict[str, Any], *keys: str) -> list[tuple[Any, ...]]:
    return [tuple(entry[key] for key in keys) for entry in run["log"] if keys[1] in entry]


def test_training_goes_on_as_if_nothing_had_been_scored(tmp_path: Path) -> None:
    """With dropout, whose generator the evaluation's DataLoader and every generation would move."""
    method = ["--method", "molf-e", "--expert_ranks", "2", "4", "--lora_dropout", "0.2", "--save_strategy", "no"]
    plain = train(tmp_path / "plain", *TASK, *method)
    scored = train(tmp_path / "scored", *TASK, *method, *EVERY_TWO, "--eval_examples", "32")
    assert_identical(scored["weights"], plain["weights"])
    assert scored["routing"] == plain["routing"]
    assert points(scored, "step", "loss") == points(plain, "step", "loss")
    assert [step for step, _ in points(scored, "step", "eval_loss")] == [2, 4, 6, 8]
    assert points(scored, "step", "eval_score")[-1] == (8, scored["metrics"]["score"]), "the same records and model"


def test_every_generator_is_put_back() -> None:
    def drawn() -> tuple[float, ...]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = drawn()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    with undisturbed():
        drawn()
    assert drawn() == expected


def test_a_resumed_run_has_every_point_once(tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = [*TASK, "--method", "molf", "--expert_ranks", "2", "--save_strategy", "steps", "--save_steps", "1"]
    options += [*EVERY_TWO, "--eval_examples", "8", "--eval_on_start", "true"]
    whole = train(out, *options)
    assert points(whole, "step", "eval_loss")[0][0] == 0
    for step in (3, 4):  # between evaluations, and at one
        again = train(out, *options, "--resume_from_checkpoint", str(out / f"checkpoint-{step}"))
        assert points(again, "step", "eval_loss", "eval_score") == points(whole, "step", "eval_loss", "eval_score")
        assert points(again, "step", "molf/switch_rate") == points(whole, "step", "molf/switch_rate")
        seconds = [seconds for _, seconds in points(again, "step", "seconds")]
        assert seconds == sorted(seconds)


def test_the_model_that_metric_for_best_model_names_is_kept(tmp_path: Path) -> None:
    """transformers' own options know the task's metrics; here the least is asked for, which is not the last."""
    best = "--load_best_model_at_end true --metric_for_best_model efficacy --greater_is_better false --save_steps 2"
    options = [*EVERY_TWO, *best.split(), "--eval_examples", "32"]
    found = train(tmp_path / "run", *TASK, "--method", "molf", "--expert_ranks", "2", *options)
    of_steps = [efficacy for _, efficacy in points(found, "step", "eval_efficacy")]
    assert found["metrics"]["efficacy"] == min(of_steps) < of_steps[-1]


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
def test_schedules_by_a_metric_know_its_direction_and_its_name(tmp_path: Path, capsys, schedule: str) -> None:
    """Their default is that less is better, also of a score."""
    words = [*COMMON, *TASK, *EVERY_TWO, "--lr_scheduler_type", schedule, "--method", "lora", "--save_strategy", "no"]
    words += ["--output_dir", str(tmp_path / "run")]
    for more, kwargs in (
        ([], None),
        (["--metric_for_best_model", "score"], {"mode": "max"}),
        (["--metric_for_best_model", "score", "--greater_is_better", "false"], None),
        (["--metric_for_best_model", "score", "--lr_scheduler_kwargs", '{"mode": "min"}'], {"mode": "min"}),
        (
            ["--metric_for_best_model", "score", "--lr_scheduler_kwargs", '{"patience": 1}'],
            {"mode": "max", "patience": 1},
        ),
    ):
        assert parse([*words, *more])[1].lr_scheduler_kwargs == kwargs
    assert main(["train", *words, "--metric_for_best_model", "best"]) == 2
    error = capsys.readouterr().err
    assert "'eval_best', which is not found in the evaluation metrics. The available evaluation metrics are:" in error
    assert "compute_metrics" not in error


@pytest.mark.parametrize(("schedule", "status"), [("reduce_lr_on_plateau", 2), ("linear", 0)])
def test_evaluated_records_that_decide_the_learning_rates_are_compared(
    tmp_path: Path, capsys, schedule: str, status: int
) -> None:
    """Other ones of the same name, as of the training examples; where they decide nothing, they may change."""
    data, other, out = tmp_path / "data.jsonl", tmp_path / "other.jsonl", tmp_path / "run"
    rows = [json.dumps({"prompt": f"Ada Alder {verb} the", "completion": " drum"}) for verb in ("plays", "likes")]
    data.write_text("\n".join(rows))
    other.write_text(rows[0])
    words = ["--dataset_path", str(data), "--eval_dataset_path", str(other), "--method", "lora", "--save_steps", "1"]
    words += [*EVERY_TWO, "--lr_scheduler_type", schedule]
    train(out, *words)
    other.write_text(rows[1])
    again = ["--output_dir", str(out), "--resume_from_checkpoint", "auto"]
    assert main(["train", *COMMON, *words, *again]) == status
    assert ("the evaluated records are not those of the run of" in capsys.readouterr().err) == (status == 2)


@pytest.mark.parametrize("step", [4, 8])
def test_a_run_that_was_moved_keeps_its_best_model(tmp_path: Path, step: int) -> None:
    """From a checkpoint in the middle, and from the last one; its best is the first, which save_total_limit keeps."""
    best = "--load_best_model_at_end true --metric_for_best_model efficacy --greater_is_better false --save_steps 2"
    options = [*TASK, "--method", "molf", "--expert_ranks", "2", *EVERY_TWO, *best.split(), "--eval_examples", "32"]
    whole = train(tmp_path / "run", *options)
    (tmp_path / "run" / "metrics.json").unlink()
    for path in (tmp_path / "run").glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
    (tmp_path / "run").rename(tmp_path / "moved")
    again = train(tmp_path / "moved", *options, "--save_total_limit", "2", "--resume_from_checkpoint", "auto")
    assert_identical(again["weights"], whole["weights"])
    state = json.loads((tmp_path / "moved" / "trainer_state.json").read_text())
    assert (tmp_path / "moved" / Path(state["best_model_checkpoint"]).name / "model.safetensors").exists()


def test_the_last_checkpoint_is_kept_until_the_result_is_saved(tmp_path: Path, monkeypatch) -> None:
    """save_total_limit=1 leaves the best one too; with that alone a run killed at its end would train once more."""

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    best = "--load_best_model_at_end true --metric_for_best_model efficacy --greater_is_better false --save_steps 2"
    options = [*TASK, "--method", "molf", "--expert_ranks", "2", *EVERY_TWO, *best.split(), "--eval_examples", "32"]
    options += ["--save_total_limit", "1", "--resume_from_checkpoint", "auto"]
    whole, out = train(tmp_path / "whole", *options), tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr("molf.train.run._save", interrupted)
        assert main(["train", *COMMON, *options, "--output_dir", str(out)]) == 130
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-8"]
    again = train(out, *options)
    assert again["metrics"]["resumed_from"] == str(out / "checkpoint-8")
    assert_identical(again["weights"], whole["weights"])
    assert again["routing"] == whole["routing"]


def test_what_evaluations_need(tmp_path: Path, capsys) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "Ada Alder plays the", "completion": " drum"}))
    for options, words in (
        (["--dataset_path", str(data), *EVERY_TWO], "eval_strategy=steps: there is nothing to evaluate"),
        ([*TASK, "--test_size", "4", *EVERY_TWO], "eval_strategy=steps: there is nothing to evaluate"),
        ([*TASK, *EVERY_TWO, "--eval_examples", "0"], "eval_examples=0: must be at least 1"),
    ):
        assert main(["train", *COMMON, *options, "--output_dir", str(tmp_path / "none")]) == 2
        assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("long", [1, 200])
def test_the_loss_is_on_the_completion_whether_or_not_prompts_are_cut(tmp_path: Path, long: int) -> None:
    """TRL took cut prompts, which reach it as tokens, for plain text and trained them, too."""
    rows = [{"prompt": "Ada Alder " * length + "plays the", "completion": " drum"} for length in (1, long)]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    words = [*COMMON, "--dataset_path", str(data), "--method", "fft", "--max_steps", "1"]
    seen = []

    class Look(TrainerCallback):
        def on_train_begin(self, *args: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
            seen.extend((labels != -100).sum().item() for batch in train_dataloader for labels in batch["labels"])

    run(*parse([*words, "--output_dir", str(tmp_path / "run")]), [Look()])
    assert seen == [2, 2], "the completion and the end token"
