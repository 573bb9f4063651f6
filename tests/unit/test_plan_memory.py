"""The memory that is planned is that of real tensors, and nothing is held twice."""

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from models import ARCHITECTURES, causal_lm
from molf import MoLFConfig, create_molf_optimizer, molf_lora_config
from molf.plan.memory import Workload, _of_step, _simulate, plan_method, side_by_side
from molf.plan.text import TOO_FAST, totals, warnings
from molf.plan.tracker import PeakTracker


def test_peak_of_tensors_and_views() -> None:
    outside = torch.zeros(1000)
    with PeakTracker() as tracker:
        _ = outside[:10].t()
        a = torch.zeros(256)
        b = a.view(16, 16)
        (a + 1).sum()
        del a
        assert tracker.now == 1024, "the view keeps it"
        del b
        assert tracker.now == 0
    assert tracker.peak == 2 * 1024 + 4


def test_loading_a_state_into_itself_holds_it_once() -> None:
    """accelerate does that when it prepares an optimizer; the state was there twice, the peak of a run."""
    optimizer = create_molf_optimizer(causal_lm("llama"), MoLFConfig(expert_ranks=(8,)))
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    size, bases = bytes_of(tensors), bytes_of(s["base"] for s in optimizer.state.values() if "base" in s)
    with PeakTracker() as tracker:
        optimizer.load_state_dict(optimizer.state_dict())
    assert all(a is b for a, b in zip(tensors, (v for s in optimizer.state.values() for v in s.values()), strict=True))
    assert tracker.peak < bases + (size - bases) / 4  # of each W that is the weight, a copy, as large as its gradient


def small_workload(**change: Any) -> Workload:
    model = LlamaConfig(**{**ARCHITECTURES["llama"][1], "tie_word_embeddings": False})
    return replace(Workload(model, torch.float32, 4, 16), **change)


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kinds_are_those_of_the_real_optimizer(dtype: torch.dtype) -> None:
    config = MoLFConfig(expert_ranks=(4, 8))
    work = small_workload(dtype=dtype)
    plan = plan_method("molf", config, work)
    model = LlamaForCausalLM(work.model).to(dtype)
    optimizer = create_molf_optimizer(model, config)
    found = plan.memory()
    state = [(key, value) for each in optimizer.state.values() for key, value in each.items() if key != "step"]
    assert found["weights"] == found["gradients"] == bytes_of(model.parameters())
    assert found["masters"] == bytes_of(value for key, value in state if key == "base")
    assert found["experts"] == bytes_of(value for key, value in state if key.startswith("lora_"))
    assert found["moments"] == bytes_of(value for key, value in state if key.startswith("exp_avg"))


def test_the_simulated_step_is_the_real_one() -> None:
    """The same operations on real tensors hold the same, but for a few bytes of scalars."""
    work = small_workload()
    torch.manual_seed(0)
    real = LlamaForCausalLM(work.model).train()
    for checkpointing in (False, True):
        real.zero_grad()
        simulated = plan_method("fft", MoLFConfig(expert_ranks=()), replace(work, checkpointing=checkpointing)).peak
        assert simulated == pytest.approx(_simulate(real, real, replace(work, checkpointing=checkpointing)), rel=0.05)


def test_a_mixture_of_experts_is_planned() -> None:
    """torch has the grouped product of fake tensors in bf16 alone: in fp32 the plan was a traceback."""
    sizes = {**ARCHITECTURES["llama"][1], "num_local_experts": 4, "num_experts_per_tok": 2}
    work = small_workload(model=MixtralConfig(**sizes))
    torch.manual_seed(0)
    real = MixtralForCausalLM(work.model).train()
    plan = plan_method("molf", MoLFConfig(expert_ranks=(2,)), work)
    assert plan.memory()["weights"] == sum(4 * parameter.numel() for parameter in real.parameters())
    assert plan.peak == pytest.approx(_simulate(real, real, work), rel=0.05)


@pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning")  # of PEFT's own pattern
def test_a_method_that_the_model_does_not_take_leaves_the_others() -> None:
    """PEFT adapts a mixture's experts as a whole, which MoLF-Efficient refuses; that refused the plan of all."""
    sizes = {**ARCHITECTURES["llama"][1], "num_local_experts": 4}
    work, config = small_workload(model=MixtralConfig(**sizes)), MoLFConfig(expert_ranks=(2,))
    plans, left_out = side_by_side("molf", config, work)
    assert [plan.method for plan in plans] == ["fft", "lora", "molf"]
    assert "only linear layers can be routed" in left_out["molf-e"]
    with pytest.raises(ValueError, match="only linear layers can be routed"):
        side_by_side("molf-e", replace(config, train_base=False), work)


