"""What is compared: optimizers and adapters by name, every one with a model of its own and equal weights."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from torch.optim import Optimizer

from ..optim import MoLFConfig, create_molf_optimizer, molf_lora_config
from .presets import Preset, Settings, build_model, get_preset


@dataclass(frozen=True)
class Kind:
    """A contender's recipe.

    Attributes:
        help: One line for the user.
        optimizer: "molf", or the optimizer's class as "module:Class".
        adapter: PEFT's part: "" none, "stacked" one LoRA, "two" one adapter per rank.
        efficient: Whether its ranks are ``efficient_ranks``.
        options: Keyword arguments of the optimizer or fields of ``MoLFConfig``.
        late: Whether LoRA wins every layer in the first step, so that what is timed is the middle of a training, where
            every W differs from its P, and not its start, where B = 0.
        amp: Whether weights are fp32 and the forward pass runs under bf16 autocast.
    """

    help: str
    optimizer: str = "molf"
    adapter: str = ""
    efficient: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    late: bool = False
    amp: bool = False


_ADAMW = "torch.optim:AdamW"
_FUSED: dict[str, Any] = {"fused": True}

KINDS = {
    "fft": Kind("full fine-tuning, AdamW(fused=True) on the weights in their dtype", _ADAMW, options=_FUSED),
    "fft-amp": Kind("the same with fp32 weights under bf16 autocast", _ADAMW, options=_FUSED, amp=True),
    "fft-foreach": Kind("full fine-tuning, AdamW(foreach=True)", _ADAMW, options={"foreach": True}),
    "fft-8bit": Kind("full fine-tuning, torchao's AdamW8bit", "torchao.optim:AdamW8bit"),
    "molf": Kind("MoLF on the untouched model, after LoRA has won once", late=True),
    "molf-dense": Kind("the same where dense always wins and LoRA never has", options={"policy": "fixed-dense"}),
    "molf-dense-late": Kind("the same where dense always wins but LoRA has won", options={"lora_lr": 0.0}, late=True),
    "molf-lora": Kind("the same where LoRA always wins", options={"policy": "fixed-lora"}),
    "molf-amp": Kind("MoLF with fp32 weights under bf16 autocast", late=True, amp=True),
    "molf-superposed": Kind("MoLF with its experts in a PEFT adapter over a trained base", adapter="stacked"),
    "lora": Kind("one PEFT LoRA of the summed rank, AdamW(fused=True)", _ADAMW, "stacked", True, _FUSED),
    "lora-2": Kind("one PEFT adapter per rank, AdamW(fused=True)", _ADAMW, "two", True, _FUSED),
    "molf-e": Kind("MoLF-Efficient: one stacked PEFT LoRA", adapter="stacked", efficient=True,
                   options={"train_base": False}),
}  # fmt: skip

DEFAULTS = {
    "step": "fft fft-foreach fft-8bit molf molf-dense molf-dense-late molf-lora molf-superposed lora lora-2 molf-e",
    "train": "fft molf molf-superposed lora lora-2 molf-e",
    "memory": "fft fft-8bit molf molf-dense molf-lora molf-superposed lora lora-2 molf-e",
}
"""The contenders of each bench where none are named."""

SYNTAX = re.compile(r"([\w.-]+(?::[A-Za-z_]\w*)?)(?:@([\w.-]+))?(?::(\w+=.*|\{.*\}))?")


@dataclass(frozen=True)
class Contender:
    """A contender as the user named it: ``NAME[@PRESET][:OPTIONS]``.

    Attributes:
        label: The name in full.
        kind: Its recipe, with the options.
        preset: The model's shape.
    """

    label: str
    kind: Kind
    preset: Preset

    @classmethod
    def parse(cls, label: str, preset: str) -> Contender:
        """Read a name: one of ``KINDS``, or ``module:Class`` for any optimizer of full fine-tuning.

        OPTIONS are ``key=value,key=value`` or a JSON object: fields of ``MoLFConfig``, or the optimizer's arguments.

        Raises:
            ValueError: If there is no such contender, preset or field.

        Example:
            >>> Contender.parse("molf@tiny:expert_ranks=[2,2],score_fn=pfn", "cpu-small").kind.options
            {'expert_ranks': [2, 2], 'score_fn': 'pfn'}
        """
        match = SYNTAX.fullmatch(label)
        if match is None:
            raise ValueError(f"contender {label!r}: write NAME[@PRESET][:OPTIONS], as key=value,key=value or as JSON")
        name, own, options = match.groups()
        if name not in KINDS and ":" not in name:
            raise ValueError(f"contender {name!r}: choose one of {', '.join(KINDS)}, or an optimizer as module:Class")
        kind = KINDS.get(name, Kind("an optimizer by its import path", name))
        kind = replace(kind, options={**kind.options, **_options(label, options or "")})
        unknown = sorted(kind.options.keys() - {f.name for f in fields(MoLFConfig)})
        if kind.optimizer == "molf" and unknown:
            raise ValueError(f"contender {label!r}: MoLFConfig has no field {', '.join(unknown)}")
        return cls(label, kind, get_preset(own or preset))

    def config(self, settings: Settings) -> MoLFConfig:
        """Experts and rates; of PEFT's own contenders the experts alone count.

        Raises:
            ValueError: If an option is out of its range.
        """
        ranks = settings.efficient_ranks if self.kind.efficient else settings.ranks
        own = self.kind.options if self.kind.optimizer == "molf" else {"train_base": not self.kind.adapter}
        return MoLFConfig(**{"expert_ranks": ranks, **own})

    def optimizer_class(self) -> Any:
        """The class of an optimizer that is not MoLF's.

        Raises:
            ValueError: If it cannot be imported, or does not take these options.
        """
        module, _, name = self.kind.optimizer.partition(":")
        try:
            made: Any = getattr(import_module(module), name)
            signature(made).bind([], **self.kind.options)
            signature(made.step).bind(None)  # which some have a closure for
        except (ImportError, AttributeError, TypeError) as error:
            raise ValueError(f"contender {self.label!r}: {error}") from error
        return made

    def check(self, settings: Settings) -> None:
        """Look at the options before anything is built.

        Raises:
            ValueError: As ``config`` and ``optimizer_class``.
        """
        self.config(settings)
        if self.kind.optimizer != "molf":
            self.optimizer_class()


def default_contenders(bench: str, dtype: str) -> list[str]:
    """The names of ``DEFAULTS``, without torchao's where that is missing, with ``fft-amp`` for 16-bit weights."""
    names = [name for name in DEFAULTS[bench].split() if name != "fft-8bit" or find_spec("torchao")]
    return names if dtype == "float32" else ["fft", "fft-amp", *names[1:]]


