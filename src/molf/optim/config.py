"""The configuration of MoLF and MoLF-Efficient."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

SCORE_FNS = ("epd", "pfn")
POLICIES = ("score", "random", "fixed-dense", "fixed-lora")

_FP32 = torch.finfo(torch.float32)  # moments and masters are float32, so a setting has to be a number there
_LARGEST_RANK = 2**16


def _help(text: str, default: Any) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class MoLFConfig:
    """Which experts every target linear layer has, and how the optimizer routes among them.

    Each target layer computes  y = W x + b + Σ_i s_i B_i A_i x.  With ``train_base`` the first expert,
    "dense", is W (out, in) with its bias b (out,). Every entry of ``expert_ranks`` adds a LoRA expert
    with A_i (r_i, in), B_i (out, r_i) and the scale s_i = alpha_i / sqrt(r_i) (``use_rslora``) or
    alpha_i / r_i.

    MoLF is ``MoLFConfig()``; MoLF-Efficient is ``MoLFConfig(expert_ranks=(32, 128), train_base=False)``.

    Example:
        >>> MoLFConfig(expert_ranks=(16, 64)).experts
        ('dense', 'lora_r16', 'lora_r64')

    Raises:
        ValueError: If a field is out of its range; the message names field, value and remedy.

    Source: arXiv:2605.07111, sections 4.2 to 4.4.
    """

    expert_ranks: Sequence[int] = _help("Rank of every LoRA expert, in order.", (128,))
    lora_alpha: float | Sequence[float] | None = _help(
        "alpha of the LoRA experts: a number, one per expert, or None for scale 2 at every rank.", None
    )
    use_rslora: bool = _help("Scale by alpha / sqrt(r) instead of alpha / r.", True)
    target_modules: str | Sequence[str] = _help(
        "Layers to route, with PEFT's meaning: 'all-linear' (without the output head), a regex, or name endings. "
        "A PEFT model's adapter decides instead.",
        "all-linear",
    )
    exclude_modules: str | Sequence[str] | None = _help(
        "Layers to leave out, with PEFT's meaning; not read of a PEFT model.", None
    )
    train_base: bool = _help("Whether every target layer has a dense expert.", True)
    top_k: int = _help("How many experts of a layer are updated per step.", 1)
    score_fn: str = _help("Routing score: 'epd' or 'pfn'.", "epd")
    policy: str = _help(
        "Who wins: 'score' is MoLF; controls are 'random' (drawn), 'fixed-dense' and 'fixed-lora' (always the dense "
        "expert, or the best of the LoRA experts).",
        "score",
    )
    random_shares: Sequence[float] | None = _help("With policy 'random': the share of every expert, in order.", None)
    policy_seed: int = _help("Seed of policy 'random'.", 0)
    lr: float = _help("Learning rate of the dense expert and of what is not routed.", 5e-5)
    lora_lr: float = _help("Learning rate of the LoRA experts.", 5e-5)
    weight_decay: float = _help("Decoupled weight decay of W and of matrices that are not routed.", 0.1)
    lora_weight_decay: float = _help("Decoupled weight decay of A and B.", 0.01)
    betas: tuple[float, float] = _help("Decay rates of the two moments.", (0.9, 0.999))
    eps: float = _help("Added to the root of the second moment, in the update and in the score.", 1e-8)
    max_grad_norm: float | None = _help(
        "Clip the global gradient norm, virtual LoRA gradients included, to this; None does not clip.", None
    )
    lora_dropout: float = _help("Dropout on the input of the LoRA experts; needs a PEFT adapter.", 0.0)
    compile: bool | str = _help(
        "Compile the optimizer's elementwise passes: True, False, or 'auto' for models where it pays.", "auto"
    )
    keep_base: bool = _help(
        "Keep W in the state where it differs from the weight P; False computes W = P - Σ s B A when it is needed, and "
        "rounds bf16 weights, which then have no fp32 master, stochastically.",
        True,
    )
    moments_8bit: bool = _help("Keep the moments of all but the LoRA experts in 8 bits (torchao).", False)
    step_in_backward: bool = _help(
        "Step every layer in the backward pass and free its gradient at once; no accumulation, no max_grad_norm.", False
    )
    check_ranks_every: int | None = _help(
        "Of several processes: compare what must be equal in all of them every this many steps; None never.", None
    )
    train_other: bool | None = _help(
        "Train what is not routed; None means yes with a dense expert and no without one.", None
    )

    def __post_init__(self) -> None:
        self._check_types()
        self._check_patterns()
        self._check_experts()
        self._check_policy()
        self._check_numbers()

    def _check_types(self) -> None:
        """Refuse what is of another type; numbers become Python's own: numpy's do not load with weights_only."""
        for name in ("lr", "lora_lr", "weight_decay", "lora_weight_decay", "eps", "lora_dropout", "max_grad_norm"):
            value = getattr(self, name)
            if not _is_number(value) and not (name == "max_grad_norm" and value is None):
                raise ValueError(f"{name}={value!r}: must be a number (in YAML write 5.0e-5, not 5e-5)")
            self._set(name, value if value is None else _float(value))
        if not isinstance(self.compile, bool) and not (isinstance(self.compile, str) and self.compile == "auto"):
            raise ValueError(f"compile={self.compile!r}: choose True, False or 'auto'")
        for name in ("train_base", "use_rslora", "keep_base", "moments_8bit", "step_in_backward", "train_other"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "train_other" and value is None):
                raise ValueError(f"{name}={value!r}: must be True or False")
        for name in ("top_k", "policy_seed", "check_ranks_every"):
            value = getattr(self, name)
            if name == "check_ranks_every" and value is None:
                continue
            if not _is_integer(value):
                raise ValueError(f"{name}={value!r}: must be an integer")
            self._set(name, int(value))
        ranks = (self.expert_ranks,) if _is_integer(self.expert_ranks) else self.expert_ranks
        if not isinstance(ranks, (list, tuple)) or not all(_is_integer(rank) for rank in ranks):
            raise ValueError(f"expert_ranks={self.expert_ranks!r}: give the ranks as a list of integers")
        self._set("expert_ranks", tuple(int(rank) for rank in ranks))
        several = isinstance(self.lora_alpha, (list, tuple))
        alphas: Any = self.lora_alpha if several else [self.lora_alpha]
        if self.lora_alpha is not None and not all(_is_number(alpha) for alpha in alphas):
            raise ValueError(f"lora_alpha={self.lora_alpha!r}: give a number, or a list with one per expert")
        if self.lora_alpha is not None:
            self._set("lora_alpha", tuple(map(_float, alphas)) if several else _float(self.lora_alpha))
        if not isinstance(self.betas, (list, tuple)) or not all(_is_number(beta) for beta in self.betas):
            raise ValueError(f"betas={self.betas!r}: give two numbers")
        self._set("betas", tuple(map(_float, self.betas)))

    def _check_patterns(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if value is None and name == "exclude_modules":
                continue
            names = [value] if isinstance(value, str) else value
            if not isinstance(names, (list, tuple, set)) or not all(isinstance(n, str) and n for n in names):
                raise ValueError(f"{name}={value!r}: give 'all-linear', a regular expression, or a list of names")
            if not names and name == "target_modules":
                raise ValueError(f"{name}={value!r}: name at least one layer, or give 'all-linear'")
            if isinstance(value, str):
                try:
                    re.compile(value)
                except (re.error, OverflowError, RecursionError) as error:
                    raise ValueError(f"{name}={value!r} is no regular expression: {error}") from error
            elif isinstance(value, set):
                self._set(name, sorted(value))

    def _check_experts(self) -> None:
        if not all(1 <= rank <= _LARGEST_RANK for rank in self.expert_ranks):
            raise ValueError(f"expert_ranks={self.expert_ranks}: every rank must be from 1 to {_LARGEST_RANK}")
        if not self.experts:
            raise ValueError("expert_ranks=() with train_base=False leaves nothing to train: give at least one rank")
        if not 1 <= self.top_k <= len(self.experts):
            raise ValueError(
                f"top_k={self.top_k}: choose from 1 to {len(self.experts)}, the number of experts {self.experts}"
            )
        if not isinstance(self.score_fn, str) or self.score_fn not in SCORE_FNS:
            raise ValueError(f"score_fn={self.score_fn!r}: choose one of {', '.join(SCORE_FNS)}")
        if isinstance(self.lora_alpha, Sequence) and len(self.lora_alpha) != len(self.expert_ranks):
            raise ValueError(
                f"lora_alpha={tuple(self.lora_alpha)}: give one number, or one per expert of "
                f"expert_ranks={self.expert_ranks}"
            )
        if not all(_FP32.tiny <= scale <= _FP32.max for scale in self.scales):
            raise ValueError(f"lora_alpha={self.lora_alpha}: must be positive, and the scales within float32's range")

    def _check_policy(self) -> None:
        if not isinstance(self.policy, str) or self.policy not in POLICIES:
            raise ValueError(f"policy={self.policy!r}: choose one of {', '.join(POLICIES)}")
        if self.policy == "random":
            self._check_shares()
        elif self.random_shares is not None:
            raise ValueError(f"random_shares={self.random_shares!r}: only policy='random' draws by shares")
        if self.policy.startswith("fixed"):
            if not self.train_base or not self.expert_ranks:
                raise ValueError(f"policy={self.policy!r} needs a dense and a LoRA expert, not {self.experts} alone")
            most = 1 if self.policy == "fixed-dense" else len(self.expert_ranks)
            if self.top_k > most:
                raise ValueError(f"top_k={self.top_k}: policy={self.policy!r} has {most} expert(s) that may win")

    def _check_shares(self) -> None:
        shares = self.random_shares
        if not isinstance(shares, (list, tuple)) or not all(_is_number(share) for share in shares):
            raise ValueError(f"random_shares={shares!r}: policy='random' needs one number per expert of {self.experts}")
        shares = tuple(map(_float, shares))
        if len(shares) != len(self.experts) or not all(0 <= share < math.inf for share in shares):
            raise ValueError(f"random_shares={shares}: give one share, not negative, per expert of {self.experts}")
        if sum(share > 0 for share in shares) < self.top_k:
            raise ValueError(f"random_shares={shares}: at least top_k={self.top_k} must be positive")
        self._set("random_shares", shares)

    def _check_numbers(self) -> None:
        for name in ("lr", "lora_lr", "weight_decay", "lora_weight_decay"):
            value = getattr(self, name)
            if not 0 <= value <= _FP32.max:
                raise ValueError(f"{name}={value}: must be finite, not negative, and within float32's range")
        if not _FP32.tiny <= self.eps <= _FP32.max:  # a smaller one is 0 in float32, and no gradient then gives 0/0
            raise ValueError(
                f"eps={self.eps}: must be positive in float32, from {_FP32.tiny:.2e}, because the score divides by "
                "sqrt(v) + eps"
            )
        if self.moments_8bit and self.eps < 1e-8:
            raise ValueError(f"eps={self.eps}: at least 1e-8 with moments_8bit, because in 8 bits a tiny v becomes 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas}: give two numbers from 0 up to, not including, 1")
        if self.step_in_backward and self.max_grad_norm is not None:
            raise ValueError(
                f"max_grad_norm={self.max_grad_norm}: step_in_backward=True never has all gradients at once; use None"
            )
        if self.max_grad_norm is not None and not _FP32.tiny <= self.max_grad_norm < math.inf:
            raise ValueError(f"max_grad_norm={self.max_grad_norm}: must be positive; use None for no clipping")
        if self.check_ranks_every is not None and self.check_ranks_every < 1:
            raise ValueError(f"check_ranks_every={self.check_ranks_every}: must be at least 1; use None for never")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout}: must be from 0 up to, not including, 1")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def experts(self) -> tuple[str, ...]:
        """Expert names in index order: "dense", "lora_r128", or "lora_r32[0]" where a rank repeats."""
        ranks = tuple(self.expert_ranks)
        names = []
        for index, rank in enumerate(ranks):
            repeat = f"[{ranks[:index].count(rank)}]" if ranks.count(rank) > 1 else ""
            names.append(f"lora_r{rank}{repeat}")
        return ("dense", *names) if self.train_base else tuple(names)

    @property
    def scales(self) -> tuple[float, ...]:
        """The scale s_i of every LoRA expert."""
        if self.lora_alpha is None:
            return (2.0,) * len(self.expert_ranks)
        if isinstance(self.lora_alpha, Sequence):
            alphas = tuple(self.lora_alpha)
        else:
            alphas = (self.lora_alpha,) * len(self.expert_ranks)
        return tuple(
            float(alpha / (math.sqrt(rank) if self.use_rslora else rank))
            for alpha, rank in zip(alphas, self.expert_ranks, strict=True)
        )

    @property
    def trains_other(self) -> bool:
        """``train_other`` with its default resolved."""
        return self.train_base if self.train_other is None else self.train_other


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _float(value: Any) -> float:
    """A number as a float; an integer beyond its range as infinity, which the range checks refuse."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
