"""Precision, guards, schedules and the routing mapping of MoLFAdamW."""

import copy
import json
import math

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn

from models import causal_lm, lm_step, twin_groups
from molf import MoLFConfig, NonFiniteGradientError, create_molf_optimizer, molf_lora_config, read_routing
from molf.optim import RoutingRecorder
from molf.optim import routing as routing_module
from molf.optim.routing import _template


def small() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = causal_lm("qwen2")
    return model, create_molf_optimizer(model, MoLFConfig(expert_ranks=(2, 2, 4), lr=1e-3, lora_lr=3e-3))


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    tensors = [p.detach().clone() for p in model.parameters()]
    return tensors + [value.clone() for state in optimizer.state.values() for value in state.values()]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("where", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_non_finite_gradient_stops_before_anything_changes(bad: float, clip: float | None, where: str) -> None:
    model = causal_lm("qwen2")
    optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=(2, 4), max_grad_norm=clip))
    for step in range(2):
        lm_step(model, optimizer, step)
    before = snapshot(model, optimizer)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.get_parameter(where).grad.view(-1)[3] = bad
    with pytest.raises(NonFiniteGradientError, match=where.removesuffix(".weight")):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(model, optimizer), strict=True))
    optimizer.zero_grad()
    lm_step(model, optimizer, 3)


def test_a_step_without_any_gradient_is_warned_of() -> None:
    """As of an optimizer whose parameters are not the model's any more."""
    model, optimizer = small()
    before = snapshot(model, optimizer)
    with pytest.warns(UserWarning, match="no parameter of this optimizer has a gradient"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(model, optimizer), strict=True))


def test_closure_and_sparse_gradients_are_refused() -> None:
    model, optimizer = small()
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)
    model.model.embed_tokens.weight.grad = torch.zeros_like(model.model.embed_tokens.weight).to_sparse()
    with pytest.raises(ValueError, match=r"embed_tokens\.weight has a sparse gradient"):
        optimizer.step()


@pytest.mark.parametrize("efficient", [False, True])
def test_bf16_models_keep_fp32_masters_and_moments(efficient: bool) -> None:
    config = MoLFConfig(expert_ranks=(2, 4), train_base=not efficient, lr=1e-3, lora_lr=1e-3)
    model = causal_lm("qwen2", torch.bfloat16)
    if efficient:
        model = get_peft_model(model, molf_lora_config(config), autocast_adapter_dtype=False)
    optimizer = create_molf_optimizer(model, config)
    for step in range(3):
        lm_step(model, optimizer, step)
    for parameter, state in optimizer.state.items():
        assert parameter.dtype == torch.bfloat16
        assert all(value.dtype == torch.float32 for value in state.values())
        if "lora_A" not in state:
            assert torch.equal(parameter, state["base"].bfloat16())
    if not efficient:
        layer = model.model.layers[0].mlp.up_proj
        state = optimizer.state[layer.weight]
        assert torch.equal(layer.weight, (state["base"] + (2 * state["lora_B"]) @ state["lora_A"]).bfloat16())


