"""Shapes to measure on: transformers configs in code, no weights and no downloads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Preset:
    """A model's shape, and what it is measured with.

    Attributes:
        model_type: transformers' name of the architecture.
        config: Its config's fields.
        published: Parameters of the published model, in 10⁹; None for a shape of our own.
        batch: Sequences per forward pass.
        length: Tokens per sequence.
        ranks: Ranks of MoLF's LoRA experts.
        efficient_ranks: Ranks of MoLF-Efficient's; PEFT's LoRA gets their sum.
        dtype: Of the weights.
    """

    model_type: str
    config: Mapping[str, Any]
    published: float | None = None
    batch: int = 8
    length: int = 1024
    ranks: tuple[int, ...] = (128,)
    efficient_ranks: tuple[int, ...] = (32, 128)
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Settings:
    """What is the same for all contenders of a run.

    Attributes:
        preset: Name of the preset.
        device: "cpu" or "cuda".
        dtype: Of the weights: "float32" or "bfloat16".
        batch: Sequences per forward pass.
        length: Tokens per sequence.
        ranks: Ranks of MoLF's LoRA experts.
        efficient_ranks: Ranks of MoLF-Efficient's.
        accumulation: Forward and backward passes per step.
        gradient_checkpointing: Whether activations are computed again in the backward pass.
        steps: Steps per round; a round's time is their mean.
        seed: Of weights, tokens and gradients.
    """

    preset: str
    device: str
    dtype: str
    batch: int
    length: int
    ranks: tuple[int, ...]
    efficient_ranks: tuple[int, ...]
    accumulation: int = 1
    gradient_checkpointing: bool = False
    steps: int = 1
    seed: int = 0


def _shape(hidden: int, layers: int, inner: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "use_cache": False,
        **more,
    }


def _own(hidden: int, layers: int, heads: int = 8, vocab: int = 8192, **more: Any) -> Preset:
    """Qwen2-like, for CPUs; the inner width is 2.75 times the hidden one."""
    config = _shape(hidden, layers, hidden * 11 // 4, heads, heads, vocab)
    fields: dict[str, Any] = {"length": 256, "ranks": (64,), "efficient_ranks": (16, 64), "dtype": "float32", **more}
    return Preset("qwen2", config, **fields)


PRESETS = {
    "tiny": _own(32, 2, 4, 128, batch=2, length=16, ranks=(4,), efficient_ranks=(2, 4)),
    "cpu-small": _own(512, 8),
    "cpu-deep": _own(64, 28, 4, 1024, length=64, ranks=(8,), efficient_ranks=(4, 8)),
    "cpu-growth-1": _own(256, 8),
    "cpu-growth-2": _own(384, 8),
    "cpu-growth-3": _own(512, 8),
    "cpu-growth-4": _own(768, 8),
    "qwen2.5-0.5b": Preset("qwen2", _shape(896, 24, 4864, 14, 2, 151936), 0.494),
    "qwen2.5-1.5b": Preset("qwen2", _shape(1536, 28, 8960, 12, 2, 151936), 1.544),
    "qwen2.5-3b": Preset("qwen2", _shape(2048, 36, 11008, 16, 2, 151936), 3.086),
    "gemma-3-1b": Preset(
        "gemma3_text",
        _shape(1152, 26, 6912, 4, 1, 262144, head_dim=256, query_pre_attn_scalar=256, sliding_window=512),
        1.0,
    ),
    "llama-3.2-1b": Preset("llama", _shape(2048, 16, 8192, 32, 8, 128256, head_dim=64), 1.236),
}
"""By name; those named after a model have its published dimensions."""


def get_preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
        ValueError: If there is none.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def build_model(preset: Preset, dtype: torch.dtype, device: str, seed: int) -> Any:
    """The preset's model with random weights, the same for the same seed and device, in training mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(preset.model_type, **preset.config)
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).train()
