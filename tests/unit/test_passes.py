"""The passes in blocks and compiled: the same numbers as on whole tensors; what they cost is counted, never timed."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from models import causal_lm, lm_step
from molf import MoLFConfig, create_molf_optimizer
from molf.optim import passes
from molf.optim import routing as routing_module
from molf.optim.adamw import Coefficients, Tracking, adamw_, track_
from molf.optim.jobs import CompileError, adamw_all, track_all

RATES = {"lr": 2e-4, "lora_lr": 2e-3}


def jobs(shapes: list[tuple[int, ...]], seed: int = 0) -> list[tuple[torch.Tensor, ...]]:
    g = torch.Generator().manual_seed(seed)
    return [tuple(torch.rand(shape, generator=g) for _ in range(3)) for shape in shapes]


def test_blocks_give_the_bits_of_whole_tensors(monkeypatch) -> None:
    """Cut, stacked and whole tensors: moments bit for bit, sums within the rounding of another order."""
    monkeypatch.setattr(passes, "BLOCK", 64)
    shapes = [(200,), (10,), (10,), (64,), (10,), (4, 8), (4, 8), (30, 8)]
    shared = Tracking((0.9, 0.999), 1e-8, "epd", torch.tensor(0.5))
    whole, blocks = jobs(shapes), jobs(shapes)
    expected = [track_(*job, shared) for job in whole]
    rows = [each[0].shape[:-1].numel() for each in blocks]
    found = passes.Passes(False, 0, torch.device("cpu")).run(track_all, blocks, shared, rows).split(rows)
    for a, b in zip(whole, blocks, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a.flatten(), b, rtol=200 * 2**-24, atol=0)


class Largest(TorchDispatchMode):
    """The largest tensor that an operation made, of those that are no view of an argument."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view and func.__name__.split(".")[0][-1] != "_":
            self.elements = max(self.elements, result.numel())
        return result


def test_the_uncompiled_step_has_no_large_temporary(monkeypatch) -> None:
    """Of a layer of 2^16 weights no elementwise operation makes a tensor above the block of 2^12."""
    monkeypatch.setattr(passes, "BLOCK", 2**12)
    model = nn.Sequential(nn.Linear(256, 256))
    optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=(2,), policy="fixed-dense", **RATES))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    with Largest() as largest:
        optimizer.step()
    assert 0 < largest.elements <= 2**12


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("score_fn", ["epd", "pfn"])
def test_one_host_read_per_step_at_any_number_of_layers(monkeypatch, layers: int, score_fn: str) -> None:
    """As on an accelerator, where the gradients' check is behind the gate."""
    reads: list[str] = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                reads.append(str(func))
            return func(*args, **(kwargs or {}))

    to_host = routing_module.to_host
    monkeypatch.setattr("molf.optim.guards.on_host", lambda values: False)
    monkeypatch.setattr(routing_module, "to_host", lambda rows: reads.append("winners") or to_host(rows))
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(layers)])
    config = MoLFConfig(expert_ranks=(2, 4), score_fn=score_fn, max_grad_norm=1.0, **RATES)
    optimizer = create_molf_optimizer(model, config)
    for _ in range(2):
        reads.clear()
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        with Reads():
            optimizer.step()
        assert reads == ["winners"]


@pytest.fixture
def kernels(monkeypatch) -> Any:
    """Triton's kernels in the place of C++, as on a GPU, by its interpreter."""
    kernels = pytest.importorskip("molf.optim.kernels", reason="no Triton")
    monkeypatch.setattr(kernels.Kernels, "DEVICE", "cpu")
    monkeypatch.setattr(passes.Passes, "_get_compiler", lambda self: kernels.Kernels())
    return kernels


@pytest.mark.parametrize("compiler", ["native", "kernels"])
def test_compiled_and_uncompiled_steps_route_alike(request, compiler: str) -> None:
    """Every winner equal, weights within fp32 rounding, winners switching."""
    interpreted = compiler == "kernels"  # which takes seconds for a step
    if interpreted:
        request.getfixturevalue("kernels")
    for name in ("qwen2",) if interpreted else ("qwen2", "phi"):
        model = causal_lm(name, num_hidden_layers=1)
        twin = copy.deepcopy(model)
        found = []
        for each, compiles in ((model, False), (twin, True)):
            torch.manual_seed(1)
            config = MoLFConfig(expert_ranks=(2, 4), max_grad_norm=1.0, compile=compiles, **RATES)
            optimizer = create_molf_optimizer(each, config)
            winners = []
            for step in range(6 if interpreted else 12):
                lm_step(each, optimizer, step)
                winners.append([routing.winners[0] for routing in optimizer.routing.values()])
            found.append(winners)
        assert found[0] == found[1]
        assert len({winner for row in found[0] for winner in row}) > 1, "the winners never switched"
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            # a step is lora_lr times m / √v at most, which here differs by some ulp, and θ is rounded once
            torch.testing.assert_close(a, b, rtol=0, atol=12 * (2e-3 * 64 * 2**-24 + 4 * 2**-24))


