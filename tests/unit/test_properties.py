"""Random configurations: what is valid builds, steps and resumes; what is not is one ValueError that names it."""

import copy
import dataclasses
import io
import itertools
import math
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from models import causal_lm, tokens
from molf import MoLFAdamW, MoLFConfig, NonFiniteGradientError, create_molf_optimizer, molf_lora_config
from molf.optim.policy import priorities
from molf.optim.reference import MoLFAdamWReference, superpose
from molf.optim.routing import winners_of

FIELDS = [field.name for field in dataclasses.fields(MoLFConfig)]
HUGE = 10**400


def examples(count: int):
    """The same examples in every run; ten times as many in the test that is marked slow."""
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


# --- what a user may write --------------------

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.floats(),
    st.sampled_from([HUGE, -HUGE, 2**63, 10**30, 1e308, 1e39, 1e-46, 5e-324, -0.0, Fraction(1, 3), 1j, object(), b"x"]),
    st.sampled_from([np.float32(0.5), np.float64(0.5), np.int64(2), np.bool_(True), np.array([1, 2]), torch.ones(())]),
    st.sampled_from(
        ["", "x", "5e-5", "epd", "pfn", "random", "fixed-dense", "(", "[", "(?i)x", "a\nb", "all-linear", "*"]
    ),
    st.text(max_size=4),
)
ANYTHING = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.lists(SCALARS, max_size=3).map(tuple),
    st.lists(st.lists(SCALARS, max_size=2), max_size=2),
    st.dictionaries(st.text(max_size=2), SCALARS, max_size=2),
    st.sets(st.one_of(st.text(max_size=2), st.integers()), max_size=2),
    st.builds(range, st.integers(0, 3)),
)
RATES = st.one_of(st.just(0), st.floats(1e-6, 1e-2), st.floats(1e-6, 1e-2).map(np.float64), st.just(np.float32(1e-3)))


@st.composite
def valid_fields(draw: Any) -> dict[str, Any]:
    """Fields of a config that the documentation of every field allows."""
    ranks = draw(st.lists(st.integers(1, 5), max_size=4))
    base = draw(st.booleans()) or not ranks
    experts = len(ranks) + base
    policies = ["score", "score", "random", *(["fixed-dense", "fixed-lora"] if base and ranks else [])]
    policy = draw(st.sampled_from(policies))
    most = {"fixed-dense": 1, "fixed-lora": len(ranks)}.get(policy, experts)
    top_k = draw(st.integers(1, most))
    shares = draw(
        st.permutations(
            [1.0] * top_k + draw(st.lists(st.floats(0, 9), min_size=experts - top_k, max_size=experts - top_k))
        )
    )
    alpha = st.floats(0.1, 32)
    in_backward = draw(st.sampled_from([False, False, True]))
    moments_8bit = draw(st.booleans())
    eps = draw(st.floats(1e-8, 1e-2) if moments_8bit else st.one_of(st.floats(1e-12, 1e-2), st.just(2e-38)))
    # with the smallest ε, v = 0 where g is 0 would make m / ε, as AdamW has it, larger than float32's numbers
    beta2 = draw(st.floats(0.1 if eps < 1e-12 else 0, 0.9999))
    return {
        "expert_ranks": draw(st.sampled_from([tuple, list, lambda r: [np.int64(x) for x in r]]))(ranks),
        "lora_alpha": draw(st.one_of(st.none(), alpha, st.lists(alpha, min_size=len(ranks), max_size=len(ranks)))),
        "use_rslora": draw(st.booleans()),
        "target_modules": draw(st.sampled_from(["all-linear", ".*", r"[02]|.*_proj|.*\.\d", ["0", "2", "q_proj"]])),
        "exclude_modules": draw(st.sampled_from([None, [], "absent", {"absent"}, ["4"]])),
        "train_base": base,
        "top_k": top_k,
        "score_fn": draw(st.sampled_from(["epd", "pfn"])),
        "policy": policy,
        "random_shares": shares if policy == "random" else None,
        "policy_seed": draw(st.integers()),
        **{name: draw(RATES) for name in ("lr", "lora_lr", "weight_decay", "lora_weight_decay")},
        "betas": draw(st.sampled_from([list, tuple]))((draw(st.floats(0, 0.999)), beta2)),
        "eps": eps,
        "max_grad_norm": None if in_backward else draw(st.one_of(st.none(), st.floats(1e-3, 1e3))),
        "compile": draw(st.sampled_from([False, "auto", True])),
        "keep_base": draw(st.booleans()),
        "moments_8bit": moments_8bit,
        "step_in_backward": in_backward,
        "train_other": draw(st.sampled_from([None, True, False])),
    }  # fmt: skip


