"""Triton's kernels by Triton's interpreter, on a CPU, against torch; tests/gpu has what needs a device.

The interpreter has no products of bf16 and rounds to it otherwise than a device.
"""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import chain
from types import SimpleNamespace

import pytest
import torch

from molf.optim.adamw import Coefficients, Tracking, adamw_, track_, unrouted_
from molf.optim.jobs import CompileError, Job, Pass, adamw_all, track_all, unrouted_all
from molf.optim.virtual import Products

kernels = pytest.importorskip("molf.optim.kernels", reason="no Triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a device")

SHAPES = [(3, 5), (2, 4096), (1,), (0, 5), (3, 16), (2, 9000), (2, 3, 70), (8192 + 16,)]
COEFFICIENTS = Coefficients(0.999, -1e-2, 0.5, 2.0, 1e-8)


@pytest.fixture
def compiler(monkeypatch):
    monkeypatch.setattr(kernels.Kernels, "DEVICE", "cpu")
    return kernels.Kernels()


def tensors(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """A gradient, m, v and a value."""
    g = torch.Generator().manual_seed(seed)
    grad, m, value = (torch.randn(shape, generator=g) for _ in range(3))
    return [grad.to(dtype), m, torch.rand(shape, generator=g), value]


def pairs(dtype: torch.dtype = torch.float32) -> tuple[list[list[torch.Tensor]], list[list[torch.Tensor]]]:
    return tuple([tensors(shape, i, dtype) for i, shape in enumerate(SHAPES)] for _ in range(2))


def run(compiler: object, function: Pass, jobs: list[Job], shared: object, by_row: bool = False) -> list:
    """All of them, or an error: the sums of each job's rows."""
    rows = [job[1].shape[:-1].numel() if by_row else 1 for job in jobs]
    sums = torch.full((sum(rows),), torch.nan)
    assert sorted(chain.from_iterable(compiler.run(function, jobs, shared, rows, sums))) == list(range(len(jobs)))
    return list(sums.split(rows))


def close(found: object, expected: object) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("score_fn", "dtype"), [("epd", torch.float32), ("pfn", torch.bfloat16)])
def test_moments_and_sums(compiler, score_fn: str, dtype: torch.dtype) -> None:
    shared = Tracking((0.9, 0.999), 1e-8, score_fn, torch.tensor(0.7), torch.tensor(True))
    ours, theirs = pairs(dtype)
    found = run(compiler, track_all, [tuple(each[:3]) for each in ours], shared, by_row=True)
    for i, (each, (grad, m, v, _)) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(found[i], track_(grad, m, v, shared).flatten(), rtol=1e-5, atol=0)
        close(each[:3], [grad, m, v])


def test_a_closed_gate_leaves_the_moments(compiler) -> None:
    shared = Tracking((0.9, 0.999), 1e-8, "epd", None, torch.tensor(False))
    ours, theirs = pairs()
    torch.use_deterministic_algorithms(True)  # fills new memory with nan
    try:
        found = run(compiler, track_all, [tuple(each[:3]) for each in ours], shared)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not torch.cat(found).any()
    for each, before in zip(ours, theirs, strict=True):
        assert all(map(torch.equal, each, before))


@pytest.mark.parametrize("store", [None, torch.bfloat16])
def test_values(compiler, store: torch.dtype | None) -> None:
    ours, theirs = pairs()
    stores = [None if store is None else torch.zeros(shape, dtype=store) for shape in SHAPES]
    jobs = [(x[3], x[1], x[2], s, None) for x, s in zip(ours, stores, strict=True)]
    run(compiler, adamw_all, jobs, COEFFICIENTS)
    for each, stored, (_, m, v, value) in zip(ours, stores, theirs, strict=True):
        adamw_(value, m, v, None, None, COEFFICIENTS)
        close(each[1:], [m, v, value])
        if stored is not None:
            torch.testing.assert_close(stored, each[3].to(store), rtol=2**-7, atol=0)


def test_rates_and_winners_by_row(compiler) -> None:
    """Losers keep their bits."""
    ours, theirs = tensors((4, 1500), 0), tensors((4, 1500), 0)
    c = COEFFICIENTS._replace(decay=torch.rand(4, 1), step_size=torch.rand(4, 1))
    winner = torch.tensor([[True], [False], [False], [True]])
    run(compiler, adamw_all, [(ours[3], ours[1], ours[2], None, winner)], c, by_row=True)
    before = theirs[3].clone()
    adamw_(theirs[3], theirs[1], theirs[2], None, winner, c)
    close(ours[3], theirs[3])
    assert torch.equal(ours[3][1:3], before[1:3])
    assert not torch.equal(ours[3][0], before[0])


