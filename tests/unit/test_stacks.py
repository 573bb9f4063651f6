"""Modules of one shape are stepped as one, and nobody can tell but by the number of calls."""

import copy
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from models import causal_lm, lm_step, twin_groups
from molf import MoLFConfig, create_molf_optimizer, molf_lora_config
from molf.optim import parts, stacks, virtual
from molf.optim.adamw import Tracking
from molf.optim.compiled import _moment_numbers

MOLF = MoLFConfig(expert_ranks=(2, 3), lora_alpha=(3.0, 5.0), lr=1e-3, lora_lr=1e-3, compile=False)
EFFICIENT = MoLFConfig(expert_ranks=(2, 3), train_base=False, lora_lr=3e-3, compile=False)
STEPS = 12


def _model(config, architecture="qwen2", dtype=torch.float32, **changes):
    from peft import get_peft_model

    model = causal_lm(architecture, dtype, **changes)
    torch.manual_seed(0)
    if config.train_base:
        return model
    adapter = molf_lora_config(config, fan_in_fan_out=architecture == "gpt2")
    return get_peft_model(model, adapter, autocast_adapter_dtype=False)


def _train(model, optimizer, steps=range(STEPS)):
    winners = []
    for step in steps:
        lm_step(model, optimizer, step)
        winners.append({name: each.winners for name, each in optimizer.routing.items()})
    return winners


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [MOLF, EFFICIENT, replace(MOLF, compile=True), replace(EFFICIENT, compile=True)],
    ids=["molf", "molf-e", "molf-compiled", "molf-e-compiled"],
)
@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_stacked_is_one_by_one(monkeypatch, architecture, config, dtype):
    """All tensors of several modules gathered, only those of LoRA experts, none."""
    runs = []
    for gathered, pairs in ((stacks.STACK_FROM, stacks.PAIR_TO), (0, stacks.PAIR_TO), (0, {})):
        monkeypatch.setattr(stacks, "STACK_FROM", gathered)
        monkeypatch.setattr(stacks, "PAIR_TO", pairs)
        model = _model(config, architecture, dtype)
        optimizer = create_molf_optimizer(model, config)
        runs.append((_train(model, optimizer), dict(model.named_parameters()), optimizer))
    sizes = [max(len(stack) for stack in optimizer.stacks().all) for *_, optimizer in runs]
    assert sizes[0] > 1
    assert sizes[1] > 1
    assert sizes[2] == 1
    alone, theirs, _ = runs[2]
    assert len({names for step in alone for names in step.values()}) > 1
    for winners, ours, _ in runs[:2]:
        assert winners == alone
        for name, weight in ours.items():
            # batched matmuls sum in another order: fp32 rounding, which may flip one bf16 spacing
            rtol = 2**-7 if dtype == torch.bfloat16 else 1e-4
            torch.testing.assert_close(weight, theirs[name], rtol=rtol, atol=2e-6)


def test_a_module_that_sits_out_a_step_keeps_its_moments_and_its_count():
    model = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
    optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=(2,)))
    assert [len(stack) for stack in optimizer.stacks().all] == [3]
    for step in range(4):
        for i, layer in enumerate(model):
            if (step, i) != (1, 2):
                layer(torch.randn(5, 6)).square().mean().backward()
        before = {key: value.clone() for key, value in optimizer.state[model[2].weight].items()}
        optimizer.step()
        optimizer.zero_grad()
        unchanged = all(torch.equal(before[key], value) for key, value in optimizer.state[model[2].weight].items())
        assert unchanged == (step == 1)
    assert [optimizer.state[layer.weight]["step"].item() for layer in model] == [4, 4, 3]
    assert optimizer.steps_taken == 4


