"""Several processes: what is refused before they train, and what they must agree on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..optim.sharding import processes

if TYPE_CHECKING:
    from .arguments import TrainArguments

T = TypeVar("T")

_USE_FSDP2 = "use --fsdp true, which is FSDP2, or leave it out for DDP"
FSDP_CONFIG = ("version", "cpu_offload", "dp_replicate_size")


def refuse_engines(args: TrainArguments) -> None:
    """Refuse the engines that hide or cut the matrices that are routed, before they are started.

    Raises:
        ValueError: Naming the engine and the remedy.
    """
    if args.deepspeed or _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            f"deepspeed={args.deepspeed or 'by accelerate launch'}: ZeRO flattens the weights, and no matrix is left "
            f"to route; {_USE_FSDP2}"
        )
    if _is_set("ACCELERATE_USE_FSDP"):
        raise ValueError(
            "accelerate launch --use_fsdp: its FSDP1 flattens the weights, and its FSDP2 shards them when the "
            "optimizer has been made of others; launch without it and give molf train --fsdp true"
        )
    if args.parallelism_config is not None or _is_set("ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise ValueError(
            "parallelism_config: weights that are cut by tensor, context or sequence parallelism are not routed; "
            f"{_USE_FSDP2}"
        )


def check_fsdp(fsdp: Any, config: Any) -> tuple[bool, dict[str, Any]]:
    """The options ``fsdp`` and ``fsdp_config``, as transformers spells them, as a flag and a dictionary.

    Raises:
        ValueError: For FSDP1, or a setting that would not be used; names it and the remedy.
    """
    if str(fsdp).lower() not in ("true", "false", "none", ""):
        raise ValueError(f"fsdp={fsdp!r}: give true, and settings in fsdp_config")
    try:
        config = json.loads(config) if isinstance(config, str) else config or {}
        if not isinstance(config, dict):
            raise ValueError("not a mapping")
    except ValueError as error:
        remedy = "give a mapping in the YAML file, or JSON such as '{\"version\": 2}'"
        raise ValueError(f"fsdp_config={config!r} ({error}): {remedy}") from error
    found = {key.removeprefix("fsdp_"): value for key, value in config.items()}
    if str(found.get("version", 2)) != "2":
        raise ValueError(
            f"fsdp_config version={found['version']}: FSDP1 flattens the weights, and no matrix is left to route; use 2"
        )
    key = next((key for key in found if key not in FSDP_CONFIG), None)
    if key is not None:
        raise ValueError(
            f"fsdp_config {key}={found[key]!r} is not used: every layer is sharded, whole weights and sharded state of "
            f"the optimizer are saved; leave it out, known are {', '.join(FSDP_CONFIG)}"
        )
    for key, kind, remedy in (("cpu_offload", bool, "true or false"), ("dp_replicate_size", int, "a number")):
        if key in found and type(found[key]) is not kind:
            raise ValueError(f"fsdp_config {key}={found[key]!r}: give {remedy}, without quotes")
    return str(fsdp).lower() == "true", found


def check_launch(args: TrainArguments) -> None:
    """Whether the processes know of each other: else each would train alone and write to the same files.

    Raises:
        ValueError: With a launch that works.
    """
    if args.world_size > 1:
        return
    started = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if started > 1:
        raise ValueError(
            f"use_cpu={args.use_cpu}: {started} processes were started, and there is no accelerator for them; give "
            "--use_cpu true"
        )
    # accelerate's launcher for CPUs leaves the processes to MPI; this is what it sets for several
    if _is_set("ACCELERATE_USE_CPU") and "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
        raise ValueError(
            "accelerate launch --cpu starts one process unless there is MPI, whatever --num_processes says: use "
            "torchrun --nproc_per_node N -m molf train, or accelerate launch --multi_gpu with --use_cpu true"
        )
    if args.fsdp:
        raise ValueError(
            "fsdp=true with one process has nothing to shard: start several with torchrun, or leave it out"
        )


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("true", "1")


def from_first(find: Callable[[], T]) -> T:
    """What the first process finds, on every process; the others wait and do not look."""
    if processes() == 1:
        return find()
    found: list[Any] = [find() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(found)
    result: T = found[0]
    return result


def from_all(value: T) -> list[T]:
    """What every process has, on every process, in their order."""
    if processes() == 1:
        return [value]
    found: list[Any] = [None] * processes()
    torch.distributed.all_gather_object(found, value)
    return found


def digest(rows: Iterable[Any]) -> str:
    """SHA-256 of rows in their order, in hexadecimal."""
    found = hashlib.sha256()
    for row in rows:
        found.update(repr(row).encode())
    return found.hexdigest()


def check_alike(what: str, rows: Iterable[Any]) -> None:
    """Refuse processes of which one has other data than the first: one would wait for steps that another does not make.

    Raises:
        ValueError: In every process, naming what differs.
    """
    if processes() == 1:
        return
    digests = from_all(digest(rows))
    other = next((process for process, found in enumerate(digests) if found != digests[0]), None)
    if other is not None:
        raise ValueError(f"process {other} has other {what} than the first: give all the same options and files")


def first_error(error: T | None, least: Callable[[T], Any] = lambda _: 0) -> T | None:
    """What one process that found an error has of it, on every process, so that all stop or go on together.

    It costs one sum of one number; only where there is an error it is sent.

    Args:
        error: What this process has found.
        least: Of several errors the first one with the least of this is taken.
    """
    if processes() == 1:
        return error
    device = "cpu" if torch.distributed.get_backend() == "gloo" else torch.accelerator.current_accelerator()
    broken = torch.tensor(float(error is not None), device=device)
    torch.distributed.all_reduce(broken)
    if not broken.item():
        return None
    return min((each for each in from_all(error) if each is not None), key=least)
