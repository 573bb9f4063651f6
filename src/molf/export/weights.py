"""The forms without loss: the merged model, the adapter, and one adapter per expert."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer_utils import align_special_tokens

from .run import ADAPTER, TrainedRun


def write_merged(
    run: TrainedRun, trained: Any, tokenizer: Any, folder: Path, dtype: torch.dtype, max_shard_size: str
) -> None:
    """A whole transformers model: W + Σ s_i B_i A_i in float32, then one rounding to ``dtype``.

    Args:
        run: The run.
        trained: Its model in float32; an adapter is merged into it.
        tokenizer: Its tokenizer; the end token that it was trained with goes into the generation config.
        folder: Where it goes.
        dtype: Precision of the weights.
        max_shard_size: Of one file, as transformers takes it.

    Raises:
        ValueError: If the adapter changes a weight that is tied to another one.
    """
    if run.has_adapter:
        _refuse_tied(trained)
        trained = trained.merge_and_unload()
    align_special_tokens(trained, tokenizer)
    trained.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)


def _refuse_tied(model: Any) -> None:
    """A change of one tied weight is a change of the other one too, once it is merged."""
    names: dict[Tensor, list[str]] = defaultdict(list)
    for name, parameter in model.get_base_model().named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    for name, parameter in model.get_base_model().named_parameters(remove_duplicate=False):
        if ".base_layer." in name and len(names[parameter]) > 1:
            raise ValueError(
                f"the adapter changes a weight that is tied ({' = '.join(names[parameter])}), so it cannot be merged: "
                "use --to adapter"
            )


def read_adapter(run: TrainedRun, dtype: torch.dtype | None) -> tuple[Any, dict[str, Tensor]]:
    """The run's adapter: its configuration, with the base and the base's revision, and its tensors.

    Args:
        run: A run with an adapter.
        dtype: Precision of the tensors; None is as stored.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        tensors = load_file(run.folder / ADAPTER)
        config = PeftConfig.from_pretrained(str(run.folder))
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"the adapter of {run.folder} is damaged: {error}") from error
    config.base_model_name_or_path, config.revision = run.named_base, run.revision
    return config, {key: value.to(dtype or value.dtype) for key, value in tensors.items()}


def write_adapter(config: Any, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """One adapter in PEFT's own form."""
    folder.mkdir(exist_ok=True)
    config.save_pretrained(str(folder))
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / ADAPTER, {"format": "pt"})


def write_experts(run: TrainedRun, folder: Path, dtype: torch.dtype) -> list[str]:
    """One adapter per LoRA expert, in a subfolder each; their sum is the whole adapter.

    The stacked adapter has A = [A_1; A_2; ...] and B̃ = [f_1 B_1 | f_2 B_2 | ...] with f_i = s_i / c, c its own scaling.
    Expert i gets A_i, B_i = B̃_i / f_i and the scale s_i, as ``lora_alpha`` = s_i r_i over r_i, because some servers do
    not know rsLoRA. Dividing is exact where f_i is a power of two, as by default; else it rounds B once.

    Returns:
        The subfolders: the experts' names, with _ for brackets.

    Raises:
        ValueError: If the adapter has more than they are, such as that of an embedding.
    """
    whole, tensors = read_adapter(run, None)
    other = next((key for key in tensors if not key.endswith((".lora_A.weight", ".lora_B.weight"))), None)
    if other is not None:
        raise ValueError(f"{other} of the adapter belongs to no expert, because it is not routed: use --to adapter")
    scaling = whole.lora_alpha / (whole.r**0.5 if whole.use_rslora else whole.r)
    names = [name.replace("[", "_").rstrip("]") for name in run.config.experts]
    start = 0
    for name, rank, scale in zip(names, run.config.expert_ranks, run.config.scales, strict=True):
        ranks = slice(start, start + rank)
        own = {
            key: value[ranks] if "lora_A" in key else value[:, ranks] / (scale / scaling)
            for key, value in tensors.items()
        }
        config = copy.deepcopy(whole)
        config.r, config.lora_alpha, config.use_rslora = rank, scale * rank, False
        write_adapter(config, {key: value.to(dtype) for key, value in own.items()}, folder / name)
        start += rank
    return names