def test_only_the_stack_of_a_module_that_sat_out_is_taken_apart():
    layers = [nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(6, 4)]
    optimizer = create_molf_optimizer(nn.ModuleList(layers), MoLFConfig(expert_ranks=(2,)))
    for left_out in (1, None):
        for i, layer in enumerate(layers):
            if i != left_out:
                layer(torch.randn(5, 6)).square().mean().backward()
        found = optimizer.stacks().of([m for i, m in enumerate(optimizer.modules) if i != left_out], []).stacks
        assert [[module.name for module in stack.modules] for stack in found] == [
            *([["0"]] if left_out == 1 else [["0"], ["1"]]),
            ["2", "3"],
        ]
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.routed_modules == list(optimizer.routing) == ["0", "1", "2", "3"]


def test_what_is_known_of_the_same_modules_is_kept():
    """And not that of others, or of the same where they have made other steps."""
    layers = [nn.Linear(6, 6), nn.Linear(6, 6)]
    optimizer = create_molf_optimizer(nn.ModuleList(layers), MoLFConfig(expert_ranks=(2,)))
    known, both = optimizer.stacks(), optimizer.modules
    first = known.of(both, [])
    known.advance(first)
    assert known.of(both, []) is first
    assert [stack.count for stack in first.stacks] == [2.0]
    alone = known.of(both[:1], [])
    known.advance(alone)
    assert alone is not first
    apart = known.of(both, [])
    assert [(len(stack), stack.count) for stack in apart.stacks] == [(1, 3.0), (1, 2.0)]
    known.advance(known.of(both[1:], []))
    assert known.of(both, []) is first
    assert [stack.count for stack in first.stacks] == [3.0]


def test_a_module_without_gradients_makes_no_new_selections():
    """However many steps the others are ahead of it."""
    optimizer = create_molf_optimizer(nn.ModuleList([nn.Linear(6, 6) for _ in range(3)]), MoLFConfig(expert_ranks=(2,)))
    known, two = optimizer.stacks(), optimizer.modules[:2]
    first = known.of(two, [])
    for _ in range(3):
        assert known.of(two, []) is first
        known.advance(first)


@pytest.mark.parametrize("compile", [True, False])
def test_groups_with_betas_of_their_own_are_stepped_with_these(compile):
    """Also where they were all alike before, and are so again afterwards."""
    model = _model(MOLF)
    optimizer = create_molf_optimizer(model, replace(MOLF, compile=compile))
    s = torch.tensor([MOLF.scales[0]] * 2 + [MOLF.scales[1]] * 3)
    for step in range(3):
        for i, group in enumerate(optimizer.param_groups):
            group["betas"] = (0.5 + i / 20, 0.9 - i / 20) if step == 1 else (0.9, 0.99)
        before = copy.deepcopy([optimizer.state[p] for group in optimizer.param_groups for p in group["params"]])
        ids = torch.arange(3, 27).view(2, 12)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        lora = next(group for group in optimizer.param_groups if group["expert"].startswith("lora"))
        held = iter(before)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                old, new = next(held), optimizer.state[parameter]
                for name, beta, g in (("exp_avg", 0, parameter.grad), ("exp_avg_sq", 1, parameter.grad.square())):
                    expected = old[name].lerp(g, 1 - group["betas"][beta])
                    torch.testing.assert_close(new[name], expected, rtol=1e-5, atol=1e-9)
                if "lora_B" in old:
                    expected = old["lora_B_exp_avg"].lerp(parameter.grad @ old["lora_A"].T * s, 1 - lora["betas"][0])
                    torch.testing.assert_close(new["lora_B_exp_avg"], expected, rtol=1e-4, atol=1e-6)
        optimizer.zero_grad()


@pytest.mark.parametrize("compile", [True, False])
def test_groups_with_an_epsilon_of_their_own_are_stepped_with_it(compile):
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    alone = copy.deepcopy(model)
    config = replace(MOLF, expert_ranks=(), lora_alpha=None, target_modules=["0"], compile=compile)
    optimizer = create_molf_optimizer(model, config)
    adamw = torch.optim.AdamW(twin_groups(optimizer, model, alone), lr=MOLF.lr)
    for i, groups in enumerate(zip(optimizer.param_groups, adamw.param_groups, strict=True)):
        for group in groups:
            group["eps"] = 0.01 * i
    for each, stepped in ((model, optimizer), (alone, adamw)):
        _steps(each, stepped, range(2))
    for parameter, other in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-6, atol=1e-7)


