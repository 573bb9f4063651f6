"""What the processes of a test of ``molf train`` do."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import runpy
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from programs import make_model, start, whole
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.utils._pytree import tree_map
from transformers import TrainerCallback, trainer_jit_checkpoint

import molf.cli.train
from molf import MoLFConfig, NonFiniteError, read_routing
from molf.assets import BUNDLED_MODEL
from molf.optim.sharding import local
from molf.train import checkpoints as whole_checkpoints
from molf.train import nonfinite
from molf.train.distributed import first_error, from_first
from molf.train.run import train
from molf.train.verify import checkpoints

METHODS = {
    "fft": [],
    "lora": ["--expert_ranks", "4"],
    "molf": ["--expert_ranks", "4", "--lora_lr", "3e-3", "--check_ranks_every", "2"],
    "molf-e": ["--expert_ranks", "2", "4", "--lora_alpha", "4", "8"],
}


def options(method: str, facts: Path, out: Path, steps: int, *more: str) -> list[str]:
    return [
        "--model_name_or_path", str(BUNDLED_MODEL), "--task", "fact", "--dataset_path", str(facts), "--max_examples",
        "40", "--max_steps", str(steps), "--per_device_train_batch_size", "2", "--learning_rate", "1e-3",
        "--lr_scheduler_type", "constant", "--warmup_steps", "0", "--max_grad_norm", "1", "--logging_steps", "1",
        "--save_strategy", "no", "--gradient_checkpointing", "false", "--disable_tqdm", "true", "--eval_at_end",
        "false", "--method", method, *METHODS[method], "--output_dir", str(out), *more,
    ]  # fmt: skip


def losses(out: Path) -> list[float]:
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def winners(out: Path) -> list[Any]:
    return [record["winners"] for record in read_routing(out / "routing.jsonl")[1]]


def everything(out: Path) -> dict[str, Any]:
    """What a resume must not change: weights, states and routing of a run and of its last checkpoint."""
    newest = checkpoints(out)[-1]
    files = [*out.glob("*.safetensors"), *newest.rglob("*.safetensors"), *newest.rglob("*.pt")]
    found: dict[str, Any] = {
        str(path.relative_to(out)): load_file(path) if path.suffix == ".safetensors" else torch.load(path)
        for path in files
    }
    log = out / "routing.jsonl"
    return {**found, "routing": log.read_text() if log.exists() else None}


def halve(run: Path, half: Path) -> None:
    """A run that was interrupted after the checkpoint before its last one."""
    shutil.copytree(run, half)
    shutil.rmtree(checkpoints(half)[-1])
    for path in (*half.glob("*.safetensors"), half / "metrics.json"):
        path.unlink()


class _End(TrainerCallback):
    """What this process holds at the end of training; of sharded tensors, all of it."""

    found: dict[str, Any]

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any):
        held = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        self.found = tree_map(lambda each: whole(each) if isinstance(each, Tensor) else each, held)


def train_to_end(argv: Sequence[str]) -> dict[str, Any]:
    end = _End()
    train(*molf.cli.train.parse(argv), [end])
    return end.found


def train_with_a_broken_rank(argv: Sequence[str], step: int) -> dict[str, Any]:
    """The second process sees what is not finite, at one step; the first does not."""
    steps = itertools.count(1)
    there = nonfinite.check_step

    def check_step(*args: Any, **kwargs: Any) -> None:
        there(*args, **kwargs)
        if next(steps) == step and dist.get_rank() == 1:
            raise NonFiniteError("the loss is not finite here")

    nonfinite.check_step = check_step
    return train_to_end(argv)


def command(argv: Sequence[str]) -> dict[str, Any]:
    """Exit status and words of the command line."""
    molf.cli._PATIENCE = 0.0  # no launcher ends the others
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = molf.cli.main(["train", *argv])
    return {"status": status, "out": out.getvalue(), "err": err.getvalue()}


class _Sigterm(TrainerCallback):
    """The signal, to the second process alone, in a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if dist.get_rank() == 1 and state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def command_with_a_signal(argv: Sequence[str], step: int) -> dict[str, Any]:
    """The command line, without transformers' wait for a SIGKILL."""
    trainer_jit_checkpoint.threading = SimpleNamespace(Timer=lambda _, call: SimpleNamespace(start=call))
    molf.cli.train.train = lambda *arguments: train(*arguments, [_Sigterm(step)])
    return command(argv)


def command_on_a_full_disk(argv: Sequence[str]) -> dict[str, Any]:
    """The second process cannot write its shards."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    if dist.get_rank() == 1:
        HuggingFaceStorageWriter.write_data = full
    return command(argv)


def agree(broken: int) -> dict[str, Any]:
    """What ``first_error`` and ``from_first`` give to this process."""
    rank = dist.get_rank()
    error = first_error(ValueError(f"of rank {rank}") if rank == broken else None)
    return {"none": first_error(None), "error": str(error), "first": from_first(lambda: f"by {rank}")}


def refused(checkpoint: str) -> str:
    """Why the Trainers' mixin does not load a checkpoint, which the first process alone looks at."""
    if dist.get_rank() > 0:
        del whole_checkpoints.check_checkpoint
    try:
        whole_checkpoints.WholeCheckpoints()._load_from_checkpoint(checkpoint)
    except ValueError as error:
        return str(error)
    return "not refused"


def example(name: str, *arguments: Any, **options: Any) -> None:
    """``main`` of an example, in the process group that is there."""
    there = dist.init_process_group, dist.destroy_process_group
    dist.init_process_group = dist.destroy_process_group = lambda: None
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / name))["main"](*arguments, **options)
    dist.init_process_group, dist.destroy_process_group = there


def state_bytes(name: str, fields: dict[str, Any]) -> dict[str, int]:
    """What this process holds of a sharded model's optimizer, by the kinds of ``molf plan``."""
    config = MoLFConfig(**fields)
    model, optimizer = start(make_model(name, config), config, "fsdp2")
    found = dict.fromkeys(("masters", "experts", "moments"), 0)
    for state in optimizer.state.values():
        for key, value in state.items():
            kind = "masters" if key == "base" else "experts" if key.startswith("lora_") else "moments"
            found[kind] += local(value).numel() * value.element_size() if key != "step" else 0
    adapters = [p for n, p in model.named_parameters() if ".lora_" in n]
    found["experts"] += sum(local(p).numel() * p.element_size() for p in adapters)
    return found