def test_bf16_small_updates_are_not_lost() -> None:
    """A bf16 weight of 1 cannot move by 1e-3; its fp32 master does, and after ten steps the weight follows."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False)).bfloat16()
    model[0].weight.data.fill_(1.0)
    optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=(), lr=1e-3, weight_decay=0.0))
    for _ in range(10):
        model[0].weight.grad = torch.ones_like(model[0].weight)
        optimizer.step()
    assert optimizer.state[model[0].weight]["base"].item() == pytest.approx(0.99, abs=1e-5)
    assert model[0].weight.item() == pytest.approx(0.99, abs=0.004)


def test_schedulers_drive_each_expert_through_its_group() -> None:
    """A LoRA learning rate of zero leaves every update to the dense expert, and the other way round."""
    for zero, winner in ((("lora_r2[0]", "lora_r2[1]", "lora_r4"), "dense"), (("dense", "dense_bias"), "lora")):
        model, optimizer = small()
        factors = [0.0 if group["expert"] in zero else 1.0 for group in optimizer.param_groups]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda t, f=f: f for f in factors])
        for step in range(3):
            lm_step(model, optimizer, step)
            scheduler.step()
            assert all(r.winners[0].startswith(winner) for r in optimizer.routing.values())


def test_rates_of_single_lora_experts_are_their_own() -> None:
    """Decay and step size are per expert: with rate zero a winning expert keeps its bits, the other one moves."""
    config = MoLFConfig(expert_ranks=(2, 4), train_base=False, top_k=2, lora_lr=1e-2)
    model = get_peft_model(causal_lm("llama"), molf_lora_config(config))
    optimizer = create_molf_optimizer(model, config)
    optimizer.param_groups[1]["lr"] = 0.0
    B = [p for name, p in model.named_parameters() if "lora_B" in name]
    lm_step(model, optimizer, 0)
    lm_step(model, optimizer, 1)
    assert all(bool(p[:, :2].any()) and not bool(p[:, 2:].any()) for p in B)


def test_step_zero_with_rate_zero_is_a_tie_for_the_lower_index() -> None:
    model, optimizer = small()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    lm_step(model, optimizer, 0)
    assert all(routing.winners == ("dense",) and not any(routing.scores) for routing in optimizer.routing.values())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(int(state["step"]) == 1 for state in optimizer.state.values())


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: transformers.get_cosine_schedule_with_warmup(optimizer, 2, 5),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=6),
    ],
    ids=["transformers", "one-cycle"],
)
def test_schedules_are_followed_as_by_adamw(schedule) -> None:
    """Bit for bit, of rates and of the betas that OneCycleLR cycles."""
    model = causal_lm("qwen2")
    twin = copy.deepcopy(model)
    optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=(), lr=1e-3))
    adamw = torch.optim.AdamW(twin_groups(optimizer, model, twin), lr=1e-3)
    for each, stepped in ((model, optimizer), (twin, adamw)):
        scheduler = schedule(stepped)
        for step in range(5):
            lm_step(each, stepped, step)
            scheduler.step()
    assert optimizer.param_groups[0]["betas"] == adamw.param_groups[0]["betas"]
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, other)


@pytest.mark.parametrize(("train_base", "first"), [(True, 1e-2), (False, 1e-3)])
def test_a_least_rate_is_reached(train_base: bool, first: float) -> None:
    """transformers' schedulers divide it by the optimizer's default rate, not by those of its groups."""
    from transformers import get_cosine_with_min_lr_schedule_with_warmup, get_polynomial_decay_schedule_with_warmup

    config = MoLFConfig(expert_ranks=(2,), train_base=train_base, train_other=False, lr=1e-2, lora_lr=1e-3)
    for make, least in (
        (get_cosine_with_min_lr_schedule_with_warmup, {"min_lr": 1e-4}),
        (get_polynomial_decay_schedule_with_warmup, {"lr_end": 1e-4}),
    ):
        model = causal_lm("llama")
        optimizer = create_molf_optimizer(model, config)
        assert optimizer.param_groups[0]["lr"] == first
        scheduler = make(optimizer, num_warmup_steps=0, num_training_steps=2, **least)
        for step in range(2):
            lm_step(model, optimizer, step)
            scheduler.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)
        optimizer.add_param_group({"params": nn.Parameter(torch.ones(3))})
        assert optimizer.param_groups[-1]["lr"] == 1e-2


def test_routing_mapping() -> None:
    model, optimizer = small()
    assert optimizer.routing == {}
    lm_step(model, optimizer, 0)
    assert list(optimizer.routing) == optimizer.routed_modules
    routing = optimizer.routing["model.layers.0.self_attn.q_proj"]
    assert routing.experts == ("dense", "lora_r2[0]", "lora_r2[1]", "lora_r4")
    assert len(routing.scores) == 4
    assert routing.winners == (routing.experts[routing.scores.index(max(routing.scores))],)


def test_sync_weights_follows_the_state() -> None:
    model, optimizer = small()
    layer = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        optimizer.state[layer.weight]["lora_B"].fill_(0.1)
    expected = layer.weight.detach() + 0.2 * optimizer.state[layer.weight]["lora_A"].sum(0)
    optimizer.sync_weights()
    torch.testing.assert_close(layer.weight.detach(), expected)


def test_recorder_writes_one_record_per_step_in_full_precision(tmp_path, monkeypatch) -> None:
    model, optimizer = small()
    copies, to_host = [], routing_module.to_host
    monkeypatch.setattr(routing_module, "to_host", lambda rows: copies.append(1) or to_host(rows))
    recorder = RoutingRecorder(optimizer, tmp_path / "routing.jsonl")
    seen = []
    for step in range(4):
        lm_step(model, optimizer, step)
        seen.append(copy.deepcopy(optimizer.routing))
    recorder.close()
    header, records = read_routing(tmp_path / "routing.jsonl")
    assert header["schema"] == 1
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert len(copies) == 4, "one device-to-host copy per step"
    for record, routing in zip(records, seen, strict=True):
        for name, scores, winners in zip(header["modules"], record["scores"], record["winners"], strict=True):
            assert tuple(scores) == routing[name].scores
            assert tuple(header["experts"][i] for i in winners) == routing[name].winners


def test_a_line_is_the_record_whatever_its_numbers(tmp_path) -> None:
    """Floats that need all digits, whole ones, what is not finite, and modules that took no part; names are names."""
    _, optimizer = small()
    recorder = RoutingRecorder(optimizer, tmp_path / "routing.jsonl")
    count, numbers = len(optimizer.routed_modules), [0.1, 1 / 3, 5e-324, 1e22, 0.0, 3.0, 2.0**-30, 1e-9]
    rows = [[numbers[(i + j) % len(numbers)] for j in range(len(optimizer.experts))] for i in range(count)]
    for scores, winners in (
        (rows, [[1]] * count),
        ([[math.inf, 1.0], *rows[1:]], [[0]] * count),
        ([None, *rows[1:]], [None, *[[1]] * (count - 1)]),
    ):
        record = {
            "step": 7,
            "lr": {"dense": 5e-5, "100 %": 1e-3, "b": 0.1, "c": 1.0},
            "scores": scores,
            "winners": winners,
        }
        recorder._template = _template(list(record["lr"]), count, 1)
        line = recorder._line(record)
        assert line.endswith("\n")
        assert json.loads(line) == record
    recorder.close()


def test_the_recorder_counts_as_the_optimizer_does(tmp_path) -> None:
    """Also where the parameter that was ahead stays behind, and where another state is loaded."""
    model, optimizer = small()
    recorder = RoutingRecorder(optimizer, tmp_path / "routing.jsonl")
    saved = copy.deepcopy(optimizer.state_dict())
    expected = []
    for step in range(9):
        if step == 6:
            optimizer.load_state_dict(saved)
        frozen = list(model.parameters())[: 20 if step in (2, 3) else 1 if step == 4 else 0]
        for parameter in frozen:
            parameter.requires_grad_(False)
        lm_step(model, optimizer, step)
        expected.append(optimizer.steps_taken)
        for parameter in frozen:
            parameter.requires_grad_(True)
        assert recorder.latest["step"] == expected[-1]
    assert expected[6:] == [1, 2, 3]
    recorder.close()


def test_a_step_without_gradients_is_a_record_without_decisions(tmp_path) -> None:
    model, optimizer = small()
    recorder = RoutingRecorder(optimizer, tmp_path / "routing.jsonl")
    lm_step(model, optimizer, 0)
    with pytest.warns(UserWarning, match="no parameter of this optimizer has a gradient"):
        optimizer.step()
    recorder.close()
    assert optimizer.routing == {}
    records = read_routing(tmp_path / "routing.jsonl")[1]
    assert [record["winners"][0] is None for record in records] == [False, True]


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_the_default_device_is_none_of_its_tensors(compile: bool, clip: float | None) -> None:
    """As after ``torch.set_default_device("cuda")``: what is made beside the model is made where it belongs."""
    runs = []
    for default in ("cpu", "meta"):
        model = causal_lm("qwen2")
        torch.manual_seed(0)
        batch = torch.arange(3, 19).view(2, 8)
        with torch.device(default):
            config = MoLFConfig(expert_ranks=(2, 4), lora_alpha=(4.0, 6.0), max_grad_norm=clip, compile=compile)
            optimizer = create_molf_optimizer(model, config)
            for _ in range(3):
                with torch.device("cpu"):
                    model(input_ids=batch, labels=batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            optimizer.load_state_dict(optimizer.state_dict())
        runs.append(snapshot(model, optimizer))
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_is_none_of_its_tensors(default: torch.dtype) -> None:
    """A count of steps in bf16 would never go beyond 256."""
    runs = []
    for dtype in (torch.float32, default):
        model = causal_lm("qwen2")
        torch.set_default_dtype(dtype)
        try:
            config = MoLFConfig(expert_ranks=(2, 4), lora_alpha=(4.0, 6.0), max_grad_norm=0.1)
            optimizer = create_molf_optimizer(model, config)
            for state in optimizer.state.values():
                state["step"].fill_(256)
            for step in range(3):
                for i, parameter in enumerate(model.parameters()):
                    parameter.grad = torch.full_like(parameter, 1e-3 * (1 + i + step))
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        assert optimizer.steps_taken == 259
        runs.append(snapshot(model, optimizer))
    assert all(map(torch.equal, *runs))


def test_a_state_saved_with_another_type_of_step_counts_is_loaded() -> None:
    """As by an optimizer that was made under another default dtype."""
    model, optimizer = small()
    lm_step(model, optimizer, 0)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = state["step"].double()
    optimizer.load_state_dict(saved)
    assert {state["step"].dtype for state in optimizer.state.values()} == {torch.float32}
    assert optimizer.steps_taken == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"keep_base": False}, {"step_in_backward": True}, {"compile": False}])
def test_a_step_under_autocast_is_the_same_bits(dtype: torch.dtype, options) -> None:
    """As where a whole iteration is in its block."""
    runs = []
    for inside in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).to(dtype)
        config = MoLFConfig(expert_ranks=(2, 3), lora_alpha=(3.0, 5.0), policy="fixed-lora", **options)
        optimizer = create_molf_optimizer(model, config)
        for step in range(4):
            weights = [torch.full_like(parameter, 1e-3 * (1 + step)) for parameter in model.parameters()]
            loss = sum((p * w).sum() for p, w in zip(model.parameters(), weights, strict=True))
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                loss.backward()
                optimizer.step()
                optimizer.sync_weights()
            optimizer.zero_grad()
        runs.append(snapshot(model, optimizer))
    assert all(map(torch.equal, *runs))


def test_a_log_goes_on_from_the_state_that_was_loaded(tmp_path) -> None:
    """Within one process, as after a rollback."""
    model, optimizer = small()
    recorder = RoutingRecorder(optimizer, tmp_path / "r.jsonl")
    for step in range(3):
        lm_step(model, optimizer, step)
        if step == 0:
            saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    lm_step(model, optimizer, 7)
    latest = recorder.latest
    recorder.close()
    records = read_routing(tmp_path / "r.jsonl")[1]
    assert [record["step"] for record in records] == [1, 2]
    assert records[1] == latest


@pytest.mark.parametrize("lost", [2, 3])
def test_a_log_that_lacks_steps_is_not_continued(tmp_path, lost: int) -> None:
    """In the middle or at the end, as where it was cut by hand and the run goes on from a newer checkpoint."""
    model, optimizer = small()
    recorder = RoutingRecorder(optimizer, tmp_path / "r.jsonl")
    for step in range(3):
        lm_step(model, optimizer, step)
    recorder.close()
    lines = (tmp_path / "r.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "r.jsonl").write_text(cut := "".join(lines[:lost] + lines[lost + 1 :]))
    recorder = RoutingRecorder(optimizer, tmp_path / "r.jsonl")
    with pytest.raises(ValueError, match=rf"r\.jsonl has no record of step {lost}, and the run goes on with step 4"):
        lm_step(model, optimizer, 3)
    recorder.close()
    assert (tmp_path / "r.jsonl").read_text() == cut


def test_recorder_survives_a_torn_line_and_drops_what_a_resume_repeats(tmp_path) -> None:
    model, optimizer = small()
    recorder = RoutingRecorder(optimizer, tmp_path / "r.jsonl")
    lm_step(model, optimizer, 0)
    saved = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    for step in (1, 2):
        lm_step(model, optimizer, step)
    recorder.close()
    full = (tmp_path / "r.jsonl").read_text()
    header, _, rest = full.partition("\n")
    full = header + "\n" + rest.replace('"step":1,', '"step": 1,', 1)  # what is kept is not written anew
    (tmp_path / "r.jsonl").write_text(full + '{"step": 4, "lr"')
    model.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[0])
    recorder = RoutingRecorder(optimizer, tmp_path / "r.jsonl")
    for step in (1, 2):
        lm_step(model, optimizer, step)
    recorder.close()
    assert (tmp_path / "r.jsonl").read_text() == full
    (tmp_path / "other.jsonl").write_text('{"schema": 99}\n')
    with pytest.raises(ValueError, match="schema 99"):
        read_routing(tmp_path / "other.jsonl")


def test_layers_with_other_step_counts_keep_their_own_bias_correction() -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
    theirs = copy.deepcopy(ours)
    config = MoLFConfig(expert_ranks=(), target_modules=["0", "1"], compile=False, lr=1e-3, weight_decay=0.0)
    optimizers = create_molf_optimizer(ours, config), torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(3):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            (model(x) if step else model[2](model[0](x))).square().sum().backward()  # layer 1 takes no part at first
            optimizer.step()
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


def test_scores_of_layers_of_several_dtypes_are_their_own() -> None:
    found = []
    for dtypes in ((torch.float64, torch.float32, torch.float64), (torch.float64,) * 3):
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(8 + i, 9 + i, bias=False).to(dtype) for i, dtype in enumerate(dtypes)])
        config = MoLFConfig(expert_ranks=(), target_modules=["0", "1", "2"], compile=False)
        optimizer = create_molf_optimizer(model, config)
        for i, parameter in enumerate(model.parameters()):
            parameter.grad = torch.full_like(parameter, 10.0**i)
        optimizer.step()
        found.append([each.scores[0] for each in optimizer.routing.values()])
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)
