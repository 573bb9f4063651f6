"""The device: its clock and bandwidth, what it compiled, and how often a step waits for it."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.optim import AdamW, Optimizer

from ..optim import MoLFAdamW
from ..optim.virtual import shares_storage


def clock(device: str) -> float:
    """Seconds, once the device has done all that was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def calls_timed(owner: object, methods: Mapping[str, str], device: str) -> Iterator[dict[str, Callable[[], float]]]:
    """Time all calls of methods of an object meanwhile, on a GPU in its own time and without waiting for it.

    Args:
        owner: The object.
        methods: Names of its methods by the names that the times shall have.
        device: "cpu" or "cuda".

    Yields:
        By name, what then tells the sum of all calls in milliseconds.
    """
    spans: dict[str, list[tuple[Any, Any]]] = {name: [] for name in methods}

    def now() -> Any:
        if device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(method: Callable[..., Any], spans: list[tuple[Any, Any]]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            start = now()
            result = method(*args)
            spans.append((start, now()))
            return result

        return call

    def total(name: str) -> float:
        return sum(a.elapsed_time(b) if device == "cuda" else 1e3 * (b - a) for a, b in spans[name])

    for name, method in methods.items():
        setattr(owner, method, timed(getattr(owner, method), spans[name]))
    try:
        yield {name: partial(total, name) for name in methods}
    finally:
        for method in methods.values():
            delattr(owner, method)


def free() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reset_peak() -> None:
    """Count ``peak_mib`` from here on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_mib() -> float:
    """MiB that tensors took on a GPU at most."""
    return torch.cuda.max_memory_allocated() / 2**20


def compilations() -> int:
    """Graphs that torch.compile has made in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


def copy_bandwidth(device: str, mebibytes: int = 256, copies: int = 10) -> float:
    """Bytes read and written per second, in GB/s, by copying a tensor larger than any cache; the best of all copies."""
    source = torch.zeros(mebibytes * 2**20, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    times = []
    for _ in range(copies):
        start = clock(device)
        target.copy_(source)
        times.append(clock(device) - start)
    return 2 * source.numel() / min(times) / 1e9


def floor_bytes(optimizer: Optimizer, dense_wins: float) -> int | None:
    """Bytes that a step moves at least, matmuls aside; None for what is neither AdamW nor MoLF with virtual experts.

    AdamW reads g, m, v, w and writes m, v, w, and p, the model's 16-bit weight, where w is its fp32 master. A routed
    weight takes two passes, because the score comes before the update: g, m, v → m, v; then m, v, w → w, p where
    dense wins, else w → p, the rewrite of P = W + Σ s B A.

    Args:
        optimizer: After its first step, when it has moments.
        dense_wins: Share of routed layers that dense wins.
    """
    adapters = any(str(group.get("expert")).startswith("lora") and group["params"] for group in optimizer.param_groups)
    if not isinstance(optimizer, (AdamW, MoLFAdamW)) or adapters:
        return None
    total = 0.0
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        state = optimizer.state[parameter]
        if "exp_avg" not in state:
            continue
        g = parameter.element_size()
        own = "base" in state and not shares_storage(state["base"], parameter)
        p = g if own else 0  # without a copy of its own, w is p
        w = state["base"].element_size() if own else g
        moments = state["exp_avg"].element_size() + state["exp_avg_sq"].element_size()
        if "lora_A" in state:
            second = dense_wins * (moments + 2 * w + p) + (1 - dense_wins) * (w + p)
            total += parameter.numel() * (g + 2 * moments + second)
            experts = state["lora_A"].numel() + state["lora_B"].numel()
            total += experts * ((w + 2 * moments) + (1 - dense_wins) * (moments + 2 * w))
        else:
            total += parameter.numel() * (g + 2 * moments + 2 * w + p)
    return int(total)


def device_syncs(step: Callable[[], Any]) -> dict[str, int]:
    """How often a step waits for the GPU, from a profiler's trace; see ``waits``."""
    from torch.profiler import ProfilerActivity, profile, record_function

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        with record_function("step"):
            step()
        torch.cuda.synchronize()
    return waits(trace.events())


def waits(events: Iterable[Any]) -> dict[str, int]:
    """Calls within the range "step" that wait for the device, by name, and copies from the device to the host."""
    events = list(events)
    on_cpu = [event for event in events if event.device_type.name == "CPU"]
    span = next(event.time_range for event in on_cpu if event.name == "step")
    inside = [event.name for event in on_cpu if span.start <= event.time_range.start <= span.end]
    names = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
    copies = sum(event.name.startswith("Memcpy DtoH") for event in events)
    return {**{name: inside.count(name) for name in names}, "copies_to_host": copies}
