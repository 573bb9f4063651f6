"""One training run: model, data, method, trainer, and the run directory that it leaves.

The run directory holds the trained model (``model.safetensors`` or ``adapter_model.safetensors``, tokenizer
and configuration), ``run.json`` (resolved configuration and versions), ``metrics.json``, ``trainer_state.json``
(what was logged, with times), ``routing.jsonl`` for methods that route, and the trainer's checkpoints.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of whichever client it uses
from transformers import TrainerCallback, TrainerState, set_seed
from trl import SFTTrainer

from ..errors import of_the_machine
from ..files import claim, copy_whole, of_option, sync, write_json
from ..optim import MoLFConfig, MoLFOptimizerFactory, read_routing
from ..optim.routing import expert_share
from ..optim.sharding import PLAIN, is_sharded
from ..tasks import Task, get_task
from ..tasks.prompts import Context
from .adalora import AdaLoraCallback, AdaLoraTrainer
from .arguments import MethodArguments, TrainArguments
from .callbacks import PlanCallback, RoutingCallback, SpeedCallback, before_loggers
from .checkpoints import WholeCheckpoints, writing
from .checks import check_training
from .data import fit_examples, load_data
from .distributed import check_alike, digest, from_first
from .evaluation import ScoredEvaluation, few
from .load import hub_commit, load_model, load_tokenizer, naming, versions
from .methods import METHODS, Adapted
from .nonfinite import FiniteSteps, skipped_steps
from .quantize import PACKAGES, keep_adapters_in_fp32, quantized
from .resume import BY_METRIC, find_checkpoint, finished, is_over
from .sampling import SeededSampling
from .sharded import ShardedCallback, ShardedTraining, shard
from .stop import check_not_stopped, stop_between_steps
from .verify import progress


def train(method: MethodArguments, args: TrainArguments, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Train by one method and save the result; returns the metrics.

    Args:
        method: Model, data, method and experts.
        args: Everything else, in TRL's names.
        callbacks: Further callbacks of the Trainer.

    Raises:
        ValueError: If an argument, the data, the model or a checkpoint does not fit; no result is written then.
        OSError: If the model or the data cannot be read.
        NonFiniteError: If a loss, gradient or weight is NaN or infinite; the last checkpoint is good.
        StoppedError: If SIGTERM ended it, with ``enable_jit_checkpoint``; no result is written then.

    With several processes all call it, the first alone writes and, unless the model is sharded, scores; the others
    return what they know.
    """
    with contextlib.ExitStack() as held:
        return _train(method, args, callbacks, held)


