"""Whether a checkpoint is whole and fits a model. Looked at before anything is loaded from it; no pickle is run."""

from __future__ import annotations

import json
import pickle
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.trainer_pt_utils import safe_globals

from ..files import sha256
from ..optim import MoLFConfig
from ..optim.checkpoint import DECISIVE
from ..optim.sharding import is_sharded, local

MANIFEST = "manifest.json"
"""Size and SHA-256 of every other file of a checkpoint."""

UNFINISHED = "unfinished-checkpoint"
"""The folder within ``output_dir`` that a checkpoint is written in."""

SHARDED, REST = "optimizer", "rest.pt"
"""The folder of sharded optimizer state in a checkpoint, in place of ``optimizer.pt``; in it, groups and numbers."""

_ADAPTER = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora")


def checkpoints(folder: Path, after: int = -1) -> list[Path]:
    """The folders ``checkpoint-N`` of a run with N > ``after``, whole or not, by N."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and _step(path).isdecimal()]
    return sorted((path for path in found if int(_step(path)) > after), key=lambda path: int(_step(path)))


def _step(path: Path) -> str:
    return path.name.rpartition("-")[2]


def check_checkpoint(folder: Path) -> None:
    """Whether everything that an exact resume needs is there, unchanged and readable.

    Raises:
        ValueError: Naming the file and what is wrong with it.
    """
    if not (folder / "trainer_state.json").is_file():
        raise ValueError(f"resume_from_checkpoint={folder}: not a checkpoint folder (no trainer_state.json in it)")
    weights = [*folder.glob("model*.safetensors"), *folder.glob("**/adapter_model.safetensors")]
    states = list(folder.glob("rng_state*.pth"))
    shards = sorted((folder / SHARDED).glob("*.safetensors"))
    saved = [folder / (f"{SHARDED}/{REST}" if (folder / SHARDED).is_dir() else "optimizer.pt"), folder / "scheduler.pt"]
    missing = [str(path.relative_to(folder)) for path in saved if not path.is_file()]
    missing += [] if weights else ["model.safetensors"]
    missing += [] if states else ["rng_state.pth"]
    if missing:
        raise ValueError(
            f"resume_from_checkpoint={folder}: {', '.join(missing)} is missing, so the run cannot continue exactly; "
            "take an older checkpoint, and save without save_only_model"
        )
    _check_manifest(folder)
    progress(folder)
    for path in (*weights, *shards):
        _shapes([path])
    for path in (*saved, *states):
        _load(path)


def progress(folder: Path) -> tuple[int, int]:
    """Steps done and steps in all, as the checkpoint has them.

    Raises:
        ValueError: If ``trainer_state.json`` is damaged.
    """
    state = folder / "trainer_state.json"
    try:
        found = json.loads(state.read_text())
        return found["global_step"], found["max_steps"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{state} is damaged ({error}): take an older checkpoint") from error


def check_fits(folder: Path, model: Any, optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None) -> None:
    """Whether weights and optimizer state of a checkpoint are of this model and of these experts.

    Args:
        folder: The checkpoint.
        model: The model that is to go on.
        optimizer_cls_and_kwargs: The Trainer's argument; a MoLFConfig in it is compared with the saved one.

    Raises:
        ValueError: Naming the first thing that differs, with both values. Nothing has been loaded then.
    """
    if isinstance(model, PeftModel):
        name = model.active_adapter
        place = folder if name == "default" else folder / name  # as PEFT saves it
        own = get_peft_model_state_dict(model, adapter_name=name)
        _check_adapter(place, model.peft_config[name])
        saved = _shapes(place.glob("adapter_model.safetensors"))
    else:
        own = model.state_dict()
        saved = _shapes(folder.glob("model*.safetensors"))
    places: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in own.items():
        places[local(tensor).data_ptr()][name] = tensor
    together = [as_saved(model, each).keys() for each in places.values() if len(each) > 1]
    tied = {name for names in together if names & saved.keys() for name in names}
    expected = as_saved(model, own)
    lost = sorted(expected.keys() - saved.keys() - tied)
    for name in sorted(saved.keys() - expected.keys()) or lost:
        has, lacks = ("this model", "the checkpoint") if name in expected else ("the checkpoint", "this model")
        raise ValueError(f"{folder} is of another model or method: {has} has {name}, {lacks} has not")
    for name, shape in saved.items():
        if shape != expected[name]:
            raise ValueError(f"{folder} is of another model: {name} has shape {shape}, here {expected[name]}")
    config = (optimizer_cls_and_kwargs or (None, {}))[1].get("config")
    path = folder / SHARDED / REST if (folder / SHARDED).is_dir() else folder / "optimizer.pt"
    if path.name != REST and is_sharded(model):
        raise ValueError(f"{path} is whole and this run is sharded: continue without fsdp, as the run began")
    _check_experts(path, config if isinstance(config, MoLFConfig) else None)


def as_saved(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Names and shapes under which transformers saves these of a model's tensors.

    Those of the published checkpoints, which for some models, such as mixtures of experts, are not the model's own.
    """
    found = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()}
    if isinstance(model, PreTrainedModel):
        found = revert_weight_conversion(model, found)
    return {name: tuple(tensor.shape) for name, tensor in found.items()}


def _check_adapter(folder: Path, own: Any) -> None:
    path = folder / "adapter_config.json"
    saved = json.loads(path.read_text()) if path.is_file() else {}
    for key in _ADAPTER:
        here = getattr(own, key, None)
        if key in saved and saved[key] != here:
            raise ValueError(f"{folder} is of another adapter: its {key} is {saved[key]}, here {here}")


def _check_experts(path: Path, config: MoLFConfig | None) -> None:
    saved = _load(path)["param_groups"][0]
    if config is None or "expert_ranks" not in saved:
        if config is not None or "expert_ranks" in saved:
            one, other = ("AdamW's", "MoLFAdamW") if config else ("MoLFAdamW's", "another optimizer")
            raise ValueError(f"{path} is {one}, and this run has {other}: continue with the same method")
        return
    for key in DECISIVE:
        old, new = (list(x) if isinstance(x, tuple) else x for x in (saved[key], getattr(config, key)))
        if old != new:
            raise ValueError(f"{path} was made with {key}={old}, this run has {new}: continue with the same options")


def _check_manifest(folder: Path) -> None:
    """Compare with the manifest; checkpoints of a plain Trainer have none."""
    path = folder / MANIFEST
    if not path.is_file():
        return
    try:
        files = json.loads(path.read_text())["files"].items()
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): take an older checkpoint") from error
    for name, entry in files:
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file} is missing: take an older checkpoint")
        if file.stat().st_size != entry["bytes"]:
            found = f"it has {file.stat().st_size} bytes, saved were {entry['bytes']}"
            raise ValueError(f"{file} is damaged ({found}): take an older checkpoint")
        if sha256(file) != entry["sha256"]:
            raise ValueError(f"{file} is not the file that was saved (another SHA-256): take an older checkpoint")


def _shapes(paths: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Names and shapes in safetensors files."""
    found: dict[str, tuple[int, ...]] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as tensors:
                found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise _damaged(path, error) from error
    return found


def _load(path: Path) -> Any:
    """What torch saved, with its tensors left on the disk; code in it is refused, not run."""
    try:
        with safe_globals():  # numpy's arrays, which the random states hold
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    reason = str(error).split("\n")[0]
    return ValueError(f"{path} is damaged ({reason}): take an older checkpoint")
