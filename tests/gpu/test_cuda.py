"""On a CUDA device: the CPU's winners and values, one wait per step, exact resume. Skipped where there is none."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from molf import MoLFConfig, NonFiniteGradientError, create_molf_optimizer
from molf.bench.device import device_syncs
from molf.optim import routing

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

RATES = {"lr": 2e-4, "lora_lr": 2e-3}

VARIANTS: dict[str, dict[str, Any]] = {
    "one": {"expert_ranks": (8,)},
    "three, clipped": {"expert_ranks": (2, 4, 8), "lora_alpha": (4, 4, 8), "max_grad_norm": 0.01},
    "two winners": {"expert_ranks": (2, 4), "top_k": 2},
    "pfn": {"expert_ranks": (8,), "score_fn": "pfn"},
    "random": {"expert_ranks": (8,), "policy": "random", "random_shares": (0.5, 0.5)},
    "no base": {"expert_ranks": (8,), "keep_base": False},
}


def model(dtype: torch.dtype = torch.float32, device: str = "cuda") -> nn.Module:
    """Layers that are compiled, three of them alike, and small ones that are stacked; what is not routed, too.

    Of some the rows are no multiples of 16 bytes; one is stored as (in, out).
    """
    torch.manual_seed(0)
    wide = [nn.Linear(256, 256) for _ in range(3)]
    small = [nn.Linear(32, 32, bias=False) for _ in range(4)]
    odd = [nn.Linear(101, 371), nn.Linear(101, 371), Conv1D(371, 101)]
    layers = [nn.Embedding(300, 256), *wide, nn.Linear(256, 384), nn.LayerNorm(384), nn.Linear(384, 32), *small, *odd]
    return nn.Sequential(*layers).to(device, dtype)


def give_gradients(made: nn.Module, step: int, broken: bool = False) -> None:
    """The same for any device and dtype, up to rounding; larger at some steps, so that winners change."""
    g = torch.Generator().manual_seed(step)
    for parameter in made.parameters():
        grad = torch.randn(parameter.shape, generator=g) * 10 ** (-3 + 2 * torch.rand((), generator=g))
        parameter.grad = grad.to(parameter)
    if broken:
        next(made.parameters()).grad.view(-1)[3] = float("nan")


def optimizer_of(made: nn.Module, **changes: Any) -> Any:
    return create_molf_optimizer(made, MoLFConfig(**{"compile": False, **RATES, **changes}))


def step(made: nn.Module, optimizer: Any, number: int) -> list[tuple[str, ...]]:
    give_gradients(made, number)
    optimizer.step()
    return [each.winners for each in optimizer.routing.values()]


@pytest.fixture
def reads(monkeypatch) -> Iterator[list[int]]:
    """Where waits for the device are errors, the read of the winners is none; it keeps the count of them."""
    found: list[int] = []
    read = routing.to_host

    def counted(rows: torch.Tensor) -> list[list[float]]:
        found.append(1)
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        listed = read(rows)
        torch.cuda.set_sync_debug_mode(mode)
        return listed

    monkeypatch.setattr(routing, "to_host", counted)
    yield found
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_waits_once(reads, name: str, compiled: bool, dtype: torch.dtype) -> None:
    made = model(dtype)
    optimizer = optimizer_of(made, compile=compiled, **VARIANTS[name])
    for number in range(3):
        step(made, optimizer, number)
    reads.clear()
    for number in range(3, 6):
        give_gradients(made, number)
        torch.cuda.set_sync_debug_mode("error")
        optimizer.step()
        torch.cuda.set_sync_debug_mode("default")
    assert len(reads) == 3


def test_the_trace_of_a_step_has_one_wait() -> None:
    made = model(torch.bfloat16)
    optimizer = optimizer_of(made, compile=True, expert_ranks=(4, 8))
    for number in range(3):
        step(made, optimizer, number)
    give_gradients(made, 3)
    found = device_syncs(optimizer.step)
    assert found.pop("copies_to_host") == 1
    assert sum(found.values()) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("prepared", [False, True])
def test_an_optimizer_may_be_made_before_its_model_is_moved(prepared: bool, dtype: torch.dtype) -> None:
    """As with accelerate, which loads the state, moved, into the optimizer."""
    made, other = model(dtype, "cpu"), model(dtype)
    torch.manual_seed(1)
    optimizer = optimizer_of(made, compile="auto", expert_ranks=(8,))
    made.cuda()
    if prepared:
        saved = optimizer.state_dict()
        moved = {i: {key: value.cuda() for key, value in each.items()} for i, each in saved["state"].items()}
        optimizer.load_state_dict({**saved, "state": moved})
    there = optimizer_of(other, compile="auto", expert_ranks=(8,))
    for mine, its in zip(made.parameters(), other.parameters(), strict=True):
        if "lora_A" in there.state[its]:
            there.state[its]["lora_A"].copy_(optimizer.state[mine]["lora_A"])
    for number in range(4):
        assert step(made, optimizer, number) == step(other, there, number)
    for mine, its in zip(made.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_winners_and_weights_are_those_of_a_cpu(name: str, compiled: bool) -> None:
    """From equal gradients, in fp32: winners equal, weights but for the rounding of sums in another order."""
    theirs, ours = model(device="cpu"), model()
    pair = [(theirs, optimizer_of(theirs, **VARIANTS[name]))]
    copied = copy.deepcopy(pair[0][1].state_dict())  # the random A of a CPU
    pair.append((ours, optimizer_of(ours, compile=compiled, **VARIANTS[name])))
    pair[1][1].load_state_dict(copied)
    won = set()
    for number in range(12):
        left, right = (step(made, optimizer, number) for made, optimizer in pair)
        assert left == right
        won |= set(left)
    assert len(won) > 1 or name == "pfn"
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float32, 0)])
def test_p_is_its_base_and_experts(dtype: torch.dtype, rounding: float) -> None:
    """P = W + Σ s B A, rounded once: at most to the other of the two neighbours, in fp64's eyes."""
    made = model(dtype)
    optimizer = optimizer_of(made, compile=True, expert_ranks=(8,), policy="fixed-lora")
    for number in range(6):
        step(made, optimizer, number)
    checked = 0
    for parameter in made.parameters():
        state = optimizer.state[parameter]
        if "lora_A" not in state:
            continue
        product = 2 * state["lora_B"].double() @ state["lora_A"].double()
        exact = state["base"].double() + (product if product.shape == parameter.shape else product.T)
        error = (parameter.double() - exact).abs() / exact.abs().clamp(min=1e-3)
        assert error.max() <= max(1.01 * rounding, 2**-20)
        checked += 1
    assert checked == 12


