"""GRPO with MoLF: short completions are rewarded. The reference of ``beta`` is a frozen copy.

python examples/grpo.py OUTPUT_DIR
"""

import sys

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

from molf import MoLFConfig
from molf.assets import BUNDLED_MODEL
from molf.tasks import get_task
from molf.train.trainers import MoLFGRPOTrainer


def brevity(completion_ids: list[list[int]], **_: object) -> list[float]:
    return [-float(len(ids)) for ids in completion_ids]


def main(output_dir: str, steps: int = 20) -> None:
    prompts = [{"prompt": edit.prompt} for edit in get_task("world-fact").load(None, 32)]
    trainer = MoLFGRPOTrainer(
        AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL),  # the reference is loaded from the same folder
        brevity,
        args=GRPOConfig(
            output_dir, max_steps=steps, per_device_train_batch_size=8, num_generations=4, max_completion_length=16,
            temperature=1.5, beta=0.04, max_grad_norm=0.0, logging_steps=5, gradient_checkpointing=False, bf16=False,
            use_cpu=True, report_to="none",
        ),
        train_dataset=Dataset.from_list(prompts),
        processing_class=AutoTokenizer.from_pretrained(BUNDLED_MODEL),
        molf_config=MoLFConfig(expert_ranks=(16,), lr=1e-4, lora_lr=1e-4, max_grad_norm=1.0),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(*sys.argv[1:])
