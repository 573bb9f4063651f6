"""MoLF-Efficient behind accelerate, without a Trainer, and an exact resume.

python examples/accelerate_loop.py OUTPUT_DIR --stop_after 9     # as if it had been interrupted
python examples/accelerate_loop.py OUTPUT_DIR --resume           # ends with the bits of the uninterrupted run
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from molf import MoLFConfig, create_molf_optimizer, molf_lora_config
from molf.assets import BUNDLED_MODEL
from molf.tasks import get_task

EPOCHS = 4


def main(output_dir: str, stop_after: int | None = None, resume: bool = False) -> None:
    set_seed(0)
    # the seedable sampler's order depends on seed and epoch alone, so that it is the same after a resume
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    config = MoLFConfig(expert_ranks=(4, 16), train_base=False, lora_lr=3e-3, lora_dropout=0.05, max_grad_norm=1.0)
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL)
    model = get_peft_model(model, molf_lora_config(config, task_type="CAUSAL_LM"))

    def collate(examples):
        texts = [example["prompt"] + example["completion"] + tokenizer.eos_token for example in examples]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        return batch | {"labels": batch.input_ids.masked_fill(batch.attention_mask == 0, -100)}

    task = get_task("world-fact")
    examples = [task.example(record) for record in task.load(None, 32)]
    # a generator of its own: to start its iterator, a DataLoader draws a number, from the one of dropout else
    batches = DataLoader(examples, 8, shuffle=True, collate_fn=collate, generator=torch.Generator().manual_seed(0))
    optimizer = create_molf_optimizer(model, config)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 2, EPOCHS * len(batches))
    model, optimizer, batches, scheduler = accelerator.prepare(model, optimizer, batches, scheduler)
    if resume:
        accelerator.load_state(f"{output_dir}/state")
    done = optimizer.optimizer.steps_taken  # MoLF's own attributes are behind accelerate's wrapper

    model.train()
    for epoch in range(done // len(batches), EPOCHS):
        batches.set_epoch(epoch)
        skipped = done % len(batches) if epoch == done // len(batches) else 0
        for batch in accelerator.skip_first_batches(batches, skipped):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if optimizer.optimizer.steps_taken == stop_after:
                accelerator.save_state(f"{output_dir}/state")
                return
    accelerator.unwrap_model(model).save_pretrained(output_dir)  # one ordinary adapter
    print(f"{optimizer.optimizer.steps_taken} steps, saved to {output_dir}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_dir")
    parser.add_argument("--stop_after", type=int, help="save everything after this many steps and stop")
    parser.add_argument("--resume", action="store_true", help="go on from what was saved")
    main(**vars(parser.parse_args()))
