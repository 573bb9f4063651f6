"""MoLF in any transformers or TRL Trainer, also one without ``optimizer_cls_and_kwargs``."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from ..optim import MoLFAdamW, MoLFConfig, MoLFOptimizerFactory


class MoLFTrainerMixin:
    """Makes a Trainer train with MoLF: ``class MyTrainer(MoLFTrainerMixin, TheirTrainer): pass``.

    The trainer takes one more argument, ``molf_config``, and makes the optimizer when it needs one, after the model
    is on its device and sharded. ``MoLFDPOTrainer`` and ``MoLFGRPOTrainer`` in ``molf.train.trainers`` are made so.

    Args:
        *args: The trainer's.
        molf_config: Experts, rates and clipping; set the trainer's own ``max_grad_norm`` to 0.
        **kwargs: The trainer's.

    Raises:
        ValueError: If the trainer is given another optimizer, or has no reference model of its own while the base
            of its adapter is trained.

    Example:
        class MyTrainer(MoLFTrainerMixin, Trainer):
            pass

        MyTrainer(model, args, train_dataset=dataset, molf_config=MoLFConfig(expert_ranks=(16,))).train()
    """

    args: Any
    model: Any
    optimizer: Any

    def __init__(self, *args: Any, molf_config: MoLFConfig, **kwargs: Any) -> None:
        self.molf_config = molf_config
        super().__init__(*args, **kwargs)
        if self.optimizer is not None:
            raise ValueError(
                f"optimizers={self.optimizer.__class__.__name__}: the optimizer is made from molf_config; leave it out"
            )
        if self.args.max_grad_norm and (molf_config.max_grad_norm or molf_config.step_in_backward):
            effect = "has no effect with step_in_backward" if molf_config.step_in_backward else "clips once more"
            warnings.warn(f"max_grad_norm={self.args.max_grad_norm} of the trainer {effect}: set it to 0", stacklevel=2)
        # what the Trainer makes it from, and what a resume compares a checkpoint with
        self.optimizer_cls_and_kwargs = (MoLFOptimizerFactory, {"config": molf_config})

    def create_optimizer(self, model: nn.Module | None = None) -> MoLFAdamW:
        """Make the optimizer, once; called by the Trainer."""
        self._check_reference()
        if getattr(self, "is_fsdp_enabled", False):
            raise ValueError(
                "fsdp: accelerate would shard the model when its optimizer has been made; leave fsdp out, call "
                "molf.train.sharded.shard(model, args) first, and mix ShardedTraining into the trainer"
            )
        optimizer: MoLFAdamW = super().create_optimizer(model)  # type: ignore[misc]
        return optimizer

    def _check_reference(self) -> None:
        """TRL takes the model without its adapter as the reference, which is the starting point only while frozen."""
        adapter_off = hasattr(self.model, "peft_config") and getattr(self, "ref_model", self) is None
        if not adapter_off or not getattr(self, "beta", 0) or getattr(self.args, "precompute_ref_log_probs", False):
            return
        config = self.molf_config
        for name, value in (("train_base", config.train_base), ("train_other", config.trains_other)):
            if value:
                raise ValueError(
                    f"{name}={value} with an adapter: the reference is the model without its adapter, and would be "
                    f"trained along; pass the model without an adapter, or {name}=False"
                )
