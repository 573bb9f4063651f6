"""DESIGN section 6, invariants 2 to 5: what the optimizer equals, bit for bit or within rounding."""

import copy

import pytest
import torch
from golden import MLP
from peft import LoraConfig, get_peft_model
from torch import nn

from molf import MoLFAdamW, MoLFConfig, NonFiniteGradientError, create_molf_optimizer, molf_lora_config
from molf.optim.reference import MoLFAdamWReference, superpose

LAYERS = ["fc1", "fc2"]


def batches(steps: int, dtype: torch.dtype = torch.float32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 12, generator=g).to(dtype), torch.randn(8, 8, generator=g).to(dtype)) for _ in range(steps)]


def train(model: nn.Module, optimizer, steps: int = 20, accumulate: int = 1, dtype=torch.float32) -> list:
    """Linear warm-up from 0 over three steps; returns the winners of every step, if the optimizer routes."""
    groups = getattr(optimizer, "param_groups", [])
    rates = [group["lr"] for group in groups]
    winners = []
    for t, (x, y) in enumerate(batches(steps, dtype)):
        optimizer.lr_factor = min(t / 3, 1)
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * optimizer.lr_factor
        for part_x, part_y in zip(x.chunk(accumulate), y.chunk(accumulate), strict=True):
            (((model(part_x) - part_y) ** 2).mean() / accumulate).backward()
        optimizer.step()
        model.zero_grad()
        if isinstance(optimizer, MoLFAdamWReference):
            winners.append([optimizer.winners[name] for name in LAYERS])
        elif isinstance(optimizer, MoLFAdamW):
            winners.append(
                [[optimizer.experts.index(w) for w in routing.winners] for routing in optimizer.routing.values()]
            )
    return winners


def equal(first: nn.Module, second: nn.Module) -> None:
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("lr", [1e-3, 0.02])
def test_without_lora_experts_it_is_torch_adamw(lr: float) -> None:
    """Invariant 2, first half, fp32, bit for bit."""
    model = MLP()
    twin = copy.deepcopy(model)
    config = MoLFConfig(expert_ranks=(), lr=lr)
    train(model, create_molf_optimizer(model, config))
    groups = [
        {"params": [twin.fc1.weight, twin.fc2.weight], "weight_decay": 0.1},
        {"params": [twin.fc1.bias], "weight_decay": 0},
    ]
    train(twin, torch.optim.AdamW(groups, lr=lr, foreach=False, fused=False))
    equal(model, twin)


@pytest.mark.parametrize("score_fn", ["epd", "pfn"])
def test_with_every_expert_updated_it_is_torch_adamw_on_the_superposition(score_fn: str) -> None:
    """Invariant 2, second half: W, b, A and B of a PEFT adapter over its unfrozen base, bit for bit."""
    config = MoLFConfig(expert_ranks=(4,), lora_alpha=2.0, top_k=2, score_fn=score_fn, lr=1e-2, lora_lr=3e-3)
    model = get_peft_model(MLP(), LoraConfig(r=4, lora_alpha=2.0, use_rslora=True, target_modules=LAYERS))
    twin = copy.deepcopy(model)
    train(model, create_molf_optimizer(model, config))
    twin.requires_grad_(True)
    named = dict(twin.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if n.endswith("base_layer.weight")], "weight_decay": 0.1, "lr": 1e-2},
        {"params": [p for n, p in named.items() if n.endswith("bias")], "weight_decay": 0.0, "lr": 1e-2},
        {"params": [p for n, p in named.items() if "lora_" in n], "weight_decay": 0.01, "lr": 3e-3},
    ]
    train(twin, torch.optim.AdamW(groups, foreach=False, fused=False))
    equal(model, twin)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("ranks", [(4,), (2, 2, 6)])
@pytest.mark.parametrize("score_fn", ["epd", "pfn"])
@pytest.mark.parametrize("train_base", [True, False])
def test_fused_superposed_and_reference_agree(accumulate, clip, ranks, score_fn, train_base) -> None:
    """Invariant 3, in float64: virtual experts, a PEFT adapter and the paper line by line give one trajectory."""
    lora_lr = 6e-3 if len(ranks) == 1 else 2e-3  # at these rates the winners switch
    config = MoLFConfig(
        expert_ranks=ranks, train_base=train_base, score_fn=score_fn, lr=1e-3, lora_lr=lora_lr, max_grad_norm=clip,
        top_k=2 if len(ranks) > 1 else 1, lora_alpha=1.0,
    )  # fmt: skip
    fused = MLP().double()
    reference_model = copy.deepcopy(fused)
    layers = superpose(reference_model, LAYERS, config)
    adapted = get_peft_model(copy.deepcopy(fused), molf_lora_config(config), autocast_adapter_dtype=False).double()
    optimizer, adapter_optimizer = (create_molf_optimizer(model, config) for model in (fused, adapted))
    with torch.no_grad():
        for name, layer in layers.items():
            state = optimizer.state[fused.get_submodule(name).weight]
            real = adapted.base_model.model.get_submodule(name)
            state["lora_A"].copy_(torch.cat(list(layer.A)))
            real.lora_A["default"].weight.copy_(torch.cat(list(layer.A)))
            for B in layer.B:
                B.normal_(std=0.1)
            state["lora_B"].copy_(torch.cat(list(layer.B), 1))
            scaled = [s * B for s, B in zip(config.scales, layer.B, strict=True)]
            real.lora_B["default"].weight.copy_(torch.cat(scaled, 1))
            if not train_base:
                layer.W.requires_grad_(False)
                if layer.b is not None:
                    layer.b.requires_grad_(False)
    optimizer.sync_weights()
    pairs = ((fused, optimizer), (adapted, adapter_optimizer), (reference_model, MoLFAdamWReference(layers, config)))
    winners = [train(model, opt, 20, accumulate, torch.float64) for model, opt in pairs]
    assert winners[0] == winners[1] == winners[2]
    assert len(config.experts) == 1 or len({str(row) for row in winners[0]}) > 1, (
        "the winners never switched: nothing was tested"
    )
    for name, layer in layers.items():
        merged = adapted.base_model.model.get_submodule(name)
        real = merged.base_layer.weight + merged.lora_B["default"].weight @ merged.lora_A["default"].weight
        torch.testing.assert_close(fused.get_submodule(name).weight, layer.merged(), rtol=0, atol=1e-12)
        torch.testing.assert_close(real, layer.merged(), rtol=0, atol=1e-12)
    if train_base:
        torch.testing.assert_close(fused.fc1.bias, reference_model.fc1.b, rtol=0, atol=1e-12)