def test_an_adapter_is_no_virtual_expert() -> None:
    plan = plan_method("molf-e", MoLFConfig(expert_ranks=(2, 3), train_base=False), small_workload())
    adapter = sum(math.prod(tensor.shape) for tensor in plan.held if tensor.kind == "experts")
    whole = adapter + sum(math.prod(tensor.shape) for tensor in plan.held if tensor.kind == "weights")
    assert totals(plan) == f"molf-e: {adapter:,} of {whole:,} parameters trained"


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("train_base", [True, False])
def test_a_step_needs_what_is_planned_for_it(train_base: bool, compile: bool) -> None:
    """Gradients of experts, and small tensors that are gathered: never more, and most of it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes))
    config = MoLFConfig(expert_ranks=(16, 64), train_base=train_base, compile=compile)
    if not train_base:
        model = get_peft_model(model, molf_lora_config(config, task_type="CAUSAL_LM"))
    optimizer = create_molf_optimizer(model, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for _ in range(3):
        for parameter in trained:
            parameter.grad = torch.randn_like(parameter)
        with PeakTracker() as tracker:
            optimizer.step()
    planned, _ = _of_step(optimizer)
    assert 0.7 * planned < tracker.peak <= planned


def test_a_step_with_8_bits_needs_what_is_planned_for_packing_them() -> None:
    """16 bytes per element of the largest tensor were planned, and the search for the codes was not."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=4096, tie_word_embeddings=True, **sizes))
    optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=(16,), moments_8bit=True))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    with PeakTracker() as tracker:
        optimizer.step()
    planned, _ = _of_step(optimizer)
    assert 0.8 * planned < tracker.peak <= planned


def test_shards_and_copies() -> None:
    """FSDP2 deals rows of all but A and its moments; DDP keeps all and the gradients twice."""
    plan = plan_method("molf", MoLFConfig(expert_ranks=(4,)), small_workload())
    one, ddp, fsdp = plan.memory(), plan.memory(2), plan.memory(2, sharded=True)
    assert ddp == {**one, "communication": one["gradients"]}
    virtual = [tensor for tensor in plan.held if tensor.kind == "experts"]
    whole = [tensor for tensor in virtual if not tensor.dealt]
    assert {tensor.shape[0] for tensor in whole} == {4}
    assert len(whole) == len(virtual) / 2
    assert fsdp["experts"] == sum(t.bytes for t in whole) + sum(t.bytes for t in virtual if t.dealt) // 2
    assert fsdp["masters"] == one["masters"] / 2
    assert plan.memory(1, sharded=True) == one


def test_accumulation_keeps_gradients_beside_activations() -> None:
    config = MoLFConfig(expert_ranks=())
    once = plan_method("fft", config, small_workload())
    twice = plan_method("fft", config, small_workload(accumulation=4))
    gradients = once.memory()["gradients"]
    assert once.peak < twice.peak <= once.peak + gradients


def test_warnings_that_matter() -> None:
    def said(name: str, config: MoLFConfig, **change: Any) -> str:
        work = small_workload(**change)
        return " ".join(warnings(plan_method(name, config, work), config, work))

    tied = LlamaConfig(**{**ARCHITECTURES["llama"][1], "tie_word_embeddings": True})
    assert "head is tied to model.embed_tokens.weight" in said("molf", MoLFConfig(expert_ranks=(4,)), model=tied)
    assert said("molf", MoLFConfig(expert_ranks=(4,), train_other=False), model=tied) == ""
    assert "lora_lr 0.02 x scale 5 = 0.1" in said("molf", MoLFConfig(expert_ranks=(4,), lora_lr=0.02, lora_alpha=10))
    assert said("molf", MoLFConfig(expert_ranks=(4,))) == ""
    assert "no fp32 master" in said("fft", MoLFConfig(expert_ranks=()), dtype=torch.bfloat16)
    assert said("molf", MoLFConfig(expert_ranks=(4,)), dtype=torch.bfloat16) == ""


def test_the_threshold_of_the_warning_is_that_of_the_measured_runs() -> None:
    runs = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "lr_scale.json").read_text())["runs"]
    last = {(r["model"], r["method"], r["scale"], r["lora_lr"]): r["losses"][-1] for r in runs}
    above = [key for key in last if key[2] * key[3] >= TOO_FAST]
    assert len(above) == 20
    assert all(last[key] >= 2.5 * last[(*key[:2], 2, 3e-3)] for key in above)
