"""What ``molf train`` takes: the method and its experts, next to TRL's SFTConfig."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar

import torch
from trl import SFTConfig

from ..optim import MoLFConfig
from ..tasks import TASKS
from ..tasks.prompts import LONG_PROMPTS
from .distributed import FSDP_CONFIG, check_fsdp, refuse_engines
from .methods import METHODS, resolve
from .quantize import PACKAGES
from .resume import BY_METRIC

_COMPILE: dict[str, bool | str] = {"auto": "auto", "true": True, "false": False}


def _help(text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class MethodArguments:
    """The model, the data and the method; every other option is SFTConfig's.

    Raises:
        ValueError: If a value is out of its range; the message names it and the remedy.
    """

    needs_data: ClassVar[bool] = True

    model_name_or_path: str = _help("Folder or hub id of a transformers causal language model.", "")
    model_revision: str = _help("Revision of the model on the hub.", "main")
    dtype: str = _help("Precision to load the model in: float32, bfloat16 or auto (as stored).", "float32")
    quantization: str = _help(
        f"Quantise the frozen base of an adapter: {', '.join(PACKAGES)}. Saved adapters fit the original base.",
        "none",
    )
    method: str = _help(f"One of {', '.join(METHODS)}.", "molf")
    task: str | None = _help(f"One of {', '.join(TASKS)}; without it completion, prompts and completions of your own.")
    dataset_path: str | None = _help("The data: the task's file, folder or hub id[:split].")
    eval_dataset_path: str | None = _help(
        "Records to score after training and in evaluations; default is the trained ones, but of completion none."
    )
    max_examples: int | None = _help("Train on at most this many records, from the start of the data.")
    validation_size: float = _help("Split the records: size of the validation part, or its share below 1.", 0.0)
    test_size: float = _help("Size or share of the test part; both parts are scored after training.", 0.0)
    split_seed: int = _help("Seed of the split, apart from the seed of training.", 0)
    eval_at_end: bool = _help("Score the task after training and add it to metrics.json.", True)
    eval_examples: int = _help(
        "With eval_strategy: how many records, of the validation part if there is one, give the loss and the score "
        "while training goes on.",
        64,
    )
    long_prompts: str = _help(
        "Prompts that exceed the model's context: truncate (from the left) or refuse.", "truncate"
    )
    expert_ranks: list[int] = field(
        default_factory=list,
        metadata={
            "help": "Ranks of the LoRA experts: default 128; 32 128 for molf-e and lora-sum; one rank, default 16, for "
            "lora, rslora, dora, pissa, adalora (where it is the average left in the end) and lora+other."
        },
    )
    lora_alpha: list[float] = field(
        default_factory=list,
        metadata={"help": "alpha: one number, or one per expert; default is scale 2 at every rank."},
    )
    use_rslora: bool | None = _help(
        "Scale by alpha / sqrt(r) (always so in rslora) instead of alpha / r (always so in adalora); default no for "
        "lora, dora and pissa, else yes. It matters with lora_alpha alone."
    )
    target_modules: list[str] = field(
        default_factory=list, metadata={"help": "Layers to adapt: all-linear (default), one regex, or name endings."}
    )
    exclude_modules: list[str] = field(
        default_factory=list, metadata={"help": "Layers to leave out: one regex, or name endings."}
    )
    top_k: int = _help("Experts updated per layer and step.", 1)
    score_fn: str = _help("Routing score: epd or pfn.", "epd")
    random_shares: list[float] = field(
        default_factory=list,
        metadata={"help": "For the method random: one share per expert, dense first; drawn with the seed."},
    )
    lora_lr: float | None = _help("Learning rate of the LoRA experts; default is learning_rate.")
    lora_weight_decay: float = _help("Weight decay of LoRA's A and B.", 0.01)
    lora_dropout: float = _help("Dropout on LoRA's input; molf-e, lora-sum and PEFT's methods only.", 0.0)
    train_other: bool | None = _help(
        "Train what is not routed; default no for molf-e, else yes. molf-e then saves a whole model, no adapter."
    )
    compile: str = _help("Compile the optimizer's elementwise passes: true, false, or auto where it pays.", "auto")
    keep_base: bool = _help("Keep W beside the weight P; false computes it, and rounds bf16 stochastically.", True)
    moments_8bit: bool = _help("Keep the moments of all but the LoRA experts in 8 bits (torchao).", False)
    step_in_backward: bool = _help(
        "Step every layer in the backward pass and free its gradient; needs gradient_accumulation_steps 1 and "
        "max_grad_norm 0.",
        False,
    )
    check_ranks_every: int | None = _help(
        "Compare what must be equal on all processes every this many steps, and stop where it is not."
    )

    dry_run: bool = _help(
        "Make one step, print its peak memory next to the estimate of molf plan, and save nothing.", False
    )

    def __post_init__(self) -> None:
        for name in ("expert_ranks", "lora_alpha", "random_shares", "target_modules", "exclude_modules"):
            value = getattr(self, name)  # YAML may give one value without a list
            setattr(self, name, list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value])
        if not self.model_name_or_path:
            raise ValueError("model_name_or_path is not given: name a transformers folder or hub id")
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r}: choose one of {', '.join(METHODS)}")
        if self.task is not None and self.task not in TASKS:
            raise ValueError(f"task={self.task!r}: choose one of {', '.join(TASKS)}, or leave it out")
        if self.needs_data and self.task is None and not self.dataset_path:
            raise ValueError("dataset_path is not given: name a file of training data, or a task with its own")
        for name in ("validation_size", "test_size"):
            size = getattr(self, name)
            if not 0 <= size < math.inf or (size > 0 and self.eval_dataset_path):
                raise ValueError(
                    f"{name}={size:g}: must be positive and finite; it splits the records of dataset_path, so it needs "
                    "no eval_dataset_path"
                )
        if self.long_prompts not in LONG_PROMPTS:
            raise ValueError(f"long_prompts={self.long_prompts!r}: choose one of {', '.join(LONG_PROMPTS)}")
        if self.compile.lower() not in _COMPILE:
            raise ValueError(f"compile={self.compile!r}: choose one of {', '.join(_COMPILE)}")
        if self.dtype not in ("float32", "bfloat16", "auto"):
            raise ValueError(f"dtype={self.dtype!r}: choose float32, bfloat16 or auto")
        if self.quantization not in PACKAGES:
            raise ValueError(f"quantization={self.quantization!r}: choose one of {', '.join(PACKAGES)}")
        spec = METHODS[self.method]
        if self.quantization != "none" and (not spec.quantizes or self.train_other):
            other = " with train_other" if spec.quantizes else ""
            raise ValueError(
                f"quantization={self.quantization}: {self.method}{other} needs the base's weights in full precision; "
                f"leave it out or choose one of {', '.join(name for name, m in METHODS.items() if m.quantizes)}"
            )
        for name in ("max_examples", "eval_examples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        self._refuse_unused()
        if spec.one_rank and len(self.expert_ranks) > 1:
            raise ValueError(f"expert_ranks={self.expert_ranks}: {self.method} has one rank; use molf-e for several")

    @property
    def data_task(self) -> str:
        """What the data are of: the task, or prompts and completions."""
        return self.task or "completion"

    def _refuse_unused(self) -> None:
        """An option that the method would ignore is an error, not a surprise."""
        spec = METHODS[self.method]
        unused = (*spec.unused, *(() if self.method == "random" else ("random_shares",)))
        if spec.routes and spec.adapter and not self.train_other:
            unused += ("keep_base", "moments_8bit")  # an adapter has no W beside it, and its moments are small
        for option in fields(self):
            default = option.default_factory() if option.default_factory is not MISSING else option.default
            value = getattr(self, option.name)
            if option.name in unused and value != default:
                remedy = "random" if option.name == "random_shares" else "molf"
                raise ValueError(
                    f"{option.name}={value}: {self.method} does not use it; leave it out or choose {remedy}"
                )

    def molf_config(self, args: SFTConfig) -> MoLFConfig:
        """The experts of the method, with the learning rate, decay, betas and clipping of ``args``."""
        alphas: float | tuple[float, ...] | None = tuple(self.lora_alpha) or None
        if isinstance(alphas, tuple) and len(alphas) == 1:
            alphas = alphas[0]
        spec = METHODS[self.method]
        config = MoLFConfig(
            expert_ranks=tuple(self.expert_ranks) or spec.default_ranks,
            lora_alpha=alphas,
            use_rslora=spec.use_rslora if self.use_rslora is None else self.use_rslora,
            target_modules=_pattern(self.target_modules) or "all-linear",
            exclude_modules=_pattern(self.exclude_modules),
            train_base=spec.train_base,
            top_k=self.top_k,
            score_fn=self.score_fn,
            policy=spec.policy,
            random_shares=tuple(self.random_shares) or None,
            policy_seed=args.seed if spec.policy == "random" else 0,
            lr=args.learning_rate,
            lora_lr=args.learning_rate if self.lora_lr is None else self.lora_lr,
            weight_decay=args.weight_decay,
            lora_weight_decay=self.lora_weight_decay,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            max_grad_norm=args.max_grad_norm or None,
            lora_dropout=self.lora_dropout,
            train_other=self.train_other,
            compile=_COMPILE[self.compile.lower()],
            keep_base=self.keep_base,
            moments_8bit=self.moments_8bit,
            step_in_backward=self.step_in_backward,
            check_ranks_every=self.check_ranks_every,
        )
        return resolve(self.method, config)


def _pattern(values: list[str]) -> str | list[str] | None:
    """One value with regex characters, or "all-linear", stays a string, as PEFT reads it; else a list of endings."""
    if not values:
        return None
    single = len(values) == 1 and (values[0] == "all-linear" or not values[0].replace("_", "").isalnum())
    return values[0] if single else list(values)


@dataclass
class TrainArguments(SFTConfig):
    """TRL's SFTConfig with MoLF's defaults where the paper has some."""

    learning_rate: float = _help("Peak learning rate of the dense expert and of what is not routed.", 5e-5)
    weight_decay: float = _help("Weight decay of dense matrices; 0 for biases and norms always.", 0.1)
    lr_scheduler_type: str = _help("Learning-rate schedule.", "cosine")
    warmup_steps: float = _help("Warm-up steps, or as a ratio of all steps below 1.", 0.1)
    output_dir: str = _help("Run directory.", "runs/molf")
    completion_only_loss: bool | None = _help("No loss on the prompt.", True)  # TRL takes cut prompts for plain text
    bf16: bool | None = _help("bf16 mixed precision; default on a GPU.")
    activation_checkpointing: bool | None = _help("transformers' new name for gradient_checkpointing.")
    dataloader_pin_memory: bool = _help("Pin memory of batches; default on a GPU.", torch.cuda.is_available())
    use_cpu: bool = _help(
        "Train on the CPU; default where there is nothing else.", not torch.accelerator.is_available()
    )
    resume_from_checkpoint: str | None = _help(
        "A checkpoint folder; last, the newest whole one in output_dir; or auto, the same if there is one, else start."
    )
    fsdp: str | None = field(
        default=None, metadata={"help": "Shard the model over the processes, with FSDP2.", "nargs": "?", "const": True}
    )
    fsdp_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": f"JSON, or a mapping in YAML, with {', '.join(FSDP_CONFIG)}."}
    )
    on_nonfinite: str = _help("At a loss or gradient that is NaN or infinite: stop, or skip the step.", "stop")
    nonfinite_limit: int = _help("How many such steps in a row are skipped before the run stops.", 10)
    report_to: None | str | list[str] = field(  # noqa: RUF036  the parser takes the order of TrainingArguments alone
        default="none", metadata={"help": "Where to log: none, tensorboard, wandb, trackio, ..."}
    )

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = torch.cuda.is_available() and not self.fp16
        if self.activation_checkpointing is None:  # transformers' new name for TRL's gradient_checkpointing
            self.activation_checkpointing = self.gradient_checkpointing
        refuse_engines(self)
        this: Any = self
        fsdp, config = check_fsdp(self.fsdp, self.fsdp_config)
        if config.get("cpu_offload") and torch.cuda.is_available():  # the optimizer then adds up tensors on the CPU
            this.ddp_backend = this.ddp_backend or "cuda:nccl,cpu:gloo"
        self.fsdp = self.fsdp_config = None  # the Trainer would have accelerate shard, after the optimizer is made
        super().__post_init__()
        this.fsdp, this.fsdp_config = fsdp, config
        if self.lr_scheduler_type in BY_METRIC and self.greater_is_better:
            self.lr_scheduler_kwargs = {"mode": "max", **(this.lr_scheduler_kwargs or {})}  # their own default is "min"
