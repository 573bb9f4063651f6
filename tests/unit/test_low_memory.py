"""Options that save memory: W that is computed, rounded weights, 8-bit moments, steps in the backward pass."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from torch import nn

from models import causal_lm, lm_step, tokens
from molf import MoLFConfig, NonFiniteGradientError, create_molf_optimizer, molf_lora_config
from molf.optim.quantized import as_float, is_quantized
from molf.optim.stacks import Stacks
from molf.optim.virtual import round_stochastically

RATES = {"lr": 1e-3, "lora_lr": 2e-3}


def trajectory(model: nn.Module, config: MoLFConfig, steps: int = 20) -> tuple[list[list[str]], torch.optim.Optimizer]:
    torch.manual_seed(1)
    optimizer = create_molf_optimizer(model, config)
    winners = []
    for step in range(steps):
        lm_step(model, optimizer, step)
        winners.append([each.winners[0] for each in optimizer.routing.values()])
    return winners, optimizer


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the state beside the model: what shares the weight's memory is not counted."""
    own = {p.untyped_storage().data_ptr() for p in optimizer.state}
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
        for t in ((value.codes, value.scale) if is_quantized(value) else (value,))
    }
    return sum(size for pointer, size in storages.items() if pointer not in own)


def test_no_copy_of_w_before_a_lora_expert_has_won() -> None:
    model = causal_lm("qwen2")
    optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=(4,), policy="fixed-dense", **RATES))
    routed = [model.get_submodule(name).weight for name in optimizer.routed_modules]
    before = state_bytes(optimizer)
    for step in range(2):
        lm_step(model, optimizer, step)
    assert state_bytes(optimizer) == before
    other = causal_lm("qwen2")
    optimizer = create_molf_optimizer(other, MoLFConfig(expert_ranks=(4,), policy="fixed-lora", **RATES))
    assert state_bytes(optimizer) == before
    lm_step(other, optimizer, 0)
    assert state_bytes(optimizer) == before + sum(4 * weight.numel() for weight in routed)


def test_a_loaded_state_shares_w_where_the_saved_one_did() -> None:
    model = causal_lm("qwen2")
    config = MoLFConfig(expert_ranks=(4,), policy="fixed-dense", **RATES)
    optimizer = create_molf_optimizer(model, config)
    lm_step(model, optimizer, 0)
    saved = copy.deepcopy(optimizer.state_dict())
    other = causal_lm("qwen2")
    again = create_molf_optimizer(other, config)
    before = state_bytes(again)
    again.load_state_dict(saved)
    assert state_bytes(again) == before
    for name in optimizer.routed_modules:
        assert torch.equal(model.get_submodule(name).weight, other.get_submodule(name).weight)


def test_a_computed_w_gives_the_same_routing_and_weights_within_rounding() -> None:
    """fp32: a step rounds W and P, each by at most 2^-24 of the largest term, where a kept W rounds once."""
    model = causal_lm("qwen2")
    twin = copy.deepcopy(model)
    config = MoLFConfig(expert_ranks=(2, 4), lr=2e-4, lora_lr=2e-3)
    winners, kept = trajectory(model, config)
    computed, optimizer = trajectory(twin, replace(config, keep_base=False))
    assert winners == computed
    assert len({name for row in winners for name in row}) > 1, "the winners never switched"
    assert not any("base" in state for state in optimizer.state.values())
    assert state_bytes(optimizer) < state_bytes(kept)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=20 * 4 * 2**-24 * a.detach().abs().max().item())


def test_bf16_without_masters_rounds_stochastically() -> None:
    """A weight of 1 with updates of 1e-3, a quarter of its spacing, follows on average; to nearest it would stay."""
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16()
    model[0].weight.data.fill_(1.0)
    config = MoLFConfig(expert_ranks=(), lr=1e-3, weight_decay=0.0, keep_base=False)
    optimizer = create_molf_optimizer(model, config)
    for _ in range(10):
        model[0].weight.grad = torch.ones_like(model[0].weight)
        optimizer.step()
    state = optimizer.state[model[0].weight]
    assert "base" not in state
    assert state["exp_avg"].dtype == torch.float32
    # each step rounds by a variable with sd at most 2^-9 (half the spacing 2^-8); mean of 4096, ten steps, five sigma
    assert model[0].weight.float().mean().item() == pytest.approx(0.99, abs=5 * (10**0.5) * 2**-9 / 64)
    assert model[0].weight.float().unique().numel() > 1


def test_stochastic_rounding_is_unbiased_and_exact_where_it_can_be() -> None:
    value = torch.full((10000,), 1.0 + 2**-10)
    store = torch.empty(10000, dtype=torch.bfloat16)
    round_stochastically(value, store)
    assert set(store.float().tolist()) == {1.0, 1.0 + 2**-7}
    share = (store.float() > 1).float().mean().item()
    assert share == pytest.approx(1 / 8, abs=5 * (1 / 8 * 7 / 8 / 10000) ** 0.5)
    exact = torch.tensor([1.0, -2.5, 0.0, -0.0, 3.0e38, 1e-40]).bfloat16()
    round_stochastically(exact.float(), rounded := torch.empty_like(exact))
    assert torch.equal(rounded.view(torch.int16), exact.view(torch.int16))
    broken = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1], dtype=torch.int32).view(torch.float32)  # a GPU's, a CPU's
    round_stochastically(broken, rounded := torch.zeros(3, dtype=torch.bfloat16))
    assert rounded.isnan().all()


