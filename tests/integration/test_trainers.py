"""transformers' Trainer and TRL's: MoLF and MoLF-Efficient, with what each trainer can do beside."""

from __future__ import annotations

import inspect
import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, GRPOConfig, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import use_adapter

from molf import MoLFConfig, MoLFOptimizerFactory, MoLFTrainerMixin, molf_lora_config
from molf.assets import BUNDLED_MODEL
from molf.train.trainers import MoLFDPOTrainer, MoLFGRPOTrainer
from watch import StepWatch

pytestmark = pytest.mark.filterwarnings(
    "ignore:.gradient_checkpointing.* is deprecated:FutureWarning",  # TRL 1.16, with transformers' older names
    "ignore:.*is_gradient_checkpointing.* is deprecated:FutureWarning",
)

MOLF = MoLFConfig(expert_ranks=(4,), lr=3e-4, lora_lr=1e-3, max_grad_norm=1.0)
EFFICIENT = MoLFConfig(expert_ranks=(2, 4), train_base=False, lora_lr=3e-3, max_grad_norm=1.0)
CONFIGS = {"molf": MOLF, "molf-e": EFFICIENT}
PLAIN: dict[str, Any] = {"gradient_checkpointing": False, "bf16": False}
ALL = {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "bf16": True}
TEXTS = ["Ada Alder plays the organ.", "Leo Lark speaks Cestic and", "Ada Alder plays the drum. Leo"] * 8


def load(model_class: Any = AutoModelForCausalLM, **options: Any) -> Any:
    return model_class.from_pretrained(BUNDLED_MODEL, dtype=torch.float32, **options)


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BUNDLED_MODEL)


def arguments(config_class: Any, folder: Any, steps: int = 3, **options: Any) -> Any:
    """The trainer's own clipping is off: the optimizer clips."""
    common = {
        "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": 4, "use_cpu": True,
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "report_to": "none", "save_strategy": "no",
        "logging_steps": 1, "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    return config_class(**common | options)


def bits(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], model: Any) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def train(trainer: Any, steps: int = 3) -> StepWatch:
    """Train and look at every step; afterwards exactly what the config trains has changed."""
    watch = StepWatch()
    trainer.add_callback(watch)
    before = bits(trainer.model)
    trainer.train()
    assert watch.steps == trainer.state.global_step == steps
    config, after = watch.optimizer.config, changed(before, trainer.model)
    if config.train_base:
        assert {f"{name}.weight" for name in watch.optimizer.routed_modules} <= after
        assert trainer.model.lm_head.weight is trainer.model.model.embed_tokens.weight
    else:
        assert after
        assert not [name for name in after if ".lora_" not in name and "modules_to_save" not in name]
    return watch


def adapted(model: Any, name: str, task_type: str = "CAUSAL_LM") -> Any:
    return get_peft_model(model, molf_lora_config(EFFICIENT, task_type=task_type)) if name == "molf-e" else model


def factory(name: str) -> Any:
    return MoLFOptimizerFactory, {"config": CONFIGS[name]}


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_trainer(tmp_path, name: str) -> None:
    data = [{"input_ids": tokenizer()(text).input_ids} for text in TEXTS]
    train(
        Trainer(
            adapted(load(), name),
            arguments(TrainingArguments, tmp_path, **ALL),
            train_dataset=data,
            data_collator=DataCollatorForLanguageModeling(tokenizer(), mlm=False),
            optimizer_cls_and_kwargs=factory(name),
        )
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_sft_trainer_with_packing(tmp_path, name: str) -> None:
    trainer = SFTTrainer(
        load(),
        args=arguments(SFTConfig, tmp_path, **ALL, packing=True, max_length=16),
        train_dataset=Dataset.from_list([{"text": text} for text in TEXTS]),
        processing_class=tokenizer(),
        peft_config=molf_lora_config(EFFICIENT, task_type="CAUSAL_LM") if name == "molf-e" else None,
        optimizer_cls_and_kwargs=factory(name),
    )
    assert len(trainer.train_dataset) < len(TEXTS)
    train(trainer)


@pytest.mark.parametrize("name", CONFIGS)
def test_reward_trainer(tmp_path, name: str) -> None:
    """The new head is not routed; it trains, in MoLF-Efficient because PEFT copies it for a classifier."""
    model = load(AutoModelForSequenceClassification, num_labels=1)
    model.config.pad_token_id = tokenizer().pad_token_id
    trainer = RewardTrainer(
        adapted(model, name, "SEQ_CLS"),
        args=arguments(RewardConfig, tmp_path, **ALL),
        train_dataset=Dataset.from_list([{"chosen": a, "rejected": b} for a, b in itertools.pairwise(TEXTS)]),
        processing_class=tokenizer(),
        optimizer_cls_and_kwargs=factory(name),
    )
    before = bits(trainer.model)
    watch = StepWatch()
    trainer.add_callback(watch)
    trainer.train()
    assert watch.steps == 3
    assert len(watch.optimizer.routed_modules) == 28
    heads = {key for key in changed(before, trainer.model) if "score" in key}
    assert heads == ({"score.weight"} if name == "molf" else {"base_model.model.score.modules_to_save.default.weight"})


def reference_logits(trainer: Any) -> torch.Tensor:
    """Of what TRL takes as the reference: its copy, or the trained model with another adapter or none."""
    ids, own = torch.arange(10, 22)[None], trainer.ref_model
    other = nullcontext() if own is not None else use_adapter(
        trainer.model, "ref" if "ref" in trainer.model.peft_config else None
    )  # fmt: skip
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=trainer.args.bf16), other:
        return (trainer.model if own is None else own)(input_ids=ids).logits.float()


