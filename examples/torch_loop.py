"""MoLF in a plain torch loop: 64 counterfactual facts into the bundled model.

python examples/torch_loop.py OUTPUT_DIR
"""

import sys

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from molf import MoLFConfig, RoutingRecorder, create_molf_optimizer
from molf.assets import BUNDLED_MODEL
from molf.tasks import get_task


def main(output_dir: str, epochs: int = 8) -> None:
    torch.manual_seed(0)
    task = get_task("world-fact")
    records = task.load(None, 64)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL)

    def collate(examples):
        texts = [example["prompt"] + example["completion"] + tokenizer.eos_token for example in examples]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        return batch | {"labels": batch.input_ids.masked_fill(batch.attention_mask == 0, -100)}

    batches = DataLoader([task.example(record) for record in records], 8, shuffle=True, collate_fn=collate)
    config = MoLFConfig(expert_ranks=(16,), lr=1e-3, lora_lr=1e-3, max_grad_norm=1.0)
    optimizer = create_molf_optimizer(model, config)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 8, epochs * len(batches))  # every expert keeps its own rate
    recorder = RoutingRecorder(optimizer, f"{output_dir}/routing.jsonl")

    for epoch in range(epochs):
        model.train()
        for batch in batches:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()  # clips and refuses what is not finite
            scheduler.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, {optimizer.routing['model.layers.0.mlp.up_proj'].winners}")

    recorder.close()
    model.save_pretrained(output_dir)  # an ordinary model
    tokenizer.save_pretrained(output_dir)
    print(f"efficacy {task.evaluate(model.eval(), tokenizer, records[:16])['efficacy']:.1f} %")


if __name__ == "__main__":
    main(*sys.argv[1:])