def _train(
    method: MethodArguments, args: TrainArguments, callbacks: Sequence[TrainerCallback], held: contextlib.ExitStack
) -> dict[str, Any]:
    """``train``, with a stack that holds the run directory until the run has ended."""
    spec = METHODS[method.method]
    config, resolved = _resolved(method, args)
    task = get_task(method.data_task)
    dataset, scored = load_data(task, method)
    evaluated = few(next(iter(scored.values())), method.eval_examples) if args.eval_strategy != "no" else []
    resolved["data"] = {"examples": digest(dataset)}
    if args.lr_scheduler_type in BY_METRIC:
        resolved["data"]["evaluated"] = digest(evaluated)
    where = args.resume_from_checkpoint, str(args.output_dir), resolved
    if (ended := from_first(lambda: finished(*where))) is not None:
        return ended
    checkpoint = from_first(lambda: find_checkpoint(*where))
    args.eval_on_start = args.eval_on_start and checkpoint is None  # a run starts once
    set_seed(args.seed)
    tokenizer = load_training_tokenizer(method, args)
    memory = _PeakMemory()
    with naming(method.model_name_or_path):
        model = load_model(method.model_name_or_path, method.dtype, **_hub(method, args), **_quantized(method, args))
        resolved["model_commit"] = hub_commit(method.model_name_or_path, method.model_revision)
    memory.model = model
    dataset, cut = _fit(task, dataset, scored, model, tokenizer, method, args)
    check_alike("training examples", dataset)
    adapted = Adapted(model, method.method, config, resolved["model_commit"]) if spec.saves_adapter(config) else None
    if args.fsdp:
        shard(model if adapted is None else adapted.model, args)
    adalora = AdaLoraCallback()
    out = Path(str(args.output_dir))
    lock = from_first(lambda: _claim(out))
    if args.process_index == 0:
        held.callback(os.close, lock)
    routing = RoutingCallback(out / "routing.jsonl")
    trainer = _make_trainer(
        method.method,
        model=model if adapted is None else adapted.model,
        args=args,
        train_dataset=dataset,
        eval_dataset=_examples(task, evaluated, model, tokenizer, method, args.max_length) if evaluated else None,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=(MoLFOptimizerFactory, {"config": config}) if spec.routes else None,
        callbacks=[
            *([adalora] if method.method == "adalora" else []),
            ShardedCallback(),
            PlanCallback(out / "run.json", resolved),
            *callbacks,
        ],
    )
    trainer.score = partial(task.evaluate, tokenizer=tokenizer, records=evaluated)
    trainer.verified = checkpoint
    speed = SpeedCallback(memory.mib)
    before_loggers(trainer, speed, *([routing] if spec.routes else []))
    if checkpoint is not None and args.process_index == 0:
        _take_log(Path(checkpoint).parent / "routing.jsonl", routing.path)
    try:
        metrics = {"method": method.method, **_run(trainer, checkpoint, speed), **cut}
    finally:
        routing.close()
    if method.method == "adalora":
        metrics["adalora_ranks"] = adalora.changed_ranks()
    _save(trainer, adapted, out)
    first = args.process_index == 0
    if spec.routes and first:
        metrics["expert_share"] = _expert_shares(out, config)
    if method.eval_at_end and (first or is_sharded(trainer.model)):
        metrics |= _scores(task, trainer, tokenizer, scored, method.method)
    if first:
        write_json(out / "metrics.json", metrics)
    return metrics


def _take_log(source: Path, target: Path) -> None:
    """The routing that led to a checkpoint of another folder; what came after it is dropped when the log goes on."""
    if source.is_file() and not target.exists():
        copy_whole(source, target)


def _expert_shares(out: Path, config: MoLFConfig) -> dict[str, float]:
    records = read_routing(out / "routing.jsonl")[1]
    return {name: expert_share(records, i) for i, name in enumerate(config.experts)}


def _resolved(method: MethodArguments, args: TrainArguments) -> tuple[MoLFConfig, dict[str, Any]]:
    """The experts, and all of ``run.json``; ``args`` gets the rate, decay and clipping that its AdamW is to have."""
    check_training(method, args)
    config = method.molf_config(args)
    if METHODS[method.method].routes:
        args.max_grad_norm = 0.0  # the optimizer clips, because only it knows the virtual gradients
    elif METHODS[method.method].adapter:
        args.learning_rate, args.weight_decay = config.lora_lr, config.lora_weight_decay
    found = versions(*PACKAGES[method.quantization])
    training = {**args.to_dict(), "eos_token": args.eos_token}  # which transformers takes for a secret
    parts = {"method": asdict(method), "molf": asdict(config), "training": training, "versions": found}
    return config, {**parts, "processes": args.world_size}


def _claim(out: Path) -> int:
    with of_option("output_dir", out, "written"):
        return claim(out, "another process trains in this output_dir; wait for its end, or choose another folder", 10)


class _Trainer(FiniteSteps, WholeCheckpoints, ShardedTraining, ScoredEvaluation, SeededSampling, SFTTrainer):
    pass


class _AdaLoraTrainer(FiniteSteps, WholeCheckpoints, ScoredEvaluation, SeededSampling, AdaLoraTrainer):
    pass


def _make_trainer(method: str, **arguments: Any) -> Any:
    template = arguments["args"].chat_template_path
    caches = getattr(arguments["model"].config, "use_cache", None)
    try:
        with of_option("chat_template_path", template) if template else contextlib.nullcontext():
            trainer: Any = (_AdaLoraTrainer if method == "adalora" else _Trainer)(**arguments)
    except (RuntimeError, ImportError, HTTPError) as error:  # such as a logger that is not installed, or push_to_hub
        if of_the_machine(error):
            raise
        raise ValueError(f"the trainer cannot be made: {error}") from error
    args, batch = trainer.args, trainer.args.train_batch_size * trainer.args.world_size
    if args.dataloader_drop_last and len(trainer.train_dataset) < batch:
        raise ValueError(
            f"dataloader_drop_last=True: {len(trainer.train_dataset)} examples fill no batch of {batch}; leave it out, "
            "or lower per_device_train_batch_size"
        )
    stop_between_steps(trainer)
    if caches is not None:
        trainer.model.config.use_cache = caches  # the Trainer's own is of training, where TRL says no at every step
    keep_adapters_in_fp32(trainer.model)
    trainer.on_nonfinite, trainer.nonfinite_limit = args.on_nonfinite, args.nonfinite_limit
    return trainer


