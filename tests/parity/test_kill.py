"""kill -9 at random moments: every restart finds a whole checkpoint, and the result is the uninterrupted run's."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_resume import assert_identical
from transformers.trainer_utils import get_last_checkpoint

from molf.assets import BUNDLED_MODEL
from molf.train.resume import check_checkpoint

STEPS = 6
ARGUMENTS = [
    "--model_name_or_path", str(BUNDLED_MODEL), "--task", "fact", "--max_examples", "16", "--max_steps", str(STEPS),
    "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--learning_rate", "1e-3",
    "--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "1", "--gradient_checkpointing", "false",
    "--eval_at_end", "false", "--use_cpu", "true", "--disable_tqdm", "true", "--resume_from_checkpoint", "auto",
]  # fmt: skip
RANKS = {"fft": [], "lora": ["--expert_ranks", "4"], "molf": ["--expert_ranks", "4"]}
RANKS |= {"molf-e": ["--expert_ranks", "2", "4", "--lora_dropout", "0.1"]}


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., dict[str, int]]]:
    """Runs the command line in a fresh process, killed at a given event; see ``kill_run.py``."""
    command = [sys.executable, str(Path(__file__).parent / "kill_run.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None

        def ask(argv: list[str], event: int | None = None, delay: float = 0.0) -> dict[str, int]:
            print(json.dumps({"argv": argv, "event": event, "delay": delay}), file=server.stdin, flush=True)
            return json.loads(server.stdout.readline())

        yield ask
        server.stdin.close()


def result(out: Path) -> dict[str, Any]:
    """Everything of a run that must not depend on how often it was killed."""
    assert {path.name for path in out.glob("*checkpoint*")} == {f"checkpoint-{STEPS}"}
    last = out / f"checkpoint-{STEPS}"
    check_checkpoint(last)
    assert json.loads((out / "metrics.json").read_text())["steps"] == STEPS
    log = out / "routing.jsonl"
    return {
        "weights": load_file(next(out.glob("*.safetensors"))),
        "checkpoint": load_file(next(last.glob("*.safetensors"))),
        "states": [torch.load(last / name, weights_only=True) for name in ("optimizer.pt", "scheduler.pt")],
        "routing": log.read_text() if log.exists() else None,
    }


@pytest.mark.parametrize(
    ("method", "kills"),
    [("molf", 5), *(pytest.param(method, 15, marks=pytest.mark.slow) for method in ("fft", "lora", "molf-e"))],
)
def test_killed_at_random_moments(tmp_path: Path, facts: Path, run, method: str, kills: int) -> None:
    def command(out: Path) -> list[str]:
        return ["train", *ARGUMENTS, "--method", method, *RANKS[method], "--dataset_path", str(facts), "--output_dir",
                str(out)]  # fmt: skip

    whole, out = tmp_path / "whole", tmp_path / "killed"
    answer = run(command(whole))
    assert answer["status"] == 0
    assert answer["events"] > 15 * STEPS  # opens and renames of every save: the moments are there to be hit
    expected, moments, killed, best = result(whole), random.Random(method), 0, 0
    while killed < kills:
        event = moments.randrange(answer["events"] * 2 // 3)
        ended = run(command(out), event, moments.choice([0.0, 0.002, 0.05]) * moments.random())
        if ended["status"] == 0:
            assert_identical(result(out), expected)
            shutil.rmtree(out)
            best = 0
            continue
        assert ended["status"] == -9
        killed += 1
        newest = get_last_checkpoint(out) if out.exists() else None  # what any Trainer would take
        if newest is not None:
            check_checkpoint(Path(newest))
        step = int(newest.rpartition("-")[2]) if newest else 0
        assert step >= best
        best = step
    assert run(command(out))["status"] == 0
    assert_identical(result(out), expected)
    assert run(command(out)) == {"status": 0, "events": 0}  # the run is over: nothing is written again
