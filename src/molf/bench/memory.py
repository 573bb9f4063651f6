"""Peak memory of a training step, each contender in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .contenders import Contender
from .device import free
from .presets import PRESETS, Settings
from .workload import TrainStep

STEPS = 3
"""Training steps: moments are there after the first, copies of W after LoRA has won."""

_PREDICTABLE = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",  # a larger tensor is mapped on its own and unmapped when it is freed
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MKL_DISABLE_FAST_MM": "1",
}
"""What keeps resident memory at what is alive: neither glibc nor MKL hoards what was freed."""

_STATUS = Path("/proc/self/status")


def measure_apart(contender: Contender, settings: Settings, threads: int) -> dict[str, Any]:
    """``measure`` in a fresh process; {"error": ...} if the device has no memory for it.

    Raises:
        ChildProcessError: If it fails; its error is on stderr.
    """
    request = {"contender": contender.label, "settings": asdict(settings), "threads": threads}
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **_PREDICTABLE, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", __name__, json.dumps(request)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ChildProcessError(f"{contender.label} ended with status {done.returncode}; its error is above")
    return json.loads(done.stdout.splitlines()[-1])


def measure(contender: Contender, settings: Settings) -> dict[str, Any]:
    """MiB at the peak of training steps, and once model and optimizer are made, beyond what the process had before.

    A toy model is trained first, so that libraries, compiler and thread pools are loaded and not counted.

    Raises:
        ValueError: On a CPU without Linux's /proc.
    """
    if settings.device == "cpu" and not _STATUS.exists():
        raise ValueError(f"device={settings.device}: resident memory is read from {_STATUS}, which only Linux has")
    toy = TrainStep(replace(contender, preset=PRESETS["tiny"]), replace(settings, batch=2, length=16))
    toy.warm_up(STEPS)
    del toy
    free()
    before = _memory(settings.device)
    workload = TrainStep(contender, settings)
    made = _memory(settings.device)
    _reset_peak(settings.device)
    workload.warm_up(STEPS)
    peak = _memory(settings.device, peak=True)
    facts = workload.facts()
    workload.forward_backward()  # for the gradients, which are counted too
    facts["bytes"] = tensor_bytes(workload.model, workload.optimizer)
    return {"parts": {"total": peak - before, "made": made - before}, "facts": facts}


def tensor_bytes(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Bytes of weights, gradients and optimizer state by name; a storage that several tensors share counts once."""
    seen: set[int] = set()

    def count(tensor: Tensor | None) -> int:
        total = 0
        for part in _plain(tensor):
            storage = part.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += storage.nbytes()
        return total

    weights = sum(count(tensor) for tensor in (*model.parameters(), *model.buffers()))
    gradients = sum(count(parameter.grad) for parameter in model.parameters())
    state: dict[str, int] = defaultdict(int)
    for entries in optimizer.state.values():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                state[name] += count(value)
    return {"weights": weights, "gradients": gradients, "state": dict(state)}


def _plain(tensor: Tensor | None) -> Iterator[Tensor]:
    """The tensors that hold the data of a tensor, such as a quantised one's codes and scales."""
    if tensor is not None and is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name))
    elif tensor is not None:
        yield tensor


def _memory(device: str, *, peak: bool = False) -> float:
    """MiB that the process holds now, or held at its peak: on a GPU in tensors, else resident."""
    if device == "cuda":
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**20
    field = "VmHWM:" if peak else "VmRSS:"  # not ru_maxrss, which a process inherits from the one that started it
    return next(int(line.split()[1]) for line in _STATUS.read_text().splitlines() if line.startswith(field)) / 2**10


def _reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        (_STATUS.parent / "clear_refs").write_text("5")  # the peak starts at what is resident now


def main(text: str) -> None:
    """Measure what ``measure_apart`` asks for and print the result as JSON."""
    request = json.loads(text)
    settings = Settings(**request["settings"])
    torch.set_num_threads(request["threads"])
    try:
        print(json.dumps(measure(Contender.parse(request["contender"], settings.preset), settings)))
    except torch.OutOfMemoryError as error:
        print(json.dumps({"error": str(error).splitlines()[0]}))
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1])
