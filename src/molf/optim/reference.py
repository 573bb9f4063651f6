"""MoLF as the paper writes it: explicit superposition, one expert after the other, no speed.

Read this first. ``MoLFAdamW`` does the same on an untouched model; the parity tests hold the two
together. Section and equation numbers are those of arXiv:2605.07111.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import MoLFConfig


class SuperposedLinear(nn.Module):
    """y = W x + b + Σ_i s_i B_i A_i x  (section 4.2, Eq. 1): all experts in every forward pass, no gate.

    Args:
        linear: The layer whose W (out, in) and b (out,) become the dense expert.
        config: Ranks r_i and scales s_i of the LoRA experts; A_i (r_i, in), B_i (out, r_i).
    """

    def __init__(self, linear: nn.Linear, config: MoLFConfig) -> None:
        super().__init__()
        self.W, self.b, self.scales = linear.weight, linear.bias, config.scales
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        for rank in config.expert_ranks:
            A = nn.Parameter(self.W.new_empty(rank, linear.in_features))
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            self.A.append(A)
            self.B.append(nn.Parameter(self.W.new_zeros(linear.out_features, rank)))

    def forward(self, x: Tensor) -> Tensor:
        """Eq. 1 for x (..., in)."""
        y = F.linear(x, self.W, self.b)
        for s, A, B in zip(self.scales, self.A, self.B, strict=True):
            y = y + s * F.linear(F.linear(x, A), B)
        return y

    def merged(self) -> Tensor:
        """W_final = W + Σ_i s_i B_i A_i  (section 4.5), (out, in)."""
        weight = self.W.detach().clone()
        for s, A, B in zip(self.scales, self.A, self.B, strict=True):
            weight += s * B.detach() @ A.detach()
        return weight


def superpose(model: nn.Module, names: list[str], config: MoLFConfig) -> dict[str, SuperposedLinear]:
    """Replace the named ``nn.Linear`` layers of ``model`` by superpositions; returns them by name."""
    layers = {}
    for name in names:
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{name} is a {type(linear).__name__}: only nn.Linear can be superposed")
        layers[name] = SuperposedLinear(linear, config)
        setattr(model.get_submodule(parent), child, layers[name])
    return layers


@dataclass
class Expert:
    """Parameters θ that are routed together, with the rates that update them.

    Attributes:
        parameters: θ; for the dense expert W and b, for a LoRA expert A_i and B_i.
        weight_decays: λ of each parameter; 0 for a bias.
        lr: η, this step's.
        m: First moment of each parameter.
        v: Second moment of each parameter.
    """

    parameters: list[Tensor]
    weight_decays: list[float]
    lr: float
    m: list[Tensor] = field(init=False)
    v: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.m = [torch.zeros_like(theta) for theta in self.parameters]
        self.v = [torch.zeros_like(theta) for theta in self.parameters]


class MoLFAdamWReference:
    """MoLF's optimizer over ``SuperposedLinear`` layers, the paper line by line.

    Args:
        layers: The superposed layers by name.
        config: Experts, rates, score and top_k.
        others: Parameters that are not routed, with their weight decay.

    Attributes:
        experts: The experts of every layer, in index order.
        scores: Each layer's scores at the last step.
        winners: Each layer's winning expert indices at the last step, best first.
        lr_factor: Multiplies every learning rate of the next step.

    Source: section 4.3, Eqs. 2-3.
    """

    def __init__(
        self, layers: dict[str, SuperposedLinear], config: MoLFConfig, others: list[tuple[Tensor, float]] | None = None
    ) -> None:
        if config.policy != "score":
            raise ValueError(f"policy={config.policy!r}: the reference routes by score alone; use MoLFAdamW")
        self.config, self.n, self.lr_factor = config, 0, 1.0
        self.scores: dict[str, list[float]] = {}
        self.winners: dict[str, list[int]] = {}
        self.experts: dict[str, list[Expert]] = {}
        for name, layer in layers.items():
            self.experts[name] = []
            if config.train_base:
                dense = [layer.W] if layer.b is None else [layer.W, layer.b]
                self.experts[name].append(Expert(dense, [config.weight_decay, 0.0][: len(dense)], config.lr))
            for A, B in zip(layer.A, layer.B, strict=True):
                self.experts[name].append(Expert([A, B], [config.lora_weight_decay] * 2, config.lora_lr))
        self.others = [Expert([theta], [decay], config.lr) for theta, decay in others or []]

    @torch.no_grad()
    def step(self) -> None:
        """One step, from the gradients in ``.grad``."""
        self._clip()
        self.n += 1
        for name, experts in self.experts.items():
            for expert in experts:  # Universal momentum tracking: winners and losers alike
                self._track(expert)
            scores = [self._score(expert) for expert in experts]
            order = sorted(range(len(experts)), key=lambda i: -scores[i])  # stable: ties keep the lower index first
            self.scores[name], self.winners[name] = scores, order[: self.config.top_k]
            for i in self.winners[name]:
                self._update(experts[i])
        for expert in self.others:
            self._track(expert)
            self._update(expert)

    def _clip(self) -> None:
        """Clip:  g ← g · min(1, c / (‖g‖ + 1e-6)), the norm over all experts' and other parameters' gradients."""
        if self.config.max_grad_norm is None:
            return
        everyone = [expert for experts in self.experts.values() for expert in experts] + self.others
        grads = [_grad(theta) for expert in everyone for theta in expert.parameters]
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
        for g in grads:
            g.mul_(min(1.0, self.config.max_grad_norm / (norm + 1e-6)))

    def _track(self, expert: Expert) -> None:
        """Eqs. 2-3:  m ← β1 m + (1-β1) g,   v ← β2 v + (1-β2) g²."""
        beta1, beta2 = self.config.betas
        for theta, m, v in zip(expert.parameters, expert.m, expert.v, strict=True):
            g = _grad(theta)
            m.mul_(beta1).add_(g, alpha=1 - beta1)
            v.mul_(beta2).add_(g * g, alpha=1 - beta2)

    def _score(self, expert: Expert) -> float:
        """EPD  S = (η/N) Σ m²/(√v + ε);   PFN  S = √((1/N) Σ (m/(√v + ε))²)."""
        eps, count = self.config.eps, sum(theta.numel() for theta in expert.parameters)
        pairs = list(zip(expert.m, expert.v, strict=True))
        if self.config.score_fn == "epd":
            total = sum(float((m**2 / (v.sqrt() + eps)).sum()) for m, v in pairs)
            return expert.lr * self.lr_factor / count * total
        return math.sqrt(sum(float(((m / (v.sqrt() + eps)) ** 2).sum()) for m, v in pairs) / count)

    def _update(self, expert: Expert) -> None:
        """θ ← (1 - ηλ) θ,  then  θ ← θ - η m̂ / (√v̂ + ε)  with  m̂ = m/(1-β1ⁿ),  v̂ = v/(1-β2ⁿ)."""
        beta1, beta2 = self.config.betas
        lr = expert.lr * self.lr_factor
        for theta, decay, m, v in zip(expert.parameters, expert.weight_decays, expert.m, expert.v, strict=True):
            m_hat = m / (1 - beta1**self.n)
            v_hat = v / (1 - beta2**self.n)
            theta.mul_(1 - lr * decay)
            theta.sub_(lr * m_hat / (v_hat.sqrt() + self.config.eps))


def _grad(theta: Tensor) -> Tensor:
    if theta.grad is None:
        raise ValueError("a parameter has no gradient: call backward() before step()")
    return theta.grad