@pytest.mark.parametrize("compiled", [False, True])
def test_a_gradient_that_is_not_finite_changes_nothing(compiled: bool) -> None:
    made = model(torch.bfloat16)
    optimizer = optimizer_of(made, compile=compiled, expert_ranks=(4, 8))
    for number in range(2):
        step(made, optimizer, number)
    before = copy.deepcopy((made.state_dict(), optimizer.state_dict()["state"]))
    give_gradients(made, 2, broken=True)
    with pytest.raises(NonFiniteGradientError, match=r"0\.weight"):
        optimizer.step()
    torch.testing.assert_close((made.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_resume_is_exact(tmp_path, dtype: torch.dtype) -> None:
    made, again = model(dtype), model(dtype)
    optimizer = optimizer_of(made, compile=True, expert_ranks=(4, 8))
    for number in range(4):
        step(made, optimizer, number)
    torch.save((made.state_dict(), optimizer.state_dict()), tmp_path / "saved.pt")
    weights, state = torch.load(tmp_path / "saved.pt", weights_only=True)
    again.load_state_dict(weights)
    resumed = optimizer_of(again, compile=True, expert_ranks=(4, 8))
    resumed.load_state_dict(state)
    for number in range(4, 8):
        assert step(made, optimizer, number) == step(again, resumed, number)
    torch.testing.assert_close(again.state_dict(), made.state_dict(), rtol=0, atol=0)


def test_stores_are_rounded_as_torch_does() -> None:
    """Masters of what is not routed to their bf16 parameters: every bit."""
    made = model(torch.bfloat16)
    optimizer = optimizer_of(made, compile=True, expert_ranks=(8,), train_other=True)
    for number in range(3):
        step(made, optimizer, number)
    others = [p for p in made.parameters() if "lora_A" not in optimizer.state[p]]
    assert len(others) == 11
    for parameter in others:
        assert torch.equal(parameter, optimizer.state[parameter]["base"].bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_in_16_bits_are_added_up_in_fp32(compiled: bool, dtype: torch.dtype) -> None:
    """dA = s Bᵀ G and dB = s G Aᵀ with A and B rounded to G's dtype, else but for the rounding of fp32."""
    made = model(dtype)
    optimizer = optimizer_of(made, compile=compiled, expert_ranks=(8, 200), lora_alpha=(8, 100))
    for number in range(3):
        step(made, optimizer, number)
    give_gradients(made, 3)
    s = torch.tensor(optimizer.config.scales, device="cuda").repeat_interleave(torch.tensor([8, 200], device="cuda"))
    for stack in optimizer.stacks().all:
        dA, dBt = (each.unflatten(0, (len(stack), -1)) for each in optimizer._gradients(stack).pair)
        weights = [parameter for part in stack.weights for parameter in part.parameters]
        for weight, a, bt in zip(weights, dA, dBt, strict=True):
            A, B = (optimizer.state[weight][name].to(dtype).double() for name in ("lora_A", "lora_B"))
            G = (weight.grad.T if stack.modules[0].transposed else weight.grad).double()
            for found, exact in ((a, s[:, None] * (B.T @ G)), (bt, s[:, None] * (A @ G.T))):
                assert (found - exact).norm() <= 1e-6 * exact.norm()
