"""molf plan and molf train --dry_run from the command line."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torchao.optim import subclass_8bit
from transformers import AutoConfig

from models import causal_lm, lm_step
from molf import MoLFAdamW, MoLFConfig, create_molf_optimizer
from molf.assets import BUNDLED_MODEL
from molf.cli import main
from molf.cli.train import parse
from molf.plan.dry_run import DryRun, compared, dry_run, fill_state, model_config, workload
from molf.plan.memory import Workload, plan_method

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories3M"
IN_BACKWARD = ["--step_in_backward", "true", "--gradient_accumulation_steps", "1", "--max_grad_norm", "0"]
PLAN = ["plan", "--model_name_or_path", str(BUNDLED_MODEL)]


def test_a_plan_needs_no_data_and_no_weights(tmp_path, capsys) -> None:
    folder = tmp_path / "config-alone"
    folder.mkdir()
    (folder / "config.json").write_text((BUNDLED_MODEL / "config.json").read_text())
    options = ["--expert_ranks", "16", "--max_length", "32", "--gpus", "6"]
    assert main(["plan", "--model_name_or_path", str(folder), *options]) == 0
    printed = capsys.readouterr().out
    assert "molf: 946,176 of 946,176 parameters trained, and 155,648 in virtual experts" in printed
    assert re.search(r"model\.layers\.\*\.mlp\.up_proj\.lora_A +4 +16 x 128 +lora_r16", printed)
    assert [line.split()[0] for line in printed.split("GiB on one device, 8 x 32")[1].splitlines()[4:8]] == [
        "fft", "lora", "molf", "molf-e",
    ]  # fmt: skip
    lines = [line.split() for line in printed.split("GiB on one device, 8 x 32")[1].splitlines()[4:8]]
    most = max(float(line[-2]) for line in lines)
    assert [len(line[-1]) for line in lines] == [pytest.approx(20 * float(line[-2]) / most, abs=0.6) for line in lines]
    assert [line.split()[0] for line in printed.split("Peak GiB per GPU:")[1].splitlines()[4:8]] == ["1", "2", "4", "6"]
    assert "warning: the output head is tied" in printed
    assert main(["plan", "--model_name_or_path", str(folder), *options, "--all", "true", "--method", "molf-e"]) == 0
    printed = capsys.readouterr().out
    assert "model.layers.3.mlp.up_proj.lora_B" in printed
    assert "warning" not in printed


def test_what_is_refused(capsys) -> None:
    def fails(*arguments: str) -> str:
        capsys.readouterr()
        assert main(list(arguments)) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("molf: error:")]
        return line

    assert "gpus=0: must be at least 1" in fails(*PLAN, "--gpus", "0")
    for command in (["plan"], ["train", "--task", "world-fact"]):
        for name in ("/nowhere", "./no/where", "no where"):
            reason = "there is no such folder, and no model of the hub has such a name"
            assert (
                fails(*command, "--model_name_or_path", name) == f"molf: error: model {name} cannot be read: {reason}"
            )
        assert fails(*command, "--model_name_or_path", "no/where") == (
            "molf: error: model no/where cannot be read: there is no such folder, the hub cannot be reached "
            "(HF_HUB_OFFLINE is set), and its cache does not have the model"
        )
    assert "unknown option: --all_of_it" in fails(*PLAN, "--all_of_it", "1")
    assert "nothing" in fails(*PLAN, "--target_modules", "nothing", "--expert_ranks", "2")
    assert "dataset_path is not given" in fails("train", *PLAN[1:])


@pytest.mark.parametrize("made", ["molf", "adamw"])
def test_a_dry_run_has_all_state_before_its_step_and_none_of_it_moved(made: str) -> None:
    """In fp32 a W for every layer, where LoRA has won none yet; AdamW's moments. The next step is the first."""
    model, other = causal_lm("llama"), causal_lm("llama")
    optimizers = [
        create_molf_optimizer(each, MoLFConfig(expert_ranks=(4,), lr=1e-3))
        if made == "molf"
        else torch.optim.AdamW(each.parameters(), lr=1e-3, weight_decay=0.1)
        for each in (model, other)
    ]
    fill_state(optimizers[0])
    held = {id(t.untyped_storage()): t.untyped_storage().nbytes()
            for t in [*model.parameters(), *(t for s in optimizers[0].state.values() for t in s.values())]}  # fmt: skip
    plan = plan_method("molf" if made == "molf" else "fft", MoLFConfig(expert_ranks=(4,)), work_of(model))
    planned = sum(tensor.bytes for tensor in plan.held if tensor.kind != "gradients")
    assert planned <= sum(held.values()) <= planned + 4 * len(list(model.parameters()))  # and the counts of steps
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert [group["lr"] for group in optimizers[0].param_groups] == [
        group["lr"] for group in optimizers[1].param_groups
    ]
    lm_step(model, optimizers[0], 0)
    if made == "molf":
        lm_step(other, optimizers[1], 0)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def work_of(model: Any) -> Workload:
    return Workload(model.config, torch.float32, 1, 4)


