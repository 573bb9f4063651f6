"""Which layers of a model are routed, and by which of its parameters.

``find_routed`` understands two kinds of model: an ordinary ``nn.Module``, whose target layers get
virtual LoRA experts, and a PEFT model, whose LoRA layers hold the experts as real parameters.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .config import MoLFConfig
from .sharding import local
from .virtual import storage

_TRAINABLE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_CLASSIFIER_HEADS = ("score", "classifier", "classification_head", "qa_outputs")


@dataclass(frozen=True)
class Target:
    """One routed layer as found in a model; (out, in) are the dimensions of its weight as a matrix.

    Attributes:
        name: Module name in the model.
        weight: W, (out, in), or (in, out) if ``transposed`` (GPT-2's Conv1D).
        bias: b, (out,), or None.
        transposed: Whether the weight is stored as (in, out).
        lora_A: The adapter's A, (R, in), or None where the LoRA experts are virtual.
        lora_B: The adapter's B, (out, R), or None.
        scaling: The factor that the adapter applies to B A.
    """

    name: str
    weight: nn.Parameter
    bias: nn.Parameter | None
    transposed: bool
    lora_A: nn.Parameter | None = None
    lora_B: nn.Parameter | None = None
    scaling: float = 1.0

    @property
    def dimensions(self) -> tuple[int, int]:
        """(out, in), also of a weight that is quantised and packed."""
        if self.lora_A is not None and self.lora_B is not None:
            return self.lora_B.shape[0], self.lora_A.shape[1]
        outs, ins = self.weight.shape
        return (ins, outs) if self.transposed else (outs, ins)


def find_routed(model: nn.Module, config: MoLFConfig) -> list[Target]:
    """The layers of ``model`` that ``config`` routes, in module order.

    Raises:
        ValueError: If nothing matches, or if a matching layer cannot be routed; the message names it.
    """
    layers = [(name, module) for name, module in model.named_modules() if _is_lora_layer(module)]
    _refuse_foreign_adapters(model, bool(layers))
    if layers:
        targets = [_adapter_target(name, module, config) for name, module in layers]
    else:
        targets = [_plain_target(name, module) for name, module in _matching(model, config)]
        if config.train_base:  # a layer that the user froze stays frozen
            targets = [target for target in targets if target.weight.requires_grad or _quantised(target.weight)]
        if config.lora_dropout and config.expert_ranks:
            raise ValueError(
                f"lora_dropout={config.lora_dropout}: virtual LoRA experts see no input to drop; use 0, or wrap the "
                "model first: get_peft_model(model, molf_lora_config(config))"
            )
    if not targets:
        raise ValueError(
            f"target_modules={config.target_modules!r} with exclude_modules={config.exclude_modules!r} matches no "
            f"layer of {type(model).__name__} that is not frozen: choose names from model.named_modules(), or unfreeze "
            "them by requires_grad_(True), as after PEFT's merge_and_unload()"
        )
    _refuse_tied(model, targets, config)
    _refuse_sparse(model)
    _refuse_complex(model)
    keep_differentiable(model)
    for target in targets:
        _check_weight(target, config)
    return targets


def _is_lora_layer(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and bool(getattr(module, "lora_A", None))


def _is_conv1d(module: nn.Module) -> bool:
    return hasattr(module, "nf") and any(each.__name__ == "Conv1D" for each in type(module).__mro__)  # FSDPConv1D


def _matching(model: nn.Module, config: MoLFConfig) -> list[tuple[str, nn.Module]]:
    """Modules that the target patterns select; "all-linear" is every linear but the output head."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    exclude = config.exclude_modules
    every = config.target_modules == "all-linear"
    rule = LoraConfig(
        target_modules=".*" if every else listed(config.target_modules),
        exclude_modules=listed(exclude),
    )
    heads = _output_heads(model) if every else set()
    candidates = [
        (name, module)
        for name, module in model.named_modules()
        if name and (not every or ((isinstance(module, nn.Linear) or _is_conv1d(module)) and module not in heads))
    ]
    try:
        return [(name, module) for name, module in candidates if check_target_module_exists(rule, name)]
    except re.error as error:
        raise ValueError(
            f"target_modules={config.target_modules!r} or exclude_modules={exclude!r} is no regular expression: {error}"
        ) from error


def listed(patterns: str | Sequence[str] | None) -> str | list[str] | None:
    """Patterns as PEFT takes them: a string, or a list and no other sequence."""
    return patterns if patterns is None or isinstance(patterns, str) else list(patterns)


def _output_heads(model: nn.Module) -> set[nn.Module]:
    """The output heads, also of a model inside: a language model's, or else a classifier by its usual name."""
    found: list[Any] = []
    for part in model.modules():
        getter = getattr(part, "get_output_embeddings", None)
        if getter is None:
            continue
        try:
            head = getter()
        except (AttributeError, NotImplementedError):  # so do some models of transformers that have none
            head = None
        found += [head] if head is not None else [getattr(part, name, None) for name in _CLASSIFIER_HEADS]
    return {module for head in found if isinstance(head, nn.Module) for module in head.modules()}


def _plain_target(name: str, module: Any) -> Target:
    transposed = _is_conv1d(module)
    if not transposed and not isinstance(module, nn.Linear):
        raise ValueError(
            f"target_modules selects {name}, a {type(module).__name__}: only linear layers can be routed; "
            "name linear layers, or leave it out with exclude_modules"
        )
    _check_held(name, module)
    if not module.weight.numel():
        raise ValueError(f"{name}.weight is empty, {tuple(module.weight.shape)}: leave it out with exclude_modules")
    bias = module.bias if module.bias is not None and module.bias.requires_grad else None
    return Target(name, module.weight, bias, transposed)


def _check_held(name: str, linear: Any) -> None:
    """Refuse a weight or bias that is no parameter, or has no values yet."""
    for kind in ("weight", "bias"):
        tensor = getattr(linear, kind, None)
        if tensor is not None and not isinstance(tensor, nn.Parameter):
            raise ValueError(
                f"{name}.{kind} is computed by a parametrization, by weight_norm or by pruning, and is no parameter: "
                "remove that, or leave the layer out with exclude_modules"
            )
        if isinstance(tensor, nn.UninitializedParameter) or (tensor is not None and tensor.is_meta):
            raise ValueError(
                f"{name}.{kind} has no values yet: load or initialise the model before making the optimizer"
            )


def _active_adapters(layer: Any) -> list[str]:
    """The adapters of a LoRA layer that take part in its forward pass; TRL keeps a frozen reference as another one."""
    return [key for key in layer.lora_A if key in layer.active_adapters]


def _adapter_target(name: str, layer: Any, config: MoLFConfig) -> Target:
    active = _active_adapters(layer)
    if len(active) != 1:
        raise ValueError(
            f"{name} has the LoRA adapters {list(layer.lora_A)}, {len(active)} of them active: use one stacked "
            "adapter, get_peft_model(model, molf_lora_config(config))"
        )
    key, base = active[0], layer.base_layer
    transposed = _is_conv1d(base)
    if not transposed and not isinstance(base, nn.Linear):
        raise ValueError(
            f"{name} adapts a {type(base).__name__}: only linear layers can be routed; exclude it, or, of a mixture of "
            "experts, which PEFT's 'all-linear' adapts as a whole, name linear layers in target_modules"
        )
    blocks = layer.lora_B[key].weight.shape[1] != layer.lora_A[key].weight.shape[0]  # a column is of several ranks
    if getattr(layer, "use_dora", {}).get(key) or getattr(layer.lora_B[key], "bias", None) is not None or blocks:
        raise ValueError(
            f"{name} uses DoRA, a LoRA bias or a block-diagonal B: only plain LoRA can be routed; switch these off"
        )
    if layer.merged:
        raise ValueError(f"{name} has its adapter merged into the base: call unmerge_adapter() first")
    dropout = float(getattr(layer.lora_dropout[key], "p", 0.0))
    if config.lora_dropout not in (0.0, dropout):
        raise ValueError(
            f"lora_dropout={config.lora_dropout}, but the adapter of {name} has {dropout}: make it with "
            "molf_lora_config(config), and set disable_dropout=False where TRL's arguments have it"
        )
    for factor in ("lora_A", "lora_B"):
        _check_held(f"{name}.{factor}", getattr(layer, factor)[key])
    if config.train_base:
        _check_held(name, base)
    A, B = layer.lora_A[key].weight, layer.lora_B[key].weight
    total = sum(config.expert_ranks)
    if A.shape[0] != total:
        raise ValueError(
            f"expert_ranks={config.expert_ranks} (total rank {total}) does not fit the adapter of {name}, which has "
            f"rank {A.shape[0]}: make it with molf_lora_config(config)"
        )
    return Target(name, base.weight, base.bias, transposed, A, B, float(layer.scaling[key]))


def _check_weight(target: Target, config: MoLFConfig) -> None:
    """Refuse a weight that cannot be trained, or that cannot hold P = W + Σ s B A."""
    weight = target.weight
    if _quantised(weight) and (config.train_base or target.lora_A is None):
        raise ValueError(
            f"{target.name}.weight is quantised ({type(weight.data).__name__}, {weight.dtype}) and cannot be a dense "
            "expert: use train_base=False with a PEFT adapter, or load the model without quantisation"
        )
    if target.lora_A is None and weight.dim() != 2:
        raise ValueError(f"{target.name}.weight has shape {tuple(weight.shape)}, not (out, in): exclude it")


def _refuse_foreign_adapters(model: nn.Module, has_lora: bool) -> None:
    """Refuse PEFT methods other than LoRA, and biases that PEFT was asked to train."""
    for name, adapter in getattr(model, "peft_config", {}).items():
        kind = str(getattr(adapter.peft_type, "value", adapter.peft_type))
        if kind != "LORA" or not has_lora:
            raise ValueError(
                f"adapter {name!r} is of type {kind} and has no LoRA layer to route: use "
                "get_peft_model(model, molf_lora_config(config)), or the model without an adapter"
            )
        if adapter.bias != "none":
            raise ValueError(f"adapter {name!r} has bias={adapter.bias!r}: use bias='none', or train_base=True instead")


def _quantised(weight: Tensor) -> bool:
    wrapped = is_traceable_wrapper_subclass(weight.data) and type(weight.data).__name__ != "DTensor"
    return wrapped or weight.dtype not in _TRAINABLE_DTYPES


def _refuse_tied(model: nn.Module, targets: Sequence[Target], config: MoLFConfig) -> None:
    names: dict[Any, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[_memory(parameter)].append(name)
    for target in targets:
        base = (target.weight, target.bias) if config.train_base or target.lora_A is None else ()
        for parameter in (*base, target.lora_A, target.lora_B):
            if parameter is not None and len(tied := names[_memory(parameter)]) > 1:
                raise ValueError(
                    f"{target.name} is routed but its weight is tied ({' = '.join(tied)}): "
                    "leave it out with exclude_modules, or untie the weights"
                )


def _memory(parameter: Tensor) -> Any:
    """What tied parameters have in common: themselves, or where their elements begin."""
    own = local(parameter)
    return id(parameter) if _quantised(parameter) or not own.numel() else (storage(own), own.storage_offset())


def _refuse_sparse(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse and module.weight.requires_grad:
            raise ValueError(f"{name} gives sparse gradients, which have no moments: make it with sparse=False")


def _refuse_complex(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_complex() and parameter.requires_grad:
            raise ValueError(
                f"{name} is {parameter.dtype}, and complex parameters are not trained: freeze it by "
                "requires_grad_(False), or hold it as real numbers (torch.view_as_real)"
            )


def keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights on a CPU, as it does at the first forward pass in eval mode.

    Its kernel for packed weights has no backward pass. From then on no gradient passes through the layer's base, in
    training as well, and nothing is said (bitsandbytes 0.50).

    Raises:
        ValueError: If that has happened already.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
            raise ValueError(
                f"{name}.weight was packed for inference by a forward pass in eval mode, and bitsandbytes computes no "
                "gradient through it any more: load the model again and make its optimizer before evaluating it"
            )
        module.support_avx512bf16_for_cpu = False


def apply_trainability(
    model: nn.Module, targets: Sequence[Target], config: MoLFConfig
) -> list[tuple[str, nn.Parameter]]:
    """Set ``requires_grad`` as the config says and return the trainable parameters that are not routed.

    PEFT freezes every base parameter when it wraps a model, so on a PEFT model the config alone decides, of embeddings
    and norms as well. On an ordinary model what the user froze stays frozen, except that ``train_base=False`` routes
    frozen layers, too: virtual LoRA experts need their weights' gradients. Whatever else PEFT was asked to train by
    name (``modules_to_save``, LoRA on embeddings, single tokens) trains unless ``train_other=False``.
    """
    routed: set[Tensor] = set()
    for target in targets:
        virtual = target.lora_A is None
        for parameter, trains in (
            (target.weight, config.train_base or virtual),
            (target.bias, config.train_base),
            (target.lora_A, True),
            (target.lora_B, True),
        ):
            if isinstance(parameter, nn.Parameter):  # a frozen base may compute its weight
                routed.add(parameter)
                if parameter.is_floating_point() and parameter.requires_grad != trains:
                    parameter.requires_grad_(trains)
    adapted = any(target.lora_A is not None for target in targets)
    others = []
    own, idle = _adapter_parameters(model), _idle_parameters(model)
    for name, parameter in model.named_parameters():
        if parameter in routed or not parameter.is_floating_point():
            continue
        if parameter in idle:
            parameter.requires_grad_(False)
            continue
        asked = name in own and config.train_other is not False
        if not config.trains_other:
            parameter.requires_grad_(asked)
        elif adapted and ".original_module." not in name:
            parameter.requires_grad_(True)
        if parameter.requires_grad:
            others.append((name, parameter))
    return others


def outside_adapter(model: nn.Module) -> list[str]:
    """Names of parameters that are trained and that PEFT, which saves its adapter alone, does not save."""
    if not hasattr(model, "peft_config"):
        return []
    own = _adapter_parameters(model)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad and name not in own]


def _adapter_parameters(model: nn.Module) -> set[str]:
    """Names of parameters that PEFT added beside the base model's."""
    wrappers = [name for name, m in model.named_modules() if hasattr(m, "base_layer") or hasattr(m, "modules_to_save")]
    base = ("base_layer.", "original_module.")
    return {
        name
        for wrapper in wrappers
        for name, _ in model.named_parameters()
        if name.startswith(f"{wrapper}.") and not name[len(wrapper) + 1 :].startswith(base)
    }


def _idle_parameters(model: nn.Module) -> set[Tensor]:
    """Parameters of adapters that are not active, and of what they train by name."""
    modules: list[Any] = list(model.modules())
    found = [
        (held[key], key in module.active_adapters)
        for module in modules
        for name in getattr(module, "adapter_layer_names", ())
        for held in [getattr(module, name, {})]  # a name may be that of a module inside, which is looked at itself
        for key in held
    ]
    return {each for own, active in found if not active for each in _tensors(own)}


def _tensors(own: Any) -> list[Tensor]:
    return [own] if isinstance(own, Tensor) else list(own.parameters())
