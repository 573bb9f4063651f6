"""The memory of a run by kind: the real model, adapter and optimizer are made of fake tensors, and a step is simulated.

Nothing is loaded or allocated. Weights, masters, experts, moments and gradients are counted from the tensors that would
be there; a forward and backward pass on fake tensors tells what activations and their gradients hold at the peak.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..optim import MoLFConfig, create_molf_optimizer, quantized
from ..optim.passes import BLOCK
from ..train.methods import METHODS, adapter_config
from ..train.sharded import layers
from .tracker import PeakTracker

KINDS = ("weights", "masters", "experts", "gradients", "moments", "activations", "communication")
HEAD_CHUNK = 32768
"""Columns of the logits that TRL's loss holds at a time."""
STEP_TENSORS = 3
"""Tensors that a pass of MoLF's step holds beside the state, of the size of a block."""
PACKING = 52
"""Bytes per element of the largest 8-bit moment while it is packed: m and v in fp32, and torchao's search for the
codes, two int64 and five fp32 tensors. 47 to 50 is what a process grows by on a CPU."""
PLANNED = ("adamw_torch", "adamw_torch_fused", "sgd")
"""Optimizers of methods that do not route whose moments are counted; the Trainer's SGD has none."""


@dataclass(frozen=True)
class Workload:
    """What decides the memory apart from the method.

    Attributes:
        model: The model's transformers configuration.
        dtype: Of its weights.
        batch: Sequences per device and forward pass.
        length: Tokens per sequence.
        accumulation: Forward passes per step.
        checkpointing: Whether activations are recomputed.
        autocast: Whether the forward pass is in bf16 by autocast.
        fused: Whether the AdamW of methods that do not route is fused.
        optim: Its name, as transformers has it; of those that are not in ``PLANNED`` AdamW is planned.
        quantization: Of the frozen base of the methods that take it, as ``molf train`` names it.
        trust_remote_code: Whether the model's own code may run.
    """

    model: Any
    dtype: torch.dtype
    batch: int
    length: int
    accumulation: int = 1
    checkpointing: bool = False
    autocast: bool = False
    fused: bool = True
    optim: str = "adamw_torch_fused"
    quantization: str = "none"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Held:
    """One tensor that is there throughout training.

    Attributes:
        kind: One of ``KINDS``.
        name: The parameter that it belongs to.
        shape: Its shape.
        bytes: Its size.
        dealt: How many rows, or columns, FSDP2 deals out to the GPUs; 0 if each has it whole, as it has of the virtual
            experts the factor that sums over what is dealt out of the weight: A, or B where the weight is transposed.
    """

    kind: str
    name: str
    shape: tuple[int, ...]
    bytes: int
    dealt: int

    def bytes_on(self, gpus: int) -> int:
        """Of one GPU's shard: rows are dealt out in equal parts, the last of which may be smaller."""
        return -(-self.dealt // gpus) * self.bytes // self.dealt if self.dealt else self.bytes


@dataclass(frozen=True)
class Row:
    """A parameter in the table of tensors; see ``molf.plan.text``."""

    name: str
    shape: tuple[int, ...]
    experts: str
    lr: float
    weight_decay: float
    trained: bool


@dataclass(frozen=True)
class Plan:
    """One method's tensors and memory.

    Attributes:
        method: Its name.
        ranks: Of its LoRA experts.
        held: What is there throughout.
        rows: The table of tensors.
        peak: Of a forward and backward pass, gradients included, bytes.
        step: What the optimizer's step holds beside state and gradients, bytes.
        summed: Of it gradients that FSDP2's processes sum, which each has as a whole, and once more in one piece.
        blocks: Bytes of the largest layer's weights, of which FSDP2 gathers two.
        tied: Whether the output head is the embedding.
    """

    method: str
    ranks: tuple[int, ...]
    held: list[Held]
    rows: list[Row] = field(repr=False)
    peak: int
    step: int
    summed: int
    blocks: int
    tied: bool

    def memory(self, gpus: int = 1, sharded: bool = False) -> dict[str, int]:
        """Bytes per GPU by kind at the peak; their sum is the peak.

        Args:
            gpus: How many.
            sharded: FSDP2, where a GPU has its share of every sharded tensor and gathers two layers at a time; else
                DDP, where every GPU has all, and the gradients a second time in DDP's buckets.
        """
        found = dict.fromkeys(KINDS, 0)
        for tensor in self.held:
            found[tensor.kind] += tensor.bytes_on(gpus) if sharded else tensor.bytes
        whole = sum(tensor.bytes for tensor in self.held if tensor.kind == "gradients")
        dealt = sharded and gpus > 1
        step = (self.step - self.summed) // gpus + 2 * self.summed if dealt else self.step
        found["activations"] = max(self.peak - whole, step, 0)
        if gpus > 1:
            found["communication"] = 2 * self.blocks if sharded else whole
        return found


def plan_method(name: str, config: MoLFConfig, work: Workload) -> Plan:
    """Make a method's model and optimizer of fake tensors and simulate a step.

    Args:
        name: Of ``molf train``.
        config: Its experts, as ``MethodArguments.molf_config`` resolves them.
        work: Model, precision and batch.

    Raises:
        ValueError: If the model cannot be routed this way.
    """
    spec = METHODS[name]
    base, model = _on_meta(name, config, work)
    if config.moments_8bit:  # torchao's tables are kept once they are made, which fake tensors cannot do
        for signed in (True, False):
            quantized.zeros(torch.empty(BLOCK), signed=signed)
    with FakeTensorMode(
        allow_non_fake_inputs=True
    ):  # tensors that say they are on the CPU, so that operations choose its kernels, not meta's
        model.to_empty(device="cpu")
        base.tie_weights()
        optimizer = create_molf_optimizer(model, replace(config, step_in_backward=False)) if spec.routes else None
        in_backward = spec.routes and config.step_in_backward
        if in_backward:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(_free)
        rows = list(_routed_rows(model, optimizer) if optimizer else _plain_rows(model, config, spec.adapter))
        packed = _quantised(base) if spec.quantizes and work.quantization != "none" else {}
        held = [
            *_of_model(model, packed, work.quantization, not in_backward),
            *(_of_optimizer(optimizer) if optimizer else () if work.optim == "sgd" else _of_adamw(model)),
        ]
        unpacked = max((weight.numel() for weight in packed.values()), default=0)  # one at a time, to multiply with
        peak = _simulate(model, base, work) + unpacked * (2 if work.autocast else work.dtype.itemsize)
    sizes = [tensor.bytes for tensor in held if tensor.kind == "moments"]
    temporaries, summed = _of_step(optimizer) if optimizer else ((0 if work.fused else 2) * max(sizes, default=0), 0)
    return Plan(
        name,
        tuple(config.expert_ranks),
        held,
        rows,
        peak,
        temporaries,
        summed,
        _largest_block(base),
        base.get_output_embeddings() is not None
        and base.get_output_embeddings().weight is base.get_input_embeddings().weight,
    )


def _on_meta(name: str, config: MoLFConfig, work: Workload) -> tuple[Any, Any]:
    """The base model, and the same one with the method's adapter where it has one."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(
            work.model, dtype=work.dtype, trust_remote_code=work.trust_remote_code
        ).train()
        if not METHODS[name].saves_adapter(config):
            return base, base
        return base, get_peft_model(base, adapter_config("lora" if name == "pissa" else name, config))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _quantised(base: Any) -> dict[int, Tensor]:
    """The weights by ``id`` that are quantised: of linear layers without the output head and without an adapter's."""
    head = base.get_output_embeddings()
    layers = [m for m in base.modules() if isinstance(m, nn.Linear) and m is not head and not m.weight.requires_grad]
    return {id(layer.weight): layer.weight for layer in layers}


def _packed_size(weight: Tensor, quantization: str) -> int:
    """Bytes of a quantised weight with its fp32 scales: one per 64 elements of NF4, else int8 and one per output."""
    if quantization == "bnb-4bit":
        return -(-weight.numel() // 2) + 4 * -(-weight.numel() // 64)
    return weight.numel() + 4 * weight.shape[0]


def _free(parameter: Tensor) -> None:
    """What a step in the backward pass does with a gradient."""
    parameter.grad = None


def _of_model(model: nn.Module, packed: dict[int, Tensor], quantization: str, gradients: bool) -> Iterator[Held]:
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        size = _packed_size(parameter, quantization) if id(parameter) in packed else _size(parameter)
        yield Held("experts" if ".lora_" in name else "weights", name, shape, size, _rows(parameter))
        if parameter.requires_grad and gradients:
            yield Held("gradients", name, shape, _size(parameter), _rows(parameter))


def _rows(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.dim() else 0


def _of_optimizer(optimizer: Any) -> Iterator[Held]:
    """What ``optimizer.state`` holds, as it is: W where there is one, virtual experts with their moments, moments."""
    transposed = {f"{module.name}.weight" for module in optimizer.modules if module.transposed}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            for key, value in optimizer.state[parameter].items():
                if key == "step":
                    continue
                kind = "masters" if key == "base" else "experts" if key.startswith("lora_") else "moments"
                dealt = _rows(value)
                if kind == "experts":  # A (R, in) goes by the weight's inputs, B (out, R) by its outputs
                    by_inputs = key.startswith("lora_A")
                    dealt = value.shape[int(by_inputs)] if by_inputs == (name in transposed) else 0
                parts = [value.codes, value.scale, value.qmap] if quantized.is_quantized(value) else [value]
                yield Held(kind, name, tuple(value.shape), sum(map(_size, parts)), dealt)


def _of_step(optimizer: Any) -> tuple[int, int]:
    """Bytes that a step needs beside the state, and how many of them FSDP2's processes sum.

    Gradients of experts that are no parameters and gradients that are gathered, or after them values that are; one
    matrix more, as that of a scaled B; and a pass's tensors. When what is not routed is stepped, these are gone.
    """
    sizes, values, summed = [], [], 0
    for stack in optimizer.stacks().all:
        gathered, virtual = len(stack) > 1, stack.modules[0].lora_A is None
        several = [part for part in (*stack.dense, *(stack.pair or ())) if len(part.parameters) > 1]
        values += [_size(part.exp_avg) for part in several if part.value is None]
        sizes += [_size(part.exp_avg) for part in stack.dense if len(part.members) > 1]
        for factor, part in enumerate(stack.pair or ()):
            if gathered or virtual or part.turned:  # a real adapter's B is scaled
                sizes.append(_size(part.exp_avg))
            if virtual and factor == int(stack.modules[0].transposed):
                summed += _size(part.exp_avg)
    weights = {id(weight) for stack in optimizer.stacks().all for weight in stack.parameters}
    packed = {True: 0, False: 0}  # by whether it is routed, the largest
    for parameter, state in optimizer.state.items():
        for value in filter(quantized.is_quantized, state.values()):
            packed[id(parameter) in weights] = max(packed[id(parameter) in weights], PACKING * value.numel())
    routed = max(sum(sizes), sum(values)) + max([0, *sizes, *values]) + packed[True]
    return max(routed, packed[False]) + STEP_TENSORS * 4 * BLOCK, summed


def _of_adamw(model: nn.Module) -> Iterator[Held]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield Held("moments", name, tuple(parameter.shape), 2 * _size(parameter), _rows(parameter))


def _routed_rows(model: nn.Module, optimizer: Any) -> Iterator[Row]:
    """Every parameter with its experts; virtual experts follow the weight that they belong to."""
    routed = {
        name: m for m in optimizer.modules for name in (f"{m.name}.weight", f"{m.name}.lora_A", f"{m.name}.lora_B")
    }
    trained = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            trained[parameter] = (name, group)
    lora = [group for group in optimizer.param_groups if group["expert"].startswith("lora_")]
    names = ", ".join(group["expert"] for group in lora)
    for name, parameter in model.named_parameters():
        own, group = trained.get(parameter, (name, None))
        shape = tuple(parameter.shape)
        if group is None or group["expert"] == "base":
            yield Row(name, shape, "", 0.0, 0.0, False)
        elif own.endswith((".lora_A", ".lora_B")) and own in routed:
            yield Row(name, shape, names, lora[0]["lr"], lora[0]["weight_decay"], True)
        else:
            expert = group["expert"].removesuffix("_bias") if group["expert"].startswith("dense") else "not routed"
            yield Row(name, shape, expert, group["lr"], group["weight_decay"], True)
        for key in ("lora_A", "lora_B"):
            if parameter in trained and key in optimizer.state[parameter]:
                virtual = tuple(optimizer.state[parameter][key].shape)
                place = name.removesuffix(".weight")
                yield Row(f"{place}.{key}", virtual, names, lora[0]["lr"], lora[0]["weight_decay"], True)


def _plain_rows(model: nn.Module, config: MoLFConfig, adapter: bool) -> Iterator[Row]:
    """Parameters as the Trainer's AdamW groups them: no decay of vectors, one learning rate."""
    lr, decay = (config.lora_lr, config.lora_weight_decay) if adapter else (config.lr, config.weight_decay)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield Row(name, tuple(parameter.shape), "", lr, decay if parameter.dim() > 1 else 0.0, True)
        else:
            yield Row(name, tuple(parameter.shape), "", 0.0, 0.0, False)


def _simulate(model: Any, base: Any, work: Workload) -> int:
    """Peak of what a forward and backward pass make, with the gradients; with accumulation of the second pass."""
    from trl.kernels import ChunkedLogProbFunction

    if work.checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
        if model is not base:
            base.enable_input_require_grads()
    head = base.get_output_embeddings()
    chunk = HEAD_CHUNK if torch.cuda.is_available() else min(HEAD_CHUNK, head.weight.shape[0])
    with PeakTracker() as tracker:
        ids = torch.zeros(work.batch, work.length, dtype=torch.long)
        mask = torch.ones_like(ids)
        mask[-1, -1] = 0  # a batch with padding takes more than one without
        for _ in range(min(2, work.accumulation)):
            with torch.autocast("cpu", torch.bfloat16, enabled=work.autocast):
                hidden = base.base_model(input_ids=ids, attention_mask=mask, use_cache=False)[0][:, :-1]
                flat = hidden.reshape(-1, hidden.size(-1))
                targets, outputs = ids[:, 1:].reshape(-1), ("entropy", "is_top1")
                found = ChunkedLogProbFunction.apply(
                    flat, head.weight, head.bias, targets, 1.0, chunk, None, 1.0, outputs
                )
            del hidden, flat
            found[0].sum().backward()
            del found
    return tracker.peak


def _largest_block(base: nn.Module) -> int:
    """Bytes of the largest layer's parameters; what FSDP2 gathers at a time."""
    return max((sum(_size(p) for p in layer.parameters()) for layer in layers(base)), default=0)


def side_by_side(method: str, config: MoLFConfig, work: Workload) -> tuple[list[Plan], dict[str, str]]:
    """The method as it is configured, next to fft, lora, molf and molf-e with its ranks, or their own defaults.

    Returns:
        The plans, and by name why one of the others has none: the model cannot be trained by it this way.

    Raises:
        ValueError: If the model cannot be trained by the method itself.
    """
    plans, left_out = [], {}
    for name in dict.fromkeys(("fft", "lora", "molf", "molf-e", method)):
        spec = METHODS[name]
        ranks = tuple(config.expert_ranks) or spec.default_ranks
        if spec.one_rank:
            ranks = ranks[-1:]
        if name == "molf-e" and len(ranks) < 2:
            ranks = spec.default_ranks
        if name == "fft":
            ranks = ()
        other = replace(
            config, expert_ranks=ranks, train_base=spec.train_base, policy="score", random_shares=None, top_k=1,
            lora_alpha=None, train_other=None, lora_dropout=0.0,
        )  # fmt: skip
        try:
            plans.append(plan_method(name, config if name == method else other, work))
        except ValueError as error:
            if name == method:
                raise
            left_out[name] = str(error)
    return plans, left_out
