"""DPO with MoLF-Efficient: prefer a counterfactual answer to the one that is known. The reference is the base model.

python examples/dpo.py OUTPUT_DIR
"""

import sys

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig

from molf import MoLFConfig, molf_lora_config
from molf.assets import BUNDLED_MODEL
from molf.tasks import get_task
from molf.train.trainers import MoLFDPOTrainer


def main(output_dir: str, steps: int = 20) -> None:
    pairs = [
        {"prompt": edit.prompt, "chosen": f" {edit.target_new}", "rejected": f" {edit.target_true}"}
        for edit in get_task("world-fact").load(None, 32)
    ]
    config = MoLFConfig(expert_ranks=(4, 16), train_base=False, lora_lr=1e-3, max_grad_norm=1.0)
    trainer = MoLFDPOTrainer(
        AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL),
        args=DPOConfig(
            output_dir, max_steps=steps, per_device_train_batch_size=8, max_grad_norm=0.0, logging_steps=5,
            gradient_checkpointing=False, bf16=False, use_cpu=True, report_to="none",
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(BUNDLED_MODEL),
        peft_config=molf_lora_config(config, task_type="CAUSAL_LM"),
        molf_config=config,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(*sys.argv[1:])
