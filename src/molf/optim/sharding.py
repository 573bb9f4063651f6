"""Parameters that FSDP2 has sharded: the part that this process holds, and sums over all parts.

``fully_shard`` makes every parameter a DTensor and spreads one of its dimensions, the rows if nothing else was asked
for, over a process group; gradients come sharded alike. The optimizer works on the parts. Only two things sum over a
whole matrix, dL/dA_i = s_i B_iᵀ G and the scores, and one all-reduce completes each for all modules at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .config import MoLFConfig
from .quantized import as_float

PLAIN = {Tensor, nn.Parameter}
"""Of a subclass the data may be elsewhere."""


class ProcessesDifferError(RuntimeError):
    """What has to be the same in several processes is not, or a model was sharded after its optimizer was made."""


def is_distributed(tensor: Any) -> bool:
    """Whether it is a DTensor. Without the import, which is slow and has happened where there is one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards parameters of the model."""
    return any(is_distributed(parameter) for parameter in model.parameters())


def local(tensor: Any) -> Tensor:
    """The part of a DTensor that this process holds, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if type(tensor) not in PLAIN and is_distributed(tensor) else tensor


def locals_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """``local`` of each; a step asks for those of all its tensors, and nearly always they are plain."""
    listed = list(tensors)
    return listed if set(map(type, listed)) <= PLAIN else [local(tensor) for tensor in listed]


def processes() -> int:
    """Number of processes that train together; 1 without a process group."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def same_everywhere(tensor: Tensor) -> Tensor:
    """The first process's values, in every process: what is drawn at random must not differ."""
    if processes() > 1:
        backed = f"{tensor.device.type}:" in torch.distributed.get_backend_config()
        sent = tensor if backed else tensor.cuda()  # NCCL takes none of a model that is on the CPU yet
        torch.distributed.broadcast(sent, 0)
        tensor.copy_(sent)
    return tensor


def sharded_dim(tensor: Any) -> int | None:
    """The dimension that is spread over processes; None if every process holds the whole tensor."""
    if not is_distributed(tensor):
        return None
    return next((placement.dim for placement in tensor.placements if placement.is_shard()), None)


def shard_like(whole: Tensor, like: Any, dim: int | None) -> Tensor:
    """A tensor that every process has, as one sharded over ``dim`` by the processes that share ``like``, or replicated.

    Args:
        whole: Equal in every process.
        like: The parameter that it belongs to; if that is no DTensor, ``whole`` itself is returned.
        dim: None replicates it.
    """
    if not is_distributed(like):
        return whole
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placements = [Shard(dim) if dim is not None and each.is_shard() else Replicate() for each in like.placements]
    sharded = distribute_tensor(whole, like.device_mesh, placements, src_data_rank=None)
    return sharded.to(local(like).device)  # with CPU offload not where the mesh's devices are


def anywhere(flag: bool, tensors: Iterable[Any]) -> bool:
    """Whether a flag is set in any process that shares one of the tensors; the flag itself if none is a DTensor."""
    shared = next((each for each in tensors if is_distributed(each)), None)
    if shared is None:
        return flag
    mesh, found = shared.device_mesh, torch.tensor(float(flag), device=shared.device_mesh.device_type)
    for dim in range(mesh.ndim):
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=mesh.get_group(dim))
    return bool(found.item())


def fitted(saved: Tensor, own: Tensor) -> Tensor:
    """A saved tensor as its counterpart here is held: sharded, or whole. Gathers, so all processes call it together."""
    if is_distributed(saved) and not is_distributed(own):
        return saved.full_tensor()  # type: ignore[attr-defined]
    if is_distributed(own) and not is_distributed(saved):
        return shard_like(saved, own, sharded_dim(own))
    return saved


def compare_replicas(named: Sequence[tuple[str, Any]]) -> None:
    """See that what several processes hold is the same in all of them, by sums over the bits of every tensor.

    Args:
        named: Name and tensor; a DTensor is compared along the dimensions of its mesh that replicate it.

    Raises:
        ProcessesDifferError: Naming the first tensor that differs, in every process.
    """
    distributed = torch.distributed
    replicated: dict[Any, list[tuple[str, Tensor]]] = {}
    for name, tensor in named:
        groups = [distributed.group.WORLD]
        if is_distributed(tensor):
            mesh = tensor.device_mesh
            groups = [mesh.get_group(i) for i, each in enumerate(tensor.placements) if each.is_replicate()]
        for group in groups:
            replicated.setdefault(group, []).append((name, local(tensor)))
    device = local(named[0][1]).device  # the weights': step counts are on the CPU, whose tensors NCCL does not take
    for group, held in replicated.items():
        sums = torch.stack([_bits(as_float(tensor)).sum().to(device) for _, tensor in held])
        least = torch.stack([sums, -sums])
        distributed.all_reduce(least, distributed.ReduceOp.MIN, group=group)
        differ = [name for (name, _), low, high in zip(held, *least.tolist(), strict=True) if low != -high]
        if differ:
            raise ProcessesDifferError(
                f"{differ[0]} differs between processes (and {len(differ) - 1} more tensors): they were not given the "
                "same weights, or something but the optimizer changed them; take the last checkpoint that was the same"
            )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


