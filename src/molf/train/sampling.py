"""Samplers that go by length, drawn from the seed and the epoch as the others are."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback


class SeededSampling:
    """Mixin for a Trainer: ``group_by_length`` and ``batch_rebalance`` repeat their epochs after a resume.

    transformers draws the one from torch's generator, before a resume has put it back, and the other from seed 42.

    Example:
        class MyTrainer(SeededSampling, Trainer): ...
    """

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler: Any = super()._get_train_sampler(*args, **kwargs)  # type: ignore[misc]
        this: Any = self
        if this.args.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
            this.add_callback(_Drawn(sampler))
        return sampler


class _Drawn(TrainerCallback):
    """Seeds a sampler before every epoch; accelerate passes no epoch on to one that is sharded and skips batches."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seed, epoch = args.seed if args.data_seed is None else args.data_seed, int(state.epoch)
        if args.train_sampling_strategy == "group_by_length":
            self.sampler.generator = torch.Generator().manual_seed(seed + epoch)
        else:
            self.sampler.seed = seed
            self.sampler.set_epoch(epoch)
