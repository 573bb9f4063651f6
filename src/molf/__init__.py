"""MoLF: one optimizer that routes every update between full fine-tuning and LoRA.

Source: "Beyond LoRA vs. Full Fine-Tuning: Gradient-Guided Optimizer Routing for LLM Adaptation", arXiv:2605.07111.
"""

from .optim import (
    MoLFAdamW,
    MoLFConfig,
    MoLFOptimizerFactory,
    NonFiniteError,
    NonFiniteGradientError,
    ResumeError,
    Routing,
    RoutingRecorder,
    create_molf_optimizer,
    molf_lora_config,
    read_routing,
)
from .train.mixin import MoLFTrainerMixin

__version__ = "0.1.0"

__all__ = [
    "MoLFAdamW",
    "MoLFConfig",
    "MoLFOptimizerFactory",
    "MoLFTrainerMixin",
    "NonFiniteError",
    "NonFiniteGradientError",
    "ResumeError",
    "Routing",
    "RoutingRecorder",
    "create_molf_optimizer",
    "molf_lora_config",
    "read_routing",
]