def test_jobs_with_rates_of_their_own_and_one_that_is_left_out(compiler) -> None:
    ours, theirs = ([tensors((4, 700), seed) for seed in range(4)] for _ in range(2))
    own, by_row = (COEFFICIENTS._replace(decay=d, step_size=s) for d, s in ((0.9, -0.1), torch.rand(2, 4, 1)))
    rates, jobs = [COEFFICIENTS, own, by_row, own], [(x[3], x[1], x[2], None, None) for x in ours]
    assert sorted(chain.from_iterable(compiler.run(adamw_all, jobs, rates, [1, 1, 4, 0], torch.zeros(0)))) == [
        0,
        1,
        2,
        3,
    ]
    for (_, m, v, value), c in zip(theirs[:3], rates, strict=False):
        adamw_(value, m, v, None, None, c)
    for each, (*_, value) in zip(ours, theirs, strict=True):
        close(each[3], value)


def test_a_whole_step_of_what_is_not_routed(compiler) -> None:
    numbers = Tracking((0.9, 0.999), 1e-8, "epd", torch.tensor(0.5), torch.tensor(True)), COEFFICIENTS
    ours, theirs = pairs(torch.float16)
    run(compiler, unrouted_all, [(x[3], x[1], x[2], None, x[0]) for x in ours], numbers)
    for each, (grad, m, v, value) in zip(ours, theirs, strict=True):
        unrouted_(value, m, v, None, grad, numbers)
        close(each[1:], [m, v, value])


@pytest.mark.parametrize(("dtype", "rounding", "error"), [(torch.float32, 0, 2**-22), (torch.float16, 2**-11, 2**-16)])
def test_products(compiler, monkeypatch, dtype: torch.dtype, rounding: float, error: float) -> None:
    """Layers of several shapes at once; what is not taken is left alone. In 16 bits, of factors in two halves."""
    halves = kernels._halves
    monkeypatch.setattr(kernels, "_halves", lambda factor: halves(factor).half())
    g = torch.Generator().manual_seed(0)

    def layers(rows: int, columns: int, count: int) -> Products:
        made = [torch.randn(rows, columns, generator=g) for _ in range(2 * count)]
        made[:count] = [each.to(dtype) for each in made[:count]]
        pair = torch.randn(count, 40, rows, generator=g), torch.randn(count, 40, columns, generator=g)
        return Products(made[:count], made[count:], *pair)

    listed = [layers(130, 70, 1), layers(16, 48, 3), layers(128, 256, 2)]
    left_out = listed[1]._replace(bases=[base.double() for base in listed[1].bases])
    before = [target.clone() for target in left_out.targets]
    scales = torch.rand(40, generator=g)
    assert compiler.superpose([listed[0], left_out, listed[2]], scales) == [0, 2]
    assert all(map(torch.equal, left_out.targets, before))
    assert compiler.superpose(listed, scales) == [0, 1, 2]
    for each in listed:
        for target, base, left, right in zip(*each, strict=True):
            exact = base.double() + (left * scales[:, None]).double().T @ right.double()
            torch.testing.assert_close(target.double(), exact, rtol=rounding, atol=40 * error)


def test_halves_hold_16_bits() -> None:
    """The product of the halves is that of the factors but for 2^-16 of it."""
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 8, 30, generator=g), torch.randn(2, 8, 50, generator=g)
    (a, a_low), (b, b_low) = (kernels._halves(each).double().split(8, 1) for each in (left, right))
    exact = left.double().mT @ right.double()
    assert (a.mT @ b + a.mT @ b_low + a_low.mT @ b - exact).norm() <= 2**-16 * exact.norm()
    assert (a.mT @ b - exact).norm() >= 2**-10 * exact.norm()


@pytest.mark.parametrize("turned", [False, True])
def test_gradients_in_16_bits(compiler, turned: bool) -> None:
    g = torch.Generator().manual_seed(0)
    ranks, outs, ins = 40, 130, 80
    A, Bt = (torch.randn(3, ranks, n, generator=g).half() for n in (ins, outs))
    grads = [torch.randn(outs, ins, generator=g).half() for _ in range(3)]
    scales, out = torch.rand(ranks, generator=g), (torch.zeros(3, ranks, ins), torch.zeros(3, ranks, outs))
    laid_out = [grad.T.contiguous() if turned else grad for grad in grads]
    assert compiler.gradients(laid_out, A, Bt, scales, out, turned)
    for i, G in enumerate(grads):
        close(out[0][i] / 100, scales[:, None] * (Bt[i].float() @ G.float()) / 100)
        close(out[1][i] / 100, scales[:, None] * (A[i].float() @ G.float().T) / 100)
    assert not compiler.gradients([grad.float() for grad in laid_out], A.float(), Bt.float(), scales, out, turned)