@pytest.mark.parametrize(("half", "name"), [(0, "0.weight"), (1, "1.weight")])
def test_float16_without_masters_is_refused(half: int, name: str) -> None:
    """Also of what is not routed."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    model[half].half()
    with pytest.raises(ValueError, match=rf"keep_base=False and {name} is float16"):
        create_molf_optimizer(model, MoLFConfig(expert_ranks=(2,), keep_base=False))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_8_bit_moments_follow_the_full_ones(tmp_path) -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    twin = copy.deepcopy(model)
    optimizers = [
        create_molf_optimizer(each, MoLFConfig(expert_ranks=(4,), moments_8bit=bits, **RATES))
        for each, bits in ((model, False), (twin, True))
    ]
    losses: list[list[float]] = [[], []]
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        x = torch.randn(16, 64, generator=generator)
        for each, optimizer, found in zip((model, twin), optimizers, losses, strict=True):
            loss = ((each(x) - x.roll(1, 1)) ** 2).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
    assert losses[0][-1] < 0.9 * losses[0][0]
    assert losses[1][-1] == pytest.approx(losses[0][-1], rel=0.02)
    state = optimizers[1].state[twin[0].weight]
    assert is_quantized(state["exp_avg"])
    assert is_quantized(state["exp_avg_sq"])
    assert state_bytes(optimizers[1]) < 0.6 * state_bytes(optimizers[0])
    torch.save(optimizers[1].state_dict(), tmp_path / "state.pt")
    third = copy.deepcopy(twin)
    again = create_molf_optimizer(third, MoLFConfig(expert_ranks=(4,), moments_8bit=True, **RATES))
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(as_float(again.state[third[0].weight][key]), as_float(state[key]))
    with pytest.raises(ValueError, match=r"exp_avg of .* is kept otherwise"):
        optimizers[0].load_state_dict(optimizers[1].state_dict())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("policy", ["fixed-dense", "score"])
def test_8_bit_moments_of_small_gradients_beside_large_ones(policy: str) -> None:
    """Where v rounds to 0 and m does not, a step is not m/ε: none is larger than AdamW's."""
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Embedding(64, 64))
    config = MoLFConfig(expert_ranks=(2,), policy=policy, lora_lr=0.0, weight_decay=0.0, lr=1e-3, moments_8bit=True)
    optimizer = create_molf_optimizer(model, config)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.full((64, 64), 1e-4)
        parameter.grad[:, 0] = 1.0
    optimizer.step()
    for old, parameter in zip(before, model.parameters(), strict=True):
        moved = (parameter - old).abs()
        assert moved.max() <= 1.05e-3
        assert moved.min() > 1e-4


@pytest.mark.parametrize("efficient", [False, True])
def test_steps_in_the_backward_pass_are_the_same_bits(efficient: bool) -> None:
    config = MoLFConfig(expert_ranks=(2, 4), train_base=not efficient, **RATES)
    after = causal_lm("qwen2")
    if efficient:
        after = get_peft_model(after, molf_lora_config(config))
    inside = copy.deepcopy(after)
    winners, first = trajectory(after, config, 6)
    inner, second = trajectory(inside, replace(config, step_in_backward=True), 6)
    assert list(map(sorted, winners)) == list(map(sorted, inner))
    assert all(torch.equal(a, b) for a, b in zip(after.parameters(), inside.parameters(), strict=True))
    for name, routing in first.routing.items():
        assert second.routing[name].winners == routing.winners
        assert second.routing[name].scores == pytest.approx(
            routing.scores, rel=1e-5
        )  # sums of 32 fp32 terms, reordered


def test_steps_in_the_backward_pass_look_at_all_tensors_once(monkeypatch) -> None:
    """And not for every module, which would be the square of their number."""
    looks = []
    fit = Stacks.fit
    monkeypatch.setattr(Stacks, "fit", lambda *arguments: looks.append(1) or fit(*arguments))
    model = causal_lm("qwen2")
    optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=(2,), step_in_backward=True, **RATES))
    for step in range(3):
        lm_step(model, optimizer, step)
    assert len(looks) == 2  # before the first there are no stacks


def test_steps_in_the_backward_pass_free_gradients_and_refuse_accumulation() -> None:
    model = causal_lm("qwen2")
    optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=(2,), step_in_backward=True, **RATES))
    ids = tokens(0)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(RuntimeError, match="cannot accumulate gradients"):
        model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    assert optimizer.routing == {}
    assert before["state"][0]["step"] == optimizer.state_dict()["state"][0]["step"]
    with pytest.raises(ValueError, match=r"max_grad_norm=1\.0: step_in_backward=True"):
        MoLFConfig(step_in_backward=True, max_grad_norm=1.0)
    with pytest.raises(NonFiniteGradientError, match="what came before it in the backward pass was updated"):
        (model(input_ids=ids, labels=ids).loss * torch.inf).backward()