def made(trainer_class: Any, form: str, **options: Any) -> Any:
    """MoLF on the plain model, MoLF-Efficient by ``peft_config``, and on a model that has its adapter already."""
    name = "molf" if form == "molf" else "molf-e"
    peft_config = molf_lora_config(EFFICIENT, task_type="CAUSAL_LM")
    return trainer_class(
        get_peft_model(load(), peft_config) if form == "molf-e, adapted" else load(),
        peft_config=peft_config if form == "molf-e" else None,
        processing_class=tokenizer(),
        molf_config=CONFIGS[name],
        **options,
    )


def assert_reference_stays(trainer: Any) -> StepWatch:
    """Ten steps: the policy moves, the reference is the starting point bit for bit, every expert still trains."""
    ids = torch.arange(10, 22)[None]
    start = reference_logits(trainer)
    if not trainer.args.bf16:
        with torch.no_grad():
            assert torch.equal(start, load()(input_ids=ids).logits)
    watch = train(trainer, steps=10)
    assert torch.equal(reference_logits(trainer), start)
    assert trainer.ref_model is None or not changed(bits(load()), trainer.ref_model)
    with torch.no_grad():
        assert not torch.equal(trainer.model(input_ids=ids).logits, start)
    trains = {id(p) for group in watch.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in trainer.model.parameters() if p.requires_grad} == trains
    return watch


PAIRS = [{"prompt": "Ada Alder plays the", "chosen": " drum.", "rejected": " organ."},
         {"prompt": "Leo Lark speaks", "chosen": " Cestic.", "rejected": " French now."}] * 8  # fmt: skip
FORMS = [("molf", ALL), ("molf-e", ALL), ("molf-e, adapted", PLAIN)]


@pytest.mark.parametrize(("form", "options"), FORMS)
def test_dpo_trainer(tmp_path, form: str, options: dict[str, Any]) -> None:
    args = arguments(DPOConfig, tmp_path, steps=10, **options)
    trainer = made(MoLFDPOTrainer, form, args=args, train_dataset=Dataset.from_list(PAIRS))
    assert_reference_stays(trainer)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=2e-3)  # log 2: policy and reference are the same model, bf16 or not
    assert losses[-1] < 0.6


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The share of even tokens: it differs between completions."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


@pytest.mark.parametrize(
    ("form", "options", "beta"), [*((*form, 0.5) for form in FORMS), ("molf", PLAIN, 0.0), ("molf-e", ALL, 0.0)]
)
def test_grpo_trainer(tmp_path, form: str, options: dict[str, Any], beta: float) -> None:
    sampling = {"num_generations": 4, "max_completion_length": 6, "temperature": 3.0}
    args = arguments(GRPOConfig, tmp_path, steps=10 if beta else 3, **options, **sampling, beta=beta)
    prompts = Dataset.from_list(PAIRS).select_columns("prompt")
    trainer = made(MoLFGRPOTrainer, form, reward_funcs=reward, args=args, train_dataset=prompts)
    if beta:
        assert_reference_stays(trainer)
        assert max(entry.get("kl", 0) for entry in trainer.state.log_history) > 0
    else:
        assert trainer.ref_model is None
        train(trainer)


class Mixed(MoLFTrainerMixin, Trainer):
    """A trainer by the mixin alone."""


