"""``molf train`` on several processes: the run of one process with the same global batch, written once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import assert_identical

from molf import read_routing
from molf.assets import BUNDLED_MODEL

STEPS = 6
METHODS = {
    "fft": [],
    "lora": ["--expert_ranks", "4"],
    "molf": ["--expert_ranks", "4", "--lora_lr", "3e-3"],
    "molf-e": ["--expert_ranks", "2", "4", "--lora_alpha", "4", "8"],
}


def options(method: str, facts: Path, out: Path, *more: str) -> list[str]:
    return [
        "--model_name_or_path", str(BUNDLED_MODEL), "--task", "fact", "--dataset_path", str(facts), "--max_examples",
        "40", "--max_steps", str(STEPS), "--per_device_train_batch_size", "2", "--learning_rate", "1e-3",
        "--lr_scheduler_type", "constant", "--warmup_steps", "0", "--max_grad_norm", "1", "--logging_steps", "1",
        "--save_strategy", "steps", "--save_steps", "3", "--gradient_checkpointing", "false", "--disable_tqdm", "true",
        "--eval_at_end", "false", "--method", method, *METHODS[method], "--output_dir", str(out), *more,
    ]  # fmt: skip


def losses(out: Path) -> list[float]:
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def winners(out: Path) -> list[Any]:
    return [record["winners"] for record in read_routing(out / "routing.jsonl")[1]]


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_are_one(tmp_path: Path, facts: Path, launch, method: str) -> None:
    """A rank's batches are those that one process accumulates, so sums alone differ, by their order."""
    one, two, dumps = tmp_path / "one", tmp_path / "two", tmp_path / "dumps"
    dumps.mkdir()
    launch(1, "train_and_dump", tmp_path, *options(method, facts, one, "--gradient_accumulation_steps", "2"))
    launch(2, "train_and_dump", dumps, *options(method, facts, two))
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    if method.startswith("molf"):
        assert winners(two) == winners(one)
        assert len({str(row) for record in winners(one) for row in record}) == 2  # both experts won
    assert_identical(*(torch.load(dumps / f"rank{rank}.pt", weights_only=True) for rank in range(2)))
