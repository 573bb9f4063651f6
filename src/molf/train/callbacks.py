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

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the log."""
        self.close()

    def close(self) -> None:
        """Close the log; the Trainer does not call ``on_train_end`` after an error."""
        if self.recorder is not None:
            self.recorder.close()
            self.recorder = None


class AdaLoraCallback(TrainerCallback):
    """Runs AdaLoRA's rank allocation, without which it is LoRA with an orthogonality penalty.

    Of T steps the first T/10, and those of the warm-up, keep all ranks, and the last T/2 keep the final ones, about
    as in the longest runs of the paper.

    Source: arXiv:2303.10512, sections 3.3 and 4.1.
    """

    def __init__(self) -> None:
        self.model: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Set the schedule, now that the number of steps is known.

        Raises:
            ValueError: If there are fewer than two steps.
        """
        steps = state.max_steps
        if steps < 2:
            raise ValueError(f"adalora needs 2 steps or more to change its ranks, the run has {steps}: train longer")
        self.model = model
        config = self._config()
        config.total_step, config.tfinal = steps, min(steps // 2, steps - 2)
        config.tinit = min(max(steps // 10, args.get_warmup_steps(steps)), steps - config.tfinal - 1)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the optimizer's step, while its gradients are there: PEFT's order."""
        self.model.base_model.update_and_allocate(state.global_step + 1)

    def changed_ranks(self) -> dict[str, float]:
        """Smallest, largest and mean rank that is left.

        Raises:
            ValueError: If the ranks never changed, or nothing is left.
        """
        config = self._config()
        ranks = [sum(kept) for kept in (config.rank_pattern or {}).values()]
        if all(rank == config.init_r for rank in ranks):
            raise ValueError(f"adalora's ranks never changed from {config.init_r}, so this was not AdaLoRA: no result")
        if not any(ranks):
            raise ValueError(
                "adalora pruned every rank, because no gradient came before: use more steps or less warm-up"
            )
        return {"min": min(ranks), "max": max(ranks), "mean": sum(ranks) / len(ranks)}

    def _config(self) -> Any:
        return self.model.peft_config["default"]


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
