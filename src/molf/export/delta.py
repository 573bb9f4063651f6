"""MoLF's dense change P - P₀ as a LoRA of rank r, for servers that want adapters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from .run import TrainedRun


@dataclass(frozen=True)
class Delta:
    """The change as an adapter over the base.

    Attributes:
        model: The base with the adapter, a ``PeftModel`` in float32.
        energy: By layer, the share of ‖ΔW‖_F² that rank r keeps.
        total: The same share over all layers together.
        carried: What else changed and goes along whole: modules, and the biases of the layers.
        dropped: What else changed and was left out.
    """

    model: Any
    energy: dict[str, float]
    total: float
    carried: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


@torch.no_grad()
def make_delta(run: TrainedRun, base: Any, trained: Any, rank: int, drop_other: bool) -> Delta:
    """The best adapter of rank r: ΔW = U S Vᵀ of every linear layer but the output head, cut after r singular values.

    A (r, in) = √S_r V_rᵀ and B (out, r) = U_r √S_r, with scale 1. A layer whose smaller side is below r is exact, and
    filled up with zeros, so that all layers have one rank. What else training changed (embeddings, norms, biases, the
    head) has no such form: PEFT carries it whole, as ``modules_to_save`` and trained biases.

    Args:
        run: The run.
        base: P₀, in float32; it becomes the adapter's model.
        trained: P, in float32.
        rank: r.
        drop_other: Leave out what else changed, for servers that take nothing but LoRA.

    Raises:
        ValueError: If the rank is out of range, nothing changed, the base is another one, or PEFT cannot carry what
            else changed.
    """
    before, after = dict(base.named_parameters()), dict(trained.named_parameters())
    if {name: p.shape for name, p in before.items()} != {name: p.shape for name, p in after.items()}:
        raise ValueError(f"{run.base} is not the base of {run.folder}: its tensors have other names or shapes")
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    linears = _linears(base)
    biased = sorted(n for n in linears if f"{n}.bias" in changed and not drop_other)
    layers = [n for n in linears if f"{n}.weight" in changed or n in biased]
    others = sorted(changed - {f"{n}.weight" for n in layers} - {f"{n}.bias" for n in biased})
    modules = [] if drop_other else sorted({name.rpartition(".")[0] for name in others})
    if not layers:
        raise ValueError(f"no linear layer of {run.folder} differs from {run.base}: there is no change to export")
    _check_rank(rank, [after[f"{name}.weight"] for name in layers])
    _check_carried(base, modules)
    model = get_peft_model(base, _lora_config(base, rank, layers, modules, bool(biased)), revision=run.revision)
    model.peft_config["default"].base_model_name_or_path = run.named_base
    kept, whole = {}, {}
    for name in layers:
        layer = model.get_base_model().get_submodule(name)
        if not hasattr(layer, "lora_A"):  # of names like those of 3D experts PEFT makes adapters of these instead
            raise ValueError(f"PEFT makes no adapter of {name} in {type(base).__name__}: use --to merged")
        delta = after[f"{name}.weight"] - before[f"{name}.weight"]
        delta = delta.T if linears[name] else delta
        kept[name], whole[name] = _factorise(delta, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        if name in biased:
            layer.base_layer.bias.copy_(after[f"{name}.bias"])
    _carry(model.get_base_model(), modules, after)
    return Delta(
        model=model.eval(),
        energy={name: _share(kept[name], whole[name]) for name in layers},
        total=_share(sum(kept.values()), sum(whole.values())),
        carried=[*modules, *(f"{name}.bias" for name in biased)],
        dropped=others if drop_other else [],
    )


def _linears(model: Any) -> dict[str, bool]:
    """Linear layers but the output head: name, and whether the weight is stored as (in, out)."""
    head = model.get_output_embeddings()
    return {
        name: isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }


def _check_rank(rank: int, weights: list[Tensor]) -> None:
    largest = max(min(weight.shape) for weight in weights)
    if not 1 <= rank <= largest:
        raise ValueError(f"rank={rank}: choose from 1 to {largest}, at which the change of every layer is exact")


def _check_carried(base: Any, modules: list[str]) -> None:
    """Refuse what PEFT cannot carry: modules with parts, and tied ones under names that it does not know."""
    ends = Counter(parameter for _, parameter in base.named_parameters(remove_duplicate=False))
    remedy = "use --to merged, or --drop_other to leave it out"
    for name in modules:
        module = base.get_submodule(name)
        if module is base or next(module.children(), None) is not None:
            raise ValueError(
                f"training changed {name or 'a parameter of the model itself'}, which PEFT cannot carry in an adapter, "
                f"because it has parts: {remedy}"
            )
        tied = any(ends[parameter] > 1 for parameter in module.parameters())
        if tied and name.rpartition(".")[2] not in EMBEDDING_LAYER_NAMES:
            raise ValueError(f"training changed {name}, which is tied, and PEFT cannot carry that tie: {remedy}")


def _lora_config(base: Any, rank: int, layers: list[str], modules: list[str], biased: bool) -> LoraConfig:
    tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=layers,
        modules_to_save=modules or None,
        bias="lora_only" if biased else "none",
        ensure_weight_tying=tied and any(name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for name in modules),
        fan_in_fan_out=isinstance(base.get_submodule(layers[0]), Conv1D),
        task_type="CAUSAL_LM",
    )


def _share(kept: float, whole: float) -> float:
    return kept / whole if whole else 1.0


def _factorise(delta: Tensor, A: Tensor, B: Tensor) -> tuple[float, float]:
    """Fill A (r, in) and B (out, r) with the best approximation; returns ‖B A‖_F² and ‖ΔW‖_F²."""
    rank = len(A)
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    root = S[:rank].sqrt()
    A.copy_(pad(root[:, None] * Vh[:rank], (0, 0, 0, rank - len(root))))
    B.copy_(pad(U[:, :rank] * root, (0, rank - len(root))))
    energy = S.double().square()
    return energy[:rank].sum().item(), energy.sum().item()


def _carry(model: Any, modules: list[str], after: Mapping[str, Tensor]) -> None:
    """Write the trained values of whole modules; PEFT has tied the head to the embeddings where they were."""
    for name in modules:
        for key, parameter in model.get_submodule(name).modules_to_save["default"].named_parameters():
            parameter.copy_(after[f"{name}.{key}"])