def _save(trainer: Any, adapted: Adapted | None, out: Path) -> None:
    """Save the trained model, on the disk before any metrics say that the run is over."""
    with writing(out):
        trainer.save_model()
        trainer.save_state()
        if trainer.args.process_index > 0:
            return
        if adapted is not None:
            adapted.save_on_original_base(out)
        for path in out.iterdir():
            sync(path)


def _scores(task: Task, trainer: Any, tokenizer: Any, scored: dict[str, Sequence[Any]], method: str) -> dict[str, Any]:
    """The task's metrics of every part of the records; those of the part without a name stand by themselves.

    Without the autocast of training: as of what is saved, and as after a resume that trains no more.
    """
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    metrics: dict[str, Any] = {}
    for part, records in scored.items():
        found = task.evaluate(model, tokenizer, records, description=f"evaluate {part or method}")
        metrics |= {part: found} if part else found
    return metrics


def _run(trainer: Any, checkpoint: str | None, speed: SpeedCallback) -> dict[str, Any]:
    """Train; returns loss, steps, time without evaluations, and memory, these two since the resume if there was one."""
    start = time.perf_counter()
    resumed = 0 if checkpoint is None else progress(Path(checkpoint))[0]  # it may be removed while the run goes on
    if checkpoint is not None and is_over(checkpoint):  # the Trainer would take one step more
        loss = None
        trainer.load_ended(checkpoint)
    else:
        loss = trainer.train(resume_from_checkpoint=checkpoint).training_loss
        check_not_stopped(trainer)
    metrics: dict[str, Any] = {
        "train_loss": loss if checkpoint is None else _mean_loss(trainer.state, resumed, loss),
        "steps": trainer.state.global_step,
        "seconds": time.perf_counter() - start - speed.paused,
        "peak_memory_mib": speed.peak_memory(),
    }
    if trainer.on_nonfinite == "skip":
        metrics["skipped_steps"] = len(skipped_steps(trainer.state.log_history))
    return metrics if checkpoint is None else {**metrics, "resumed_from": checkpoint}


def _mean_loss(state: TrainerState, resumed: int, loss: float | None) -> float | None:
    """Mean training loss of a run that continued from step ``resumed``, from its log before and ``loss`` after.

    Steps between the last log and the checkpoint are in neither.
    """
    logged = [(row["step"], row["loss"]) for row in state.log_history if "loss" in row and row["step"] <= resumed]
    before = [0, *(step for step, _ in logged)]
    parts = [(mean, step - earlier) for (step, mean), earlier in zip(logged, before, strict=False)]
    parts += [] if loss is None else [(loss, state.global_step - resumed)]
    total = sum(steps for _, steps in parts)
    return sum(mean * steps for mean, steps in parts) / total if total else loss


def load_training_tokenizer(method: MethodArguments, args: TrainArguments) -> Any:
    """The model's tokenizer.

    Raises:
        ValueError: If it cannot be read, or has no end token, without which it cannot teach when to stop.
    """
    name = method.model_name_or_path
    with naming(name):
        tokenizer = load_tokenizer(name, args.eos_token, **_hub(method, args))
    if tokenizer.eos_token is None:
        raise ValueError(f"the tokenizer of {name} has no EOS token: set one with --eos_token")
    return tokenizer


def _hub(method: MethodArguments, args: TrainArguments) -> dict[str, Any]:
    return {"revision": method.model_revision, "trust_remote_code": args.trust_remote_code}


def _quantized(method: MethodArguments, args: TrainArguments) -> dict[str, Any]:
    half = args.bf16 or method.dtype == "bfloat16"
    return quantized(method.quantization, args.device, torch.bfloat16 if half else torch.float32)


