"""``--enable_jit_checkpoint``: what SIGTERM ends goes on as if nothing had ended it, and is no result."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file
from test_resume import assert_identical
from transformers import TrainerCallback

import molf.cli.train
from molf.assets import BUNDLED_MODEL
from molf.cli import main
from molf.train.run import train

STEPS = 8
ARGUMENTS = [
    "--model_name_or_path", str(BUNDLED_MODEL), "--task", "world-fact", "--max_examples", "32", "--method", "molf-e",
    "--expert_ranks", "2", "4", "--lora_dropout", "0.2", "--num_train_epochs", "2", "--per_device_train_batch_size",
    "4", "--gradient_accumulation_steps", "2", "--learning_rate", "1e-3", "--gradient_checkpointing", "false",
    "--logging_steps", "1", "--eval_examples", "8", "--eval_at_end", "false", "--use_cpu", "true", "--disable_tqdm",
    "true", "--enable_jit_checkpoint", "true", "--resume_from_checkpoint", "auto",
]  # fmt: skip


class Ends(TrainerCallback):
    """Sends SIGTERM when a step begins, or ends training itself after one."""

    def __init__(self, killed: int = 0, last: int = 0) -> None:
        self.killed, self.last = killed, last

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.killed:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step == self.last


@pytest.fixture
def run(monkeypatch):
    """The command line with a callback; transformers' wait for a SIGKILL is over at once."""
    timer = SimpleNamespace(Timer=lambda seconds, call: SimpleNamespace(start=call))
    monkeypatch.setattr("transformers.trainer_jit_checkpoint.threading", timer)

    def of(out: Path, *options: str, ends: Ends | None = None) -> int:
        monkeypatch.setattr(molf.cli.train, "train", lambda *arguments: train(*arguments, [ends] if ends else []))
        return main(["train", *ARGUMENTS, *options, "--output_dir", str(out)])

    return of


def result(out: Path) -> list[Any]:
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    known = ("step", "epoch", "loss", "grad_norm", "learning_rate", "eval_loss", "eval_score")
    points = [{key: entry[key] for key in known if key in entry} for entry in history if "train_loss" not in entry]
    return [load_file(out / "adapter_model.safetensors"), (out / "routing.jsonl").read_text(), points]


@pytest.mark.parametrize(("strategy", "steps"), [("steps", (3, 4)), ("epoch", (3, 4))])
def test_a_run_that_sigterm_stopped_goes_on_bit_for_bit(tmp_path: Path, capsys, run, strategy, steps) -> None:
    """After a step that is evaluated and one that is not; at the end of an epoch, and within one."""
    options = ["--eval_strategy", strategy, "--eval_steps", "2", "--save_strategy", "no"]
    whole = tmp_path / "whole"
    assert run(whole, *options) == 0
    for step in steps:
        out = tmp_path / str(step)
        assert run(out, *options, ends=Ends(killed=step)) == 143
        told = f"molf: stopped at step {step} of {STEPS}; continue with --resume_from_checkpoint auto\n"
        assert told in capsys.readouterr().err
        assert [path.name for path in out.glob("*checkpoint*")] == [f"checkpoint-{step}"]
        assert not [*out.glob("*.safetensors"), *out.glob("metrics.json")]
        assert run(out, *options) == 0
        assert_identical(result(out), result(whole))
        assert json.loads((out / "metrics.json").read_text())["steps"] == STEPS
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(("ends", "steps"), [(Ends(last=3), 3), (Ends(killed=STEPS), STEPS)])
def test_what_another_callback_or_the_last_step_ended_has_ended(tmp_path: Path, run, ends: Ends, steps: int) -> None:
    assert run(tmp_path, "--save_strategy", "no", ends=ends) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["steps"] == steps


def test_an_evaluation_after_the_signal_finds_a_checkpoint(tmp_path: Path, run, monkeypatch) -> None:
    """It may take longer than the scheduler waits."""

    def killed(self: Any, *arguments: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.Trainer._evaluate", killed)
    options = ["--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "no"]
    assert run(tmp_path, *options, ends=Ends(killed=2)) == 130
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-2"]


def test_what_could_not_go_on_is_refused(tmp_path: Path, capsys, run) -> None:
    assert run(tmp_path / "run", "--save_only_model", "true") == 2
    assert "enable_jit_checkpoint=True: a checkpoint of molf-e with save_only_model=True" in capsys.readouterr().err
    options = [*ARGUMENTS[:-2], "--method", "adalora", "--expert_ranks", "4", "--lora_dropout", "0"]
    assert main(["train", *options, "--output_dir", str(tmp_path / "run")]) == 2
    assert "enable_jit_checkpoint=True: a checkpoint of adalora with" in capsys.readouterr().err
