"""``examples/fsdp2.py`` on two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import AutoPeftModelForCausalLM
from processes import run
from train_programs import example
from transformers import AutoModelForCausalLM


@pytest.mark.parametrize("efficient", [False, True])
def test_a_resume_ends_with_the_bits_of_the_uninterrupted_run(tmp_path: Path, efficient: bool) -> None:
    whole, half = tmp_path / "whole", tmp_path / "half"
    run(tmp_path, 2, example, "fsdp2.py", str(whole), efficient=efficient, steps=5)
    run(tmp_path, 2, example, "fsdp2.py", str(half), efficient=efficient, steps=5, stop_after=3)
    run(tmp_path, 2, example, "fsdp2.py", str(half), efficient=efficient, steps=5, resume=str(half / "checkpoint-3"))
    for name in ("adapter_model.safetensors" if efficient else "model.safetensors", "routing.jsonl"):
        assert (half / name).read_bytes() == (whole / name).read_bytes()
    (AutoPeftModelForCausalLM if efficient else AutoModelForCausalLM).from_pretrained(whole)


def test_another_number_of_processes_goes_on_in_bf16(tmp_path: Path) -> None:
    run(tmp_path, 2, example, "fsdp2.py", str(tmp_path), bf16=True, steps=5, stop_after=2)
    run(tmp_path, 1, example, "fsdp2.py", str(tmp_path), bf16=True, steps=5, resume=str(tmp_path / "checkpoint-2"))
    assert len((tmp_path / "routing.jsonl").read_text().splitlines()) == 1 + 5
