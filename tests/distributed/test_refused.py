"""What several processes cannot train is refused by one line, with the remedy."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from processes import run
from train_programs import command, options

from models import causal_lm
from molf import MoLFTrainerMixin
from molf.cli import main
from molf.train.arguments import TrainArguments
from molf.train.sharded import ShardedCallback, layers

ENGINES = {
    "deepspeed": (["--deepspeed", "zero3.json"], {}, r"deepspeed=zero3.json: ZeRO flattens .* use --fsdp true"),
    "deepspeed-launch": ([], {"ACCELERATE_USE_DEEPSPEED": "true"}, "deepspeed=by accelerate launch: ZeRO flattens"),
    "fsdp-launch": ([], {"ACCELERATE_USE_FSDP": "true"}, "accelerate launch --use_fsdp: .* give molf train --fsdp"),
    "parallel": ([], {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism_config: weights that are cut"),
    "fsdp1": (["--fsdp", "true", "--fsdp_config", '{"version": 1}'], {}, "version=1: FSDP1 flattens .* use 2"),
    "legacy": (["--fsdp", "full_shard auto_wrap"], {}, "fsdp='full_shard auto_wrap': give true"),
    "file": (["--fsdp", "true", "--fsdp_config", "fsdp.json"], {}, "fsdp_config='fsdp.json' .*: give a mapping"),
    "unused": (["--fsdp", "--fsdp_config", '{"fsdp_state_dict_type": "X"}'], {}, "state_dict_type='X' is not used"),
    "alone": (["--fsdp"], {}, "fsdp=true with one process has nothing to shard"),
    "no-mpi": ([], {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1"}, "accelerate launch --cpu starts one"),
}


@pytest.mark.parametrize("case", ENGINES)
def test_refused(tmp_path: Path, facts: Path, monkeypatch, capsys, case: str) -> None:
    words, environment, message = ENGINES[case]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["train", *options("molf", facts, tmp_path / "run", 1, *words)]) == 2
    said = capsys.readouterr().err.strip().split("\n")[-1]
    assert said.startswith("molf: error: ")
    assert re.search(message, said), said
    assert not (tmp_path / "run").exists()


def test_refused_by_two_processes_in_one_voice(tmp_path: Path, facts: Path) -> None:
    """The second waits for the launcher to end it."""
    cases = [
        ("lora", ["--method", "dora"], r"fsdp=true: dora needs whole weights"),
        ("molf", ["--step_in_backward", "true", "--max_grad_norm", "0"], "step_in_backward=True with 2 processes"),
        ("molf", ["--use_cpu", "false"], "use_cpu=False: 2 processes were started, and there is no accelerator"),
        ("molf", ["--fp16", "true"], "fp16=True: its loss scaler does not see"),
        ("molf", ["--dry_run", "true"], "dry_run=True with 2 processes: it weighs one"),
        (
            "molf",
            ["--fsdp_config", '{"dp_replicate_size": 3}'],
            "fsdp_config dp_replicate_size=3: must divide the 2 processes",
        ),
    ]
    for method, words, message in cases:
        argv = [*options(method, facts, tmp_path / "run", 1), "--fsdp", *words]
        first, second = run(tmp_path, 2, command, argv)
        assert first["err"].strip().split("\n")[-1].startswith(f"molf: error: {message}"), first
        assert f"molf: error: process 1: {message}" in second["err"]


def test_other_commands_are_one_process(monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["compare", "--task", "world-fact"]) == 2
    assert "molf: error: molf compare is one process: start it without torchrun" in capsys.readouterr().err


def test_a_model_that_is_whole_is_not_trained_as_a_sharded_one() -> None:
    args = TrainArguments(output_dir="unused")
    args.fsdp = True
    with pytest.raises(ValueError, match=r"fsdp=true, but model.embed_tokens.weight is not sharded \(26 such"):
        ShardedCallback().on_train_begin(args, None, None, model=causal_lm("qwen2"))


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_layers_are_those_that_are_numbered(name: str) -> None:
    model = causal_lm(name)
    kind = {"qwen2": "Qwen2DecoderLayer", "gpt2": "GPT2Block"}[name]
    assert [type(layer).__name__ for layer in layers(model)] == [kind, kind]
    experts = torch.nn.ModuleList(torch.nn.ModuleList([torch.nn.Linear(1, 1)]) for _ in range(11))
    assert list(layers(experts)) == list(experts)  # not what is numbered inside them


def test_a_trainer_that_shards_too_late_is_refused() -> None:
    trainer = object.__new__(MoLFTrainerMixin)
    trainer.model, trainer.is_fsdp_enabled = torch.nn.Linear(2, 2), True
    with pytest.raises(ValueError, match=r"fsdp: .* call molf.train.sharded.shard\(model, args\) first"):
        trainer.create_optimizer()