@pytest.mark.parametrize(
    ("options", "limit", "warning"),
    [
        ({"max_grad_norm": 1.0}, 0.5, "max_grad_norm=0.5 of the trainer clips once more: set it to 0"),
        ({"step_in_backward": True}, 0.5, "max_grad_norm=0.5 of the trainer has no effect with step_in_backward"),
        ({"max_grad_norm": 1.0}, 0.0, None),
        ({}, 0.5, None),
    ],
)
def test_two_clippings_are_told(tmp_path, options: dict[str, Any], limit: float, warning: str | None) -> None:
    config = MoLFConfig(expert_ranks=(4,), **options)
    with pytest.warns(match=warning) if warning else nullcontext():
        Mixed(load(), arguments(TrainingArguments, tmp_path, max_grad_norm=limit), molf_config=config)


def test_seq2seq_trainer_takes_the_mixin(tmp_path) -> None:
    class MoLFSeq2SeqTrainer(MoLFTrainerMixin, Seq2SeqTrainer):
        pass

    assert "optimizer_cls_and_kwargs" not in inspect.signature(Seq2SeqTrainer.__init__).parameters
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 64}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    data = [{"input_ids": [3, 4, 5], "labels": [6, 7]}] * 8
    before = bits(model)
    args = arguments(Seq2SeqTrainingArguments, tmp_path)
    trainer = MoLFSeq2SeqTrainer(model, args, train_dataset=data, molf_config=MOLF)
    trainer.train()
    routed = trainer.optimizer.optimizer.routed_modules
    assert len(routed) == 16
    assert {f"{name}.weight" for name in routed} <= changed(before, model)


def test_the_mixin_is_the_factory(tmp_path) -> None:
    data = [{"input_ids": tokenizer()(text).input_ids} for text in TEXTS]
    results = []
    for trainer_class, how in (
        (Mixed, {"molf_config": MOLF}),
        (Trainer, {"optimizer_cls_and_kwargs": factory("molf")}),
    ):
        torch.manual_seed(0)
        collator = DataCollatorForLanguageModeling(tokenizer(), mlm=False)
        args = arguments(TrainingArguments, tmp_path)
        trainer = trainer_class(load(), args, train_dataset=data, data_collator=collator, **how)
        trainer.train()
        assert trainer.create_optimizer() is trainer.optimizer
        results.append(trainer.model)
    assert not changed(bits(results[0]), results[1])


def test_the_mixin_refuses_a_second_optimizer_and_a_reference_that_would_be_trained(tmp_path) -> None:
    model = load()
    optimizers = (torch.optim.SGD(model.parameters(), lr=0.1), None)
    with pytest.raises(ValueError, match="optimizers=SGD: the optimizer is made from molf_config"):
        Mixed(model, arguments(TrainingArguments, tmp_path), molf_config=MOLF, optimizers=optimizers)
    superposed = MoLFConfig(expert_ranks=(2, 4))
    with_norms = MoLFConfig(expert_ranks=(2, 4), train_base=False, train_other=True)
    for config, message in ((superposed, "train_base=True with an adapter"), (with_norms, "train_other=True with an")):
        trainer = MoLFDPOTrainer(
            load(), args=arguments(DPOConfig, tmp_path, **PLAIN), train_dataset=Dataset.from_list(PAIRS),
            processing_class=tokenizer(), peft_config=molf_lora_config(config), molf_config=config,
        )  # fmt: skip
        with pytest.raises(ValueError, match=message):
            trainer.train()


def test_without_a_reference_any_form_trains(tmp_path) -> None:
    """GRPO with beta 0, reference log-probabilities computed beforehand, and trainers that have a beta alone."""
    config = MoLFConfig(expert_ranks=(2, 4))
    common = {"processing_class": tokenizer(), "peft_config": molf_lora_config(config), "molf_config": config}
    prompts = Dataset.from_list(PAIRS)
    grpo = arguments(GRPOConfig, tmp_path, **PLAIN, beta=0.0, num_generations=4)
    dpo = arguments(DPOConfig, tmp_path, **PLAIN, precompute_ref_log_probs=True)
    alone = Mixed(load(), arguments(TrainingArguments, tmp_path), molf_config=config)
    alone.beta = 0.1
    for trainer in (
        MoLFGRPOTrainer(load(), reward, args=grpo, train_dataset=prompts, **common),
        MoLFDPOTrainer(load(), args=dpo, train_dataset=prompts, **common),
        alone,
    ):
        assert len(trainer.create_optimizer().routed_modules) == 28
