"""What the processes of a test do: build a model, spread it, train it."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import causal_lm
from molf import MoLFAdamW, MoLFConfig, create_molf_optimizer, molf_lora_config
from molf.optim.sharding import local, sharded_dim
from molf.optim.virtual import shares_storage

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
    untrained = make_model(name, config, adapter)
    if options.pop("checkpointing", False):
        untrained.gradient_checkpointing_enable()
    model, optimizer = start(untrained, config, kind, **options)
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


def begin_and_save(folder: str, fields: dict[str, Any], steps: tuple[int, int], way: str, asynchronous: bool) -> Any:
    """Train, save with torch's distributed checkpoint, go on; what the steps after saving were."""
    config = MoLFConfig(**fields)
    model, optimizer = start(make_model("gemma3", config), config, way)
    for step in range(steps[0]):
        train_step(model, optimizer, step)
    for group in optimizer.param_groups:  # as a scheduler: to be restored, of groups without parameters too
        group["lr"] *= 0.5
    if asynchronous:
        saving = dcp.async_save(checkpoint(model, optimizer), checkpoint_id=folder)
        saving.result()
    else:
        dcp.save(checkpoint(model, optimizer), checkpoint_id=folder)
    return go_on(model, optimizer, steps)


def checkpoint(model: nn.Module, optimizer: MoLFAdamW) -> dict[str, Any]:
    weights, state = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": state}


def load_and_go_on(folder: str, fields: dict[str, Any], steps: tuple[int, int], way: str) -> Any:
    """Load that checkpoint into a new model and optimizer, on any number of processes, and go on."""
    config = MoLFConfig(**fields)
    untrained = make_model("gemma3", config)
    torch.manual_seed(1)  # other experts than those that were saved
    model, optimizer = start(untrained, config, way)
    saved = checkpoint(model, optimizer)
    dcp.load(saved, checkpoint_id=folder)
    if sum(not group["params"] for group in optimizer.param_groups) > 1:  # which set_state_dict does not take
        set_model_state_dict(model, saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    else:
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    return go_on(model, optimizer, steps)


def gathered_and_loaded(fields: dict[str, Any], steps: tuple[int, int], way: str) -> tuple[Any, Any]:
    """Train, gather the whole state on the first process, load it from there into a new optimizer; both go on."""
    config, runs = MoLFConfig(**fields), []
    model, optimizer = start(make_model("gemma3", config), config, way)
    for step in range(steps[0]):
        train_step(model, optimizer, step)
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
    weights, state = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    weights, state = copy.deepcopy((weights, state))
    runs.append(go_on(model, optimizer, steps))
    model, optimizer = start(make_model("gemma3", config), config, way)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.get_world_size() > 1)
    set_model_state_dict(model, weights, options=options)  # set_state_dict hangs: the others' weights are empty
    set_optimizer_state_dict(model, optimizer, state, options=options)
    runs.append(go_on(model, optimizer, steps))
    return runs[0], runs[1]


def go_on(model: nn.Module, optimizer: MoLFAdamW, steps: tuple[int, int]) -> dict[str, Any]:
    losses, winners = [], []
    for step in range(steps[0], sum(steps)):
        losses.append(train_step(model, optimizer, step))
        winners.append([each.winners for each in optimizer.routing.values()])
    inner = getattr(model, "module", model)
    return {"losses": losses, "winners": winners, "weights": {n: whole(p) for n, p in inner.named_parameters()}}


