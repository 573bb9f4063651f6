"""``molf train --fsdp true``: every process holds a part, and the run is that of one process."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from processes import run
from safetensors.torch import load_file
from test_resume import assert_identical
from train_programs import command, command_on_a_full_disk, everything, halve, losses, options, train_to_end, winners
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

from molf.assets import BUNDLED_MODEL
from molf.cli import main
from molf.train.verify import checkpoints

ROOT = Path(__file__).parents[2]
STEPS = 4
SAVED = ["--save_strategy", "steps", "--save_steps", "2"]
ONE = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4"]
TWO = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2", "--fsdp", "true"]
FOUR = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1", "--fsdp", "true"]


SLOW = [pytest.param(each, marks=pytest.mark.slow) for each in ("fft", "lora")]  # nothing of theirs is ours


@pytest.mark.parametrize("method", [*SLOW, "molf", "molf-e"])
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
    file = "adapter_model.safetensors" if method in ("lora", "molf-e") else "model.safetensors"
    assert load_file(two / file).keys() == load_file(one / file).keys()  # tied weights once
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
    assert main(["export", str(two), "--to", "adapter" if file.startswith("adapter") else "merged"]) == 0


def test_a_resume_with_several_virtual_experts(tmp_path: Path, facts: Path) -> None:
    """Their groups have no parameters, of which torch's ``set_optimizer_state_dict`` takes one at most."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    several = ["--expert_ranks", "4", "3", *TWO, *SAVED]
    assert [each["status"] for each in run(tmp_path, 2, command, options("molf", facts, whole, STEPS, *several))] == [
        0,
        0,
    ]
    halve(whole, again)
    several += ["--resume_from_checkpoint", "auto"]
    said = run(tmp_path, 2, command, options("molf", facts, again, STEPS, *several))
    assert [each["status"] for each in said] == [0, 0], said
    assert_identical(everything(again), everything(whole))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_model_that_is_saved_under_other_names_resumes_exactly(tmp_path: Path, facts: Path, processes: int) -> None:
    """As mixtures of experts are: a Trainer's own resume would leave such weights as it finds them."""
    base, full, again = tmp_path / "base", tmp_path / "full", tmp_path / "again"
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    tokenizer.save_pretrained(base)
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(base)
    several = [*(TWO if processes == 2 else ONE), *SAVED, "--model_name_or_path", str(base)]
    several += ["--load_best_model_at_end", "true", "--eval_strategy", "steps", "--eval_steps", str(STEPS // 2)]
    several += ["--eval_examples", "4", "--metric_for_best_model", "eval_loss", "--greater_is_better", "true"]
    first = run(tmp_path, processes, command, options("molf", facts, full, STEPS, *several))
    assert [each["status"] for each in first] == [0] * processes, first
    halve(full, again)
    several += ["--resume_from_checkpoint", "auto"]
    said = run(tmp_path, processes, command, options("molf", facts, again, STEPS, *several))
    assert [each["status"] for each in said] == [0] * processes, said
    assert_identical(everything(again), everything(full))
    best, file = checkpoints(full)[0], "model.safetensors"  # the loss falls: the greatest is the first
    assert_identical(load_file(full / file), load_file(best / file))
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in load_file(best / file)


@pytest.mark.parametrize(("method", "task"), [("molf", "world-fact"), ("molf-e", "world-sql")])
def test_scores_of_a_sharded_model_are_those_of_the_saved_one(tmp_path: Path, facts: Path, method: str, task: str):
    out = tmp_path / "run"
    argv = [*options(method, facts, out, 2, *TWO, "--eval_at_end", "true"), "--task", task, "--max_examples", "8"]
    at = argv.index("--dataset_path")
    del argv[at : at + 2]
    assert [each["status"] for each in run(tmp_path, 2, command, argv)] == [0, 0]
    metrics = json.loads((out / "metrics.json").read_text())
    saved = ["--task", task, "--max_examples", "8", "--output", str(tmp_path / "eval.json")]
    assert main(["eval", "--model", str(out), *saved]) == 0
    found = json.loads((tmp_path / "eval.json").read_text())["metrics"]
    assert {name: metrics[name] for name in found} == pytest.approx(found, rel=1e-4)


def test_a_full_disk_on_one_process_is_one_line(tmp_path: Path, facts: Path) -> None:
    out = tmp_path / "run"
    first, second = run(tmp_path, 2, command_on_a_full_disk, options("molf", facts, out, STEPS, *TWO, *SAVED))
    for each in (first, second):
        assert each["status"] == 2
        assert "checkpoint-2 cannot be written" in each["err"].splitlines()[-1]
        assert "No space left on device" in each["err"].splitlines()[-1]
    assert not list(out.glob("*checkpoint*"))


def test_the_commands_of_the_page(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "distributed.md").read_text()
    commands = re.findall(r"^torchrun --nproc_per_node 2 -m molf train (.*)$", page, re.MULTILINE)
    assert len(commands) == 2
    for line in commands:
        argv = line.replace(" src/", f" {ROOT}/src/").replace(" runs/", f" {tmp_path}/").split()
        argv += ["--max_examples", "8", "--max_steps", "2"]
        assert [each["status"] for each in run(tmp_path, 2, command, argv)] == [0, 0]
    for kind in ("ddp", "fsdp2"):
        assert (tmp_path / kind / "metrics.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["molf", "molf-e"])
def test_four_processes_continue_what_two_began(tmp_path: Path, facts: Path, method: str) -> None:
    """And two what four did, with shards on pairs and replicas of them, offloaded."""
    whole, wide, hybrid = (tmp_path / name for name in ("whole", "wide", "hybrid"))
    config = ["--fsdp_config", '{"dp_replicate_size": 2, "cpu_offload": true}']
    auto = [*SAVED, "--resume_from_checkpoint", "auto"]
    run(tmp_path, 2, command, options(method, facts, whole, STEPS, *TWO, *SAVED))
    halve(whole, wide)
    run(tmp_path, 4, command, options(method, facts, wide, STEPS, *FOUR, *auto))
    run(tmp_path, 4, command, options(method, facts, hybrid, STEPS, *FOUR, *config, *SAVED))
    for out in (wide, hybrid):
        assert losses(out) == pytest.approx(losses(whole), rel=1e-5)
        assert winners(out) == winners(whole)
    half = tmp_path / "half"
    halve(hybrid, half)
    run(tmp_path, 2, command, options(method, facts, half, STEPS, *TWO, *auto))
    assert losses(half) == pytest.approx(losses(whole), rel=1e-5)
    assert winners(half) == winners(whole)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "dtype"), [("molf", "float32"), ("molf", "bfloat16"), ("molf-e", "bfloat16")])
def test_bf16_with_and_without_fp32_weights(tmp_path: Path, facts: Path, method: str, dtype: str) -> None:
    one, two, again = (tmp_path / name for name in ("one", "two", "again"))
    half = ["--bf16", "true", "--dtype", dtype, "--gradient_checkpointing", "true"]
    train_to_end(options(method, facts, one, STEPS, *ONE, *half))
    run(tmp_path, 2, command, options(method, facts, two, STEPS, *TWO, *half, *SAVED))
    assert losses(two) == pytest.approx(losses(one), rel=2e-2)  # gradients are rounded to 8 bits
    halve(two, again)
    run(
        tmp_path,
        2,
        command,
        options(method, facts, again, STEPS, *TWO, *half, *SAVED, "--resume_from_checkpoint", "auto"),
    )
    assert_identical(everything(again), everything(two))
