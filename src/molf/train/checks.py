"""What the method and the training arguments must agree on, looked at before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import get_scheduler
from trl import SFTConfig

from ..tasks import get_task
from .arguments import MethodArguments, TrainArguments
from .distributed import check_launch
from .load import check_revision
from .methods import METHODS
from .nonfinite import ON_NONFINITE
from .resume import starts_anew

_NOT_SHARDED = ("dora", "pissa", "adalora")
_IN_BACKWARD = {"gradient_accumulation_steps": 1, "max_grad_norm": 0, "fp16": False, "on_nonfinite": "stop"}
"""With step_in_backward: a step is made before another batch, all gradients or a loss scaler are there."""
_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "per_device_train_batch_size": (lambda size: size >= 1, "must be at least 1"),
    "gradient_accumulation_steps": (lambda steps: steps >= 1, "must be at least 1"),
    "max_steps": (lambda steps: steps == -1 or steps >= 1, "must be at least 1; num_train_epochs counts without it"),
    "auto_find_batch_size": (
        lambda wanted: not wanted,
        "it would start again with the weights and moments that are trained by then; leave it out and lower "
        "per_device_train_batch_size, --dry_run true shows the memory",
    ),
    "on_nonfinite": (lambda name: name in ON_NONFINITE, f"choose one of {', '.join(ON_NONFINITE)}"),
    "nonfinite_limit": (lambda limit: limit >= 1, "must be at least 1; to skip none, use stop"),
    "neftune_noise_alpha": (lambda alpha: alpha is None or 0 <= alpha < math.inf, "must be 0 or more, and finite"),
    "label_smoothing_factor": (lambda factor: 0 <= factor < 1, "must be 0 or more, and below 1"),
    "max_length": (lambda size: size is None or size >= 1, "must be at least 1; longer sequences are cut to it"),
    "pad_to_multiple_of": (lambda size: size is None or size >= 1, "must be at least 1; without it nothing is rounded"),
}
"""Options of SFTConfig and TrainArguments that are wrong whatever the others are: what is allowed, and the remedy."""


def check_training(method: MethodArguments, args: TrainArguments) -> None:
    """See that a run with these arguments does what they say.

    Raises:
        ValueError: Naming the argument, its value and the remedy.
    """
    check_launch(args)
    check_revision(method.model_name_or_path, method.model_revision)
    _check_processes(method, args)
    _check_optimizer(method, args)
    _check_evaluations(method, args)
    for name, (allowed, remedy) in _ALLOWED.items():
        if not allowed(getattr(args, name)):
            raise ValueError(f"{name}={getattr(args, name)!r}: {remedy}")
    if not 0 < args.num_train_epochs < math.inf and args.max_steps <= 0:
        raise ValueError(f"num_train_epochs={args.num_train_epochs}: must be positive and finite")
    _check_device(args)
    _check_accelerator(args.accelerator_config)
    _check_checkpoints(args)
    _check_schedule(args)


def _check_processes(method: MethodArguments, args: TrainArguments) -> None:
    """What several processes, or shards of a model, do not take."""
    if args.fsdp and (method.quantization != "none" or method.method in _NOT_SHARDED):
        what = method.method if method.quantization == "none" else f"quantization={method.quantization}"
        raise ValueError(f"fsdp=true: {what} needs whole weights to start from; use DDP, which is fsdp=false")
    if args.fsdp and args.fp16:
        raise ValueError("fp16=True: its loss scaler does not see the gradients of other processes; use bf16")
    if method.dry_run and args.world_size > 1:
        raise ValueError(f"dry_run=True with {args.world_size} processes: it weighs one; start it without a launcher")
    if method.step_in_backward and args.world_size > 1:
        raise ValueError(
            f"step_in_backward=True with {args.world_size} processes: a layer would be stepped before its gradient "
            "is averaged over them; leave it out"
        )


def _check_optimizer(method: MethodArguments, args: TrainArguments) -> None:
    """Options of the optimizer that another one, or another option, stands in for."""
    spec = METHODS[method.method]
    if spec.routes and args.optim != TrainArguments.optim:
        raise ValueError(f"optim={args.optim}: {method.method} is the optimizer; leave the option out")
    for name in ("model_init_kwargs", *(("optim_args", "optim_target_modules") if spec.routes else ())):
        if getattr(args, name):
            raise ValueError(f"{name}={getattr(args, name)}: {method.method} does not use it; leave it out")
    if spec.adapter and not (spec.routes and method.train_other) and args.weight_decay != TrainArguments.weight_decay:
        raise ValueError(f"weight_decay={args.weight_decay}: {method.method} takes lora_weight_decay")
    if method.method == "adalora":
        _check_adalora(args)
    if args.enable_jit_checkpoint and (method.method == "adalora" or args.save_only_model):
        raise ValueError(
            f"enable_jit_checkpoint=True: a checkpoint of {method.method} with save_only_model={args.save_only_model} "
            "cannot be continued exactly; leave it out"
        )
    for name, value in _IN_BACKWARD.items() if method.step_in_backward else ():
        if getattr(args, name) != value:
            raise ValueError(
                f"{name}={getattr(args, name)}: with step_in_backward every layer is updated before all gradients "
                f"are there; set it to {value}, or leave step_in_backward out"
            )


def _check_evaluations(method: MethodArguments, args: TrainArguments) -> None:
    others = method.eval_dataset_path or method.validation_size
    trained = get_task(method.data_task).scores_trained and not method.test_size
    if args.eval_strategy != "no" and not (others or trained):
        raise ValueError(
            f"eval_strategy={args.eval_strategy.value}: there is nothing to evaluate, neither a test's records nor "
            "trained ones being taken; give an eval_dataset_path or a validation_size"
        )


def _check_device(args: TrainArguments) -> None:
    if args.fp16 and args.device.type == "cpu":
        raise ValueError("fp16=True: a CPU would train in fp32 all the same; use bf16, or leave it out")
    if args.activation_offloading and not torch.accelerator.is_available():
        raise ValueError("activation_offloading=True: there is no accelerator to offload from; leave it out")


def _check_adalora(args: TrainArguments) -> None:
    """What its ranks, which go by every step's gradients, do not take."""
    if not starts_anew(args.resume_from_checkpoint):
        raise ValueError(
            f"resume_from_checkpoint={args.resume_from_checkpoint}: adalora's importance scores are in no "
            "checkpoint, so it cannot continue exactly; start a new run in another output_dir"
        )
    if args.on_nonfinite == "skip":
        raise ValueError("on_nonfinite=skip: adalora scores its ranks by the gradients of every step; use stop")
    if args.load_best_model_at_end:
        raise ValueError(
            "load_best_model_at_end=True: adalora's last ranks are not those of the best checkpoint; leave it out"
        )


