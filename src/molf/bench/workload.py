"""What is timed: a training step, or the optimizer's part of it alone."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..errors import of_the_machine
from ..optim import MoLFAdamW
from .contenders import Contender, build, lora_wins
from .device import calls_timed, clock, device_syncs, floor_bytes
from .presets import Settings


class Workload:
    """A contender that stands ready: its model and optimizer.

    Args:
        contender: What to build.
        settings: Of the run.

    Attributes:
        model: The model.
        optimizer: Its optimizer.
    """

    def __init__(self, contender: Contender, settings: Settings) -> None:
        self.contender = contender
        self.settings = settings
        start = clock(settings.device)
        self.model, self.optimizer = build(contender, settings)
        self.build_seconds = clock(settings.device) - start
        self.generator = torch.Generator(settings.device).manual_seed(settings.seed)

    def round(self, steps: int) -> dict[str, float]:
        """Milliseconds per step: "total", and parts of it."""
        raise NotImplementedError

    def warm_up(self, steps: int) -> list[float]:
        """Milliseconds of the first steps: they make state and compile, and LoRA wins a late contender's first.

        Raises:
            ValueError: If an optimizer that is not MoLF's cannot step such a model.
        """
        kind = self.contender.kind
        try:
            with lora_wins(self.optimizer) if kind.late else nullcontext():
                first = self.round(1)["total"]
        except RuntimeError as error:
            if kind.optimizer == "molf" or of_the_machine(error):
                raise
            raise ValueError(f"contender {self.contender.label!r}: {error}") from error
        return [first, *(self.round(1)["total"] for _ in range(steps - 1))]

    def facts(self) -> dict[str, Any]:
        """Parameters, seconds to build, and the share of layers that dense won in the last step."""
        parameters = list(self.model.parameters())
        return {
            "parameters": sum(p.numel() for p in parameters),
            "trainable": sum(p.numel() for p in parameters if p.requires_grad),
            "build_s": self.build_seconds,
            "dense_wins": dense_share(self.optimizer),
        }


def dense_share(optimizer: Any) -> float | None:
    """Share of routed layers that dense won in the last step; None where there is no dense expert."""
    if not isinstance(optimizer, MoLFAdamW) or "dense" not in optimizer.experts or not optimizer.routing:
        return None
    wins = ["dense" in choice.winners for choice in optimizer.routing.values()]
    return sum(wins) / len(wins)


class TrainStep(Workload):
    """A whole training step on random tokens: forward, backward, step, zero_grad.

    Attributes:
        batches: Token ids (accumulation, batch, length), the same for every contender.
    """

    def __init__(self, contender: Contender, settings: Settings) -> None:
        super().__init__(contender, settings)
        shape = (settings.accumulation, settings.batch, settings.length)
        vocabulary = int(contender.preset.config["vocab_size"])
        self.batches = torch.randint(3, vocabulary, shape, generator=self.generator, device=settings.device)

    def round(self, steps: int) -> dict[str, float]:
        """Milliseconds per step."""
        start = clock(self.settings.device)
        for _ in range(steps):
            self.forward_backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return {"total": 1e3 * (clock(self.settings.device) - start) / steps}

    def forward_backward(self) -> None:
        """Gradients of the mean loss of all batches of a step."""
        amp = self.contender.kind.amp
        for ids in self.batches:
            with torch.autocast(self.settings.device, torch.bfloat16) if amp else nullcontext():
                loss: Tensor = self.model(input_ids=ids, labels=ids).loss
            (loss / len(self.batches)).backward()


class OptimizerStep(Workload):
    """``optimizer.step()`` alone, on gradients ~ N(0, 1e-3) that stay the same.

    Where the experts are virtual, their matmuls are timed where the step makes them: "gradients" of A and B, and the
    "rewrite" of every P that differs from its W. "without_matmuls" is what is left of the step.
    """

    def __init__(self, contender: Contender, settings: Settings) -> None:
        super().__init__(contender, settings)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.gradients = [(p, torch.empty_like(p).normal_(std=1e-3, generator=self.generator)) for p in trained]

    @torch.no_grad()
    def round(self, steps: int) -> dict[str, float]:
        """Milliseconds per step, and of its matmuls."""
        self._give_gradients()
        optimizer, device = self.optimizer, self.settings.device
        virtual = isinstance(optimizer, MoLFAdamW) and any(module.lora_A is None for module in optimizer.modules)
        timed = {"gradients": "_gradients", "rewrite": "_write_products"} if virtual else {}
        with calls_timed(optimizer, timed, device) as spans:
            start = clock(device)
            for _ in range(steps):
                optimizer.step()
            total = 1e3 * (clock(device) - start) / steps
        if not virtual:
            return {"total": total}
        parts = {name: span() / steps for name, span in spans.items()}
        return {"total": total, **parts, "without_matmuls": total - sum(parts.values())}

    def facts(self) -> dict[str, Any]:
        """Also the bytes that a step has to move, and on a GPU how often it waits for the device."""
        facts = {**super().facts(), "floor_bytes": floor_bytes(self.optimizer, dense_share(self.optimizer) or 0.0)}
        self._give_gradients()
        return {**facts, "syncs": device_syncs(self.optimizer.step) if self.settings.device == "cuda" else None}

    def _give_gradients(self) -> None:
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