def refused(error: ValueError, *names: str) -> None:
    text = str(error)
    assert "\n" not in text
    assert any(name in text for name in names), text


def builds_or_is_refused(changes: dict[str, Any]) -> None:
    """Whatever a config accepts are plain Python values of the range that the arithmetic needs."""
    try:
        config = MoLFConfig(**changes)
    except ValueError as error:
        refused(error, *changes, "policy", "random_shares", "top_k")
        return
    for name in ("lr", "lora_lr", "weight_decay", "lora_weight_decay", "eps", "lora_dropout"):
        assert type(getattr(config, name)) is float
        assert 0 <= torch.tensor(getattr(config, name), dtype=torch.float32).item() < math.inf
    assert torch.tensor(config.eps, dtype=torch.float32).item() > 0
    assert all(torch.tensor(scale, dtype=torch.float32).item() > 0 for scale in config.scales)
    assert all(type(rank) is int and rank >= 1 for rank in config.expert_ranks)
    assert all(type(beta) is float and 0 <= beta < 1 for beta in config.betas)
    assert type(config.top_k) is int
    assert 1 <= config.top_k <= len(config.experts) == len(set(config.experts))
    names = config.target_modules
    assert isinstance(names, str) or all(isinstance(name, str) for name in names)


ONE_FIELD = st.tuples(st.sampled_from(FIELDS), ANYTHING).map(lambda pair: dict([pair]))
ANY_FIELDS = st.one_of(
    ONE_FIELD,
    st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=3),
    st.tuples(valid_fields(), ONE_FIELD).map(lambda pair: pair[0] | pair[1]),
)


@examples(1500)
@given(ANY_FIELDS)
def test_any_value_of_any_field_is_taken_or_refused_by_name(changes: dict[str, Any]) -> None:
    builds_or_is_refused(changes)


@pytest.mark.slow
@examples(15_000)
@given(ANY_FIELDS)
def test_any_value_of_any_field_is_taken_or_refused_by_name_slow(changes: dict[str, Any]) -> None:
    builds_or_is_refused(changes)


# --- models and steps --------------------


class Tied(nn.Module):
    """Two layers that are one, between two that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.tied, self.again = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.again.weight = self.tied.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.tied(self.first(x)))


def plain_model(kind: str, bias: bool) -> nn.Module:
    if kind == "conv1d":
        return nn.Sequential(Conv1D(6, 4), nn.Tanh(), Conv1D(3, 6))
    if kind == "norm":
        return nn.Sequential(
            nn.Linear(4, 6, bias), nn.LayerNorm(6), nn.Linear(6, 6, bias), nn.Tanh(), nn.Linear(6, 3, bias)
        )
    if kind == "frozen":
        model = plain_model("norm", bias)
        model[2].requires_grad_(False)
        return model
    if kind == "wide":  # whose moments are large enough for 8 bits
        return nn.Sequential(nn.Linear(4, 64, bias), nn.Tanh(), nn.Linear(64, 64, bias))
    if kind == "one":
        return nn.Sequential(nn.Linear(4, 1, bias))
    return {"tied": Tied, "lm": lambda: causal_lm("llama"), "no-linear": lambda: nn.Sequential(nn.LayerNorm(4))}[kind]()


SCENARIOS = st.tuples(
    valid_fields(),
    st.sampled_from(["norm", "norm", "frozen", "one", "conv1d", "wide"]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.booleans(),
    st.sampled_from([0.0, 0.3]),
)


def backward(model: nn.Module, seed: int) -> None:
    dtype = next(model.parameters()).dtype
    if hasattr(model, "config") and hasattr(model.config, "vocab_size"):
        ids = tokens(seed)
        model(input_ids=ids, labels=ids).loss.backward()
        return
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)
    model(x).float().square().mean().backward()


def expert_values(optimizer: MoLFAdamW, module: Any) -> list[list[torch.Tensor]]:
    """The tensors of every expert, in index order, read from state and model without the optimizer's own arithmetic."""
    values = []
    state = {slot: optimizer.state[optimizer._parameter(slot)] for slot in module.slots}
    masters = {slot: state[slot].get("base", optimizer._parameter(slot)) for slot in module.slots}
    computed = module.lora_A is None and bool(optimizer.config.expert_ranks) and not optimizer.config.keep_base
    if optimizer.config.train_base:  # a W that is computed moves by a rounding
        dense = [slot for slot in (module.weight, module.bias) if slot is not None][int(computed) :]
        values.append([masters[slot].detach().clone() for slot in dense])
    if not optimizer.config.expert_ranks:
        return values
    if module.lora_A is None:
        A, B = (state[module.slots[0]][name] for name in ("lora_A", "lora_B"))
    else:
        A, B = masters[module.lora_A], masters[module.lora_B]
    first = 0
    for rank in optimizer.config.expert_ranks:
        values.append([A[first : first + rank].detach().clone(), B[:, first : first + rank].detach().clone()])
        first += rank
    return values


