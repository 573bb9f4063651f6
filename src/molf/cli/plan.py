"""``molf plan``: what a ``molf train`` with these options trains and how much memory it takes, before it is run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from ..plan.dry_run import model_config, workload
from ..plan.memory import side_by_side
from ..plan.text import by_gpus, by_kind, tensors, totals, warnings
from ..train.arguments import MethodArguments
from .train import parse

DESCRIPTION = """usage: molf plan [--all] [--gpus N] OPTIONS OF molf train

    molf plan --model_name_or_path DIR --method molf --per_device_train_batch_size 8 --max_length 1024

The tensors with expert, learning rate and decay, in one line those of all layers (--all: a line for each), and
the memory of fft, lora, molf and molf-e side by side, on 1 to N GPUs (--gpus, default 8). No weight is loaded and no
data are read: sequences are taken to have --max_length tokens.
"""


@dataclass
class PlanArguments(MethodArguments):
    """The options of ``molf train``, without need of data, and the plan's own."""

    needs_data: ClassVar[bool] = False
    all: bool = field(default=False, metadata={"help": "List every tensor, not one line for those of all layers."})
    gpus: int = field(default=8, metadata={"help": "Largest number of GPUs in the table."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpus < 1:
            raise ValueError(f"gpus={self.gpus}: must be at least 1")


def run(argv: Sequence[str]) -> None:
    """Print the plan.

    Raises:
        ValueError: For bad options, or a model that cannot be routed this way.
        OSError: If the model's configuration cannot be read.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(DESCRIPTION)
        return
    method, args = parse(argv, PlanArguments)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    config, model = method.molf_config(args), model_config(method, args)
    limit = getattr(model.get_text_config(), "max_position_embeddings", None)
    length = min(n for n in (args.max_length or limit or 1024, limit) if n is not None)
    work = workload(method, args, model, length)
    plans, left_out = side_by_side(method.method, config, work)
    own = next(plan for plan in plans if plan.method == method.method)
    print(tensors(own.rows, method.all))
    print(f"\n{totals(own)}")
    quantised = "" if work.quantization == "none" else f", {work.quantization} under the adapters"
    dtype = str(work.dtype).removeprefix("torch.")
    print(f"\nGiB on one device, {work.batch} x {length} tokens, {dtype} weights{quantised}:\n")
    print(by_kind(plans))
    print("\nPeak GiB per GPU:\n")
    print(by_gpus(plans, method.gpus))
    for line in [*warnings(own, config, work), *(f"{name} is left out: {why}" for name, why in left_out.items())]:
        print(f"\nwarning: {line}")