def test_nothing_is_compiled_at_import_or_for_small_models() -> None:
    optimizer = create_molf_optimizer(causal_lm("llama"), MoLFConfig(expert_ranks=(2,)))
    assert not optimizer._passes.compiles
    for kind, work in passes.WORTH_COMPILING.items():
        assert passes.Passes("auto", work, torch.device(kind)).compiles
        assert not passes.Passes("auto", work - 1, torch.device(kind)).compiles
        assert not passes.Passes(False, work, torch.device(kind)).compiles
    assert not passes.Passes("auto", 2**40, torch.device("meta")).compiles


def test_where_triton_fails_auto_warns_and_true_is_an_error(monkeypatch, kernels) -> None:
    """Moments do not advance twice where one kind of job had run before."""
    compiling, calls = kernels._compiling, []

    @contextmanager
    def fails_later(like: torch.Tensor) -> Iterator[None]:
        with compiling(like):
            calls.append(like)
            if len(calls) > 3:  # sums were compiled; the first kind's pass and sums have run
                raise kernels.TritonError("no such\narchitecture")
            yield

    monkeypatch.setattr(kernels, "_compiling", fails_later)
    shared = Tracking((0.9, 0.999), 1e-8, "epd")
    shapes = [(32,), (33,), (48,)]
    ours, theirs = jobs(shapes), jobs(shapes)
    automatic = passes.Passes("auto", 2**40, torch.device("cuda"))
    with pytest.warns(UserWarning, match="run uncompiled, which is slower: Triton: no such$"):
        found = automatic.run(track_all, ours, shared)
    assert not automatic.compiles
    for sums, own, (grad, m, v) in zip(found, ours, theirs, strict=True):
        torch.testing.assert_close(sums, track_(grad, m, v, shared), rtol=1e-6, atol=0)
        torch.testing.assert_close(own, (grad, m, v), rtol=1e-6, atol=1e-8)
    with pytest.raises(CompileError, match=r"compile=True, but compiling failed .*use compile=False"):
        passes.Passes(True, 0, torch.device("cuda")).run(track_all, ours, shared)


def test_without_triton_auto_warns_and_true_is_an_error(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "molf.optim.kernels", None)
    shared = Tracking((0.9, 0.999), 1e-8, "epd")
    automatic = passes.Passes("auto", 2**40, torch.device("cuda"))
    with pytest.warns(UserWarning, match="run uncompiled, which is slower: Triton: "):
        assert automatic.run(track_all, jobs([(4,)]), shared)[0] > 0
    with pytest.raises(CompileError, match=r"compile=True, but compiling failed \(Triton: .*use compile=False"):
        passes.Passes(True, 0, torch.device("cuda")).run(track_all, jobs([(4,)]), shared)


@pytest.mark.parametrize(
    ("error", "becomes"),
    [(RuntimeError("no C compiler"), CompileError), (torch.OutOfMemoryError("full"), torch.OutOfMemoryError)],
)
def test_what_keeps_triton_from_compiling(kernels, error: Exception, becomes: type[Exception]) -> None:
    """A machine without a C compiler runs uncompiled; one without memory does not."""
    with pytest.raises(becomes), kernels._compiling(torch.zeros(1)):
        raise error


def test_compile_is_checked() -> None:
    with pytest.raises(ValueError, match="compile='yes': choose True, False or 'auto'"):
        MoLFConfig(compile="yes")


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("ranks", [0, 1, 3])
def test_rows_that_a_process_holds(compile: bool, ranks: int) -> None:
    """Of a sharded A it may hold one row, or none: sums and rates by row, also of those."""
    run = passes.Passes(compile, 0, torch.device("cpu")).run
    ours, theirs = jobs([(ranks, 70), (2, 70)]), jobs([(ranks, 70), (2, 70)])
    shared = Tracking((0.9, 0.999), 1e-8, "epd")
    found = run(track_all, ours, shared, [ranks, 2])
    torch.testing.assert_close(found, torch.cat([track_(*job, shared) for job in theirs]), rtol=1e-5, atol=0)
    c = Coefficients(torch.rand(ranks, 1), -torch.rand(ranks, 1), 0.5, 2.0, 1e-8)
    winner = torch.tensor([[True], [False], [True]])[:ranks]
    run(adamw_all, [(ours[0][0], ours[0][1], ours[0][2], None, winner)], c, [ranks])
    adamw_(theirs[0][0], theirs[0][1], theirs[0][2], None, winner, c)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-7)


def test_one_masked_row_longer_than_a_block() -> None:
    value, m, v = (torch.rand(1, 2 * passes.BLOCK) for _ in range(3))
    expected = value.clone()
    c = Coefficients(0.9, -0.1, 0.5, 2.0, 1e-8)
    adamw_(expected, m, v, None, None, c)
    passes.Passes(False, 0, torch.device("cpu")).run(adamw_all, [(value, m, v, None, torch.tensor([[True]]))], c, [1])
    torch.testing.assert_close(value, expected)
