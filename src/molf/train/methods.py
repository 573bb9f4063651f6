"""The methods of ``molf train``: MoLF, the baselines that PEFT and torch provide, and the controls.

A control is MoLF's optimizer with other values of its config, or one ordinary LoRA; none has code of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import AdaLoraConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from ..optim import MoLFConfig, molf_lora_config

_LORA = ("expert_ranks", "lora_alpha", "use_rslora", "lora_lr", "lora_weight_decay", "lora_dropout")
_ROUTING = ("top_k", "score_fn", "train_other")
_STEP = ("compile", "keep_base", "moments_8bit", "step_in_backward", "check_ranks_every")
_SCORES = ("top_k", "score_fn")
_TARGETS = ("target_modules", "exclude_modules")


@dataclass(frozen=True)
class Method:
    """What sets a method apart.

    Attributes:
        default_ranks: ``expert_ranks`` where none are given.
        unused: Options that it would ignore, which are refused.
        routes: Whether MoLF's optimizer trains it; else the Trainer's.
        adapter: Whether it trains a PEFT adapter, and nothing else; else the model's own tensors.
        train_base: Whether W is trained.
        one_rank: Whether it takes a single rank.
        use_rslora: Whether alpha is divided by sqrt(r) where the user does not say.
        policy: Who wins a layer and step; see ``MoLFConfig``.
        quantizes: Whether the base may be quantised: it is frozen, and PEFT only multiplies with it, in every format.
    """

    default_ranks: tuple[int, ...] = (128,)
    unused: tuple[str, ...] = ()
    routes: bool = True
    adapter: bool = False
    train_base: bool = True
    one_rank: bool = False
    use_rslora: bool = True
    policy: str = "score"
    quantizes: bool = False

    def saves_adapter(self, config: MoLFConfig) -> bool:
        """Whether the model gets an adapter: an adapter's file has no place for what else MoLF trains."""
        return self.adapter and not (self.routes and config.trains_other)


def _peft(*unused: str, use_rslora: bool = False, quantizes: bool = False) -> Method:
    own: dict[str, Any] = {"one_rank": True, "use_rslora": use_rslora, "quantizes": quantizes}
    return Method((16,), (*_ROUTING, *_STEP, *unused), False, True, False, **own)


METHODS = {
    "fft": Method((), (*_LORA, *_ROUTING, *_STEP, *_TARGETS), routes=False),
    "lora": _peft(quantizes=True),
    "rslora": _peft("use_rslora", use_rslora=True, quantizes=True),
    "dora": _peft(),
    "pissa": _peft(),
    "adalora": _peft("use_rslora"),
    "molf": Method(),
    "molf-e": Method((32, 128), adapter=True, train_base=False, quantizes=True),
    "dense-all": Method(unused=_SCORES),
    "random": Method(unused=("score_fn",), policy="random"),
    "fixed-dense": Method(unused=(*_SCORES, "lora_lr", "lora_weight_decay"), policy="fixed-dense"),
    "fixed-lora": Method(unused=_SCORES, policy="fixed-lora"),
    "lora-sum": Method((32, 128), (*_ROUTING, *_STEP), routes=False, adapter=True, train_base=False, quantizes=True),
    "lora+other": Method((16,), (*_ROUTING, "lora_dropout"), train_base=False, one_rank=True),
}


def resolve(name: str, config: MoLFConfig) -> MoLFConfig:
    """The config with what follows from the method and the number of experts."""
    if name == "dense-all":
        return replace(config, top_k=len(config.experts))
    if name == "fixed-lora":
        return replace(config, top_k=len(config.expert_ranks))
    if name == "lora-sum":
        return replace(config, expert_ranks=(sum(config.expert_ranks),))
    if name == "lora+other":
        return replace(config, train_other=True)
    return config


def adapter_config(name: str, config: MoLFConfig) -> LoraConfig:
    """One stacked adapter for molf-e; else PEFT's own, with the scale of ``config``.

    AdaLoRA starts at 3/2 of the rank and is left with the rank on average, as in its paper (arXiv:2303.10512,
    section 4.1); its schedule is set when the number of steps is known, see ``adalora.py``.
    """
    if name == "molf-e":
        return molf_lora_config(config, task_type="CAUSAL_LM")
    rank = config.expert_ranks[0]
    common: dict[str, Any] = {
        "lora_dropout": config.lora_dropout,
        "target_modules": config.target_modules,
        "exclude_modules": config.exclude_modules,
        "task_type": "CAUSAL_LM",
    }
    if name == "adalora":
        first = rank + (rank + 1) // 2  # PEFT's AdaLoRA multiplies by alpha / init_r
        return AdaLoraConfig(
            init_r=first, target_r=rank, lora_alpha=config.scales[0] * first, tinit=0, tfinal=0, total_step=2, **common
        )
    return LoraConfig(
        r=rank,
        lora_alpha=config.scales[0] * (rank**0.5 if config.use_rslora else rank),
        use_rslora=config.use_rslora,
        use_dora=name == "dora",
        init_lora_weights="pissa_niter_4" if name == "pissa" else True,
        **common,
    )


class Adapted:
    """A model with a method's adapter, and how to save that adapter so that it loads on the original base.

    PiSSA moves the leading singular directions of W into A₀, B₀ and trains from there on the base W - s B₀ A₀. What is
    saved is the same model as an adapter of W: W - s B₀ A₀ + s B A = W + s [B | -B₀] [A; A₀], of twice the rank.
    Over a 16-bit base, W - s B₀ A₀ is rounded to 16 bits before training, and the two differ by that rounding.

    Args:
        model: The base model.
        name: The method.
        config: Its ranks and scales.
        commit: The base's commit on the hub, without which the adapter would load on the main branch.

    Attributes:
        model: The PEFT model.
    """

    def __init__(self, model: Any, name: str, config: MoLFConfig, commit: str | None) -> None:
        settings = adapter_config(name, config)
        self.model = get_peft_model(model, settings, revision=commit)  # fp32 adapters also over a 16-bit base
        self._initial: dict[str, Tensor] = {}
        if name == "pissa":
            self._initial = {k: v.detach().cpu().clone() for k, v in get_peft_model_state_dict(self.model).items()}
            most, layer = min((len(v), k.partition(".lora_A")[0]) for k, v in self._initial.items() if ".lora_A" in k)
            if most < settings.r:
                raise ValueError(
                    f"expert_ranks={list(config.expert_ranks)}: pissa starts from the singular directions of W, of "
                    f"which {layer} has {most}; give a rank of at most that, or name the layer in exclude_modules"
                )

    def save_on_original_base(self, folder: Path) -> None:
        """Overwrite PiSSA's adapter in ``folder`` by the one for the original base; others are that already."""
        if not self._initial:
            return
        with TemporaryDirectory() as scratch:
            initial = Path(scratch) / "pissa_init"
            initial.mkdir()
            save_file(self._initial, initial / "adapter_model.safetensors")
            self.model.save_pretrained(folder, path_initial_model_for_weight_conversion=str(initial))
