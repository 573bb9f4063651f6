"""transformers' own Trainer: save, go on with a fresh trainer, bit for bit; and what it saves is plain."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
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

from molf import MoLFConfig, MoLFOptimizerFactory, molf_lora_config
from molf.assets import BUNDLED_MODEL

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
