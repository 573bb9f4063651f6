"""``molf train --fsdp true``: every process holds a part, and the run is that of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import run
from test_resume import assert_identical
from train_programs import METHODS, command, everything, halve, losses, options, train_to_end, winners

STEPS = 4
SAVED = ["--save_strategy", "steps", "--save_steps", "2"]
ONE = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4"]
TWO = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2", "--fsdp", "true"]
FOUR = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1", "--fsdp", "true"]


@pytest.mark.parametrize("method", METHODS)
def test_sharded_is_one_process_and_resumes_exactly(tmp_path: Path, facts: Path, method: str) -> None:
    one, two, again, alone = (tmp_path / name for name in ("one", "two", "again", "alone"))
    train_to_end(options(method, facts, one, STEPS, *ONE))
    said = run(tmp_path, 2, command, options(method, facts, two, STEPS, *TWO, *SAVED))
    assert [each["status"] for each in said] == [0, 0], said
    assert said[1]["out"] + said[1]["err"] == ""
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    if method.startswith("molf"):
        assert winners(two) == winners(one)
        assert len({str(row) for record in winners(one) for row in record}) == 2  # both experts won
    assert everything(two).keys() >= {f"checkpoint-{STEPS}/optimizer/rest.pt", f"checkpoint-{STEPS}/scheduler.pt"}
    for out in (again, alone):
        halve(two, out)
    auto = [*SAVED, "--resume_from_checkpoint", "auto"]
    run(tmp_path, 2, command, options(method, facts, again, STEPS, *TWO, *auto))
    assert_identical(everything(again), everything(two))
    train_to_end(options(method, facts, alone, STEPS, *ONE, *auto))  # whole, from what was sharded
    assert losses(alone) == pytest.approx(losses(two), rel=1e-5)
    if method.startswith("molf"):
        assert winners(alone) == winners(two)
