"""transformers' own Trainer: save, go on with a fresh trainer, bit for bit; and what it saves is plain."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftConfig, get_peft_model
from safetensors.torch import load_file
from test_resume import assert_identical
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, GRPOConfig

from molf import MoLFConfig, MoLFOptimizerFactory, molf_lora_config
from molf.assets import BUNDLED_MODEL
from molf.train.checkpoints import WholeCheckpoints
from molf.train.nonfinite import FiniteSteps
from molf.train.resume import last_checkpoint
from molf.train.trainers import MoLFDPOTrainer, MoLFGRPOTrainer

CONFIGS = {
    "molf": MoLFConfig(expert_ranks=(2, 4), lr=1e-3, lora_lr=2e-3, max_grad_norm=1.0),
    "molf-e": MoLFConfig(expert_ranks=(2, 4), train_base=False, lora_lr=3e-3, lora_dropout=0.1, max_grad_norm=1.0),
}


def trainer(name: str, folder: Path, seed: int) -> Trainer:
    """A fresh one; ``seed`` makes its adapter and its virtual experts, which a resume has to replace."""
    torch.manual_seed(seed)
    tokenizer, config = AutoTokenizer.from_pretrained(BUNDLED_MODEL), CONFIGS[name]
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL)
    if name == "molf-e":
        model = get_peft_model(model, molf_lora_config(config, task_type="CAUSAL_LM"))
    args = TrainingArguments(
        str(folder), max_steps=6, save_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-3, warmup_steps=2, max_grad_norm=0.0, logging_steps=1, use_cpu=True, report_to="none",
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    texts = ["Ada Alder plays the organ.", "Leo Lark speaks Cestic and", "Ada Alder plays the drum.", "Leo the"] * 4
    return Trainer(
        model,
        args,
        train_dataset=[{"input_ids": tokenizer(text).input_ids} for text in texts],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        optimizer_cls_and_kwargs=(MoLFOptimizerFactory, {"config": config}),
    )


def outcome(done: Trainer) -> dict[str, Any]:
    losses = [entry["loss"] for entry in done.state.log_history if "loss" in entry]
    return {
        "model": dict(done.model.state_dict()),
        "optimizer": done.optimizer.optimizer.state_dict(),
        "scheduler": done.lr_scheduler.state_dict(),
        "rng": torch.get_rng_state(),
        "losses": losses,
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fresh_trainer_continues_bit_for_bit(tmp_path: Path, name: str) -> None:
    full = trainer(name, tmp_path / "full", seed=1)
    full.train()
    expected = outcome(full)
    shutil.copytree(tmp_path / "full" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    again = trainer(name, tmp_path / "again", seed=2)
    again.train(resume_from_checkpoint=True)
    assert_identical(expected, outcome(again))
    assert len(set(expected["losses"])) == 6

    again.save_model(str(tmp_path / "saved"))
    ids = torch.arange(10, 22)[None]
    if name == "molf":
        assert (
            load_file(tmp_path / "saved" / "model.safetensors").keys()
            == load_file(BUNDLED_MODEL / "model.safetensors").keys()
        )
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    else:
        adapter = PeftConfig.from_pretrained(tmp_path / "saved")
        assert (adapter.r, adapter.lora_alpha, adapter.use_rslora) == (6, 6, False)
        plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, again.model.eval()(input_ids=ids).logits)


class SafeDPOTrainer(FiniteSteps, WholeCheckpoints, MoLFDPOTrainer):
    """All mixins at once."""


def dpo_trainer(name: str, folder: Path, seed: int, ranks: tuple[int, ...] = (2, 4)) -> SafeDPOTrainer:
    torch.manual_seed(seed)
    config = replace(CONFIGS[name], expert_ranks=ranks, lora_dropout=0.0)  # TRL switches dropout off
    pairs = [{"prompt": "Ada Alder plays the", "chosen": " drum.", "rejected": " organ."},
             {"prompt": "Leo Lark speaks", "chosen": " Cestic.", "rejected": " Ambrian."}] * 8  # fmt: skip
    args = DPOConfig(
        str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        max_grad_norm=0.0, logging_steps=1, use_cpu=True, bf16=True, report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False, activation_checkpointing=False,
    )  # fmt: skip
    return SafeDPOTrainer(
        AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL),
        args=args,
        train_dataset=Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(BUNDLED_MODEL),
        peft_config=molf_lora_config(config, task_type="CAUSAL_LM") if name == "molf-e" else None,
        molf_config=config,
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_a_dpo_trainer_with_all_mixins_continues_bit_for_bit(tmp_path: Path, name: str) -> None:
    """Its optimizer is the mixin's and no argument of the Trainer: a resume took it for plain AdamW and refused."""
    full = dpo_trainer(name, tmp_path / "full", seed=1)
    full.train()
    shutil.copytree(tmp_path / "full" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    assert last_checkpoint(tmp_path / "again") == str(tmp_path / "again" / "checkpoint-2")
    again = dpo_trainer(name, tmp_path / "again", seed=2)
    again.train(resume_from_checkpoint=True)
    assert_identical(outcome(full), outcome(again))
    with pytest.raises(ValueError, match=r"of another adapter|expert_ranks=\[2, 4\], this run has \[2, 3\]"):
        dpo_trainer(name, tmp_path / "again", 3, ranks=(2, 3)).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_skipped_step_of_a_dpo_trainer_changes_nothing(tmp_path: Path, name: str) -> None:
    """With accumulation and bf16: the loss of one batch of the second window is NaN."""
    dpo = dpo_trainer(name, tmp_path, seed=1)
    dpo.on_nonfinite = "skip"
    seen, inner = [], dpo.compute_loss
    weights: dict[int, dict[str, torch.Tensor]] = {}

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        seen.append(dpo.state.global_step)
        weights.setdefault(seen[-1], {k: v.clone() for k, v in dpo.model.state_dict().items()})
        return inner(*args, **kwargs) * (torch.nan if len(seen) == 3 else 1.0)

    dpo.compute_loss = compute_loss
    dpo.train()
    assert seen == [0, 0, 1, 1, 2, 2, 3, 3]
    (skipped,) = (entry for entry in dpo.state.log_history if "skipped" in entry)
    assert skipped["step"] == 2
    assert skipped["skipped"].startswith("the loss is not finite")  # and not only the gradients that it left
    assert all(torch.equal(value, weights[2][key]) for key, value in weights[1].items())
    assert any(not torch.equal(value, weights[3][key]) for key, value in weights[2].items())
    assert dpo.optimizer.optimizer.steps_taken == 3


class SafeGRPOTrainer(FiniteSteps, WholeCheckpoints, MoLFGRPOTrainer):
    """All mixins at once, with completions that are drawn and a reference."""


@pytest.mark.parametrize("name", CONFIGS)
def test_a_grpo_trainer_with_all_mixins_continues_bit_for_bit(tmp_path: Path, name: str) -> None:
    config = replace(CONFIGS[name], lora_dropout=0.0)

    def grpo_trainer(folder: Path, seed: int) -> SafeGRPOTrainer:
        torch.manual_seed(seed)
        args = GRPOConfig(
            str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2,
            max_grad_norm=0.0, use_cpu=True, bf16=True, report_to="none", disable_tqdm=True, num_generations=4,
            max_completion_length=6, temperature=3.0, beta=0.1, logging_steps=1, dataloader_pin_memory=False,
            activation_checkpointing=False,
        )  # fmt: skip
        return SafeGRPOTrainer(
            AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL),
            reward_funcs=lambda completion_ids, **_: [
                sum(t % 2 == 0 for t in ids) / len(ids) for ids in completion_ids
            ],
            args=args,
            train_dataset=Dataset.from_list([{"prompt": "Ada Alder plays the"}, {"prompt": "Leo Lark speaks"}] * 8),
            processing_class=AutoTokenizer.from_pretrained(BUNDLED_MODEL),
            peft_config=molf_lora_config(config, task_type="CAUSAL_LM") if name == "molf-e" else None,
            molf_config=config,
        )

    full = grpo_trainer(tmp_path / "full", seed=1)
    full.train()
    shutil.copytree(tmp_path / "full" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    again = grpo_trainer(tmp_path / "again", seed=2)
    again.train(resume_from_checkpoint=True)
    assert_identical(outcome(full), outcome(again))
    assert max(entry.get("kl", 0) for entry in full.state.log_history) > 0


def test_an_adapter_of_another_name_continues(tmp_path: Path) -> None:
    """PEFT saves it in a subfolder of its name."""

    class Whole(WholeCheckpoints, Trainer):
        pass

    def named(seed: int) -> Trainer:
        plain = trainer("molf-e", tmp_path, seed)
        base = plain.model.unload()
        model = get_peft_model(base, molf_lora_config(CONFIGS["molf-e"], task_type="CAUSAL_LM"), adapter_name="mine")
        arguments = {"train_dataset": plain.train_dataset, "data_collator": plain.data_collator}
        return Whole(model, plain.args, optimizer_cls_and_kwargs=plain.optimizer_cls_and_kwargs, **arguments)

    full = named(1)
    full.train()
    expected = outcome(full)
    shutil.rmtree(tmp_path / "checkpoint-6")
    again = named(2)
    again.train(resume_from_checkpoint=last_checkpoint(tmp_path))
    assert_identical(expected, outcome(again))


def test_whole_checkpoints_refuse_what_peft_would_not_save(tmp_path: Path) -> None:
    """Before the first step; without checkpoints the run is made."""

    class Whole(WholeCheckpoints, Trainer):
        pass

    def superposed(**options: Any) -> Trainer:
        plain, config = trainer("molf-e", tmp_path, 1), replace(CONFIGS["molf-e"], train_base=True)
        made = (MoLFOptimizerFactory, {"config": config})
        arguments = {"train_dataset": plain.train_dataset, "data_collator": plain.data_collator}
        return Whole(plain.model, replace(plain.args, **options), optimizer_cls_and_kwargs=made, **arguments)

    with pytest.raises(ValueError, match=r"^base_model\S+ is trained and .*save_strategy='no' and merge_and_unload"):
        superposed().train()
    superposed(save_strategy="no", max_steps=1).train()
