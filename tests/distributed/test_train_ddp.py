"""``molf train`` on several processes: the run of one process with the same global batch, written once."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import run
from test_resume import assert_identical
from train_programs import METHODS, agree, command, everything, halve, losses, options, train_to_end, winners

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


def test_an_error_of_one_is_an_error_of_all(tmp_path: Path) -> None:
    for broken in (0, 1):
        first, second = run(tmp_path, 2, agree, broken)
        assert first == second == {"none": None, "error": f"of rank {broken}", "first": "by 0"}