class Collectives(TorchDispatchMode):
    """Counts the collectives that reach a process group, and the bytes of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
            self.calls.append((func._opname, sum(t.numel() * t.itemsize for t in tensors)))
        return func(*args, **(kwargs or {}))


def collectives_of_a_step(name: str, fields: dict[str, Any], kind: str, **changes: Any) -> dict[str, Any]:
    """Collectives of one optimizer step, what a formula needs, and the bytes of state here and in all processes."""
    config = MoLFConfig(**fields)
    base = causal_lm(name, **changes)
    if not config.train_base:
        base = get_peft_model(base, molf_lora_config(config))
    model, optimizer = start(base, config, kind)
    ids = tokens(0, 67).chunk(dist.get_world_size())[dist.get_rank()]
    model(input_ids=ids, labels=ids).loss.backward()
    with Collectives() as found:
        optimizer.step()
    state = [t for entries in optimizer.state.values() for key, t in entries.items() if t.dim() and key != "base"]
    weights = [optimizer._parameter(module.slots[0]) for module in optimizer.modules]
    return {
        "calls": found.calls,
        "modules": len(optimizer.modules),
        "inputs": sum(weight.shape[1] for weight in weights),
        "looked_at": sum(len(group["params"]) for group in optimizer.param_groups),
        "bytes_here": sum(local(t).numel() * t.itemsize for t in state),
        "bytes_sharded": sum(t.numel() * t.itemsize for t in state if sharded_dim(t) is not None),
        "bytes_replicated": sum(t.numel() * t.itemsize for t in state if sharded_dim(t) is None),
    }


def mixed_precision(kind: str, steps: int) -> None:
    """fp32 parameters computed with in bf16: the parameter that is sharded is P itself, and there is no third copy."""
    config = MoLFConfig(expert_ranks=(4,), lora_alpha=6.0, lr=1e-3, lora_lr=1e-3)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, optimizer = start(make_model("gemma3", config), config, kind, mp_policy=policy)
    won_once = set()
    for step in range(steps):
        before = {m.name: _held(optimizer, m) for m in optimizer.modules}
        train_step(model, optimizer, step)
        for module in optimizer.modules:
            P, W, A, B = _held(optimizer, module)
            old_P, old_W, old_A, old_B = before[module.name]
            dense = optimizer.routing[module.name].winners == ("dense",)
            won_once |= set() if dense else {module.name}
            assert P.dtype == W.dtype == torch.float32
            assert not torch.equal(P, old_P)
            assert torch.equal(W, old_W) != dense
            assert torch.equal(A, old_A) == torch.equal(B, old_B) == dense
            torch.testing.assert_close(P, W + 3.0 * B @ A, rtol=1e-6, atol=1e-7)
            weight = optimizer._parameter(module.slots[0])
            assert shares_storage(optimizer.state[weight]["base"], weight) == (module.name not in won_once)
    assert 0 < len(won_once) < len(optimizer.modules) or steps > 20


def _held(optimizer: MoLFAdamW, module: Any) -> list[torch.Tensor]:
    """Parts of P, W, A, B in this process."""
    weight = optimizer._parameter(module.slots[0])
    state = optimizer.state[weight]
    return [local(t).detach().clone() for t in (weight, state["base"], state["lora_A"], state["lora_B"])]


def differ_after_a_write(kind: str) -> list[str]:
    """Messages when one process's weight, or its replicated expert, is written to."""
    config = MoLFConfig(expert_ranks=(4,), check_ranks_every=2)
    messages = []
    for key in ("lora_A", "lora_A_exp_avg", "step") + (("weight",) if kind == "ddp" else ()):
        model, optimizer = start(make_model("llama", config), config, kind)
        train_step(model, optimizer, 0)
        if dist.get_rank() == 1:
            weight = optimizer._parameter(optimizer.modules[3].slots[0])
            with torch.no_grad():
                written = weight if key == "weight" else optimizer.state[weight][key]
                local(written).add_(0.5)
                optimizer._remember_written()
        try:
            train_step(model, optimizer, 1)
            messages.append("")
        except RuntimeError as error:
            messages.append(str(error))
    return messages


def eight_bits_that_differ() -> list[str]:
    """Messages before and after one process's 8-bit moment is written to."""
    config = MoLFConfig(expert_ranks=(4,), moments_8bit=True)
    model = nn.Sequential(nn.Linear(64, 64))
    model, optimizer = start(model, config, "ddp")
    moment = optimizer.state[optimizer._parameter(optimizer.modules[0].slots[0])]["exp_avg"]
    messages = []
    for _ in range(2):
        try:
            optimizer.compare_replicas()
            messages.append("")
        except RuntimeError as error:
            messages.append(str(error))
        if dist.get_rank() == 1:
            moment.copy_(torch.ones(64, 64))
    return [type(moment).__name__, *messages]


def refusals() -> list[str]:
    """What is refused, in the order of the test that reads them."""
    world = dist.get_world_size()
    cases = [_sharded_after, _in_backward, _stochastic, _eight_bits, _tensor_parallel, _half_sharded, _fsdp1, _late_ddp]
    cases += [_frozen_after_ddp, _sharded_by_rank]
    messages = []
    for case in cases:
        try:
            case(init_device_mesh("cpu", (world,), mesh_dim_names=("shard",)))
            messages.append("")
        except (ValueError, RuntimeError) as error:
            messages.append(str(error))
    return messages


