"""Run directories as ``molf train`` leaves them, written by hand: any architecture and precision, at no cost."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from models import causal_lm
from molf import MoLFConfig, molf_lora_config
from molf.assets import BUNDLED_MODEL
from molf.train.arguments import MethodArguments
from molf.train.load import versions

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def make_base(folder: Path, arch: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A tiny model with the bundled tokenizer's vocabulary and a generation config of its own."""
    model = causal_lm(arch, dtype, vocab_size=1231, **changes)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(folder)
    return folder


def make_run(
    folder: Path,
    base: Path,
    method: str,
    config: MoLFConfig,
    *,
    other: bool = False,
    size: float = 0.05,
    shard: str = "5GB",
    **arguments: Any,
) -> Path:
    """A finished run: noise of ``size`` in the linear layers or the adapter, and with ``other`` in everything else."""
    options = {"dataset_path": None, "task": "world-fact", "dtype": "auto", **arguments}
    quantization = options.pop("quantization", None)
    options = {**asdict(MethodArguments(str(base), method=method, task="world-fact")), **options}
    model = AutoModelForCausalLM.from_pretrained(base)
    noise = torch.Generator().manual_seed(1)
    if method in ("molf-e", "lora"):
        model = get_peft_model(model, molf_lora_config(config, task_type="CAUSAL_LM"))
    for name, p in model.named_parameters():
        if ".lora_" in name or (method == "molf" and (other or "_proj.weight" in name or ".c_" in name)):
            with torch.no_grad():
                p.add_(size * torch.randn(p.shape, generator=noise).to(p))
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    if quantization is not None:
        options["quantization"] = quantization
    record = {"method": options, "molf": asdict(config), "training": {}, "versions": versions()}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "metrics.json").write_text(json.dumps({"method": method, "train_loss": 0.5}))
    return folder
