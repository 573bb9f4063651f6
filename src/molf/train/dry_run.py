"""``molf train --dry_run``: real steps, their peak memory, and what ``molf plan`` says of it."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import io
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback

from ..optim.virtual import shares_storage
from ..plan.memory import Plan, Workload, plan_method
from .arguments import MethodArguments, TrainArguments
from .load import naming
from .run import train

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _LARGE = -1, -3, 1 << 16


@dataclass(frozen=True)
class DryRun:
    """What a step took and what was estimated.

    Attributes:
        measured: Peak memory, bytes.
        plan: The estimate.
        batch: Sequences in the larger of the batches.
        length: Tokens per sequence of the longest batch.
        shared: Bytes of W that were still the layer's own weight, because no LoRA expert of the layer had won.
    """

    measured: float
    plan: Plan
    batch: int
    length: int
    shared: int = 0

    @property
    def memory(self) -> dict[str, int]:
        """The plan by kind for what these steps held, bytes: without the copies of W that are yet to come."""
        memory = self.plan.memory()
        return {**memory, "masters": memory["masters"] - self.shared}

    @property
    def estimated(self) -> int:
        """Peak memory by the plan, bytes."""
        return sum(self.memory.values())


class _Watch(TrainerCallback):
    """Notes the largest batch that reaches the model's embedding, and how much of W needs no memory of its own."""

    def __init__(self) -> None:
        self.batch = self.length = self.shared = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Look at what the embedding is given."""

        def look(_: Any, inputs: tuple[Any, ...]) -> None:
            batch, length = inputs[0].shape
            if batch * length > self.batch * self.length:
                self.batch, self.length = batch, length

        model.get_input_embeddings().register_forward_pre_hook(look)

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Look at which W are the weights themselves."""
        states = getattr(optimizer, "optimizer", optimizer).state.items()
        bases = [each["base"] for weight, each in states if "base" in each and shares_storage(each["base"], weight)]
        self.shared = sum(base.numel() * base.element_size() for base in bases)


def dry_run(method: MethodArguments, args: TrainArguments) -> DryRun:
    """Make real steps in a scratch folder, and estimate the memory of the same batch.

    Three steps: AdamW has its moments from the second on, and in fp32 a LoRA expert that wins the second, the first
    with a learning rate above 0, makes a copy of W that the third holds. On a CPU, memory is the growth of the process,
    so the whole is done twice: the first time loads the libraries' code, which is no part of the model.

    Raises:
        ValueError: As of ``train``.
        OSError: As of ``train``.
    """
    if not torch.cuda.is_available():
        _keep_no_freed_memory()
        _few_steps(method, args)
        gc.collect()
        _keep_no_freed_memory()
    measured, seen = _few_steps(method, args)
    model = model_config(method, args)
    work = workload(method, args, model, seen.length)
    plan = plan_method(method.method, method.molf_config(args), work)
    return DryRun(measured * 2**20, plan, seen.batch, seen.length, seen.shared)


def compared(found: DryRun) -> str:
    """Measured and estimated peak, and the estimate by kind, MiB."""
    kinds = ", ".join(f"{kind} {size / 2**20:.1f}" for kind, size in found.memory.items() if size)
    more = f"\nup to {found.shared / 2**20:.1f} MiB more, for W, from each layer's first win of a LoRA expert on"
    measured, estimated = found.measured / 2**20, found.estimated / 2**20
    return (
        f"a step of {found.batch} x {found.length} tokens took {measured:.1f} MiB at its peak; the estimate is "
        f"{estimated:.1f} MiB ({100 * (estimated / measured - 1):+.1f} %)\n"
        f"estimated MiB: {kinds}{more if found.shared else ''}"
    )


def _few_steps(method: MethodArguments, args: TrainArguments) -> tuple[float, _Watch]:
    args, seen = copy.deepcopy(args), _Watch()
    method = copy.deepcopy(method)
    method.eval_at_end = False
    args.max_steps, args.save_strategy, args.eval_strategy, args.disable_tqdm = 3, "no", "no", True
    args.report_to = []  # what "none" has become
    args.resume_from_checkpoint = None
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args.output_dir = folder
        return train(method, args, [seen])["peak_memory_mib"], seen


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
        fused="fused" in str(args.optim),
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
