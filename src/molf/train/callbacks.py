"""Trainer callbacks: what will be trained, the routing log, and speed and memory among the Trainer's logs."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..files import write_json
from ..optim import MoLFAdamW, RoutingRecorder
from ..optim.routing import stream_routing
from .resume import set_aside
from .telemetry import LostUpdates, RoutingMetrics


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


class RoutingCallback(TrainerCallback):
    """Writes the routing log of a run and adds ``molf/...`` metrics to the Trainer's log; works in any Trainer.

    The log is ``RoutingRecorder``'s, the metrics are ``RoutingMetrics``' and, for a step that is logged of a model with
    16-bit weights, ``molf/lost_update_fraction``. For the metrics to reach ``report_to``, add it by ``before_loggers``.

    Example:
        trainer = SFTTrainer(..., report_to="tensorboard")
        before_loggers(trainer, RoutingCallback("routing.jsonl"))

    Args:
        path: The log file, JSON lines.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.recorder: RoutingRecorder | None = None
        self._metrics: RoutingMetrics | None = None
        self._lost: LostUpdates | None = None
        self._counted: dict[str, Any] | None = None  # the latest record that the metrics have
        self._lost_share: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Open the log; on a resume continue it after the resumed step."""
        self.close()  # after an error the Trainer did not
        if state.is_world_process_zero:
            self.recorder = RoutingRecorder(optimizer, self.path)
            own = self.recorder.optimizer
            self._metrics = RoutingMetrics(own.routed_modules, own.experts, own.config.top_k)
            if state.global_step and self.path.exists():
                records, taken = stream_routing(self.path)[1], own.steps_taken
                self._metrics.follow(record for record in records if record["step"] <= taken)
            self._lost = LostUpdates(own)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before a step that may be logged, look at the weights; it may be made in the backward pass."""
        self._lost_share = None
        if self.recorder is not None and self._lost is not None and _may_log(args, state):
            self._lost.before_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the step's decisions, unless it was skipped: then there is no new record."""
        latest = self.recorder.latest if self.recorder is not None else None
        if latest is None or latest is self._counted or self._metrics is None or self._lost is None:
            return
        self._counted = latest
        self._metrics.add(latest)
        self._lost_share = self._lost.after_step(latest["winners"])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Complete an entry that has the training loss."""
        if self._metrics is None or logs is None or "loss" not in logs:
            return
        found = self._metrics.take()
        if self._lost_share is not None:
            found["molf/lost_update_fraction"] = self._lost_share
        _complete(state, logs, found)

    def sync(self) -> None:
        """Wait until the log would survive a power loss: a checkpoint must never be on the disk before it."""
        if self.recorder is not None:
            self.recorder.sync()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Right after a checkpoint of a Trainer that does not ``sync`` before it, as ``WholeCheckpoints`` does."""
        self.sync()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the log."""
        self.close()

    def close(self) -> None:
        """Close the log; the Trainer does not call ``on_train_end`` after an error."""
        if self.recorder is not None:
            self.recorder.close()
            self.recorder = None


def _may_log(args: Any, state: Any) -> bool:
    """Whether the Trainer may log the step that is about to be made; by epochs it does not say beforehand."""
    step = state.global_step + 1
    if step == 1 and args.logging_first_step:
        return True
    strategy = str(getattr(args.logging_strategy, "value", args.logging_strategy))
    return strategy == "epoch" or (strategy == "steps" and step % state.logging_steps == 0)


class SpeedCallback(TrainerCallback):
    """Adds ``seconds`` of training so far, ``tokens_per_second`` and ``peak_memory_mib`` to the training logs.

    The seconds go on after a resume, and so do the ``num_tokens`` that TRL counts from 0 in every process: they are
    those of the run. Tokens per second are since the entry before. The clock stands still while loggers start, which
    may take a connection, and while the Trainer evaluates; an evaluation's entry has the ``seconds`` at which it began.

    Args:
        peak_memory: Gives the peak memory so far, MiB.

    Attributes:
        paused: Seconds that loggers' starts and evaluations of this process took.
    """

    def __init__(self, peak_memory: Callable[[], float]) -> None:
        self.peak_memory = peak_memory
        self.paused = 0.0
        self._begin = 0.0
        self._stepped = 0.0  # when the latest step had ended and was logged
        self._started = False
        self._tokens = 0.0  # of the processes before
        self._last = (0.0, 0.0)  # time and tokens at the entry before

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock and the count where the history ends."""

        def last(key: str) -> float:
            return next((entry[key] for entry in reversed(state.log_history) if key in entry), 0.0)

        now, self._tokens = time.perf_counter(), last("num_tokens")
        self._begin, self._stepped, self._started = now - last("seconds"), now, False
        self._last = (now, self._tokens)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """At the first one, take out what the other callbacks did when training began."""
        if not self._started:
            self._started = True
            self.on_evaluate(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time, in case an evaluation follows."""
        self._stepped = time.perf_counter()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As after a step."""
        self.on_step_end(args, state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the evaluation out of the time."""
        now = time.perf_counter()
        took, self._stepped = now - self._stepped, now
        self.paused, self._begin = self.paused + took, self._begin + took
        self._last = (self._last[0] + took, self._last[1])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Complete an entry that has the training loss or an evaluation's; in any, count on."""
        if logs is None:
            return
        if "eval_loss" in logs:
            _complete(state, logs, {"seconds": self._stepped - self._begin})
        if "num_tokens" in logs:
            _complete(state, logs, {"num_tokens": logs["num_tokens"] + self._tokens})
        if "loss" not in logs:
            return
        self._stepped = now = time.perf_counter()
        found = {"seconds": now - self._begin, "peak_memory_mib": self.peak_memory()}
        if "num_tokens" in logs:
            found["tokens_per_second"] = (logs["num_tokens"] - self._last[1]) / (now - self._last[0])
            self._last = (now, logs["num_tokens"])
        _complete(state, logs, found)


class PlanCallback(TrainerCallback):
    """Prints, before the first step, what will be trained and how, and writes the resolved configuration.

    What the folder holds of a run that went further than this one resumes from is no part of it any more: its result is
    removed, its later checkpoints are set aside.

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
            if state.global_step:
                set_aside(self.path.parent, state.global_step)
            write_json(self.path, self.resolved)
            print(describe(model, getattr(optimizer, "optimizer", optimizer), args.learning_rate), flush=True)


def describe(model: Any, optimizer: Any, learning_rate: float) -> str:
    """Modules, experts and trainable parameters, one line each."""
    total = sum(map(_size, model.parameters()))
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


def _size(parameter: Any) -> int:
    """Its numbers; bitsandbytes packs two of 4 bits in a byte, and keeps the shape that they had."""
    state = getattr(parameter, "quant_state", None)
    return int(parameter.numel() if state is None else state.shape.numel())
