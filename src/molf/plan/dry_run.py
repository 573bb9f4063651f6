"""``molf train --dry_run``: one real step, its peak memory, and what ``molf plan`` says of it."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import io
import sys
import tempfile
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import TrainerCallback

from ..optim import MoLFAdamW
from ..optim.virtual import shares_storage
from ..train.arguments import MethodArguments, TrainArguments
from ..train.load import naming
from ..train.run import train
from .memory import Plan, Workload, plan_method
from .text import not_planned

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _LARGE = -1, -3, 1 << 16


@dataclass(frozen=True)
class DryRun:
    """What a step took and what was estimated.

    Attributes:
        measured: Peak memory, bytes.
        plan: The estimate.
        batch: Sequences in the larger of the batches.
        length: Tokens per sequence of the longest batch.
        optim: The optimizer's name, of methods that do not route.
    """

    measured: float
    plan: Plan
    batch: int
    length: int
    optim: str

    @property
    def estimated(self) -> int:
        """Peak memory by the plan, bytes."""
        return sum(self.plan.memory().values())


class _Stepped(Exception):
    """The step was made: there is nothing to save or to score."""


class _OneStep(TrainerCallback):
    """Fills the optimizer's state, makes a step, notes its peak and its largest batch, and ends the run."""

    def __init__(self) -> None:
        self.batch = self.length = 0
        self.peak_mib = 0.0

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Fill the state, and look at what the embedding is given."""

        def look(_: Any, inputs: tuple[Any, ...]) -> None:
            batch, length = inputs[0].shape
            if batch * length > self.batch * self.length:
                self.batch, self.length = batch, length

        model.get_input_embeddings().register_forward_pre_hook(look)
        fill_state(getattr(optimizer, "optimizer", optimizer))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Of the first step."""
        self.peak_mib = (logs or {})["peak_memory_mib"]
        raise _Stepped


@torch.no_grad()
def fill_state(optimizer: Any) -> None:
    """Make all that an optimizer comes to hold in a run, without a step of the training.

    MoLF has its moments from the start, but in fp32 makes a layer a W of its own at the first win of a LoRA expert.
    Another optimizer makes its moments in the first ``step()``: here in one of gradients and learning rates that are 0.
    """
    if isinstance(optimizer, MoLFAdamW):
        for weight, state in optimizer.state.items():
            if "base" in state and shares_storage(state["base"], weight):
                state["base"] = state["base"].clone()
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def dry_run(method: MethodArguments, args: TrainArguments) -> DryRun:
    """Make one real step in a scratch folder, and estimate the memory of the same batch.

    What the optimizer comes to hold in a run is there before, see ``fill_state``: else the step would not show it. On a
    CPU, memory is the growth of the process, so the whole is done twice: the first time loads the libraries' code,
    which is no part of the model.

    Raises:
        ValueError: As of ``train``.
        OSError: As of ``train``.
    """
    if not torch.cuda.is_available():
        _keep_no_freed_memory()
        _one_step(method, args)
        gc.collect()
        _keep_no_freed_memory()
    seen = _one_step(method, args)
    model = model_config(method, args)
    work = replace(workload(method, args, model, seen.length), batch=seen.batch)  # packed, or of few examples
    plan = plan_method(method.method, method.molf_config(args), work)
    return DryRun(seen.peak_mib * 2**20, plan, seen.batch, seen.length, work.optim)


def compared(found: DryRun) -> str:
    """Measured and estimated peak, and the estimate by kind, MiB."""
    kinds = ", ".join(f"{kind} {size / 2**20:.1f}" for kind, size in found.plan.memory().items() if size)
    measured, estimated = found.measured / 2**20, found.estimated / 2**20
    return (
        f"a step of {found.batch} x {found.length} tokens took {measured:.1f} MiB at its peak; the estimate is "
        f"{estimated:.1f} MiB ({100 * (estimated / measured - 1):+.1f} %)\n"
        f"estimated MiB: {kinds}" + "".join(f"\nwarning: {line}" for line in not_planned(found.optim))
    )


def _one_step(method: MethodArguments, args: TrainArguments) -> _OneStep:
    args, seen = copy.deepcopy(args), _OneStep()
    args.save_strategy, args.eval_strategy, args.eval_on_start, args.disable_tqdm = "no", "no", False, True
    args.load_best_model_at_end = False
    args.logging_strategy, args.logging_steps = "steps", 1
    args.report_to = []  # what "none" has become
    args.resume_from_checkpoint = None
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.suppress(_Stepped),
    ):
        args.output_dir = folder
        train(method, args, [seen])
    return seen


def _keep_no_freed_memory() -> None:
    """Have glibc give what is free back to the system, now and from now on: the process is as large as what it has."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        libc.mallopt(_M_TRIM_THRESHOLD, _LARGE)
        libc.malloc_trim(0)


def workload(method: MethodArguments, args: TrainArguments, model: Any, length: int) -> Workload:
    """What the options say of memory, for sequences of that length."""
    dtype = model.dtype if method.dtype == "auto" else getattr(torch, method.dtype)
    return Workload(
        model=model,
        dtype=dtype or torch.float32,
        batch=args.per_device_train_batch_size,
        length=length,
        accumulation=args.gradient_accumulation_steps,
        checkpointing=bool(args.activation_checkpointing),
        autocast=bool(args.bf16),
        fused="fused" in args.optim.value,
        optim=args.optim.value,
        quantization=method.quantization,
        trust_remote_code=args.trust_remote_code,
    )


def model_config(method: MethodArguments, args: TrainArguments) -> Any:
    """The model's transformers configuration; no weight is read.

    Raises:
        ValueError: If there is none, with the model's name.
    """
    from transformers import AutoConfig

    with naming(method.model_name_or_path):
        return AutoConfig.from_pretrained(
            method.model_name_or_path, revision=method.model_revision, trust_remote_code=args.trust_remote_code
        )
