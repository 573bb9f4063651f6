"""MoLF or MoLF-Efficient with FSDP2, in a plain torch loop: weights, W, B and moments are sharded.

torchrun --nproc_per_node 2 examples/fsdp2.py OUTPUT_DIR --stop_after 5   # as if it had been interrupted
torchrun --nproc_per_node 2 examples/fsdp2.py OUTPUT_DIR --resume OUTPUT_DIR/checkpoint-5

The second command ends with the bits of the uninterrupted run; with another number of processes it goes on as well.
"""

import argparse
import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import get_peft_model
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from molf import MoLFConfig, RoutingRecorder, create_molf_optimizer, molf_lora_config
from molf.assets import BUNDLED_MODEL
from molf.tasks import get_task

BATCH, ACCUMULATION = 8, 2  # examples of a forward pass, of all processes together


def sharded_model(device: str, config: MoLFConfig, bf16: bool) -> torch.nn.Module:
    """Every layer is gathered for its own forward and backward pass, and what is left for the whole model's."""
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL)
    layers = model.model.layers
    if not config.train_base:
        model = get_peft_model(model, molf_lora_config(config, task_type="CAUSAL_LM"))
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def batches(device: str):
    """The share of this process of every forward pass, by its number; so the order survives a resume."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    task = get_task("world-fact")
    examples = [task.example(record) for record in task.load(None, 64)]
    texts = [example["prompt"] + example["completion"] + tokenizer.eos_token for example in examples]

    def batch(number: int):
        mine = range(number * BATCH + dist.get_rank(), (number + 1) * BATCH, dist.get_world_size())
        found = tokenizer([texts[i % len(texts)] for i in mine], padding=True, return_tensors="pt").to(device)
        return found | {"labels": found.input_ids.masked_fill(found.attention_mask == 0, -100)}

    return batch, tokenizer


def main(
    output_dir: str, efficient: bool = False, bf16: bool = False, steps: int = 10, stop_after=None, resume=None
) -> None:
    device = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    if device != "cpu":
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    torch.manual_seed(0)
    if efficient:
        config = MoLFConfig(expert_ranks=(4, 16), train_base=False, lora_lr=3e-3, max_grad_norm=1.0)
    else:
        config = MoLFConfig(expert_ranks=(16,), lr=1e-3, lora_lr=1e-3, max_grad_norm=1.0)
    model = sharded_model(device, config, bf16)
    optimizer = create_molf_optimizer(model, config)  # of the sharded parameters, so it comes after them
    scheduler = get_cosine_schedule_with_warmup(optimizer, 2, steps)
    batch, tokenizer = batches(device)
    first = dist.get_rank() == 0

    def state():
        weights, moments = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": moments, "scheduler": scheduler.state_dict()}

    if resume:
        saved = state()
        dcp.load(saved, checkpoint_id=resume)  # every process reads what it holds
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
    recorder = RoutingRecorder(optimizer, f"{output_dir}/routing.jsonl") if first else None

    model.train()
    for step in range(optimizer.steps_taken, stop_after or steps):
        total = torch.zeros((), device=device)
        for i in range(ACCUMULATION):
            model.set_requires_gradient_sync(i == ACCUMULATION - 1)
            loss = model(**batch(step * ACCUMULATION + i)).loss / ACCUMULATION
            loss.backward()
            total += loss.detach()
        optimizer.step()  # clips and refuses what is not finite, the same on every process
        scheduler.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        if first:
            print(f"step {step + 1}: loss {total.item() / dist.get_world_size():.3f}")
    if recorder is not None:
        recorder.close()

    writers = dist.new_group(backend="gloo")  # of its own, because training could go on while it writes
    folder = f"{output_dir}/checkpoint-{optimizer.steps_taken}"
    saving = dcp.async_save(state(), checkpoint_id=folder, process_group=writers)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if first:  # the only process that has it
        names = [name for name, _ in model.named_parameters()]  # a tied weight once
        model.save_pretrained(output_dir, state_dict={name: whole[name] for name in names})
        tokenizer.save_pretrained(output_dir)
    saving.result()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_dir")
    parser.add_argument("--efficient", action="store_true", help="MoLF-Efficient")
    parser.add_argument("--bf16", action="store_true", help="compute in bf16; weights and sums of gradients in fp32")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--stop_after", type=int, help="save everything after this many steps and stop")
    parser.add_argument("--resume", help="the checkpoint to go on from")
    main(**vars(parser.parse_args()))