def test_few_selections_are_kept_where_other_modules_take_part_in_every_step():
    model = nn.ModuleList([nn.Linear(4, 4) for _ in range(12)])
    optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=(2,)))
    for step in range(40):
        for i in torch.randperm(12, generator=torch.Generator().manual_seed(step))[:6]:
            for parameter in model[int(i)].parameters():
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    kept = optimizer.stacks()._selections.values()
    assert 1 <= sum(len(each.positions) for each in kept) <= 5 * 24


def test_a_group_that_is_replaced_in_its_list_is_the_group():
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))
    optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=(3,)))
    _steps(model, optimizer, [0])
    for i, group in enumerate(optimizer.param_groups):
        optimizer.param_groups[i] = {**group, "lr": 0.0}
    before = [parameter.detach().clone() for parameter in model.parameters()]
    _steps(model, optimizer, [1])
    assert all(map(torch.equal, model.parameters(), before))


def test_unrouted_parameters_of_one_name_are_all_trained():
    model, head = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)), nn.LayerNorm(5)
    optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=(3,), compile=False))
    optimizer.add_param_group({"params": list(head.parameters()), "param_names": ["1.weight", "1.bias"]})
    before = [parameter.detach().clone() for parameter in (*model[1].parameters(), *head.parameters())]
    for parameter in (*model.parameters(), *head.parameters()):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter, old in zip((*model[1].parameters(), *head.parameters()), before, strict=True):
        assert not torch.equal(parameter, old)
        torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], torch.full_like(old, 0.1))


@pytest.mark.parametrize("compile", [False, True])
def test_a_weight_that_is_its_w_again_gets_a_new_one(compile):
    layer = nn.Linear(200, 200, bias=False)
    optimizer = create_molf_optimizer(
        layer_model := nn.Sequential(layer), replace(MOLF, policy="fixed-lora", compile=compile)
    )
    _steps(layer_model, optimizer, range(3))
    state = optimizer.state[layer.weight]
    state["lora_B"].zero_()
    layer.weight.data = state["base"]
    w = layer.weight.detach().clone()
    _steps(layer_model, optimizer, [3])
    assert torch.equal(state["base"], w)
    assert not virtual.shares_storage(state["base"], layer.weight)


def test_a_w_that_is_replaced_in_the_state_is_the_w():
    """As by code that moves a state to another device and back."""
    layer = nn.Linear(200, 200, bias=False)
    optimizer = create_molf_optimizer(model := nn.Sequential(layer), replace(MOLF, policy="fixed-lora"))
    _steps(model, optimizer, range(3))
    state = optimizer.state[layer.weight]
    old, before = state["base"], layer.weight.detach().clone()
    state["base"] = old.clone()
    old.fill_(math.nan)
    _steps(model, optimizer, [3])
    assert not torch.equal(layer.weight, before)
    assert layer.weight.isfinite().all()


@pytest.mark.parametrize("routed", [True, False])
def test_a_weight_that_is_transposed_in_its_place_is_stepped_like_adamw(routed):
    """Its address and shape stay, and compiled code goes by addresses."""
    model = nn.Sequential(nn.Linear(200, 200, bias=False), nn.Linear(200, 2))
    alone = copy.deepcopy(model)
    targets = ["0"] if routed else ["1"]
    config = replace(MOLF, expert_ranks=(), lora_alpha=None, target_modules=targets, compile=True)
    optimizer = create_molf_optimizer(model, config)
    adamw = torch.optim.AdamW(twin_groups(optimizer, model, alone), lr=MOLF.lr)
    for step in range(3):
        for each, stepped in ((model, optimizer), (alone, adamw)):
            if step == 1:
                each[0].weight.data = each[0].weight.data.t()
            _steps(each, stepped, [step])
    torch.testing.assert_close(model[0].weight, alone[0].weight, rtol=0, atol=1e-6)


