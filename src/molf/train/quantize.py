"""A quantised frozen base, for methods that train an adapter and nothing else."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, TorchAoConfig

from ..files import read_json

PACKAGES = {"none": (), "bnb-4bit": ("bitsandbytes",), "bnb-8bit": ("bitsandbytes",), "torchao-int8": ("torchao",)}
"""The quantisations, with the package that each needs."""


def quantized(name: str, device: torch.device, compute_dtype: torch.dtype) -> dict[str, Any]:
    """What ``from_pretrained`` takes to quantise the linear layers, without the output head, as it loads them.

    ``bnb-4bit`` is NF4 of QLoRA (arXiv:2305.14314) without double quantisation, ``bnb-8bit`` LLM.int8()
    (arXiv:2208.07339), and ``torchao-int8`` int8 weights with one scale per output, activations as they are.

    Args:
        name: One of ``PACKAGES``.
        device: Where the model goes: quantised weights are not moved afterwards.
        compute_dtype: What 4-bit weights are expanded to in the forward and backward pass.

    Raises:
        ValueError: If the package that quantises is not installed.
    """
    if name == "none":
        return {}
    for package in PACKAGES[name]:
        if find_spec(package) is None:
            raise ValueError(f"quantization={name}: {package} is not installed; pip install 'molf[quantized]'")
    config: Any
    if name == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    elif name == "bnb-8bit":
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # one line per layer and pass: inputs become fp16
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype)
    return {"quantization_config": config, "device_map": {"": device}}


def quantized_as(folder: Path, device: torch.device) -> tuple[str, dict[str, Any]]:
    """How the run of a folder, or of a checkpoint in it, quantised its base: by name, and as ``quantized`` says it.

    Raises:
        ValueError: If its ``run.json`` is damaged, or the package that quantises is not installed.
    """
    record = (folder.parent if folder.name.startswith("checkpoint-") else folder) / "run.json"
    run = read_json(record) if record.is_file() else {}
    method, training = run.get("method"), run.get("training")
    if not isinstance(method, dict) or not isinstance(training, dict):
        return "none", {}
    name = method.get("quantization", "none")
    if name not in [*PACKAGES]:
        raise ValueError(f"{record} is damaged or of another version of molf: quantization={name!r}")
    half = training.get("bf16") or method.get("dtype") == "bfloat16"
    return name, quantized(name, device, torch.bfloat16 if half else torch.float32)


def keep_adapters_in_fp32(model: Any) -> None:
    """Undo TRL's rounding to bf16 of the adapters of a bitsandbytes model, which AdamW's updates would be lost in."""
    if getattr(model, "is_quantized", False):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
