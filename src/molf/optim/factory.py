"""Make the optimizer from a model: groups, slots, and PEFT's configuration for MoLF-Efficient."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from torch import nn

from .config import MoLFConfig
from .layout import RoutedModule, Slot
from .modules import Target, apply_trainability, find_routed, listed, outside_adapter
from .molf_adamw import MoLFAdamW
from .sharding import check_sharding, refuse_flattened

if TYPE_CHECKING:
    from peft import LoraConfig


def create_molf_optimizer(model: nn.Module, config: MoLFConfig | None = None, **unsupported: Any) -> MoLFAdamW:
    """The MoLF optimizer of a model: the one line that turns fine-tuning into MoLF.

    An ordinary model gets virtual LoRA experts: it stays as it is, and what is trained, evaluated and
    saved is the same weight P = W + Σ s_i B_i A_i. A PEFT model made with ``molf_lora_config(config)``
    has the experts in its adapter: MoLF-Efficient with ``train_base=False``, else the superposed MoLF, whose base PEFT
    does not save: there is a warning wherever something outside the adapter is trained.
    ``requires_grad`` is set as the config says, so make the optimizer before the first backward pass: after
    ``fully_shard``, which replaces the parameters, and before or after ``DistributedDataParallel``. In a process group
    every process makes one.

    On an ordinary model frozen parameters stay frozen, except that ``train_base=False`` routes frozen layers, too. On a
    PEFT model, which PEFT has frozen, the config alone decides: a dense expert or ``train_other=True`` unfreezes
    embeddings and norms. Its adapter says which layers are routed, not ``target_modules`` and ``exclude_modules``.

    Args:
        model: Any ``nn.Module``, or a PEFT model with one LoRA adapter.
        config: Experts and rates; None means ``MoLFConfig()``.
        **unsupported: Refused by name, such as ``amsgrad``, ``maximize`` or ``fused``.

    Raises:
        ValueError: If the model cannot be routed this way; the message names the layer and the remedy.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
        >>> optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=(2,)))
        >>> optimizer.routed_modules
        ['0', '2']

    Source: arXiv:2605.07111, sections 4.2 to 4.4.
    """
    if unsupported:
        listed = ", ".join(f"{name}={value!r}" for name, value in unsupported.items())
        raise ValueError(f"{listed}: MoLF has no such option; every setting is a field of MoLFConfig")
    config = MoLFConfig() if config is None else config
    refuse_flattened(model)
    model, ddp = _unwrapped(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    targets = find_routed(model, config)
    others = apply_trainability(model, targets, config)
    if ddp is not None:
        _check_reduced(model, trained, ddp.find_unused_parameters)
    groups = _expert_groups(config)
    modules = [_add_target(groups, target, config) for target in targets]
    for name, parameter in others:
        _add(groups["other" if parameter.dim() >= 2 else "other_no_decay"], name, parameter)
    named = [pair for group in groups.values() for pair in zip(group["param_names"], group["params"], strict=True)]
    check_sharding(model, named, config)
    _warn_of_unsaved(model)
    kept = [group for group in groups.values() if group["params"] or group["expert"] in config.experts]
    index = {group["expert"]: position for position, group in enumerate(kept)}
    return MoLFAdamW(kept, config, [_routed(config, target, slots, index) for target, slots in modules])


def _unwrapped(model: Any) -> tuple[nn.Module, Any]:
    """The model inside torch.compile and DistributedDataParallel, and the latter if it was there."""
    ddp = None
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model, ddp = model.module, model
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model, ddp


def _check_reduced(model: nn.Module, trained: set[str], finds_unused: bool) -> None:
    """Refuse what DistributedDataParallel would not reduce, or would wait for, as it knows what was trained before."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad != (name in trained) and not (name in trained and finds_unused):
            was, would = ("trained", "wait for") if name in trained else ("frozen", "not reduce")
            raise ValueError(
                f"{name} was {was} when the model was wrapped in DistributedDataParallel, which would {would} its "
                "gradient: make the optimizer before wrapping the model"
            )


def _warn_of_unsaved(model: nn.Module) -> None:
    lost = outside_adapter(model)
    if lost:
        warnings.warn(
            f"{lost[0]} is trained and is no part of the adapter ({len(lost)} such parameters): save_pretrained and "
            "Trainer checkpoints of a PEFT model lose it; merge_and_unload() before saving, and to resume, keep the "
            "base's weights yourself",
            stacklevel=3,
        )


