"""Which checkpoint a run continues from, and whether it can continue exactly."""

from __future__ import annotations

import json
import math
from itertools import count
from pathlib import Path
from typing import Any

from ..files import copy_whole, read_json, sync
from .verify import UNFINISHED, check_checkpoint, checkpoints, progress

_OUTPUTS = (
    "run.json",
    "export.json",
    "config.json",
    "adapter_config.json",
    "model.safetensors",
    "adapter_model.safetensors",
    "checkpoint-*",
)
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
_DECISIVE = (
    "learning_rate lr_scheduler_type warmup_steps num_train_epochs max_steps per_device_train_batch_size "
    "gradient_accumulation_steps seed data_seed adam_beta1 adam_beta2 adam_epsilon max_length packing packing_strategy "
    "bf16 fp16 optim lr_scheduler_kwargs label_smoothing_factor neftune_noise_alpha completion_only_loss loss_type "
    "dataloader_drop_last eos_token train_sampling_strategy average_tokens_across_devices shuffle_dataset "
    "ignore_data_skip pad_to_multiple_of padding_free optim_args optim_target_modules accelerator_config "
    "router_aux_loss_coef tf32 torch_compile use_liger_kernel"
).split()
_OF_METHOD = (
    "model_name_or_path model_revision method dtype quantization task dataset_path max_examples validation_size "
    "test_size split_seed long_prompts"
).split()

BY_METRIC = ("reduce_lr_on_plateau", "greedy")
"""Schedules whose learning rates go by evaluations, so that these decide, too."""
_EVALUATION = (
    "eval_strategy eval_steps eval_delay metric_for_best_model greater_is_better per_device_eval_batch_size "
    "eval_packing bf16_full_eval fp16_full_eval"
).split()
_EVALUATED = ("eval_examples", "eval_dataset_path")
_DATA = {"examples": "training examples", "evaluated": "evaluated records"}