def step_and_look(model: nn.Module, optimizer: MoLFAdamW, seed: int) -> None:
    """One step: top_k winners per module, losers bit-identical, everything finite."""
    before = [expert_values(optimizer, module) for module in optimizer.modules]
    backward(model, seed)
    optimizer.step()
    optimizer.zero_grad()
    assert sorted(optimizer.routing) == sorted(optimizer.routed_modules)  # in the backward pass the last layer is first
    for module, old in zip(optimizer.modules, before, strict=True):
        routing = optimizer.routing[module.name]
        assert len(set(routing.winners)) == len(routing.winners) == optimizer.config.top_k
        assert all(map(math.isfinite, routing.scores))
        for name, was, now in zip(optimizer.experts, old, expert_values(optimizer, module), strict=True):
            if name not in routing.winners:
                assert all(torch.equal(a, b) for a, b in zip(was, now, strict=True)), f"{name} lost and moved"
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def check_scenario(scenario: tuple[Any, ...]) -> None:
    fields, kind, bias, dtype, adapter, dropout = scenario
    adapter = adapter and bool(fields["expert_ranks"])
    config = MoLFConfig(**fields, lora_dropout=dropout if adapter else 0.0)
    torch.manual_seed(0)
    model = plain_model(kind, bias).to(dtype)
    if kind != "norm" or adapter:  # patterns that name other layers than this model's, or its activations
        config = dataclasses.replace(config, target_modules="all-linear")
    elif config.target_modules == ".*":
        with pytest.raises(ValueError, match="only linear layers can be routed"):
            create_molf_optimizer(model, config)
        return
    if adapter:
        model.config = SimpleNamespace(tie_word_embeddings=False, to_dict=dict)
        targets = ["0", "2", "4"] if kind in ("norm", "frozen") else ["0"]
        lora = molf_lora_config(
            dataclasses.replace(config, target_modules=targets, exclude_modules=None), fan_in_fan_out=kind == "conv1d"
        )
        model = get_peft_model(model, lora, autocast_adapter_dtype=False).to(dtype)
    optimizer = create_molf_optimizer(model, config)
    step_and_look(model, optimizer, 1)
    step_and_look(model, optimizer, 2)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    twin = copy.deepcopy(model)
    resumed = create_molf_optimizer(twin, config)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    torch.manual_seed(3)
    step_and_look(model, optimizer, 3)
    torch.manual_seed(3)
    step_and_look(twin, resumed, 3)
    assert optimizer.routing == resumed.routing
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@examples(400)
@given(SCENARIOS)
def test_valid_configs_build_step_and_resume(scenario: tuple[Any, ...]) -> None:
    check_scenario(scenario)


@pytest.mark.slow
@examples(4000)
@given(SCENARIOS)
def test_valid_configs_build_step_and_resume_slow(scenario: tuple[Any, ...]) -> None:
    check_scenario(scenario)


