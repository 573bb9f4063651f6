"""Virtual LoRA experts of an ordinary layer: identity (a), the state beside P = W + Σ s_i B_i A_i.

Everything here is of one layer. ``base`` is W, laid out like the weight; ``lora_A`` (R, in) and ``lora_B`` (out, R) are
the stacked experts, B with its ranks contiguous; ``scales`` (R,) is s_i over the ranks; ``transposed`` says that the
weight is stored as (in, out).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .sharding import local, same_everywhere, shard_like, sharded_dim


class Products(NamedTuple):
    """P = W + Σ s_i B_i A_i of K layers of one shape.

    Attributes:
        targets: P, laid out like the weight.
        bases: W, likewise.
        left: Bᵀ (K, R, out), or A (K, R, in) where the weights are stored as (in, out).
        right: The other one.
    """

    targets: Sequence[Tensor]
    bases: Sequence[Tensor]
    left: Tensor
    right: Tensor


def products(targets: Sequence[Tensor], bases: Sequence[Tensor], A: Tensor, Bt: Tensor, transposed: bool) -> Products:
    """The products of A (K, R, in) and Bᵀ (K, R, out)."""
    return Products(targets, bases, *((A, Bt) if transposed else (Bt, A)))


def make_experts(state: dict[str, Any], weight: Tensor, rank: int, transposed: bool, dtype: torch.dtype) -> None:
    """A ~ kaiming_uniform(a=√5), B = 0, and their moments 0.

    Of a sharded weight, what shares its sharded dimension is sharded likewise, and the other factor replicated.

    Source: arXiv:2605.07111, section 4.2.
    """
    outs, ins = reversed(weight.shape) if transposed else weight.shape
    A = torch.empty(rank, ins, dtype=dtype, device=local(weight).device)
    torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    Bt = torch.zeros(rank, outs, dtype=dtype, device=A.device)
    by_rows = partial_factor(weight, transposed) == 0
    state["lora_A"] = shard_like(same_everywhere(A), weight, None if by_rows else 1)
    state["lora_B"] = shard_like(Bt, weight, 1 if by_rows else None).T
    for name in ("lora_A", "lora_B"):
        for moment in ("exp_avg", "exp_avg_sq"):
            state[f"{name}_{moment}"] = torch.zeros_like(state[name])


def partial_factor(weight: Tensor, transposed: bool) -> int | None:
    """The factor whose gradient sums over the processes that share a weight; None if the weight is not sharded.

    A's (0) if they share its outputs, B's (1) if they share its inputs. All of them hold that factor as a whole.
    """
    dim = sharded_dim(weight)
    return None if dim is None else int((dim == 0) == transposed)


def shares_storage(base: Tensor, weight: Tensor) -> bool:
    """Whether W is the layer's own weight, as it is while B = 0: then P = W, and a copy would be waste."""
    return base.dtype == weight.dtype and storage(base) == storage(weight)


def storage(tensor: Tensor) -> int:
    """Names its storage, also of a tensor that has no data."""
    return local(tensor).untyped_storage()._cdata


def scaled(factor: Tensor, scales: float | Tensor) -> tuple[float, Tensor]:
    """α and F with α F = s ⊙ factor along the last dimension; a single s is left to the product that follows."""
    return (1.0, factor * scales) if isinstance(scales, Tensor) else (scales, factor)


def gradients(G: Tensor, A: Tensor, Bt: Tensor, scales: float | Tensor, out: tuple[Tensor, Tensor]) -> None:
    """dL/dA_i = s_i B_iᵀ G (R, in), and the transpose of dL/dB_i = s_i G A_iᵀ, (R, out), from G = dL/dP (out, in).

    Of one layer, or of several of the same shape at once, all with one more dimension.

    Args:
        G: The gradient, its rows the outputs.
        A: (R, in), in G's dtype.
        Bt: Bᵀ, (R, out), likewise.
        scales: One s, or s_i over the ranks, (R,).
        out: Where to write them, in fp32 also where G is not and ``multiplies``.
    """
    multiply = torch.addmm if G.dim() == 2 else torch.baddbmm
    nothing = G.new_empty((1,) * G.dim())  # what is in it does not count where beta is 0
    options: dict[str, Any] = {"beta": 0, "alpha": 1.0 if isinstance(scales, Tensor) else scales}
    if out[0].dtype != G.dtype:
        options["out_dtype"] = out[0].dtype
    for left, right, to in ((Bt, G, out[0]), (A, G.mT, out[1])):
        multiply(nothing, left, right, out=to, **options)
        if isinstance(scales, Tensor):
            to.mul_(scales[:, None])


def multiplies(G: Tensor) -> bool:
    """Whether the device multiplies matrices of G's dtype and adds up in fp32."""
    return G.is_cuda and G.dtype in (torch.bfloat16, torch.float16)


def superpose(
    base: Tensor, left: Tensor, right: Tensor, scales: float | Tensor, sign: int = 1, out: Tensor | None = None
) -> Tensor:
    """W ± Σ s_i B_i A_i of one layer, in W's dtype; arguments as of ``Products``."""
    alpha, factor = scaled(left.mT, scales)
    out = torch.empty_like(base) if out is None else out  # without it autocast would multiply in bf16
    return torch.addmm(base, factor, right, alpha=sign * alpha, out=out)


def round_stochastically(value: Tensor, store: Tensor) -> None:
    """Write fp32 values to a bf16 tensor, up or down with probabilities that keep the expected value.

    bf16 is the upper half of fp32's bits: a uniform number below 2¹⁶ is added and the lower half dropped. Draws from
    torch's generator of the device. NaN stays NaN.
    """
    noise = torch.randint(0, 2**16, value.shape, dtype=torch.int32, device=value.device)
    bits = (value.view(torch.int32) + noise).bitwise_and_(-(2**16))
    rounded = bits.view(torch.float32)
    store.copy_(torch.where(value.isnan(), value, rounded, out=rounded))  # a NaN of a GPU is all ones, and overflows