def _check_accelerator(config: Any) -> None:
    """What accelerate would do behind the options that a resume compares."""
    if not config.use_seedable_sampler:
        raise ValueError(
            "accelerator_config use_seedable_sampler=False: the order of the data would not go by seed and epoch, and "
            "no resume would be exact; leave it out"
        )
    steps = (config.gradient_accumulation_kwargs or {}).get("num_steps", 1)
    if steps != 1:
        raise ValueError(
            f"accelerator_config gradient_accumulation_kwargs num_steps={steps}: it would replace "
            "gradient_accumulation_steps; give that one"
        )


def _check_checkpoints(args: TrainArguments) -> None:
    """Whether a checkpoint that is asked for is ever written."""
    if args.save_strategy == "steps" and not args.save_steps > 0:
        raise ValueError(
            f"save_steps={args.save_steps:g}: must be positive, below 1 a share of all steps; to save no checkpoint, "
            "set save_strategy to no"
        )
    for name, value in (("save_strategy", "best"), ("load_best_model_at_end", True)):
        if args.eval_strategy == "no" and getattr(args, name) == value:
            raise ValueError(
                f"{name}={value}: without evaluations no checkpoint is the best; set eval_strategy to steps or epoch, "
                f"or leave {name} out"
            )


def _check_schedule(args: SFTConfig) -> None:
    """Whether the schedule takes its settings; their values are looked at when the number of steps is known."""
    try:
        probe = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
        get_scheduler(args.lr_scheduler_type, probe, 0, 1, args.lr_scheduler_kwargs)
    except (TypeError, ArithmeticError) as error:
        raise ValueError(
            f"lr_scheduler_kwargs={args.lr_scheduler_kwargs} does not fit lr_scheduler_type="
            f"{args.lr_scheduler_type.value}: {error}"
        ) from error
    except ValueError:
        pass
