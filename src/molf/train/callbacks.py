"""Trainer callbacks: what will be trained, the routing log, and speed and memory among the Trainer's logs."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..optim import MoLFAdamW, RoutingRecorder
from .files import write_json


class RoutingCallback(TrainerCallback):
    """Writes the routing log of a run; see ``RoutingRecorder``. Works in any transformers or TRL Trainer.

    Args:
        path: The log file, JSON lines.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.recorder: RoutingRecorder | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Open the log; on a resume continue it after the resumed step."""
        if state.is_world_process_zero:
            self.recorder = RoutingRecorder(optimizer, self.path)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the log."""
        self.close()

    def close(self) -> None:
        """Close the log; the Trainer does not call ``on_train_end`` after an error."""
        if self.recorder is not None:
            self.recorder.close()
            self.recorder = None


def before_loggers(trainer: Any, *callbacks: TrainerCallback) -> None:
    """Add callbacks that complete a log entry before ``report_to`` sees it; a Trainer's own ``callbacks=`` come after.

    Args:
        trainer: Any transformers or TRL Trainer.
        *callbacks: ``RoutingCallback`` and the like.
    """
    trainer.callback_handler.callbacks[:0] = callbacks


def _complete(state: Any, logs: dict[str, float], found: dict[str, float]) -> None:
    """Add to a log entry: to what loggers see, and to the history that checkpoints and the run directory keep."""
    logs.update(found)
    state.log_history[-1].update(found)


class SpeedCallback(TrainerCallback):
    """Adds ``seconds`` of training so far, ``tokens_per_second`` and ``peak_memory_mib`` to the training logs.

    The seconds go on after a resume: they are those of the run and not of the process. Tokens are those that TRL counts
    as ``num_tokens``, since the entry before.

    Args:
        peak_memory: Gives the peak memory so far, MiB.
    """

    def __init__(self, peak_memory: Callable[[], float]) -> None:
        self.peak_memory = peak_memory
        self._begin = 0.0
        self._last = (0.0, 0.0)  # time and tokens at the entry before; TRL counts from the start of the process

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock where the history ends."""
        before = [entry for entry in state.log_history if "seconds" in entry]
        now = time.perf_counter()
        self._begin = now - (before[-1]["seconds"] if before else 0.0)
        self._last = (now, 0.0)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Complete an entry that has the training loss."""
        if logs is None or "loss" not in logs:
            return
        now = time.perf_counter()
        found = {"seconds": now - self._begin, "peak_memory_mib": self.peak_memory()}
        if "num_tokens" in logs:
            found["tokens_per_second"] = (logs["num_tokens"] - self._last[1]) / (now - self._last[0])
            self._last = (now, logs["num_tokens"])
        _complete(state, logs, found)


class PlanCallback(TrainerCallback):
    """Prints, before the first step, what will be trained and how, and writes the resolved configuration.

    Args:
        path: Where the configuration goes; not before model, data and optimizer are known to fit.
        resolved: The configuration.
    """

    def __init__(self, path: Path, resolved: dict[str, Any]) -> None:
        self.path, self.resolved = path, resolved

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Print modules, experts and trainable parameters; write the configuration."""
        if state.is_world_process_zero:
            write_json(self.path, self.resolved)
            print(describe(model, getattr(optimizer, "optimizer", optimizer), args.learning_rate), flush=True)


def describe(model: Any, optimizer: Any, learning_rate: float) -> str:
    """Modules, experts and trainable parameters, one line each."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines = []
    if isinstance(optimizer, MoLFAdamW):
        kinds = Counter(name.rpartition(".")[2] for name in optimizer.routed_modules)
        listed = ", ".join(f"{kind} x{count}" for kind, count in kinds.items())
        lines.append(f"routed modules: {len(optimizer.routed_modules)} ({listed})")
        first = 1 if optimizer.config.train_base else 0
        scales = dict(zip(optimizer.experts[first:], optimizer.config.scales, strict=True))
        for index, expert in enumerate(optimizer.experts):
            group = next(g for g in optimizer.param_groups if g["expert"] == expert)
            size = sum(module.sizes[index] for module in optimizer.modules)
            rate = group.get("initial_lr", group["lr"])
            scale = f", scale {scales[expert]:.4g}" if expert in scales else ""
            lines.append(f"  {expert}: {size:,} parameters, lr {rate:g}, weight decay {group['weight_decay']:g}{scale}")
        virtual = sum(m.sizes[i] for m in optimizer.modules for i in range(first, len(m.sizes)) if m.lora_A is None)
        extra = f", and {virtual:,} in virtual experts" if virtual else ""
        lines.append(f"trainable parameters: {trained:,} of {total:,} in the model{extra}")
    else:
        lines.append(f"trainable parameters: {trained:,} of {total:,} in the model, lr {learning_rate:g}")
    return "\n".join(lines)
