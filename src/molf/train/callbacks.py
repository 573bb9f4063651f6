"""Trainer callbacks: what will be trained, and the routing log."""

from __future__ import annotations

import os
from collections import Counter
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

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint must never be on the disk before the log that leads to it."""
        if control.should_save and self.recorder is not None:
            self.recorder.sync()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As after a step."""
        self.on_step_end(args, state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the log."""
        self.close()

    def close(self) -> None:
        """Close the log; the Trainer does not call ``on_train_end`` after an error."""
        if self.recorder is not None:
            self.recorder.close()
            self.recorder = None


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
        """Print modules, experts and trainable parameters; write the configuration; the run has no result yet."""
        if state.is_world_process_zero:
            self.path.with_name("metrics.json").unlink(missing_ok=True)
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