EXTREMES = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(
            ("lr", "lora_lr", "weight_decay", "lora_weight_decay"), st.sampled_from([0, 5e-324, 1.0, 3e38])
        ),
        "eps": st.sampled_from([1.2e-38, 1e-20, 1.0, 3e38]),
        "max_grad_norm": st.sampled_from([1.2e-38, 1e-20, 1e300]),
        "lora_alpha": st.sampled_from([1e-36, 1e36]),
        "betas": st.tuples(st.sampled_from([0, 1 - 2**-53]), st.sampled_from([0, 1 - 2**-53])),
        "lora_dropout": st.sampled_from([0, 5e-324, 0.5, 0.999]),
        "expert_ranks": st.sampled_from([(1,), (64,), (3, 3, 3, 3, 3, 3)]),
        "target_modules": st.one_of(st.text(min_size=1, max_size=3), st.lists(st.text(min_size=1), max_size=2)),
        "exclude_modules": st.one_of(st.text(max_size=3), st.lists(st.sampled_from(["0", "q_proj", "x"]), max_size=2)),
    },
)
ATTACKS = st.tuples(
    valid_fields(),
    EXTREMES,
    st.sampled_from(["norm", "norm", "frozen", "one", "conv1d", "conv1d", "tied", "no-linear", "lm"]),
    st.sampled_from([None, None, 1, 3, 7]),
    st.sampled_from([0.0, 0.5]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)


def check_attack(attack: tuple[Any, ...]) -> None:
    """Any model with any config is stepped or refused in one line; what overflows later is a NonFiniteGradientError."""
    fields, extremes, kind, rank, dropout, dtype = attack
    torch.manual_seed(0)
    model = plain_model(kind, bias=True).to(dtype)
    if rank is not None and kind != "no-linear":
        targets = {"lm": ["q_proj"], "tied": ["first"]}.get(kind, ["0"])
        lora = LoraConfig(r=rank, lora_dropout=dropout, target_modules=targets, fan_in_fan_out=kind == "conv1d")
        model = get_peft_model(model, lora)
    try:
        config = MoLFConfig(**{**fields, **extremes})
        optimizer = create_molf_optimizer(model, config)
    except ValueError as error:
        refused(error, "_modules", "expert_ranks", "lora_dropout", "tied", *FIELDS)
        return
    try:
        for seed in (1, 2):
            backward(model, seed)
            optimizer.step()
            optimizer.zero_grad()
    except NonFiniteGradientError:
        assert {"lr", "lora_lr", "weight_decay", "lora_weight_decay", "lora_alpha", "lora_dropout"} & extremes.keys()


@examples(300)
@given(ATTACKS)
def test_any_model_and_config_is_stepped_or_refused(attack: tuple[Any, ...]) -> None:
    check_attack(attack)


@pytest.mark.slow
@examples(3000)
@given(ATTACKS)
def test_any_model_and_config_is_stepped_or_refused_slow(attack: tuple[Any, ...]) -> None:
    check_attack(attack)


# --- the reference --------------------

CASES = st.fixed_dictionaries(
    {
        "sizes": st.lists(st.integers(1, 9), min_size=2, max_size=4),
        "ranks": st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple),
        "train_base": st.booleans(),
        "score_fn": st.sampled_from(["epd", "pfn"]),
        "max_grad_norm": st.sampled_from([None, 0.05]),
        "accumulate": st.sampled_from([1, 2, 4]),
        "lora_lr": st.floats(1e-4, 1e-2),
        "top_k": st.integers(1, 5),
        "bias": st.booleans(),
        "adapter": st.booleans(),
        "seed": st.integers(0, 99),
    }
)