def _expert_groups(config: MoLFConfig) -> dict[str, dict[str, Any]]:
    """Empty parameter groups by name: the experts first, in index order."""
    rates: dict[str, tuple[float, float]] = {
        expert: (config.lr, config.weight_decay) if expert == "dense" else (config.lora_lr, config.lora_weight_decay)
        for expert in config.experts
    }
    rates |= {"dense_bias": (config.lr, 0.0), "base": (0.0, 0.0)}
    rates |= {"other": (config.lr, config.weight_decay), "other_no_decay": (config.lr, 0.0)}
    return {
        name: {"params": [], "param_names": [], "expert": name, "lr": lr, "weight_decay": decay}
        for name, (lr, decay) in rates.items()
    }


def _add(group: dict[str, Any], name: str, parameter: Any) -> tuple[str, int]:
    group["params"].append(parameter)
    group["param_names"].append(name)
    return group["expert"], len(group["params"]) - 1


def _add_target(
    groups: dict[str, dict[str, Any]], target: Target, config: MoLFConfig
) -> tuple[Target, dict[str, tuple[str, int]]]:
    """Put a target's parameters in their groups; returns group name and position of each."""
    slots = {}
    if config.train_base or target.lora_A is None:
        slots["weight"] = _add(groups["dense" if config.train_base else "base"], f"{target.name}.weight", target.weight)
    if config.train_base and target.bias is not None:
        slots["bias"] = _add(groups["dense_bias"], f"{target.name}.bias", target.bias)
    if target.lora_A is not None:
        group = groups[config.experts[int(config.train_base)]]
        slots["lora_A"] = _add(group, f"{target.name}.lora_A", target.lora_A)
        slots["lora_B"] = _add(group, f"{target.name}.lora_B", target.lora_B)
    return target, slots


def _routed(
    config: MoLFConfig, target: Target, slots: dict[str, tuple[str, int]], index: dict[str, int]
) -> RoutedModule:
    places: dict[str, Slot | None] = dict.fromkeys(("weight", "bias", "lora_A", "lora_B"))
    places |= {key: (index[group], position) for key, (group, position) in slots.items()}
    outs, ins = target.dimensions
    dense = [target.weight.numel() + (0 if target.bias is None else target.bias.numel())]
    sizes = [rank * (outs + ins) for rank in config.expert_ranks]
    return RoutedModule(
        name=target.name,
        transposed=target.transposed,
        scaling=target.scaling,
        sizes=tuple((dense if config.train_base else []) + sizes),
        **places,
    )


def molf_lora_config(config: MoLFConfig, **kwargs: Any) -> LoraConfig:
    """PEFT's ``LoraConfig`` for all LoRA experts of ``config`` as one adapter of rank R = Σ r_i.

    The scales s_i are folded into B, so the adapter's own scaling alpha / R is 1, whatever the experts'.

    Args:
        config: Experts, targets and dropout.
        **kwargs: Further fields of ``LoraConfig``, such as ``task_type="CAUSAL_LM"``.

    Raises:
        ValueError: If ``config`` has no LoRA expert, or ``kwargs`` sets what the experts decide.

    Example:
        config = MoLFConfig(expert_ranks=(32, 128), train_base=False)
        model = get_peft_model(model, molf_lora_config(config, task_type="CAUSAL_LM"))

    Source: arXiv:2605.07111, section 4.4.
    """
    from peft import LoraConfig

    if not config.expert_ranks:
        raise ValueError("expert_ranks=(): an adapter needs at least one LoRA expert")
    total = sum(config.expert_ranks)
    own = {
        "r": total,
        "lora_alpha": total,
        "use_rslora": False,
        "lora_dropout": config.lora_dropout,
        "target_modules": listed(config.target_modules),
        "exclude_modules": listed(config.exclude_modules),
        "bias": "none",
    }
    clash = sorted(own.keys() & kwargs.keys())
    if clash:
        raise ValueError(f"{', '.join(clash)}: set by the experts of MoLFConfig; change the config instead")
    return LoraConfig(**own, **kwargs)


class MoLFOptimizerFactory:
    """Makes the optimizer inside a Trainer, at the time when it needs one.

    Example:
        SFTTrainer(..., optimizer_cls_and_kwargs=(MoLFOptimizerFactory, {"config": config}))
    """

    def __call__(self, model: nn.Module, config: MoLFConfig | None = None, **unsupported: Any) -> MoLFAdamW:
        """``create_molf_optimizer(model, config)``; transformers calls ``factory()(model, **kwargs)``."""
        return create_molf_optimizer(model, config, **unsupported)
