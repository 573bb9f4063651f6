"""Virtual LoRA experts of an ordinary layer: identity (a), the state beside P = W + Σ s_i B_i A_i.

Everything here is of one layer. ``base`` is W, laid out like the weight; ``lora_A`` (R, in) and ``lora_B`` (out, R) are
the stacked experts; ``scales`` (R,) is s_i over the ranks; ``transposed`` says that the weight is stored as (in, out).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def make_experts(state: dict[str, Any], weight: Tensor, rank: int, transposed: bool, dtype: torch.dtype) -> None:
    """A ~ kaiming_uniform(a=√5), B = 0, their moments 0, and W = P.  Source: arXiv:2605.07111, section 4.2."""
    outs, ins = reversed(weight.shape) if transposed else weight.shape
    state["base"] = weight.detach().to(dtype, copy=True)
    state["lora_A"] = torch.empty(rank, ins, dtype=dtype, device=weight.device)
    torch.nn.init.kaiming_uniform_(state["lora_A"], a=math.sqrt(5))
    state["lora_B"] = torch.zeros(outs, rank, dtype=dtype, device=weight.device)
    for name in ("lora_A", "lora_B"):
        for moment in ("exp_avg", "exp_avg_sq"):
            state[f"{name}_{moment}"] = torch.zeros_like(state[name])


def merged(state: dict[str, Any], scales: Tensor, transposed: bool) -> Tensor:
    """P = W + Σ s_i B_i A_i, laid out like the weight, in the dtype of W.  Source: section 4.5."""
    A, B = state["lora_A"], state["lora_B"] * scales
    return torch.addmm(state["base"], *((A.T, B.T) if transposed else (B, A)))


def gradients(G: Tensor, A: Tensor, B: Tensor, scales: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """dL/dA_i = s_i B_iᵀ G and dL/dB_i = s_i G A_iᵀ from G = dL/dP."""
    G = G.T if transposed else G
    return (B * scales).T @ G, (G @ A.T) * scales