@pytest.mark.parametrize(("capability", "ours"), [((7, 5), False), ((8, 0), True)])
def test_products_in_16_bits_are_left_to_torch_before_ampere(compiler, monkeypatch, capability, ours: bool) -> None:
    """For which Triton 3.6 makes no tensor core instructions of them."""
    multiplies = kernels._multiplies
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = SimpleNamespace(is_cuda=True, device="cuda:0")
    monkeypatch.setattr(kernels, "_multiplies", lambda like: multiplies(device))
    A, Bt, scales = torch.randn(1, 2, 4).half(), torch.randn(1, 2, 3).half(), torch.ones(2)
    out = torch.zeros(1, 2, 4), torch.zeros(1, 2, 3)
    assert compiler.gradients([torch.randn(3, 4).half()], A, Bt, scales, out, False) == ours
    monkeypatch.setattr(compiler, "_superpose", lambda listed, scales: None)
    listed = [Products([torch.ones(3, 4, dtype=dtype)], [torch.ones(3, 4)], Bt.float(), A.float())
              for dtype in (torch.float16, torch.float32)]  # fmt: skip
    assert compiler.superpose(listed, scales) == ([0, 1] if ours else [1])


def test_sums_that_do_not_compile_leave_the_moments(compiler, monkeypatch) -> None:
    """What is run again uncompiled must not have run."""

    class Fails:
        def __getitem__(self, grid: object) -> None:
            raise RuntimeError("no space left")

    monkeypatch.setattr(kernels, "_sums", Fails())
    ours, theirs = tensors((2, 50), 0), tensors((2, 50), 0)
    with pytest.raises(CompileError, match="no space left"):
        run(compiler, track_all, [tuple(ours[:3])], Tracking((0.9, 0.999), 1e-8, "epd"))
    assert all(map(torch.equal, ours, theirs))


def test_a_full_device_is_no_compiler_that_fails(compiler, monkeypatch) -> None:
    """Triton says so by a plain error."""

    class Full:
        def __getitem__(self, grid: object) -> None:
            raise RuntimeError("Triton Error [CUDA]: out of memory")

    monkeypatch.setattr(kernels, "_sums", Full())
    with pytest.raises(RuntimeError, match=r"^Triton Error \[CUDA\]: out of memory") as caught:
        run(compiler, track_all, [tuple(tensors((2, 50), 0)[:3])], Tracking((0.9, 0.999), 1e-8, "epd"))
    assert not isinstance(caught.value, CompileError)


def test_jobs_that_are_alike_share_a_launch(compiler, monkeypatch) -> None:
    """Whatever their number and shape: sums, which lie one after the other, are not aligned and need not be."""
    launches = []
    compiling = kernels._compiling
    monkeypatch.setattr(kernels, "_compiling", lambda like: launches.append(like) or compiling(like))
    for count in (1, 5):
        jobs = [tuple(tensors((3 + i, 32), i)[:3]) for i in range(count)]
        launches.clear()
        run(compiler, track_all, jobs, Tracking((0.9, 0.999), 1e-8, "epd"))
        assert len(launches) == (3 if count == 1 else 2)  # the first one compiles the sums


SHARED_MEMORY = """
import sys, torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from molf.optim import kernels

def shared(kernel, constants):
    known = {"scales": "*fp32", "table": "*i64", **dict.fromkeys(constants, "constexpr")}
    signature = {name: known.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    return triton.compile(source, target=GPUTarget("cuda", 86, 32), options={"num_warps": 8}).metadata.shared

wide, low, grads = map(int, sys.argv[1:])
tile = {"ALIGNED": True, "TILE": kernels.TILE}
for name, kernel, more in (
    ("fp32", kernels._products, {"TARGET": tl.float32, "FACTOR": tl.float32, "WIDTH": kernels.WIDTH, "DEPTH": wide}),
    ("bf16", kernels._products, {"TARGET": tl.bfloat16, "FACTOR": tl.bfloat16, "WIDTH": kernels.WIDTH, "DEPTH": low}),
    ("gradients", kernels._gradients, {"GRAD": tl.bfloat16, "TURNED": True, "DEPTH": grads}),
):
    print(name, shared(kernel, {**tile, **more}))
"""


def test_the_shared_memory_of_smaller_gpus_is_enough(compiler, monkeypatch) -> None:
    """99 KiB, as of compute capability 8.6; what is launched is compiled for it, which needs no device."""
    depths: list[str] = []

    class Launch:
        def __getitem__(self, grid: object) -> object:
            return lambda *arguments, **options: depths.append(str(arguments[-1]))

    monkeypatch.setattr(kernels, "_products", Launch())
    monkeypatch.setattr(kernels, "_gradients", Launch())
    pair = torch.zeros(1, 4, 16), torch.zeros(1, 4, 16)
    for dtype in (torch.float32, torch.bfloat16):
        layers = Products([torch.zeros(16, 16, dtype=dtype)], [torch.zeros(16, 16)], *pair)
        assert compiler.superpose([layers], torch.ones(4)) == [0]
    low = [each.bfloat16() for each in pair]
    assert compiler.gradients([torch.zeros(16, 16).bfloat16()], *low, torch.ones(4), pair, False)
    assert len(depths) == 4
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SHARED_MEMORY, *depths[:3]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sizes = {name: int(size) for name, size in (line.split() for line in done.stdout.splitlines()[-3:])}
    assert sizes.keys() == {"fp32", "bf16", "gradients"}
    assert all(0 < size <= 99 * 2**10 for size in sizes.values()), sizes
