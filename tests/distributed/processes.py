"""Run a function in several processes of one gloo group, and compare what they return."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch", "transformers", "peft", "torchao", "molf", "molf.cli.train"]
)  # imported once, not by every process


def run(
    folder: Path, world: int, function: Callable[..., Any], *args: Any, timeout: float = 120, **kwargs: Any
) -> list[Any]:
    """What ``function(*args, **kwargs)`` returns in each of ``world`` processes; if one fails, all are killed."""
    folder.mkdir(parents=True, exist_ok=True)
    store = str(folder / f"store{time.monotonic_ns()}")
    workers = [
        _CONTEXT.Process(
            target=_enter, args=(rank, world, str(store), folder / f"rank{rank}.pt", function, args, kwargs)
        )
        for rank in range(world)
    ]
    for worker in workers:
        worker.start()
    until = time.monotonic() + timeout
    while any(worker.is_alive() for worker in workers) and time.monotonic() < until:
        time.sleep(0.02)
        if any(worker.exitcode for worker in workers):
            until = min(until, time.monotonic() + 5)  # the others wait for it in a collective
    for worker in workers:
        worker.kill()
        worker.join()
    errors = [path.read_text() for path in sorted(folder.glob("rank*.txt"))]
    assert [worker.exitcode for worker in workers] == [0] * world, "\n".join(errors)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world)]


def _enter(
    rank: int, world: int, store: str, result: Path, function: Callable[..., Any], args: Any, kwargs: Any
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}  # accelerate looks for them
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    dist.barrier()  # one that is done at once would end while another still connects to it
    try:
        torch.save(function(*args, **kwargs), result)
    except BaseException:
        result.with_suffix(".txt").write_text(traceback.format_exc())
        raise
    dist.destroy_process_group()