@dataclass(frozen=True)
class Shards:
    """The processes that hold the parts of every parameter.

    Attributes:
        group: Their process group.
        first: Whether this process is the first of them; what all of them hold is counted there.
    """

    group: Any
    first: bool

    @classmethod
    def of(cls, parameters: Iterable[Any]) -> Shards | None:
        """From the parameters; None if each process has them whole."""
        parameter = next((each for each in parameters if sharded_dim(each) is not None), None)
        if parameter is None:
            return None
        mesh = parameter.device_mesh
        dim = next(i for i, placement in enumerate(parameter.placements) if placement.is_shard())
        return cls(mesh.get_group(dim), mesh.get_local_rank(dim) == 0)

    def add_up(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums of the tensors over the processes, by one all-reduce of all together, in the first one's dtype."""
        flat = torch.cat([tensor.reshape(-1).to(tensors[0].dtype) for tensor in tensors])
        torch.distributed.all_reduce(flat, group=self.group)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def first_row(parameter: Any) -> int:
    """Index of the first row of a matrix that this process holds."""
    if sharded_dim(parameter) != 0:
        return 0
    mesh = parameter.device_mesh
    dim = next(i for i, placement in enumerate(parameter.placements) if placement.is_shard())
    chunk = -(-len(parameter) // mesh.size(dim))  # as torch.chunk
    return min(chunk * mesh.get_local_rank(dim), len(parameter))


def refuse_flattened(model: nn.Module) -> None:
    """Refuse engines that hide the matrices of a model in flat parameters.

    Raises:
        ValueError: Naming the engine and the remedy.
    """
    kinds = {type(module).__name__ for module in model.modules()}
    if "FullyShardedDataParallel" in kinds:
        raise ValueError("the model is wrapped in FSDP1, which flattens the matrices that are routed: use fully_shard")
    if "DeepSpeedEngine" in kinds or any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError("the model is DeepSpeed's, which flattens the matrices that are routed: use fully_shard")


def check_sharding(model: nn.Module, trained: Iterable[tuple[str, Any]], config: MoLFConfig) -> None:
    """Refuse parameters that are spread otherwise than FSDP2 does.

    Args:
        model: As it is trained.
        trained: Names and parameters of the optimizer.
        config: Refused are options that several processes would carry out differently.

    Raises:
        ValueError: Naming the parameter or the option, and the remedy.
    """
    if processes() > 1 and config.step_in_backward:
        raise ValueError(
            "step_in_backward=True steps before the gradients of several processes are reduced: use False, or one"
        )
    trained = list(trained)
    rounded = [name for name, parameter in trained if parameter.dtype == torch.bfloat16 and not config.keep_base]
    if processes() > 1 and rounded:
        raise ValueError(
            f"keep_base=False rounds {rounded[0]} stochastically, in every process otherwise: use keep_base=True"
        )
    sharded = [(name, parameter) for name, parameter in trained if is_distributed(parameter)]
    if not sharded:
        return
    if config.moments_8bit:
        raise ValueError("moments_8bit=True is not supported on sharded parameters: use moments_8bit=False")
    from torch.distributed.fsdp import FSDPModule

    fully_sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    for name, parameter in sharded:
        names = [type(each).__name__ for each in parameter.placements]
        if not fully_sharded or names.count("Shard") > 1 or {*names} - {"Shard", "Replicate"}:
            raise ValueError(
                f"{name} is placed {parameter.placements} on {parameter.device_mesh}: tensor-parallel weights cannot "
                "be routed; shard the model with fully_shard alone"
            )
        if "lora_B" in name and sharded_dim(parameter) == 1:
            raise ValueError(f"{name} is sharded by its ranks, which are routed together: shard its rows, Shard(0)")
        if parameter.device_mesh != sharded[0][1].device_mesh:
            raise ValueError(f"{name} is on another mesh than {sharded[0][0]}: call fully_shard with one mesh")
    plain = [name for name, parameter in trained if not is_distributed(parameter)]
    if plain:
        raise ValueError(
            f"{plain[0]} is not sharded, but {sharded[0][0]} is: call fully_shard on the model itself after its layers"
        )