def _fit(
    task: Task,
    dataset: Any,
    scored: dict[str, Sequence[Any]],
    model: Any,
    tokenizer: Any,
    method: MethodArguments,
    args: TrainArguments,
) -> tuple[Any, dict[str, int]]:
    """The training set within context and ``max_length``, and as a metric how many prompts were cut, if any.

    What is to be scored is looked at now, too, before anything is trained.
    """
    for part, records in scored.items() if method.eval_at_end else ():
        name = part or method.eval_dataset_path or method.dataset_path or task.name
        context = Context.of(model, tokenizer, method.long_prompts)
        fit_examples([task.example(record) for record in records], tokenizer, context, name)
    context = Context.of(model, tokenizer, method.long_prompts)
    context.shorten(args.max_length)
    if args.packing_strategy == "wrapped" and (args.packing or args.eval_packing):  # rows are max_length tokens long
        args.max_length = context.length
    dataset = fit_examples(dataset, tokenizer, context, method.dataset_path or task.name)
    padding = tokenizer.convert_tokens_to_ids(args.pad_token or tokenizer.pad_token or tokenizer.eos_token)
    evaluated = args.per_device_eval_batch_size if args.eval_strategy != "no" else 1
    if padding is not None and (max(args.per_device_train_batch_size, evaluated) > 1 or args.pad_to_multiple_of):
        context.check(tokenizer, [[padding]])
    if not context.truncated:
        return dataset, {}
    print(f"{context.truncated} of {len(dataset)} prompts are longer than {context.length} tokens: cut from the left")
    return dataset, {"truncated_examples": context.truncated}


def _examples(
    task: Task,
    records: Sequence[Any],
    model: Any,
    tokenizer: Any,
    method: MethodArguments,
    max_length: int | None,
) -> Any:
    """Records as the dataset of the evaluation loss, within context and ``max_length`` as the training set is."""
    context = Context.of(model, tokenizer, method.long_prompts)
    context.shorten(max_length)
    pairs = Dataset.from_list([task.example(record) for record in records])
    return fit_examples(pairs, tokenizer, context, method.eval_dataset_path or method.dataset_path or task.name)


class _PeakMemory:
    """Peak memory since it was made, MiB: of the device where there is one, else the process's resident growth.

    Without pages of files, which the system takes back when it needs them, but with weights that are mapped and used.

    Attributes:
        model: Whose weights these are.
    """

    def __init__(self, model: Any = None) -> None:
        self.model = model
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        elif os.path.exists("/proc/self/clear_refs"):
            with contextlib.suppress(PermissionError):  # a read-only /proc: the peak may then be an earlier one
                Path("/proc/self/clear_refs").write_text("5")  # what came before the model is none of its peak
        resident, mapped = _resident()
        self.before = resident - mapped

    def mib(self) -> float:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() / 2**20
        status = Path("/proc/self/status").read_text() if os.path.exists("/proc/self/status") else ""
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        peak = int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        used = 0.0 if self.model is None else _mapped(self.model)
        return peak / 2**10 - _resident()[1] - self.before + used


def _resident() -> tuple[float, float]:
    """What of the process is in memory now, and what of that are pages of files, MiB; 0 where there is no /proc."""
    pages = Path("/proc/self/statm").read_text().split()[1:3] if os.path.exists("/proc/self/statm") else (0, 0)
    resident, mapped = (int(count) * resource.getpagesize() / 2**20 for count in pages)
    return resident, mapped


def _mapped(model: Any) -> float:
    """What of a model's frozen weights lies in mapped files, MiB; trained ones, once written, are memory of its own."""
    lines = Path("/proc/self/maps").read_text().splitlines() if os.path.exists("/proc/self/maps") else []
    files = [fields[0].split("-") for fields in map(str.split, lines) if len(fields) > 5 and fields[4] != "0"]
    spans = [range(*(int(end, 16) for end in ends)) for ends in files]
    frozen = (each for each in model.parameters() if type(each) in PLAIN and not each.requires_grad)
    sizes = {each.data_ptr(): each.nbytes for each in frozen}
    return sum(size for place, size in sizes.items() if any(place in span for span in spans)) / 2**20