def test_options_that_save_memory_are_planned() -> None:
    """8 bits without what an earlier optimizer left of torchao's; gradients that a step in the backward pass frees."""
    for made in (subclass_8bit.get_qmap_signed, subclass_8bit.get_qmap_unsigned):
        made.cache_clear()
    work = Workload(AutoConfig.from_pretrained(BUNDLED_MODEL), torch.float32, 1, 4)
    plain, packed, freed = (
        plan_method("molf", MoLFConfig(expert_ranks=(16,), **options), work)
        for options in ({}, {"moments_8bit": True}, {"step_in_backward": True})
    )
    weights = plain.memory()["weights"]
    sizes = [math.prod(tensor.shape) for tensor in plain.held if tensor.kind == "gradients"]
    small = [n for n in sizes if n % 256 or n < 4096]
    assert len(small) > 10  # and in full precision: vectors, and the bundled embedding
    codes = sum(2 * (n + 4 * n // 256 + 4 * 256) for n in sizes if n not in small)  # a scale per block and a table
    assert sum(t.bytes for t in packed.held if t.kind == "moments") == codes + 8 * sum(small)
    assert plain.memory()["gradients"] == weights
    assert freed.memory()["gradients"] == 0
    assert freed.memory()["activations"] < plain.memory()["activations"] + weights
    assert plan_method("fft", MoLFConfig(step_in_backward=True), work).memory()["gradients"] == weights


def test_what_is_fused_needs_no_temporaries() -> None:
    """The optimizer's name was looked for in that of its enum, and the default taken for one that is not fused."""
    words = ["--model_name_or_path", str(BUNDLED_MODEL), "--task", "world-fact", "--method", "fft", "--use_cpu", "true"]
    for optim, fused in (("adamw_torch_fused", True), ("adamw_torch", False)):
        method, args = parse([*words, "--optim", optim])
        work = workload(method, args, model_config(method, args), 4)
        assert work.fused is fused
        assert (plan_method("fft", MoLFConfig(), work).step == 0) is fused


def test_other_optimizers_are_counted_or_named(capsys) -> None:
    """Every one of them was planned, and compared with a dry run, as AdamW, without a word."""
    words = [*PLAN, "--method", "lora", "--max_length", "16", "--gpus", "1"]
    assert main([*words, "--optim", "adafactor"]) == 0
    assert "warning: optim=adafactor is not planned: moments and step are those of AdamW" in capsys.readouterr().out
    assert main([*words, "--optim", "adamw_torch"]) == 0
    assert "not planned" not in capsys.readouterr().out
    method, args = parse([*PLAN[1:], "--task", "world-fact", "--method", "fft", "--use_cpu", "true", "--optim", "sgd"])
    plan = plan_method("fft", MoLFConfig(), workload(method, args, model_config(method, args), 4))
    assert plan.memory()["moments"] == plan.step == 0
    dry = DryRun(1.0, plan, 1, 4, "adafactor")
    assert "optim=adafactor is not planned" in compared(dry)
    assert "not planned" not in compared(replace(dry, optim="sgd"))


@pytest.mark.parametrize("length", ["-5", "0"])
def test_a_length_below_one_is_refused(capsys, length: str) -> None:
    """It was a traceback, and of 0 the plan of the model's context."""
    assert main([*PLAN, "--max_length", length]) == 2
    assert f"max_length={length}: must be at least 1" in capsys.readouterr().err


def test_a_dry_run_makes_one_step(tmp_path, monkeypatch, capsys) -> None:
    steps = []
    monkeypatch.setattr(
        MoLFAdamW, "step", lambda self, closure=None, step=MoLFAdamW.step: steps.append(1) or step(self)
    )
    monkeypatch.chdir(tmp_path)
    options = ["--model_name_or_path", str(BUNDLED_MODEL), "--task", "world-fact", "--max_examples", "40"]
    options += ["--gradient_accumulation_steps", "2", "--eval_strategy", "epoch", "--use_cpu", "true"]
    options += ["--save_strategy", "epoch", "--load_best_model_at_end", "true"]
    assert main(["train", *options, "--expert_ranks", "2", "--dry_run", "true"]) == 0
    assert len(steps) == (1 if torch.cuda.is_available() else 2), "once to load the libraries' code, once to measure"
    assert re.search(r"a step of 8 x \d+ tokens took [\d.]+ MiB at its peak; the estimate is", capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("task", [True, False])
def test_a_dry_run_takes_what_a_run_takes_for_its_evaluation(tmp_path, monkeypatch, capsys, task: bool) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text('{"prompt": "The lion is", "completion": " an animal."}\n' * 4)
    options = ["--model_name_or_path", str(BUNDLED_MODEL), "--use_cpu", "true", "--expert_ranks", "2"]
    options += ["--eval_strategy", "steps", "--eval_steps", "1", "--eval_on_start", "true", "--dry_run", "true"]
    options += (
        ["--task", "world-fact", "--max_examples", "8"]
        if task
        else ["--dataset_path", "pairs.jsonl", "--eval_dataset_path", "pairs.jsonl"]
    )
    assert main(["train", *options]) == 0
    assert "MiB at its peak" in capsys.readouterr().out


@pytest.mark.parametrize("more", [("--max_examples", "3"), ("--max_examples", "40", "--packing", "true")])
def test_a_dry_run_estimates_the_batch_that_it_measured(more: tuple[str, ...]) -> None:
    """Three examples are no batch of eight, and packed ones are one long row."""
    words = ["--model_name_or_path", str(BUNDLED_MODEL), "--task", "world-fact", "--method", "fft", "--use_cpu", "true"]
    method, args = parse([*words, *more, "--max_length", "64"])
    found = dry_run(method, args)
    assert (found.batch, found.length > 64) == ((1, True) if "--packing" in more else (3, False))
    work = replace(workload(method, args, model_config(method, args), found.length), batch=found.batch)
    assert found.plan == plan_method("fft", method.molf_config(args), work)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "method"),
    [
        ("16", ["fft"]),
        ("16", ["lora"]),
        ("16", ["molf"]),
        ("16", ["molf-e"]),
        ("2", ["fft"]),
        ("2", ["molf"]),
        ("16", ["molf", "--moments_8bit", "true"]),
        ("16", ["molf", *IN_BACKWARD]),
    ],
)
@pytest.mark.parametrize("model", ["bundled", "stories3M"])
def test_a_dry_run_is_within_ten_percent_of_the_plan(tmp_path, model: str, batch: str, method: list[str]) -> None:
    """In a process of its own, whose growth is measured; a small batch leaves the masters much of it."""
    if model == "stories3M" and not STORIES.exists():
        pytest.skip(f"{STORIES} is missing")
    name, eos = (str(STORIES), ["--eos_token", "</s>"]) if model == "stories3M" else (str(BUNDLED_MODEL), [])
    options = [
        "--task",
        "world-fact",
        "--max_examples",
        "64",
        "--use_cpu",
        "true",
    ]
    command = [sys.executable, "-m", "molf", "train", "--model_name_or_path", name, *eos, *options, "--method", *method]
    command += ["--per_device_train_batch_size", batch, "--dry_run", "true"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(r"took ([\d.]+) MiB at its peak; the estimate is ([\d.]+) MiB", done.stdout)
    assert found is not None
    measured, estimated = map(float, found.groups())
    assert estimated == pytest.approx(measured, rel=0.1)
    assert not list(tmp_path.iterdir()), "nothing is saved"
