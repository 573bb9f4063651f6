"""A plan as text: the table of tensors, memory by kind and by number of GPUs, and warnings that matter."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from ..optim import MoLFConfig
from ..table import aligned
from ..train.methods import METHODS
from .memory import KINDS, PLANNED, Plan, Row, Workload

GIB = 2**30
BAR = 20
"""Characters of the longest bar."""
TOO_FAST = 0.06
"""lora_lr x scale from which every run that was tried learned far less; ``benchmarks/lr_scale.py`` made them."""


def tensors(rows: Sequence[Row], every: bool) -> str:
    """The tensors of a plan, equal ones of different layers in one line unless ``every``."""
    groups: dict[tuple[str, tuple[int, ...], str, float, float, bool], int] = {}
    for row in rows:
        name = row.name if every else re.sub(r"(^|\.)\d+(?=\.)", r"\1*", row.name)
        key = (name, row.shape, row.experts, row.lr, row.weight_decay, row.trained)
        groups[key] = groups.get(key, 0) + 1
    table = [("tensor", "count", "shape", "expert", "lr", "decay", "trained")]
    for (name, shape, experts, lr, decay, trained), count in groups.items():
        rates = (f"{lr:g}", f"{decay:g}") if trained else ("-", "-")
        table.append(
            (name, str(count), " x ".join(map(str, shape)), experts or "-", *rates, "yes" if trained else "no")
        )
    return aligned(table, right=(1, 4, 5))


def totals(plan: Plan) -> str:
    """Numbers of elements: in the model, trained, and in virtual experts."""

    def count(rows: Sequence[Row]) -> int:
        return sum(int(torch.Size(row.shape).numel()) for row in rows)

    virtual = [row for row in plan.rows if row.name.endswith((".lora_A", ".lora_B"))]  # an adapter's end with .weight
    inside = [row for row in plan.rows if row not in virtual]
    trained = [row for row in inside if row.trained]
    extra = f", and {count(virtual):,} in virtual experts" if virtual else ""
    return f"{plan.method}: {count(trained):,} of {count(inside):,} parameters trained{extra}"


def by_kind(plans: Sequence[Plan]) -> str:
    """GiB on one device by kind, one line per method with a bar of its peak."""
    kinds = [kind for kind in KINDS if kind != "communication"]
    table = [("method", "LoRA ranks", *kinds, "peak", "")]
    most = max(sum(plan.memory().values()) for plan in plans)
    for plan in plans:
        memory = plan.memory()
        peak, ranks = sum(memory.values()), ", ".join(map(str, plan.ranks)) or "-"
        bar = "#" * max(1, round(BAR * peak / most))
        table.append((plan.method, ranks, *(gib(memory[kind]) for kind in kinds), gib(peak), bar))
    return aligned(table, right=range(2, len(kinds) + 3))


def by_gpus(plans: Sequence[Plan], gpus: int) -> str:
    """Peak GiB per GPU by their number, with DDP and with FSDP2."""
    numbers = sorted({1, *(2**k for k in range(1, gpus.bit_length()) if 2**k <= gpus), gpus})
    table = [("GPUs", *(f"{p.method} {way}" for p in plans for way in ("DDP", "FSDP2")))]
    for number in numbers:
        cells = [gib(sum(plan.memory(number, sharded).values())) for plan in plans for sharded in (False, True)]
        table.append((str(number), *cells))
    return aligned(table, right=range(len(table[0])))


def gib(size: int) -> str:
    """A size in GiB with three digits that tell it."""
    return f"{size / GIB:.3g}" if size < GIB else f"{size / GIB:.1f}"


def warnings(plan: Plan, config: MoLFConfig, work: Workload) -> list[str]:
    """What will go wrong, or surprises, with this method and model; one line each."""
    found = not_planned(work.optim)
    spec = METHODS[plan.method]
    if plan.tied and any(row.trained for row in plan.rows if row.experts == "not routed" or not spec.routes):
        embedding = next((row for row in plan.rows if "embed" in row.name or "wte" in row.name), None)
        if embedding is not None and embedding.trained:
            found.append(
                f"the output head is tied to {embedding.name}: one tensor, trained but not routed, moves both"
                + ("; train_other=false leaves it alone" if spec.routes else "")
            )
    if config.expert_ranks:
        for expert, scale in zip(config.experts[int(config.train_base) :], config.scales, strict=True):
            if config.lora_lr * scale >= TOO_FAST:
                found.append(
                    f"{expert}: lora_lr {config.lora_lr:g} x scale {scale:.4g} = {config.lora_lr * scale:.3g}; from "
                    f"{TOO_FAST:g} on every run that was tried ended at 2.5 times the loss of 0.006 or more "
                    "(docs/tuning.md): lower lora_lr or lora_alpha"
                )
    half = work.dtype in (torch.bfloat16, torch.float16)
    if half and not spec.routes and not spec.adapter:
        found.append(
            f"{plan.method} in {str(work.dtype).removeprefix('torch.')} has no fp32 master: a weight keeps its bits "
            "where a step is below half its last digit; use --dtype float32, or a method that routes: it keeps masters"
        )
    return found


def not_planned(optim: str) -> list[str]:
    """That the figures are another optimizer's, if they are."""
    return [] if optim in PLANNED else [f"optim={optim} is not planned: moments and step are those of AdamW"]