def test_a_backward_pass_that_ended_with_an_error_is_over_after_zero_grad() -> None:
    """As where a batch that takes too much memory is left out; the next one was taken for accumulation."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=(2,), step_in_backward=True))

    def fail(*_: object) -> None:
        raise RuntimeError("no memory")

    hook = model[0].register_full_backward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        model(torch.ones(3, 4)).sum().backward()
    hook.remove()
    optimizer.zero_grad()
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    assert [int(optimizer.state[layer.weight]["step"]) for layer in model] == [1, 2]
    model(torch.ones(3, 4)).sum().backward()
    with pytest.raises(RuntimeError, match="a second backward pass"):
        model(torch.ones(3, 4)).sum().backward()


def test_a_group_that_is_added_is_stepped_in_the_backward_pass_too() -> None:
    model, extra = nn.Sequential(nn.Linear(4, 2)), nn.Parameter(torch.ones(2))
    optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=(2,), step_in_backward=True, **RATES))
    optimizer.add_param_group({"params": extra, "lr": 0.1})
    for _ in range(2):
        (model(torch.ones(1, 4)) * extra).sum().backward()
        assert extra.grad is None
        optimizer.step()
    assert (extra != 1).all()
    assert optimizer.state[extra]["step"] == 2


def test_a_group_that_is_added_between_two_backward_passes_is_stepped_too() -> None:
    model, extra = nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4)
    optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=(2,), step_in_backward=True))
    before = extra.weight.detach().clone()
    model(torch.ones(2, 4)).sum().backward()
    optimizer.add_param_group({"params": extra.parameters()})
    extra(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert not torch.equal(extra.weight, before)
    assert list(optimizer.routing) == ["0"]


def test_of_two_optimizers_with_steps_in_the_backward_pass_the_later_one_steps() -> None:
    """As where a cell of a notebook is run again: the first one's hooks stepped at its rate, and took the gradients."""
    model, ones = nn.Sequential(nn.Linear(4, 2)), torch.ones(1, 4)
    first = create_molf_optimizer(model, MoLFConfig(expert_ranks=(2,), step_in_backward=True, **RATES))
    model(ones).sum().backward()
    first.step()
    second = create_molf_optimizer(model, MoLFConfig((2,), step_in_backward=True, lr=0.0, lora_lr=0.0))
    before = model[0].weight.detach().clone()
    for _ in range(2):
        model(ones).sum().backward()
        second.step()
    assert torch.equal(model[0].weight, before)
    assert (first.steps_taken, second.steps_taken) == (1, 2)


def test_an_optimizer_takes_a_model_from_one_that_steps_in_its_backward_pass() -> None:
    """Which went on alone, as long as a scheduler or a variable held it, and left the other no gradient."""
    model = nn.Sequential(nn.Linear(4, 2))
    first = create_molf_optimizer(model, MoLFConfig(expert_ranks=(2,), step_in_backward=True, **RATES))
    second = create_molf_optimizer(model, MoLFConfig(expert_ranks=(2,), **RATES))
    model(torch.ones(1, 4)).sum().backward()
    second.step()
    assert (first.steps_taken, second.steps_taken) == (0, 1)


def test_a_deleted_optimizer_steps_in_no_backward_pass() -> None:
    model, ones = nn.Sequential(nn.Linear(4, 2)), torch.ones(1, 4)
    optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=(2,), step_in_backward=True, **RATES))
    before = model[0].weight.detach().clone()
    del optimizer
    model(ones).sum().backward()
    assert torch.equal(model[0].weight, before)
    assert model[0].weight.grad is not None


def test_gradients_that_came_by_no_hook_are_stepped_by_step() -> None:
    """Given by hand, or of a parameter that was frozen when it was added: step() did nothing and said nothing."""
    model, extra = nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4).requires_grad_(False)
    optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=(2,), step_in_backward=True, **RATES))
    optimizer.add_param_group({"params": extra.parameters()})
    extra.requires_grad_(True)
    before = [each.detach().clone() for each in (model[0].weight, extra.weight)]
    extra(torch.ones(2, 4)).sum().backward()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert not any(map(torch.equal, before, (model[0].weight, extra.weight)))
    assert all(each.grad is None for each in (*model.parameters(), *extra.parameters()))
    with pytest.warns(UserWarning, match="no parameter of this optimizer has a gradient") as caught:
        optimizer.step()
    assert caught[0].filename == __file__


def test_a_layer_whose_bias_was_frozen_since_is_named_when_it_steps_in_the_backward_pass() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))
    optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=(2,), step_in_backward=True, **RATES))
    model[0].bias.requires_grad_(False)
    model(torch.ones(1, 4)).sum().backward()
    with pytest.raises(RuntimeError, match="0: some of its weight, bias and adapter have a gradient"):
        optimizer.step()
