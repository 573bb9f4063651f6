"""What happens in one process of several, or to one part of what is sharded, and all of them must take alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run
from programs import make_model, start
from safetensors.torch import load_file
from test_train_fsdp2 import TWO
from train_programs import command, options

from molf import MoLFConfig, NonFiniteError, NonFiniteGradientError, create_molf_optimizer
from molf.optim.sharding import local
from molf.train.distributed import first_error
from molf.train.nonfinite import _is_of_gradients

BEST = [
    "--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1",
    "--load_best_model_at_end", "true", "--metric_for_best_model", "eval_loss", "--eval_examples", "4",
    "--greater_is_better", "true",  # the loss falls: the best is the first
]  # fmt: skip


def same_files(a: Path, b: Path) -> bool:
    found, other = load_file(a), load_file(b)
    return found.keys() == other.keys() and all(torch.equal(found[name], other[name]) for name in found)


def dies_before_the_result(argv: list[str]) -> dict[str, Any]:
    import molf.train.run as module

    def no(*_: Any) -> None:
        raise OSError("killed here")

    module._save = no
    return command(argv)


def other_on_the_second(argv: list[str], option: str, value: str) -> dict[str, Any]:
    if dist.get_rank() == 1:
        argv[argv.index(option) + 1] = value
    return command(argv)


def load_what_is_not_finite(kind: str) -> str:
    """A sharded state with NaN in the second process's part; what each process is told."""
    config = MoLFConfig(expert_ranks=(4,), lr=1e-3)
    _, saved = start(make_model("gemma3", config), config, "fsdp2")
    state = saved.state_dict()
    if dist.get_rank() == 1:
        local(next(e for e in state["state"].values() if "exp_avg" in e)["exp_avg"]).view(-1)[-1] = float("nan")
    model = make_model("gemma3", config)
    own = create_molf_optimizer(model, config) if kind == "whole" else start(model, config, "fsdp2")[1]
    try:
        own.load_state_dict(state)
    except ValueError as error:
        dist.barrier()
        return str(error)
    return ""


def in_a_folder_of_its_own(argv: list[str]) -> dict[str, Any]:
    argv[argv.index("--output_dir") + 1] += str(dist.get_rank())
    return command(argv)


def a_loss_of_the_second(_: None) -> str:
    """What is raised: its NaN has reached the gradients of both."""
    error: NonFiniteError = NonFiniteGradientError("the gradient")
    found = first_error((error if dist.get_rank() == 0 else NonFiniteError("the loss"), True), _is_of_gradients)
    assert found is not None
    return str(found[0])


@pytest.mark.parametrize("fsdp", [[], TWO], ids=["ddp", "fsdp2"])
def test_folders_that_are_not_one_are_refused(tmp_path: Path, facts: Path, fsdp: list[str]) -> None:
    """Else checkpoints would lack what the other process wrote."""
    argv = options("molf", facts, tmp_path / "run", 2, *fsdp, "--save_strategy", "steps", "--save_steps", "1")
    first = run(tmp_path, 2, in_a_folder_of_its_own, argv)[0]
    assert first["status"] == 2
    assert "output_dir has to be one folder for all of them" in first["err"].splitlines()[-1]
    assert not list(tmp_path.glob("run*/checkpoint-*"))


def test_other_data_in_one_process_are_refused(tmp_path: Path, facts: Path) -> None:
    """Else it would end early, and the others wait for ever."""
    argv = options("molf", facts, tmp_path / "run", 30)
    for each in run(tmp_path, 2, other_on_the_second, argv, "--max_examples", "11"):
        assert each["status"] == 2
        assert "process 1 has other training examples than the first" in each["err"].splitlines()[-1]


def test_the_cause_is_told_before_its_consequence(tmp_path: Path) -> None:
    assert run(tmp_path, 2, a_loss_of_the_second, None) == ["the loss"] * 2


@pytest.mark.parametrize("method", ["molf", "molf-e"])
def test_the_best_of_a_sharded_run_is_loaded_by_all(tmp_path: Path, facts: Path, method: str) -> None:
    """And not half of every tensor from the best, half from the last."""
    out = tmp_path / "run"
    run(tmp_path, 2, command, options(method, facts, out, 3, *TWO, *BEST))
    file = "model.safetensors" if method == "molf" else "adapter_model.safetensors"
    assert same_files(out / file, out / "checkpoint-1" / file)


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_that_ended_before_its_result_still_takes_the_best(tmp_path: Path, facts: Path, world: int) -> None:
    out = tmp_path / "run"
    argv = options("molf", facts, out, 3, *BEST)
    run(tmp_path, world, dies_before_the_result, argv)
    run(tmp_path, world, command, [*argv, "--resume_from_checkpoint", "auto"])
    assert json.loads((out / "trainer_state.json").read_text())["best_model_checkpoint"].endswith("checkpoint-1")
    assert same_files(out / "model.safetensors", out / "checkpoint-1" / "model.safetensors")


def test_a_lost_process_is_named_as_such_while_the_trainer_is_made(tmp_path: Path, facts: Path) -> None:
    argv = options("molf", facts, tmp_path / "run", 2)
    first, second = run(tmp_path, 2, other_on_the_second, argv, "--dataset_path", "/nonexistent.json")
    assert "another process of this run has ended" in first["err"].splitlines()[-1]
    assert "/nonexistent.json" in second["err"].splitlines()[-1]


@pytest.mark.parametrize(
    "config", ['{"dp_replicate_size": "x"}', '{"dp_replicate_size": 1.5}', '{"dp_replicate_size": null}',
               '{"cpu_offload": "false"}'],
)  # fmt: skip
def test_settings_of_another_type_are_one_clear_line(tmp_path: Path, facts: Path, config: str) -> None:
    argv = options("molf", facts, tmp_path / "run", 1, *TWO, "--fsdp_config", config)
    for each in run(tmp_path, 2, command, argv):
        assert each["status"] == 2
        assert "fsdp_config" in each["err"].splitlines()[-1]


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_what_is_not_finite_in_one_part_is_refused_by_all(tmp_path: Path, kind: str) -> None:
    first, second = run(tmp_path, 2, load_what_is_not_finite, kind, timeout=40)
    assert "not finite" in first
    assert "not finite" in second