def _sharded_after(mesh: Any) -> None:
    config = MoLFConfig(expert_ranks=(4,))
    model = make_model("llama", config)
    optimizer = create_molf_optimizer(model, config)
    train_step(spread(model, "fsdp2"), optimizer, 0)


def _in_backward(mesh: Any) -> None:
    start(causal_lm("llama"), MoLFConfig(step_in_backward=True), "ddp")


def _stochastic(mesh: Any) -> None:
    start(causal_lm("llama", torch.bfloat16), MoLFConfig(keep_base=False), "ddp")


def _eight_bits(mesh: Any) -> None:
    start(causal_lm("llama"), MoLFConfig(moments_8bit=True), "fsdp2")


def _tensor_parallel(mesh: Any) -> None:
    model = causal_lm("llama")
    parallelize_module(model, mesh, {"model.layers.*.mlp.up_proj": ColwiseParallel()})
    create_molf_optimizer(model, MoLFConfig())


def _half_sharded(mesh: Any) -> None:
    model = causal_lm("llama")
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh)
    create_molf_optimizer(model, MoLFConfig())


def _fsdp1(mesh: Any) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    create_molf_optimizer(FullyShardedDataParallel(causal_lm("llama"), device_id=torch.device("cpu")), MoLFConfig())


def _late_ddp(mesh: Any) -> None:
    config = MoLFConfig(expert_ranks=(4,))
    model = get_peft_model(causal_lm("llama"), molf_lora_config(config))
    create_molf_optimizer(nn.parallel.DistributedDataParallel(model), config)


def _frozen_after_ddp(mesh: Any) -> None:
    finds = nn.parallel.DistributedDataParallel(causal_lm("llama"), find_unused_parameters=True)
    try:
        create_molf_optimizer(finds, MoLFConfig(train_other=False))
    except ValueError as error:
        raise RuntimeError("refused where unused parameters are found") from error
    create_molf_optimizer(nn.parallel.DistributedDataParallel(causal_lm("llama")), MoLFConfig(train_other=False))


def _sharded_by_rank(mesh: Any) -> None:
    config = MoLFConfig(expert_ranks=(2, 4), train_base=False)
    model = get_peft_model(causal_lm("llama"), molf_lora_config(config))
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(1) if p.dim() == 2 else None)
    create_molf_optimizer(model, config)


def with_seeds_of_their_own(kind: str, steps: int) -> dict[str, torch.Tensor]:
    """Weights, experts and moments after training by processes whose random generators differ."""
    config = MoLFConfig(expert_ranks=(4, 3), lora_alpha=(3.0, 5.0), lr=1e-3, lora_lr=1e-3)
    model = make_model("gemma3", config)
    torch.manual_seed(dist.get_rank())
    model, optimizer = start(model, config, kind)
    for step in range(steps):
        train_step(model, optimizer, step)
    parameters = {name: whole(p) for name, p in model.named_parameters()}
    return parameters | {f"{i}.{k}": whole(t) for i, e in enumerate(optimizer.state.values()) for k, t in e.items()}


def a_new_head(steps: int) -> list[torch.Tensor]:
    """Weights and masters in bf16 of a model whose head each process draws for itself, as accelerate prepares it."""
    torch.manual_seed(0)
    body = nn.Linear(8, 8)
    torch.manual_seed(1 + dist.get_rank())
    model = nn.Sequential(body, nn.Tanh(), nn.Linear(8, 2)).bfloat16()
    config = MoLFConfig(expert_ranks=(2,), exclude_modules=["2"], lr=1e-3, lora_lr=1e-3)
    optimizer = create_molf_optimizer(model, config)
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer.load_state_dict(optimizer.state_dict())  # accelerate's, to place it
    for step in range(steps):
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(step)).bfloat16()
        wrapped(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [*model.parameters(), *(state["base"] for state in optimizer.state.values())]


def narrow_layers(kind: str, compiles: bool, steps: int, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Winners of a plain model of which a layer has fewer outputs than there are processes."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).to(dtype)
    model = spread(model, kind)
    optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=(2,), lr=1e-3, lora_lr=1e-3, compile=compiles))
    found = []
    for step in range(steps):
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(step)).to(dtype)
        own = x.chunk(dist.get_world_size())[dist.get_rank()]
        model(own).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append({name: (each.winners, each.scores) for name, each in optimizer.routing.items()})
    return found
