"""Virtual LoRA experts of an ordinary layer: identity (a), the state beside P = W + Σ s_i B_i A_i.

Everything here is of one layer. ``base`` is W, laid out like the weight; ``lora_A`` (R, in) and ``lora_B`` (out, R) are
the stacked experts, B with its ranks contiguous; ``scales`` (R,) is s_i over the ranks; ``transposed`` says that the
weight is stored as (in, out).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def make_experts(state: dict[str, Any], weight: Tensor, rank: int, transposed: bool, dtype: torch.dtype) -> None:
    """A ~ kaiming_uniform(a=√5), B = 0, and their moments 0.  Source: arXiv:2605.07111, section 4.2."""
    outs, ins = reversed(weight.shape) if transposed else weight.shape
    state["lora_A"] = torch.empty(rank, ins, dtype=dtype, device=weight.device)
    torch.nn.init.kaiming_uniform_(state["lora_A"], a=math.sqrt(5))
    state["lora_B"] = torch.zeros(rank, outs, dtype=dtype, device=weight.device).T
    for name in ("lora_A", "lora_B"):
        for moment in ("exp_avg", "exp_avg_sq"):
            state[f"{name}_{moment}"] = torch.zeros_like(state[name])


def shares_storage(base: Tensor, weight: Tensor) -> bool:
    """Whether W is the layer's own weight, as it is while B = 0: then P = W, and a copy would be waste."""
    return base.dtype == weight.dtype and base.data_ptr() == weight.data_ptr()


def scaled(factor: Tensor, scales: float | Tensor) -> tuple[float, Tensor]:
    """α and F with α F = s ⊙ factor along the last dimension; a single s is left to the product that follows."""
    return (1.0, factor * scales) if isinstance(scales, Tensor) else (scales, factor)


def gradients(G: Tensor, A: Tensor, Bt: Tensor, scales: float | Tensor) -> tuple[Tensor, Tensor]:
    """dL/dA_i = s_i B_iᵀ G (R, in), and the transpose of dL/dB_i = s_i G A_iᵀ, (R, out), from G = dL/dP (out, in).

    Args:
        G: The gradient, its rows the outputs.
        A: (R, in).
        Bt: Bᵀ, (R, out).
        scales: One s, or s_i over the ranks, (R,).
    """
    if isinstance(scales, Tensor):
        return (Bt @ G).mul_(scales[:, None]), (A @ G.T).mul_(scales[:, None])
    nothing = G.new_zeros(())
    return torch.addmm(nothing, Bt, G, beta=0, alpha=scales), torch.addmm(nothing, A, G.T, beta=0, alpha=scales)


def round_stochastically(value: Tensor, store: Tensor) -> None:
    """Write fp32 values to a bf16 tensor, up or down with probabilities that keep the expected value.

    bf16 is the upper half of fp32's bits: a uniform number below 2¹⁶ is added and the lower half dropped. Draws from
    torch's generator of the device.
    """
    noise = torch.randint(0, 2**16, value.shape, dtype=torch.int32, device=value.device)
    bits = (value.view(torch.int32) + noise).bitwise_and_(-(2**16))
    store.copy_(bits.view(torch.float32))
