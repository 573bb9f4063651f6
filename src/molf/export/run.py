"""What a run directory of ``molf train`` holds, and the models that it is about, as float32."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils.integrations import dequantize_module_weight
from safetensors import SafetensorError
from torch import nn

from ..errors import of_the_machine
from ..files import read_json
from ..optim import MoLFConfig
from ..train.arguments import MethodArguments
from ..train.load import load_model, load_tokenizer, naming
from ..train.methods import METHODS
from ..train.quantize import quantized

ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True)
class TrainedRun:
    """A finished run.

    Attributes:
        folder: The run directory.
        method: Model, data and method, as in its ``run.json``.
        config: Experts, scales and rates.
        metrics: Its ``metrics.json``.
        versions: Of the packages that trained it.
        base: Folder or hub id of the base model.
        revision: The base's commit, where it came from the hub; else the revision that was asked for.
        trust_remote_code: Whether the base's own code may run.
    """

    folder: Path
    method: dict[str, Any]
    config: MoLFConfig
    metrics: dict[str, Any]
    versions: dict[str, str]
    base: str
    revision: str
    trust_remote_code: bool = False

    @property
    def has_adapter(self) -> bool:
        """Whether it saved a PEFT adapter; else it saved a whole model."""
        return METHODS[self.method["method"]].saves_adapter(self.config)

    @property
    def named_base(self) -> str:
        """The base as an adapter names it: a folder by its absolute path, for adapters are loaded from anywhere."""
        return str(Path(self.base).absolute()) if Path(self.base).is_dir() else self.base

    @property
    def quantization(self) -> str:
        """How the base was quantised for training, or "none"."""
        return self.method.get("quantization") or "none"

    @property
    def quantized(self) -> dict[str, Any]:
        """What ``from_pretrained`` needs to quantise the base as it was for training; empty if it was not."""
        return quantized(self.quantization, torch.device("cpu"), torch.float32)

    def load_base(self) -> tuple[Any, torch.dtype]:
        """The base model in float32, and the precision that it was trained in; see ``in_float32``.

        Raises:
            ValueError: If it cannot be read; names it.
        """
        hub = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        try:
            with naming(self.base):
                model = load_model(self.base, self.method["dtype"], **hub, **self.quantized)
        except ValueError as error:
            raise ValueError(f"{error}; where the base has moved, say so with --base") from error
        return in_float32(model)

    def load_trained(self) -> tuple[Any, torch.dtype]:
        """The trained model in float32, a ``PeftModel`` where there is an adapter, and the precision of its weights.

        Raises:
            ValueError: If its weights or its base cannot be read; names them.
        """
        if not self.has_adapter:
            with naming(str(self.folder)):
                return in_float32(load_model(str(self.folder), "auto", trust_remote_code=self.trust_remote_code))
        base, dtype = self.load_base()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="Found missing adapter keys", category=UserWarning)
                return PeftModel.from_pretrained(base, str(self.folder)).eval(), dtype
        except (SafetensorError, RuntimeError, UserWarning, ValueError, KeyError, TypeError) as error:
            if of_the_machine(error):
                raise
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"the adapter of {self.folder} is damaged or of another base: {reason}") from error

    def load_tokenizer(self) -> Any:
        """The tokenizer that the run saved.

        Raises:
            ValueError: If it cannot be read.
        """
        with naming(str(self.folder)):
            return load_tokenizer(str(self.folder), trust_remote_code=self.trust_remote_code)


def read_run(folder: Path, base: str | None = None, trust_remote_code: bool = False) -> TrainedRun:
    """A finished run, from what ``molf train`` left in its directory.

    Args:
        folder: The run directory.
        base: Where the base model is now, if it has moved.
        trust_remote_code: Whether the base's own code may run.

    Raises:
        ValueError: If this is no run directory, or the run is unfinished; says what is missing.
    """
    record = _read(folder / "run.json", f"{folder} is no run folder of molf train")
    unfinished = f"the run in {folder} is unfinished"
    metrics = _read(folder / "metrics.json", unfinished)
    try:
        method = asdict(MethodArguments(**record["method"]))
        run = TrainedRun(
            folder=folder,
            method=method,
            config=MoLFConfig(**record["molf"]),
            metrics=metrics,
            versions=dict(record["versions"]),
            base=base or method["model_name_or_path"],
            revision=record.get("model_commit") or method["model_revision"],
            trust_remote_code=trust_remote_code,
        )
        weights = [ADAPTER] if run.has_adapter else ["model.safetensors", "model.safetensors.index.json"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'run.json'} is damaged or of another version of molf: {error}") from error
    if not any((folder / name).is_file() for name in weights):
        raise ValueError(f"{unfinished} (no {weights[0]} in it): {_CONTINUE}")
    return run


_CONTINUE = "continue it with molf train --resume_from_checkpoint last, or run it again"


def _read(path: Path, problem: str) -> dict[str, Any]:
    if not path.is_file():
        remedy = f": {_CONTINUE}" if path.name == "metrics.json" else ""
        raise ValueError(f"{problem} (no {path.name} in it){remedy}")
    return read_json(path)


def in_float32(model: Any) -> tuple[Any, torch.dtype]:
    """The same weights in float32 on the CPU, which is exact, and the precision that they had.

    Quantised layers become linear layers with the weights that they stand for. Models are compared this way so that
    a difference is one of weights, and not the noise of 16-bit arithmetic.
    """
    dtype = model.dtype
    for name, module in list(model.named_modules()):
        weight = dequantize_module_weight(module) if isinstance(module, nn.Linear) else None
        if weight is not None and weight is not module.weight:
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            plain.weight, plain.bias = nn.Parameter(weight.detach(), requires_grad=False), module.bias
            model.set_submodule(name, plain)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if getattr(base, "hf_quantizer", None) is not None:
        base.hf_quantizer.remove_quantization_config(base)
    return model.to("cpu").float().eval(), dtype
