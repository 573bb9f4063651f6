"""Tiny models of the supported architectures, made from configs, no weights and no network."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

_SMALL: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any], int]] = {
    # name: (config class stem, config, routed layers)
    "qwen2": ("Qwen2", {**_SMALL, "tie_word_embeddings": True}, 14),
    "qwen3": ("Qwen3", {**_SMALL, "head_dim": 8}, 14),
    "llama": ("Llama", _SMALL, 14),
    "gemma3": ("Gemma3Text", {**_SMALL, "head_dim": 8, "query_pre_attn_scalar": 8}, 14),
    "mistral": ("Mistral", _SMALL, 14),
    "phi": ("Phi", {**_SMALL, "num_key_value_heads": 4}, 12),
    "gpt2": ("GPT2", {"vocab_size": 67, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
                      "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, 8),
}  # fmt: skip


def causal_lm(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    stem, config, _ = ARCHITECTURES[name]
    model_class = {"Gemma3Text": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel"}.get(stem, f"{stem}ForCausalLM")
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, f"{stem}Config")(**{**config, **changes}))
    return model.to(dtype).train()


def tokens(step: int, vocab: int = 67) -> torch.Tensor:
    return torch.randint(3, vocab, (4, 12), generator=torch.Generator().manual_seed(step))


def lm_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    ids = tokens(step)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def twin_groups(optimizer: torch.optim.Optimizer, model: nn.Module, twin: nn.Module) -> list[dict[str, Any]]:
    """An optimizer's groups, for another optimizer, with the parameters of a copy of its model."""
    twins = dict(zip(model.parameters(), twin.parameters(), strict=True))
    return [
        {"params": [twins[parameter] for parameter in group["params"]], "weight_decay": group["weight_decay"]}
        for group in optimizer.param_groups
    ]