def check_against_reference(case: dict[str, Any]) -> None:
    """Six steps in float64: equal winners, and every weight P = W + Σ s B A within 1e-10, as in the parity tests."""
    sizes, experts = case["sizes"], len(case["ranks"]) + case["train_base"]
    config = MoLFConfig(
        expert_ranks=case["ranks"], train_base=case["train_base"], score_fn=case["score_fn"], lr=1e-3,
        lora_lr=case["lora_lr"], max_grad_norm=case["max_grad_norm"], top_k=min(case["top_k"], experts), lora_alpha=1.0,
    )  # fmt: skip
    torch.manual_seed(case["seed"])
    layers = [nn.Linear(ins, outs, case["bias"]) for ins, outs in itertools.pairwise(sizes)]
    model = nn.Sequential(*layers).double()
    names = [str(index) for index in range(len(layers))]
    twin = copy.deepcopy(model)
    superposed = superpose(twin, names, config)
    if case["adapter"]:
        model.config = SimpleNamespace(tie_word_embeddings=False, to_dict=dict)
        lora = molf_lora_config(dataclasses.replace(config, target_modules=names))
        model = get_peft_model(model, lora, autocast_adapter_dtype=False).double()
    optimizer = create_molf_optimizer(model, config)
    prefix = "base_model.model." if case["adapter"] else ""
    with torch.no_grad():
        for name, layer in superposed.items():
            real = model.get_submodule(prefix + name)
            for B in layer.B:
                B.normal_(std=0.1)
            A, B = torch.cat(list(layer.A)), torch.cat(list(layer.B), 1)
            if case["adapter"]:
                scales = [
                    scale for scale, rank in zip(config.scales, config.expert_ranks, strict=True) for _ in range(rank)
                ]
                real.lora_A["default"].weight.copy_(A)
                real.lora_B["default"].weight.copy_(B * B.new_tensor(scales))
            else:
                optimizer.state[real.weight]["lora_A"].copy_(A)
                optimizer.state[real.weight]["lora_B"].copy_(B)
            for base in (layer.W, layer.b):
                if base is not None:
                    base.requires_grad_(config.train_base)
    optimizer.sync_weights()
    reference = MoLFAdamWReference(superposed, config)
    data = torch.Generator().manual_seed(case["seed"])
    for _ in range(6):
        x = torch.randn(8, sizes[0], generator=data, dtype=torch.float64)
        y = torch.randn(8, sizes[-1], generator=data, dtype=torch.float64)
        for part_x, part_y in zip(x.chunk(case["accumulate"]), y.chunk(case["accumulate"]), strict=True):
            for network in (model, twin):
                ((network(part_x) - part_y).square().mean() / case["accumulate"]).backward()
        for each, network in ((optimizer, model), (reference, twin)):
            each.step()
            network.zero_grad()
        for name in names:
            routing = optimizer.routing[prefix + name]
            assert [routing.experts.index(winner) for winner in routing.winners] == reference.winners[name]
    for name, layer in superposed.items():
        real = model.get_submodule(prefix + name)
        weight = real.weight
        if case["adapter"]:
            weight = real.base_layer.weight + real.lora_B["default"].weight @ real.lora_A["default"].weight
        torch.testing.assert_close(weight, layer.merged(), rtol=0, atol=1e-10)
        if case["bias"]:
            torch.testing.assert_close(real.bias, layer.b, rtol=0, atol=1e-10)


@examples(120)
@given(CASES)
def test_any_shape_follows_the_reference(case: dict[str, Any]) -> None:
    check_against_reference(case)


@pytest.mark.slow
@examples(1200)
@given(CASES)
def test_any_shape_follows_the_reference_slow(case: dict[str, Any]) -> None:
    check_against_reference(case)


# --- what random configurations found ----------


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": HUGE}, {"lr": HUGE}, {"policy": "random", "random_shares": [0.5, HUGE]},
        {"expert_ranks": [2**40]},
        {"eps": 1e-46}, {"eps": 1e39}, {"lora_alpha": 1e300}, {"top_k": "a\nb"}, {"score_fn": np.array([1, 2])},
        {"target_modules": [1, None]}, {"target_modules": []}, {"target_modules": "("}, {"exclude_modules": "["},
    ],
)  # fmt: skip
def test_what_ended_in_a_traceback_or_in_nan_is_refused_by_name(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=list(changes)[-1]) as caught:
        MoLFConfig(**changes)
    refused(caught.value, *changes)


def test_settings_of_numpy_are_saved_as_numbers() -> None:
    """A float64 of numpy in a parameter group made a checkpoint that weights_only=True refuses."""
    config = MoLFConfig((np.int64(2),), lr=np.float64(1e-3), lora_lr=np.float32(1e-3), betas=list(np.ones(2) / 2))
    optimizer = create_molf_optimizer(nn.Sequential(nn.Linear(4, 4)), config)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    optimizer.load_state_dict(torch.load(buffer, weights_only=True))


def test_tiny_shares_are_shares() -> None:
    """u / w is -inf for both, and then the first expert won every draw."""
    config = MoLFConfig(expert_ranks=(2,), policy="random", random_shares=(5e-324, 5e-324))
    drawn = winners_of(priorities(config, [[0.0, 0.0]] * 64, [(index, 1) for index in range(64)]), 1)
    assert 10 < sum(best for (best,) in drawn) < 54  # 32 ± 4 of a fair coin, at 5.5 sd
