"""TRL's trainers that take no ``optimizer_cls_and_kwargs``, with MoLF."""

from __future__ import annotations

from trl import DPOTrainer, GRPOTrainer

from .mixin import MoLFTrainerMixin


class MoLFDPOTrainer(MoLFTrainerMixin, DPOTrainer):
    """TRL's DPOTrainer with MoLF.

    MoLF: pass the plain model; the reference is a frozen copy that TRL loads from where the model came from, or
    ``ref_model``. MoLF-Efficient: pass the plain model and ``peft_config=molf_lora_config(config)``; the reference is
    the model without its adapter.

    Example:
        MoLFDPOTrainer(model, args=DPOConfig(max_grad_norm=0.0), train_dataset=pairs, molf_config=config).train()
    """


class MoLFGRPOTrainer(MoLFTrainerMixin, GRPOTrainer):
    """TRL's GRPOTrainer with MoLF; models and, where ``beta`` is not 0, references as in ``MoLFDPOTrainer``.

    Example:
        MoLFGRPOTrainer(model, rewards, args=GRPOConfig(max_grad_norm=0.0), train_dataset=prompts, molf_config=config)
    """
