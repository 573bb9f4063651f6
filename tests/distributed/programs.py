"""What the processes of a test do: build a model, spread it, train it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from models import causal_lm
from molf import MoLFAdamW, MoLFConfig, create_molf_optimizer, molf_lora_config

BATCH = 8


def make_model(name: str, config: MoLFConfig, adapter: bool = False) -> nn.Module:
    """The bundled model or a tiny one, with the experts as an adapter if the config or ``adapter`` says so."""
    if name == "bundled":
        from transformers import AutoModelForCausalLM

        from molf.assets import BUNDLED_MODEL

        model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    else:
        model = causal_lm(name)
    if adapter or not config.train_base:
        torch.manual_seed(0)
        model = get_peft_model(model, molf_lora_config(config))
    return model


def spread(model: nn.Module, kind: str, **options: Any) -> nn.Module:
    """The model as one process, ddp, fsdp2 or hsdp trains it."""
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if kind in ("fsdp2", "hsdp"):
        world = dist.get_world_size()
        shape, names = ((world // 2, 2), ("replicate", "shard")) if kind == "hsdp" else ((world,), ("shard",))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for layer in _layers(model):
            fully_shard(layer, mesh=mesh, **options)
        fully_shard(model, mesh=mesh, **options)
    return model


def _layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__.endswith(("DecoderLayer", "Block"))]


def tokens(step: int, vocab: int) -> torch.Tensor:
    """One step's batch of all processes."""
    return torch.randint(3, vocab, (BATCH, 12), generator=torch.Generator().manual_seed(step % 5))


def train_step(model: nn.Module, optimizer: Any, step: int, accumulate: int = 1) -> float:
    """One optimizer step on this process's share of the batch; the loss of the whole batch."""
    world, rank = dist.get_world_size(), dist.get_rank()
    config = getattr(model, "module", model).config
    micro = tokens(step, config.vocab_size).chunk(accumulate)
    total = torch.zeros(())
    for i, batch in enumerate(micro):
        if hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(i == accumulate - 1)
        ids = batch.chunk(world)[rank]
        loss = model(input_ids=ids, labels=ids).loss / accumulate
        loss.backward()
        total += loss.detach()
    optimizer.step()
    optimizer.zero_grad()
    dist.all_reduce(total)
    return float(total) / world


def whole(tensor: Any) -> torch.Tensor:
    """A tensor as one process holds it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def start(model: nn.Module, config: MoLFConfig, kind: str, **options: Any) -> tuple[nn.Module, MoLFAdamW]:
    """A model spread over the processes, and its optimizer: DDP looks at what is frozen, ``fully_shard`` replaces."""
    if kind == "ddp":
        optimizer = create_molf_optimizer(model, config)
        return spread(model, kind), optimizer
    model = spread(model, kind, **options)
    return model, create_molf_optimizer(model, config)


def history(name: str, kind: str, fields: dict[str, Any], steps: int, **options: Any) -> dict[str, Any]:
    """Losses, winners and the end of a run."""
    adapter, accumulate = options.pop("adapter", False), options.pop("accumulate", 1)
    config = MoLFConfig(**fields)
    model, optimizer = start(make_model(name, config, adapter), config, kind, **options)
    losses, winners = [], []
    for step in range(steps):
        losses.append(train_step(model, optimizer, step, accumulate))
        winners.append([each.winners for each in optimizer.routing.values()])
    optimizer.compare_replicas()
    inner = getattr(model, "module", model)
    weights = {n: whole(p) for n, p in inner.named_parameters()}
    state = {
        f"{group['expert']}.{i}.{key}": whole(value)
        for group in optimizer.param_groups
        for i, parameter in enumerate(group["params"])
        for key, value in optimizer.state[parameter].items()
    }
    return {"losses": losses, "winners": winners, "weights": weights, "state": state}