def starts_anew(wanted: str | None) -> bool:
    """Whether ``--resume_from_checkpoint`` asks for no checkpoint."""
    return str(wanted).lower() in ("none", "", "false")


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint that is whole, for the ``resume_from_checkpoint`` of any Trainer; None if there is none.

    One that is newer and incomplete or damaged is named on standard output and skipped.
    """
    out = Path(output_dir)
    for staged in sorted(out.glob(f"{UNFINISHED}/checkpoint-*")):
        print(f"skipped {staged}: it was being written when the run ended", flush=True)
    for folder in reversed(checkpoints(out)):
        try:
            check_checkpoint(folder)
        except ValueError as error:
            print(f"skipped {folder}: {error}", flush=True)
        else:
            return str(folder)
    return None


def find_checkpoint(wanted: str | None, output_dir: str, resolved: dict[str, Any]) -> str | None:
    """The checkpoint folder to continue from, or None to start anew.

    Args:
        wanted: ``--resume_from_checkpoint``: a folder; "true" or "last" for the newest whole one in ``output_dir``;
            "auto" for the same if there is one, else a start over whatever a killed run of the same settings left.
            None starts in an unused ``output_dir``.
        output_dir: The run directory.
        resolved: This run's configuration, as written to ``run.json``.

    Raises:
        ValueError: If there is no such checkpoint, it is incomplete or damaged, the run is over, it was made with other
            settings, or a new run would mix with what ``output_dir`` holds. Nothing has been written then.
    """
    out = Path(output_dir)
    file = next((path for path in (out, *out.parents) if path.exists() and not path.is_dir()), None)
    if file is not None:
        raise ValueError(f"output_dir={output_dir}: {file} is a file; choose another folder")
    auto = str(wanted).lower() == "auto"
    found = last_checkpoint(out) if auto or str(wanted).lower() in ("true", "last") else wanted
    if starts_anew(found):
        if not starts_anew(wanted) and not auto:
            raise ValueError(
                f"resume_from_checkpoint={wanted}: {out} has no checkpoint that is whole; leave the option out to "
                "start, or give auto, which starts where there is none"
            )
        _check_free(out, resolved if auto else None)
        return None
    folder = Path(str(found))
    if found == wanted:
        check_checkpoint(folder)
    check_same(folder.parent, resolved)
    if is_over(folder) and (folder.parent / "metrics.json").is_file():
        raise ValueError(f"resume_from_checkpoint={folder}: the run is over, all {progress(folder)[1]} steps are done")
    if folder.parent.resolve() != out.resolve():
        _check_free(out, resolved)
    return str(folder)


def set_aside(out: Path, step: int) -> None:
    """Move the checkpoints after the step that a run goes on from out of the way, with the log that leads to them.

    The run cuts its log there: ``auto`` would take one of them that the log no longer reaches.
    """
    later = checkpoints(out, after=step)
    if not later:
        return
    aside = next(path for n in count(1) if not (path := out / f"set-aside-{n}").exists())
    aside.mkdir()
    for log in (path for path in (out / "routing.jsonl", out / "run.json") if path.is_file()):
        copy_whole(log, aside / log.name)
    for folder in reversed(later):  # the newest first: what is left is always what the log leads to
        folder.rename(aside / folder.name)
    for folder in (aside, out):
        sync(folder)
    names = ", ".join(folder.name for folder in later)
    print(
        f"the run goes on from step {step}: {names} moved to {aside}; remove that when you need it no more", flush=True
    )


def _check_free(out: Path, resolved: dict[str, Any] | None) -> None:
    """Refuse a folder that holds an export, or a run, unless it was killed and has the settings, if there are any."""
    if resolved is not None and (out / "run.json").is_file():
        check_same(out, resolved)
        return
    used = next((path.name for name in _OUTPUTS for path in out.glob(name)), None)
    if used is not None:
        raise ValueError(
            f"output_dir={out} holds {used} of an earlier run or export: choose another folder, remove it, or continue "
            "a run with --resume_from_checkpoint last"
        )


def is_over(checkpoint: str | Path) -> bool:
    """Whether a checkpoint is of the last step, so that only the end of the run is left: saving and scoring."""
    done, of = progress(Path(checkpoint))
    return done >= of > 0


def finished(wanted: str | None, output_dir: str, resolved: dict[str, Any]) -> dict[str, Any] | None:
    """The metrics of a run that "auto" finds ended, else None.

    Raises:
        ValueError: If it had other settings, or what it left is damaged.
    """
    metrics = Path(output_dir) / "metrics.json"
    if str(wanted).lower() != "auto" or not metrics.is_file():
        return None
    check_same(Path(output_dir), resolved)
    print(f"the run in {output_dir} is over: these are its metrics")
    return read_json(metrics)


def check_same(run: Path, resolved: dict[str, Any]) -> None:
    """A resumed run continues exactly or not at all: compare with its ``run.json``, if there is one.

    Raises:
        ValueError: Naming the first setting that differs, or the file if it is damaged.
    """
    record = run / "run.json"
    if not record.is_file():
        return
    saved, now = read_json(record), json.loads(json.dumps(resolved, default=str))
    parts = {"training": _DECISIVE, "molf": now["molf"], "method": _OF_METHOD}
    pairs = [(key, part) for part, keys in parts.items() for key in keys]
    if now["training"]["lr_scheduler_type"] in BY_METRIC:
        pairs += [*((key, "training") for key in _EVALUATION), *((key, "method") for key in _EVALUATED)]
    if saved.get("processes", 1) != now["processes"]:
        _check_same_batch(saved, now, run)
        pairs = [(key, part) for key, part in pairs if key not in _BATCH]
    for key, part in pairs:
        old, new = saved.get(part, {}).get(key), now[part].get(key)
        if old != new:
            raise ValueError(
                f"{key} was {old} in the run of {run}, now it is {new}: a resumed run continues exactly, so keep the "
                "options or start a new run in another output_dir"
            )
    for key, what in _DATA.items():
        if key in saved.get("data", {}) and saved["data"][key] != now.get("data", {}).get(key):
            raise ValueError(
                f"the {what} are not those of the run of {run}, though of the same name: a resumed run continues "
                "exactly, so restore the data or start a new run in another output_dir"
            )


def _check_same_batch(saved: dict[str, Any], now: dict[str, Any], run: Path) -> None:
    """Another number of processes continues where every step has the same examples, if not bit for bit.

    Raises:
        ValueError: If the number of examples per step differs.
    """
    old, new = (
        math.prod((each.get("processes", 1), *(each["training"][key] for key in _BATCH))) for each in (saved, now)
    )
    if old != new:
        raise ValueError(
            f"a step had {old} examples in the run of {run} ({saved.get('processes', 1)} processes), now it has {new} "
            f"({now['processes']} processes): change {' or '.join(_BATCH)} so that it has {old}"
        )
    print(
        f"continued by {now['processes']} processes, not {saved.get('processes', 1)}: every step has the same "
        "examples, but sums are rounded in another order"
    )