def test_numbers_of_groups_that_are_tensors_are_numbers():
    """Compiled code takes tensors for rates of every row."""
    found = []
    for number in (float, torch.tensor):
        model = _model(MOLF)
        optimizer = create_molf_optimizer(model, replace(MOLF, compile=True))
        for group in optimizer.param_groups:
            group["betas"] = tuple(number(beta) for beta in (0.5, 0.75))
            group["lr"], group["weight_decay"] = number(2.0**-10), number(0.25)
        _train(model, optimizer, range(4))
        found.append([parameter.detach() for parameter in model.parameters()])
    assert all(map(torch.equal, *found))


def test_compiled_code_is_given_numbers_where_groups_have_tensors():
    """A CPU's takes either; a kernel's argument that is a tensor would be an address."""
    tracking = Tracking((torch.tensor(0.5), torch.tensor(0.75)), torch.tensor(2.0**-20), "epd")
    assert [type(each) for each in _moment_numbers(tracking)[:5]] == [float] * 5


def _as_dicts(optimizer):
    for parameter, entries in optimizer.state.items():
        optimizer.state[parameter] = dict(entries)


def _as_data(optimizer):
    for entries in optimizer.state.values():
        for key, value in entries.items():
            if key != "base":  # which may be the weight itself
                value.data = value.data.clone()


def _as_data_of_the_model(optimizer):
    for parameter in optimizer.state:
        parameter.data = parameter.data.clone()


@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("config", [MOLF, EFFICIENT, replace(MOLF, compile=True), replace(EFFICIENT, compile=True)])
@pytest.mark.parametrize("move", [_as_dicts, _as_data, _as_data_of_the_model])
def test_a_state_that_moves_to_a_device_and_back_is_followed(monkeypatch, move, config, gathered):
    """By whatever way it is moved; what the optimizer has kept between steps is of other tensors then."""
    if not gathered:
        monkeypatch.setattr(stacks, "STACK_FROM", 0)
        monkeypatch.setattr(stacks, "PAIR_TO", {})
    runs = []
    for moves in (False, True):
        model = _model(config)
        optimizer = create_molf_optimizer(model, config)
        rates = [group["lr"] for group in optimizer.param_groups]
        for step in range(6):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate if step else 0.0  # LoRA experts win first after the move
            if moves and step in (1, 4):
                move(optimizer)
            _train(model, optimizer, [step])
        saved = [value.clone() for entries in optimizer.state.values() for value in entries.values()]
        runs.append([*(parameter.detach() for parameter in model.parameters()), *saved])
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("config", [MOLF, EFFICIENT], ids=["molf", "molf-e"])
def test_copies_and_replaced_tensors_are_seen(config):
    model = _model(config)
    optimizer = create_molf_optimizer(model, config)
    _train(model, optimizer, range(4))
    copied = copy.deepcopy((model, optimizer))
    for entries in copied[1].state.values():
        for key, value in entries.items():
            if key != "base":
                entries[key] = value.clone()
    assert _train(model, optimizer, range(4, 9)) == _train(*copied, range(4, 9))
    for own, other in zip(model.parameters(), copied[0].parameters(), strict=True):
        assert torch.equal(own, other)


