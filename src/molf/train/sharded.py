"""FSDP2 in a Trainer: the model is sharded before its optimizer is made, and saved so that it loads anywhere.

Weights are saved whole, gathered on the first process alone. The optimizer's state is saved as it is sharded, by every
process its part, with PyTorch's distributed checkpoint, as safetensors: its usual format has a pickle in it. Any number
of processes reads it again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainingArguments

from ..optim.sharding import is_distributed, is_sharded
from .verify import REST, SHARDED


def shard(model: nn.Module, args: TrainingArguments) -> None:
    """Shard every layer, and the rest of the model, over all processes; call it before the Trainer is made.

    Tied weights stay tied, because both are in the rest. transformers' own sharding, as it loads a model, parts them
    (5.23), and accelerate's comes when the optimizer has been made (1.15).

    Args:
        model: On any device, the same on every process.
        args: The Trainer's, with ``bf16`` and maybe ``fsdp_config``: ``cpu_offload`` keeps shards on the CPU, and with
            ``dp_replicate_size`` each of so many groups of processes has all shards (HSDP).

    Raises:
        ValueError: If the replicas do not divide the processes.
    """
    config: Any = args.fsdp_config or {}
    replicas = int(config.get("dp_replicate_size", 1))
    if replicas < 1 or args.world_size % replicas:
        raise ValueError(f"fsdp_config dp_replicate_size={replicas}: must divide the {args.world_size} processes")
    mesh = init_device_mesh(
        args.device.type, (replicas, args.world_size // replicas), mesh_dim_names=("replicate", "shard")
    )
    settings: dict[str, Any] = {
        "mesh": mesh if replicas > 1 else mesh["shard"],  # with replicas it is HSDP
        "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32) if args.bf16 else MixedPrecisionPolicy(),
        "offload_policy": CPUOffloadPolicy(torch.accelerator.is_available())
        if config.get("cpu_offload")
        else OffloadPolicy(),
    }
    for layer in layers(model):
        fully_shard(layer, **settings)
    fully_shard(model, **settings)
    register_fsdp_forward_method(model, "generate")  # an adapter's passes the model's own forward by


def layers(model: nn.Module) -> Iterator[nn.Module]:
    """The model's layers: the outermost modules whose name is a number."""
    latest = None
    for name, module in model.named_modules():  # what is inside a layer comes right after it
        if name.rpartition(".")[2].isdecimal() and (latest is None or not name.startswith(latest)):
            latest = f"{name}."
            yield module


class ShardedTraining:
    """Mixin for a Trainer: a model that is sharded already is trained as it is, and saved whole by the first process.

    Leave the Trainer's own ``fsdp`` alone: accelerate would shard the model when the optimizer has been made. With
    ``WholeCheckpoints`` in front its checkpoints hold the sharded state of the optimizer, and a resume is exact.

    Example:
        class MyTrainer(WholeCheckpoints, ShardedTraining, SFTTrainer): ...

        shard(model, args)
        MyTrainer(model, args, ..., optimizer_cls_and_kwargs=(MoLFOptimizerFactory, {"config": config})).train()
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        this: Any = self  # the Trainer that this class is mixed into
        # the Trainer's word for a model that has its own placement and reduction; else it would wrap it in DDP
        this.is_distributed_loading_by_transformers = is_sharded(this.model)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not is_sharded(model):  # which is where it belongs, maybe offloaded
            super()._move_model_to_device(model, device)  # type: ignore[misc]

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Around every forward and backward pass but the last of those that are accumulated."""
        this: Any = self
        this.model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            this.model.set_requires_gradient_sync(True)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        this: Any = self
        if is_sharded(this.model):
            adapter = hasattr(this.model, "peft_config")
            options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapter)
            state_dict = get_model_state_dict(this.model, options=options)  # empty but for the first process
            if not this.args.should_save:
                return
            first: dict[Tensor, Any] = {}
            for name, parameter in this.model.named_parameters(remove_duplicate=False):
                if name in state_dict:  # tied weights are one tensor again, which is saved once
                    state_dict[name] = first.setdefault(parameter, state_dict[name])
        super()._save(output_dir, state_dict)  # type: ignore[misc]


class ShardedCallback(TrainerCallback):
    """Looks, when the Trainer has prepared the model, whether it is as ``fsdp`` asks for."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Refuse to train a model that is whole on every process.

        Raises:
            ValueError: Naming a parameter that is not a DTensor.
        """
        whole = [name for name, p in model.named_parameters() if args.fsdp and not is_distributed(p)]
        if whole:
            raise ValueError(
                f"fsdp=true, but {whole[0]} is not sharded ({len(whole)} such parameters): every process would train "
                "the whole model; leave fsdp out, or use the versions that molf was tested with"
            )


def save_optimizer(model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """Write the state of a sharded model's optimizer; every process calls it.

    Args:
        model: The model.
        optimizer: Its optimizer.
        folder: Of a checkpoint, seen by all processes.
    """
    found: Any = get_optimizer_state_dict(model, optimizer)
    tensors, numbers = _parted(found["state"])
    with _own_errors():
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder / SHARDED), save_distributed=True))
    if torch.distributed.get_rank() == 0:
        torch.save({"state": numbers, "param_groups": found["param_groups"]}, folder / SHARDED / REST)


def load_optimizer(model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """Read what ``save_optimizer`` wrote, maybe with another number of processes; every process calls it.

    Raises:
        ValueError: If the state is of other parameters.
    """
    own: Any = get_optimizer_state_dict(model, optimizer)
    tensors, _ = _parted(own["state"])
    with warnings.catch_warnings(), _own_errors():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what is meant then
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder / SHARDED)))
    rest = torch.load(folder / SHARDED / REST, map_location="cpu", weights_only=True)
    for key, tensor in tensors.items():
        name, _, key = key.rpartition("/")
        rest["state"][name][key] = tensor
    if any(not group["params"] for group in optimizer.param_groups):  # torch's takes one such group at most
        optimizer.load_state_dict(rest)
    else:
        set_optimizer_state_dict(model, optimizer, rest)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Read a checkpoint's whole weights into a sharded model, every process its part; tied ones are there once."""
    weights = get_model_state_dict(model)
    planner = DefaultLoadPlanner(allow_partial_load=True)
    with _own_errors():
        load(weights, storage_reader=HuggingFaceStorageReader(str(folder)), planner=planner)
    set_model_state_dict(model, weights)


def load_renamed(model: Any, folder: Path) -> None:
    """Read weights that transformers saved under other names than the model's, through transformers, in fp32 at least.

    Every process reads all of them, and of a sharded model takes its part.
    """
    made: Any = next(each for each in type(model).__mro__ if not issubclass(each, FSDPModule))
    dtype = torch.promote_types(model.dtype, torch.float32)
    weights = made.from_pretrained(folder, config=model.config, dtype=dtype).state_dict()
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))


@contextmanager
def _own_errors() -> Iterator[None]:
    """What went wrong on a process, on all of them: the distributed checkpoint's error is no ``Exception``."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def _parted(state: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Tensors by parameter and key, laid out as safetensors takes them, and the rest: numbers, and tensors of one."""
    tensors = {
        f"{name}/{key}": value.contiguous()
        for name, entry in state.items()
        for key, value in entry.items()
        if isinstance(value, Tensor) and value.dim()
    }
    numbers = {
        name: {key: value for key, value in entry.items() if f"{name}/{key}" not in tensors}
        for name, entry in state.items()
    }
    return tensors, numbers
