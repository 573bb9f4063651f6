"""The optimizer, its scores, its routing and its reference twin."""

from .config import MoLFConfig
from .factory import MoLFOptimizerFactory, create_molf_optimizer, molf_lora_config
from .guards import NonFiniteError, NonFiniteGradientError, ResumeError
from .jobs import CompileError
from .molf_adamw import MoLFAdamW
from .routing import Routing, RoutingRecorder, read_routing
from .sharding import ProcessesDifferError

__all__ = [
    "CompileError",
    "MoLFAdamW",
    "MoLFConfig",
    "MoLFOptimizerFactory",
    "NonFiniteError",
    "NonFiniteGradientError",
    "ProcessesDifferError",
    "ResumeError",
    "Routing",
    "RoutingRecorder",
    "create_molf_optimizer",
    "molf_lora_config",
    "read_routing",
]