def test_weights_are_the_bits_that_the_state_says():
    """``sync_weights``, so a resume, and the look at who else wrote multiply one layer at a time."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(5, 5) for _ in range(4)])
    optimizer = create_molf_optimizer(model, replace(MOLF, policy="fixed-lora", lora_lr=1e-1))
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(6, 5)).square().mean().backward()
        optimizer.step()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.sync_weights()
    for parameter, other in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, other)


def test_convolutions_in_another_memory_format_are_stepped_like_adamw():
    """Their moments and gradients are gathered, and torch.stack keeps the format, of which there is no flat view."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(), nn.Linear(64, 3)]
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    alone = copy.deepcopy(model)
    optimizer = create_molf_optimizer(model, replace(MOLF, target_modules=["4"], expert_ranks=(), lora_alpha=None))
    adamw = torch.optim.AdamW(twin_groups(optimizer, model, alone), lr=MOLF.lr)
    for _ in range(3):
        for each, stepped in ((model, optimizer), (alone, adamw)):
            each(torch.linspace(-1, 1, 128).view(2, 4, 4, 4)).square().sum().backward()
            stepped.step()
            stepped.zero_grad()
    for parameter, other in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(parameter, other)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_alike_parameters_of_any_dimension_are_stepped_like_adamw(shape):
    model = nn.Module()
    model.layer = nn.Linear(4, 4)
    model.scales = nn.ParameterList([nn.Parameter(torch.full(shape, float(i + 1))) for i in range(3)])
    alone = [parameter.detach().clone().requires_grad_() for parameter in model.scales]
    optimizer = create_molf_optimizer(model, MOLF)
    adamw = torch.optim.AdamW(alone, lr=MOLF.lr, weight_decay=0.0)
    for _ in range(3):
        for parameters, stepped in ((model.scales, optimizer), (alone, adamw)):
            sum(p.pow(i + 2).sum() for i, p in enumerate(parameters)).backward()
            stepped.step()
            stepped.zero_grad()
    for parameter, other in zip(model.scales, alone, strict=True):
        assert torch.equal(parameter, other)


def test_rates_of_a_state_that_is_loaded_after_steps_are_read():
    model = _model(MOLF)
    optimizer = create_molf_optimizer(model, MOLF)
    _train(model, optimizer, range(2))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [parameter.detach().clone() for parameter in model.parameters()]
    _train(model, optimizer, range(2, 3))
    for parameter, other in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, other)


class _Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "config", [replace(MOLF, policy="fixed-dense"), replace(MOLF, policy="fixed-lora"), replace(EFFICIENT, top_k=2)]
)
def test_a_step_of_small_layers_makes_as_many_calls_at_any_depth(config):
    """But for P = W + Σ s_i B_i A_i: a product of one layer and one of all are not the same bits."""
    counts = []
    for layers in (4, 8):
        model = _model(config, num_hidden_layers=layers)
        optimizer = create_molf_optimizer(model, config)
        _train(model, optimizer, range(3))
        ids = torch.arange(3, 27).view(2, 12)
        model(input_ids=ids, labels=ids).loss.backward()
        with _Calls() as calls:
            optimizer.step()
        counts.append(Counter(name for name in calls.names if name not in ("permute", "transpose")))  # views of each B
    written = 4 * 7 if config.policy == "fixed-lora" else 0
    assert counts[1] - counts[0] == Counter({"addmm": written, "mul": written}) + Counter()
    assert not counts[0] - counts[1]


def test_a_tensor_in_the_place_of_one_that_is_gone_is_seen():
    """Python gives the id of a tensor that is gone to the next one."""
    model = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
    optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=(2,)))
    before, entries = optimizer.stacks(), optimizer.state[model[1].weight]
    assert optimizer.stacks() is before
    value = entries["exp_avg"].clone()
    for _ in range(3):
        entries["exp_avg"] = None
        entries["exp_avg"] = value.clone()
    assert optimizer.stacks() is not before


def _steps(model, optimizer, numbers):
    for number in numbers:
        g = torch.Generator().manual_seed(number)
        for parameter in model.parameters():
            scale = 10 ** (-3 + 2 * torch.rand((), generator=g))  # so that winners change
            parameter.grad = (torch.randn(parameter.shape, generator=g) * scale).to(parameter.dtype)
        optimizer.step()


