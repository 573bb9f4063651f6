"""Which checkpoint a run continues from, and whether it can continue exactly."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import get_last_checkpoint

_OUTPUTS = ("run.json", "config.json", "adapter_config.json", "model.safetensors", "adapter_model.safetensors")
_DECISIVE = (
    "learning_rate lr_scheduler_type warmup_steps num_train_epochs max_steps per_device_train_batch_size "
    "gradient_accumulation_steps seed data_seed adam_beta1 adam_beta2 adam_epsilon max_length packing"
).split()


def starts_anew(wanted: str | None) -> bool:
    """Whether ``--resume_from_checkpoint`` asks for no checkpoint."""
    return str(wanted).lower() in ("none", "", "false")


def find_checkpoint(wanted: str | None, output_dir: str, resolved: dict[str, Any]) -> str | None:
    """The checkpoint folder to continue from, or None to start anew in an unused ``output_dir``.

    Args:
        wanted: ``--resume_from_checkpoint``: a folder, or "true" or "last" for the newest in ``output_dir``.
        output_dir: The run directory.
        resolved: This run's configuration, as written to ``run.json``.

    Raises:
        ValueError: If there is no such checkpoint, it is incomplete or damaged, the run is over, it was made with other
            settings, or a new run would mix with what ``output_dir`` holds. Nothing has been written then.
    """
    out = Path(output_dir)
    if wanted is None or starts_anew(wanted):
        used = next((name for name in _OUTPUTS if (out / name).exists()), None)
        if used is not None:
            raise ValueError(
                f"output_dir={output_dir} holds {used} of an earlier run: choose another folder, remove it, or "
                "continue with --resume_from_checkpoint last"
            )
        return None
    if str(wanted).lower() in ("true", "last"):
        found = get_last_checkpoint(output_dir) if out.is_dir() else None
        if found is None:
            raise ValueError(f"resume_from_checkpoint={wanted}: {out} has no checkpoint; leave the option out to start")
        wanted = str(found)
    _check_complete(Path(wanted))
    _check_same(Path(wanted), resolved)
    return str(wanted)


def _check_complete(folder: Path) -> None:
    state = folder / "trainer_state.json"
    if not state.is_file():
        raise ValueError(f"resume_from_checkpoint={folder}: not a checkpoint folder (no trainer_state.json in it)")
    weights = [*folder.glob("model*.safetensors"), *folder.glob("adapter_model.safetensors")]
    missing = [name for name in ("optimizer.pt", "scheduler.pt") if not (folder / name).is_file()]
    missing += [] if weights else ["model.safetensors"]
    missing += [] if list(folder.glob("rng_state*.pth")) else ["rng_state.pth"]
    if missing:
        raise ValueError(
            f"resume_from_checkpoint={folder}: {', '.join(missing)} is missing, so the run cannot continue exactly; "
            "take an older checkpoint, and save without save_only_model"
        )
    for path in (*weights, folder / "optimizer.pt", folder / "scheduler.pt"):
        try:
            if path.suffix == ".pt":
                torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            else:
                with safe_open(path, framework="pt") as tensors:
                    tensors.keys()
        except (RuntimeError, pickle.UnpicklingError, EOFError, SafetensorError) as error:
            reason = str(error).split("\n")[0]
            raise ValueError(f"{path} is damaged ({reason}): take an older checkpoint") from error
    progress = json.loads(state.read_text())
    if progress["global_step"] >= progress["max_steps"] > 0:
        raise ValueError(
            f"resume_from_checkpoint={folder}: the run is over, all {progress['max_steps']} steps are done"
        )


def _check_same(folder: Path, resolved: dict[str, Any]) -> None:
    """A resumed run continues exactly or not at all: compare with the ``run.json`` beside the checkpoint."""
    record = folder.parent / "run.json"
    if not record.is_file():
        return
    saved, now = json.loads(record.read_text()), json.loads(json.dumps(resolved, default=str))
    pairs = [(key, saved["training"].get(key), now["training"].get(key)) for key in _DECISIVE]
    pairs += [(key, saved["molf"].get(key), now["molf"][key]) for key in now["molf"]]
    pairs += [
        (key, saved["method"].get(key), now["method"][key])
        for key in ("method", "dtype", "quantization", "task", "max_examples")
    ]
    for key, old, new in pairs:
        if old != new:
            raise ValueError(
                f"{key} was {old} in the run of {folder}, now it is {new}: a resumed run continues exactly, so "
                "keep the options or start a new run in another output_dir"
            )