def test_molf_efficient_with_one_expert_is_peft_lora_with_adamw() -> None:
    """Invariant 4, fp32, bit for bit."""
    config = MoLFConfig(expert_ranks=(4,), train_base=False, lora_lr=1e-2)
    alpha = 2.0 * 4**0.5  # the scale 2 of lora_alpha=None, in rsLoRA's terms
    model = get_peft_model(MLP(), LoraConfig(r=4, lora_alpha=alpha, use_rslora=True, target_modules=LAYERS))
    twin = copy.deepcopy(model)
    train(model, create_molf_optimizer(model, config))
    parameters = [p for p in twin.parameters() if p.requires_grad]
    train(twin, torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.01, foreach=False, fused=False))
    equal(model, twin)


def test_loser_keeps_its_bits_and_winner_moves() -> None:
    """Invariant 5: every step, every module, two of four experts winning; every expert wins and loses."""
    config = MoLFConfig(expert_ranks=(2, 2, 4), top_k=2, lr=2e-4, lora_lr=2e-3, lora_alpha=1.0)
    model = MLP()
    optimizer = create_molf_optimizer(model, config)
    columns = {"lora_r2[0]": slice(0, 2), "lora_r2[1]": slice(2, 4), "lora_r4": slice(4, 8)}
    seen = set()
    for x, y in batches(40):
        before = copy.deepcopy(optimizer.state_dict()["state"])
        bias = model.fc1.bias.detach().clone()
        ((model(x) - y) ** 2).mean().backward()
        optimizer.step()
        model.zero_grad()
        after = optimizer.state_dict()["state"]
        assert torch.equal(bias, model.fc1.bias) == ("dense" not in optimizer.routing["fc1"].winners)
        for index, name in enumerate(LAYERS):
            old, new, routing = before[index], after[index], optimizer.routing[name]
            assert new["step"] == old["step"] + 1
            seen |= {(expert, expert in routing.winners) for expert in routing.experts}
            assert torch.equal(old["base"], new["base"]) == ("dense" not in routing.winners)
            assert not torch.equal(old["exp_avg"], new["exp_avg"])
            for expert, cut in columns.items():
                lost = expert not in routing.winners
                assert torch.equal(old["lora_A"][cut], new["lora_A"][cut]) == lost
                assert torch.equal(old["lora_B"][:, cut], new["lora_B"][:, cut]) == lost
                assert not torch.equal(old["lora_B_exp_avg"][:, cut], new["lora_B_exp_avg"][:, cut])
            scaled = new["lora_B"] * torch.tensor(config.scales).repeat_interleave(torch.tensor([2, 2, 4]))
            layer = model.get_submodule(name)
            torch.testing.assert_close(layer.weight, new["base"] + scaled @ new["lora_A"])
    assert len(seen) == 8, f"not every expert has won and lost: {sorted(seen)}"


@pytest.mark.parametrize("clip", [None, 0.1])
def test_behind_the_gate_of_accelerators_the_bits_are_the_same(monkeypatch, clip: float | None) -> None:
    """Where whether all gradients are finite is known with the winners only, moments advance behind a gate."""
    config = MoLFConfig(expert_ranks=(2, 2, 4), top_k=2, lr=2e-4, lora_lr=2e-3, lora_alpha=1.0, max_grad_norm=clip)
    known = MLP()
    gated = copy.deepcopy(known)
    torch.manual_seed(1)
    first = create_molf_optimizer(known, config)
    torch.manual_seed(1)
    second = create_molf_optimizer(gated, config)
    winners = train(known, first)
    monkeypatch.setattr("molf.optim.guards.on_host", lambda values: False)
    assert winners == train(gated, second)
    equal(known, gated)
    states = zip(first.state.values(), second.state.values(), strict=True)
    assert all(torch.equal(a[key], b[key]) for a, b in states for key in a)
    before = copy.deepcopy(second.state_dict())
    for parameter in gated.parameters():
        parameter.grad = torch.ones_like(parameter)
    gated.fc2.weight.grad[1, 2] = torch.inf
    with pytest.raises(NonFiniteGradientError, match="fc2"):
        second.step()
    equal(known, gated)
    after = second.state_dict()
    assert all(torch.equal(s[key], after["state"][i][key]) for i, s in before["state"].items() for key in s)
