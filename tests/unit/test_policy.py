"""Routing without the score: forced or drawn winners, their log, their resume, and what is refused."""

import copy
import math
from collections import Counter

import pytest
import torch
from torch import nn

from models import causal_lm, lm_step
from molf import MoLFAdamW, MoLFConfig, create_molf_optimizer, read_routing
from molf.optim import RoutingRecorder
from molf.optim.policy import priorities
from molf.optim.reference import MoLFAdamWReference
from molf.optim.routing import winners_of

RATES = {"lr": 1e-3, "lora_lr": 3e-3}


def run(config: MoLFConfig, steps: int = 4) -> tuple[nn.Module, MoLFAdamW]:
    model = causal_lm("qwen2")
    optimizer = create_molf_optimizer(model, config)
    for step in range(steps):
        lm_step(model, optimizer, step)
    return model, optimizer


def drawn(config: MoLFConfig, modules: int, steps: int) -> list[tuple[int, ...]]:
    turns = [(module, step) for module in range(modules) for step in range(1, steps + 1)]
    ranked = priorities(config, [[0.0] * len(config.experts)] * len(turns), turns)
    return [tuple(best) for best in winners_of(ranked, config.top_k)]


def test_fixed_dense_is_full_fine_tuning() -> None:
    """B stays zero, so P = W + s 0 A is W itself, and the step on it is the one without LoRA experts."""
    fixed, optimizer = run(MoLFConfig(expert_ranks=(2, 4), policy="fixed-dense", **RATES))
    full, _ = run(MoLFConfig(expert_ranks=(), **RATES))
    for (name, p), q in zip(fixed.named_parameters(), full.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert {r.winners for r in optimizer.routing.values()} == {("dense",)}
    assert all(r.scores[1] > 0 for r in optimizer.routing.values())  # the log keeps the true scores
    assert not any(state["lora_B"].any() for state in optimizer.state.values() if "lora_B" in state)


def test_fixed_lora_leaves_the_dense_expert_alone() -> None:
    start, _ = run(MoLFConfig(**RATES), steps=0)
    before = {name: p.detach().clone() for name, p in start.named_parameters()}
    model, optimizer = run(MoLFConfig(expert_ranks=(2, 4), policy="fixed-lora", top_k=2, **RATES))
    for name in optimizer.routed_modules:
        weight = model.get_submodule(name).weight
        assert torch.equal(optimizer.state[weight]["base"], before[f"{name}.weight"])
        assert optimizer.state[weight]["lora_B"].any(dim=0).all()
        assert not torch.equal(weight, before[f"{name}.weight"])
        assert set(optimizer.routing[name].winners) == {"lora_r2", "lora_r4"}
    _, one = run(MoLFConfig(expert_ranks=(2, 4), policy="fixed-lora", **RATES))
    for routing in one.routing.values():  # of the LoRA experts the better one
        assert routing.winners == (max(zip(routing.scores[1:], routing.experts[1:], strict=True))[1],)


@pytest.mark.parametrize("shares", [(0.8, 0.2), (3.0, 1.0), (0.0, 1.0)])
def test_random_shares(shares: tuple[float, float]) -> None:
    """5 standard deviations of a binomial over 28 modules and 200 steps: 0.027 at share 0.8."""
    config = MoLFConfig(expert_ranks=(2,), policy="random", random_shares=shares, policy_seed=3)
    winners = drawn(config, 28, 200)
    share = shares[0] / sum(shares)
    margin = 5 * math.sqrt(share * (1 - share) / len(winners))
    assert abs(Counter(winners)[(0,)] / len(winners) - share) <= margin
    if share:  # independent over modules and over steps: both the same expert with p² + (1-p)²
        same = share**2 + (1 - share) ** 2
        for stride in (1, 200):
            agree = [a == b for a, b in zip(winners, winners[stride:], strict=False)]
            assert abs(sum(agree) / len(agree) - same) < 0.05
        other = drawn(MoLFConfig(expert_ranks=(2,), policy="random", random_shares=shares, policy_seed=4), 28, 200)
        assert abs(sum(a == b for a, b in zip(winners, other, strict=True)) / len(other) - same) < 0.05


def test_random_top_2_draws_without_putting_back() -> None:
    config = MoLFConfig(expert_ranks=(2, 4, 8), policy="random", random_shares=(1, 0, 2, 1), top_k=2)
    winners = drawn(config, 10, 100)
    assert all(len(set(pair)) == 2 and 1 not in pair for pair in winners)
    assert abs(sum(pair[0] == 2 for pair in winners) / len(winners) - 0.5) < 5 * math.sqrt(0.25 / len(winners))


def test_random_is_what_a_resume_repeats_and_touches_no_global_generator(tmp_path) -> None:
    config = MoLFConfig(expert_ranks=(2,), policy="random", random_shares=(0.5, 0.5), policy_seed=7, **RATES)
    model, optimizer = run(config, steps=3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    recorder = RoutingRecorder(optimizer, tmp_path / "a.jsonl")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for step in range(3, 8):
        lm_step(model, optimizer, step)
    assert torch.equal(torch.get_rng_state(), before)
    recorder.close()
    torch.save(saved[1], tmp_path / "optimizer.pt")
    again, resumed = run(config, steps=0)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    recorder = RoutingRecorder(resumed, tmp_path / "b.jsonl")
    for step in range(3, 8):
        lm_step(again, resumed, step)
    recorder.close()
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    rows = [tuple(w for (w,) in record["winners"]) for record in read_routing(tmp_path / "a.jsonl")[1]]
    assert len(set(rows)) == 5
    assert {w for row in rows for w in row} == {0, 1}


def test_a_checkpoint_of_another_policy_is_refused() -> None:
    config = {"expert_ranks": (2,), "policy": "random", "random_shares": (0.5, 0.5), "policy_seed": 1}
    state = run(MoLFConfig(**config), steps=1)[1].state_dict()
    for change, message in (
        ({"policy": "score", "random_shares": None}, "policy='random'"),
        ({"random_shares": (0.4, 0.6)}, "random_shares="),
        ({"policy_seed": 2}, "policy_seed=1, this optimizer has 2"),
    ):
        with pytest.raises(ValueError, match=message):
            run(MoLFConfig(**config | change), steps=0)[1].load_state_dict(state)


def test_bad_policies_are_refused() -> None:
    for fields, message in (
        ({"policy": "best"}, "policy='best': choose one of score, random"),
        ({"policy": "random"}, "random_shares=None"),
        ({"policy": "random", "random_shares": (0.5,)}, "one share, not negative, per expert"),
        ({"policy": "random", "random_shares": (0.5, -0.5)}, "one share, not negative, per expert"),
        ({"policy": "random", "random_shares": (0.5, math.nan)}, "one share, not negative, per expert"),
        ({"policy": "random", "random_shares": ("a", "b")}, "one number per expert"),
        ({"policy": "random", "random_shares": (1, 0), "top_k": 2}, "at least top_k=2 must be positive"),
        ({"random_shares": (0.5, 0.5)}, "only policy='random' draws"),
        ({"policy_seed": "1"}, "policy_seed='1'"),
        ({"policy": "fixed-dense", "train_base": False}, "needs a dense and a LoRA expert"),
        ({"policy": "fixed-lora", "expert_ranks": ()}, "needs a dense and a LoRA expert"),
        ({"policy": "fixed-dense", "top_k": 2}, "top_k=2"),
        ({"policy": "fixed-lora", "top_k": 2}, "top_k=2"),
    ):
        with pytest.raises(ValueError, match=message.replace("(", r"\(")):
            MoLFConfig(**fields)
    with pytest.raises(ValueError, match="the reference routes by score alone"):
        MoLFAdamWReference({}, MoLFConfig(policy="fixed-dense"))
