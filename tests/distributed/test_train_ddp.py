"""``molf train`` on several processes: the run of one process with the same global batch, written once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import run
from test_resume import assert_identical
from train_programs import (
    METHODS,
    agree,
    command,
    command_with_a_signal,
    everything,
    halve,
    losses,
    options,
    refused,
    train_to_end,
    train_with_a_broken_rank,
    winners,
)

STEPS = 6
SAVED = ["--save_strategy", "steps", "--save_steps", "3"]
SLOW = ("fft", "lora")  # nothing of theirs is ours


def slowly(*methods: str) -> list:
    return [pytest.param(each, marks=[pytest.mark.slow] if each in SLOW else []) for each in methods]


@pytest.mark.parametrize("method", slowly(*METHODS))
def test_two_processes_are_one(tmp_path: Path, facts: Path, method: str) -> None:
    """A rank's batches are those that one process accumulates, so sums alone differ, by their order."""
    one, two = tmp_path / "one", tmp_path / "two"
    train_to_end(options(method, facts, one, STEPS, "--gradient_accumulation_steps", "2"))
    ends = run(tmp_path, 2, train_to_end, options(method, facts, two, STEPS))
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    if method.startswith("molf"):
        assert winners(two) == winners(one)
        assert len({str(row) for record in winners(one) for row in record}) == 2  # both experts won
    assert_identical(*ends)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["molf", "molf-e"])
def test_200_steps_leave_the_same_bits_on_both(tmp_path: Path, facts: Path, method: str) -> None:
    assert_identical(*run(tmp_path, 2, train_to_end, options(method, facts, tmp_path / "run", 200)))


@pytest.mark.parametrize("method", slowly(*METHODS))
def test_a_resume_is_exact(tmp_path: Path, facts: Path, method: str) -> None:
    """By as many processes bit for bit; by one, with the same global batch, up to the order of sums."""
    whole, again, alone = tmp_path / "whole", tmp_path / "again", tmp_path / "alone"
    run(tmp_path, 2, command, options(method, facts, whole, STEPS, *SAVED))
    for out in (again, alone):
        halve(whole, out)
    auto = [*SAVED, "--resume_from_checkpoint", "auto"]
    said = run(tmp_path, 2, command, options(method, facts, again, STEPS, *auto))
    assert_identical(everything(again), everything(whole))
    assert [each["status"] for each in said] == [0, 0]
    assert '"resumed_from"' in said[0]["out"]
    assert said[1]["out"] + said[1]["err"] == ""
    assert not list(again.glob("unfinished*"))
    with pytest.raises(ValueError, match=r"a step had 4 examples .* \(2 processes\), now it has 2"):
        train_to_end(options(method, facts, alone, STEPS, *auto))
    train_to_end(options(method, facts, alone, STEPS, *auto, "--gradient_accumulation_steps", "2"))
    assert losses(alone) == pytest.approx(losses(whole), rel=1e-5)
    if method.startswith("molf"):
        assert winners(alone) == winners(whole)


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_a_resume_inside_an_epoch_of_samples_by_length_is_exact(tmp_path: Path, facts: Path, strategy: str) -> None:
    """Of the second epoch, whose sampler accelerate does not tell the epoch where it skips batches."""
    more = ["--max_examples", "12", "--train_sampling_strategy", strategy, "--save_strategy", "steps", "--save_steps"]
    whole, again = tmp_path / "whole", tmp_path / "again"
    run(tmp_path, 2, command, options("fft", facts, whole, STEPS, *more, "4"))
    halve(whole, again)
    run(tmp_path, 2, command, options("fft", facts, again, STEPS, *more, "4", "--resume_from_checkpoint", "auto"))
    assert_identical(everything(again), everything(whole))


def test_a_step_that_one_process_skips_is_skipped_by_all(tmp_path: Path, facts: Path) -> None:
    argv = options("molf", facts, tmp_path / "run", STEPS, "--on_nonfinite", "skip")
    assert_identical(*run(tmp_path, 2, train_with_a_broken_rank, argv, 3))
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert {entry["step"]: entry["skipped"] for entry in history if "skipped" in entry} == {
        3: "the loss is not finite here"
    }
    assert len(winners(tmp_path / "run")) == STEPS - 1


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path: Path, facts: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    more = [*SAVED, "--enable_jit_checkpoint", "true", "--resume_from_checkpoint", "auto"]
    run(tmp_path, 2, command, options("molf", facts, whole, STEPS, *more))
    first, second = run(tmp_path, 2, command_with_a_signal, options("molf", facts, out, STEPS, *more), 2)
    assert [first["status"], second["status"]] == [143, 143]
    assert first["err"].endswith(f"molf: stopped at step 2 of {STEPS}; continue with --resume_from_checkpoint auto\n")
    assert second["out"] + second["err"] == ""
    assert [path.name for path in out.glob("*checkpoint*")] == ["checkpoint-2"]
    assert run(tmp_path, 2, command, options("molf", facts, out, STEPS, *more))[0]["status"] == 0
    assert_identical(everything(out), everything(whole))


def test_the_first_process_scores_for_all(tmp_path: Path, facts: Path) -> None:
    argv = options("molf", facts, tmp_path / "run", 1, "--eval_at_end", "true")
    first, second = run(tmp_path, 2, command, argv)
    assert "evaluate molf" in first["err"]
    assert second["out"] + second["err"] == ""
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert first["out"].endswith(json.dumps(metrics, indent=2) + f"\nsaved to {tmp_path / 'run'}\n")
    assert 0 <= metrics["efficacy"] <= 100


def test_an_error_of_one_is_an_error_of_all(tmp_path: Path) -> None:
    for broken in (0, 1):
        first, second = run(tmp_path, 2, agree, broken)
        assert first == second == {"none": None, "error": f"of rank {broken}", "first": "by 0"}


def test_a_damaged_checkpoint_is_refused_by_all(tmp_path: Path) -> None:
    """None waits for one that has ended."""
    for said in run(tmp_path, 2, refused, str(tmp_path)):
        assert said.startswith(f"resume_from_checkpoint={tmp_path}: not a checkpoint folder")