def _small(compile=True):
    """Eight layers in one stack, four in another."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8) for _ in range(8)] + [nn.Linear(8, 6) for _ in range(4)]
    model = nn.ModuleList(layers)
    config = replace(MOLF, compile=compile, policy="random", random_shares=(0.8, 0.1, 0.1))
    return model, create_molf_optimizer(model, config)


def test_small_layers_have_their_w_in_one_tensor_once_lora_has_won_one_of_them():
    """Not before, nor uncompiled; who lost keeps its W in every bit."""
    lost = 0
    for compiled in (True, False):
        model, optimizer = _small(compiled)
        shared = []
        for step in range(12):
            before = {name: optimizer.state[layer.weight]["base"].clone() for name, layer in model.named_children()}
            _steps(model, optimizer, [step])
            for name, layer in model.named_children():
                stays = "dense" not in optimizer.routing[name].winners
                assert torch.equal(optimizer.state[layer.weight]["base"], before[name]) == stays
                lost += stays
            shared.append([part.value is not None for stack in optimizer.stacks().all for part in stack.weights])
            apart = [optimizer.state[layer.weight]["base"].data_ptr() != layer.weight.data_ptr() for layer in model]
            won = [bool(optimizer.state[layer.weight]["lora_B"].any()) for layer in model]
            stacks_of = [range(8), range(8, 12)]
            expected = [any(won[i] for i in of) if compiled else won[k] for of in stacks_of for k in of]
            assert apart == expected
        assert shared[-1] == [compiled, compiled] or not compiled
    assert lost > 10


def test_somebody_else_s_w_is_seen():
    model, optimizer = _small()
    _steps(model, optimizer, range(6))
    before, entries = optimizer.stacks(), optimizer.state[model[1].weight]
    assert before.all[0].weights[0].value is not None
    entries["base"] = entries["base"] + 1
    optimizer.sync_weights()
    assert optimizer.stacks() is not before
    old = entries["base"].clone()
    _steps(model, optimizer, [6])
    assert (entries["base"] - old).abs().max() < 0.1
    torch.testing.assert_close(model[1].weight.mean() - model[0].weight.mean(), torch.tensor(1.0), rtol=0, atol=0.2)


def test_a_resume_with_some_w_of_a_stack_that_are_the_weights():
    """After a load W is P where B = 0, and the next steps are the same bits."""
    model, optimizer = _small()
    _steps(model, optimizer, range(2))
    again = copy.deepcopy(model)
    resumed = create_molf_optimizer(again, optimizer.config)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    own = [resumed.state[layer.weight]["base"].data_ptr() != layer.weight.data_ptr() for layer in again[:8]]
    assert set(own) == {True, False}
    for each in ((model, optimizer), (again, resumed)):
        _steps(*each, range(2, 10))
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_parts_of_a_tensor_in_another_order_are_copied():
    whole = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
    for order in ([0, 1, 2], [1, 0, 2], [0, 1]):
        states = [{"x": whole.unbind()[i]} for i in order]
        joined = parts.shared(states, "x", by_row=True, turned=False)
        assert joined.view(-1, 2).tolist() == whole[order].tolist()
        assert (joined.data_ptr() == whole.data_ptr()) == (order == [0, 1, 2])
        assert all(state["x"].tolist() == whole[i].tolist() for state, i in zip(states, order, strict=True))


def test_weights_without_masters_are_rounded_stochastically_compiled_or_not(monkeypatch):
    rounded = []
    own = virtual.round_stochastically
    monkeypatch.setattr(virtual, "round_stochastically", lambda value, to: (rounded.append(to.shape), own(value, to)))
    for compiled in (True, False):
        model = nn.Sequential(nn.Linear(8, 8)).bfloat16()
        optimizer = create_molf_optimizer(model, replace(MOLF, compile=compiled, keep_base=False, policy="fixed-lora"))
        rounded.clear()
        _steps(model, optimizer, range(3))
        assert torch.Size([8, 8]) in rounded


def test_layers_of_two_dtypes_are_written_with_their_own_scales():
    """Compiled code takes those of fp32 alone."""
    model = nn.ModuleList([nn.Linear(6, 6).double(), nn.Linear(6, 6)])
    optimizer = create_molf_optimizer(model, replace(MOLF, compile=True, policy="fixed-lora"))
    _steps(model, optimizer, range(4))
    for layer in model:
        state, s = optimizer.state[layer.weight], torch.tensor([MOLF.scales[0]] * 2 + [MOLF.scales[1]] * 3)
        exact = state["base"].double() + (state["lora_B"] * s).double() @ state["lora_A"].double()
        assert (layer.weight.double() - exact).abs().max() < 1e-6
        assert (layer.weight.double() - state["base"].double()).abs().max() > 1e-3