def _options(label: str, text: str) -> dict[str, Any]:
    if text.startswith("{"):
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(f"contender {label!r}: its options are no JSON: {error}") from error
    pairs = (pair.partition("=") for pair in re.split(r",(?=\w+=)", text) if pair)
    return {key: _value(value) for key, _, value in pairs}


def _value(text: str) -> Any:
    """A Python literal, or else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def build(contender: Contender, settings: Settings) -> tuple[Any, Optimizer]:
    """The contender's model and optimizer.

    Raises:
        ValueError: If the optimizer cannot be imported or made with these options.
    """
    kind, config = contender.kind, contender.config(settings)
    dtype = torch.float32 if kind.amp else getattr(torch, settings.dtype)
    model = build_model(contender.preset, dtype, settings.device, settings.seed)
    if settings.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})  # the same by its newer and its older name
    model = _adapted(model, kind.adapter, config)
    if kind.optimizer == "molf":
        with warnings.catch_warnings():  # nothing is saved
            warnings.filterwarnings("ignore", ".* is trained and is no part of the adapter")
            return model, create_molf_optimizer(model, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        return model, contender.optimizer_class()(trained, **kind.options)
    except (TypeError, ValueError) as error:  # an option's value
        raise ValueError(f"contender {contender.label!r}: {error}") from error


def _adapted(model: Any, adapter: str, config: MoLFConfig) -> Any:
    if not adapter:
        return model
    from peft import LoraConfig, get_peft_model

    if adapter == "stacked":
        return get_peft_model(model, molf_lora_config(config, task_type="CAUSAL_LM"))
    names = [f"expert{index}" for index in range(len(config.expert_ranks))]
    for name, rank in zip(names, config.expert_ranks, strict=True):
        own = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        if name == names[0]:
            model = get_peft_model(model, own, name)
        else:
            model.add_adapter(name, own)
    model.base_model.set_adapter(names)  # the outer set_adapter takes one name only
    return model


@contextmanager
def lora_wins(optimizer: Optimizer) -> Iterator[None]:
    """LoRA wins every layer meanwhile: the dense expert's score is proportional to its rate, which is zero."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 1e-4 if group["expert"].startswith("lora") else 0.0
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
