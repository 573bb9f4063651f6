"""The passes in C++ against those in torch: the same moments, sums and values, whatever the shape, and nothing else."""

from __future__ import annotations

import copy
from itertools import chain

import pytest
import torch

from molf import MoLFAdamW, MoLFConfig, NonFiniteGradientError, create_molf_optimizer
from molf.optim import native, passes
from molf.optim.adamw import Coefficients, Tracking, adamw_, track_, unrouted_
from molf.optim.jobs import CompileError, Held, Job, Jobs, Pass, adamw_all, track_all, unrouted_all
from molf.optim.virtual import Products

SHAPES = [(), (0,), (3, 0), (0, 5), (1,), (63,), (64,), (65,), (3, 5), (2, 4096), (3, 4097), (5, 9000), (2, 3, 70)]
COEFFICIENTS = Coefficients(0.999, -1e-2, 0.5, 2.0, 1e-8)
ULP = 2**-24


def tensors(shape: tuple[int, ...], seed: int, grad_dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """A gradient, m, v and a value."""
    g = torch.Generator().manual_seed(seed)
    grad, m, value = (torch.randn(shape, generator=g) for _ in range(3))
    return [grad.to(grad_dtype), m, torch.rand(shape, generator=g), value]


def run(function: Pass, jobs: list[Job], shared: object, by_row: bool = False) -> list:
    """All of them natively, or an error: the sums of each job's rows."""
    rows = [heights(job) if by_row else 1 for job in jobs]
    sums = torch.full((sum(rows),), torch.nan)
    done = chain.from_iterable(native.Native().run(function, jobs, shared, rows, sums))
    assert list(done) == list(range(len(jobs)))
    return list(sums.split(rows))


def heights(job: Job) -> int:
    return job[1].shape[:-1].numel()


def close(found: torch.Tensor, expected: torch.Tensor, ulps: int = 4) -> None:
    torch.testing.assert_close(found, expected, rtol=ulps * 2 * ULP, atol=ulps * ULP)


@pytest.mark.parametrize("score_fn", ["epd", "pfn"])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.3, 0.5), (0.0, 0.0)])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_moments_and_sums(score_fn: str, betas: tuple[float, float], grad_dtype: torch.dtype) -> None:
    shared = Tracking(betas, 1e-8, score_fn, torch.tensor(0.7))
    ours, theirs = ([tensors(shape, i, grad_dtype) for i, shape in enumerate(SHAPES)] for _ in range(2))
    found = run(track_all, [tuple(each[:3]) for each in ours], shared, by_row=True)
    for each, (grad, m, v, _), sums in zip(ours, theirs, found, strict=True):
        expected = track_(grad, m, v, shared)
        close(each[1], m)
        close(each[2], v)
        torch.testing.assert_close(sums, expected.flatten(), rtol=1e-5, atol=0)
        assert torch.equal(each[0], grad)


@pytest.mark.parametrize("store", [False, True])
def test_values(store: bool) -> None:
    ours, theirs = ([tensors(shape, i) for i, shape in enumerate(SHAPES)] for _ in range(2))
    stores = [torch.zeros(shape, dtype=torch.bfloat16) if store else None for shape in SHAPES]
    run(adamw_all, [(x[3], x[1], x[2], s, None) for x, s in zip(ours, stores, strict=True)], COEFFICIENTS)
    for each, stored, (_, m, v, value) in zip(ours, stores, theirs, strict=True):
        adamw_(value, m, v, None, None, COEFFICIENTS)
        close(each[3], value)
        assert stored is None or torch.equal(stored, each[3].to(torch.bfloat16))
        assert torch.equal(each[1], m)
        assert torch.equal(each[2], v)


def test_rates_and_winners_by_row() -> None:
    """Losers keep their bits."""
    ours, theirs = tensors((4, 5000), 0), tensors((4, 5000), 0)
    c = COEFFICIENTS._replace(decay=torch.rand(4, 1), step_size=torch.rand(4, 1))
    winner = torch.tensor([[True], [False], [False], [True]])
    run(adamw_all, [(ours[3], ours[1], ours[2], None, winner)], c, by_row=True)
    before = theirs[3].clone()
    adamw_(theirs[3], theirs[1], theirs[2], None, winner, c)
    close(ours[3], theirs[3])
    assert torch.equal(ours[3][1:3], before[1:3])


@pytest.mark.parametrize("compile", [False, True])
def test_jobs_with_rates_of_their_own_and_one_that_is_left_out(compile: bool) -> None:
    """In one call: two of a rate, one of another, one with a rate per row, and one without rows."""
    ours, theirs = ([tensors((4, 700), seed) for seed in range(5)] for _ in range(2))
    own, by_row = (COEFFICIENTS._replace(decay=d, step_size=s) for d, s in ((0.9, -0.1), torch.rand(2, 4, 1)))
    rates = [COEFFICIENTS, own, by_row, COEFFICIENTS, own]
    jobs = [(x[3], x[1], x[2], None, None) for x in ours]
    versions = [x[3]._version for x in ours]
    passes.Passes(compile, 0, torch.device("cpu")).run(adamw_all, jobs, rates, [1, 1, 4, 1, 0])
    for i, (each, (_, m, v, value), c) in enumerate(zip(ours, theirs, rates, strict=True)):
        if i < 4:
            adamw_(value, m, v, None, None, c)
        close(each[3], value)
        assert (each[3]._version > versions[i]) == (i < 4)
    assert torch.equal(ours[4][3], tensors((4, 700), 4)[3])


def test_a_column_is_looked_at_again_where_its_data_is_another() -> None:
    """Tensors that are held are looked at once, as long as they are where they were."""
    jobs = [tensors((6, 9), seed)[:3] for seed in range(2)]
    held = Jobs([job[0] for job in jobs], Held(job[1] for job in jobs), Held(job[2] for job in jobs))
    shared, sums = Tracking((0.9, 0.999), 1e-8, "epd"), torch.zeros(2)
    for dtype, expected in ((None, [0, 1]), (None, [0, 1]), (torch.float64, [1]), (torch.float32, [0, 1])):
        if dtype is not None:
            jobs[0][1].data = torch.zeros(6, 9, dtype=dtype)
        assert list(chain.from_iterable(native.Native().run(track_all, held, shared, [1, 1], sums))) == expected


def test_a_whole_step_of_what_is_not_routed() -> None:
    ours, theirs = ([tensors(shape, i, torch.bfloat16) for i, shape in enumerate(SHAPES)] for _ in range(2))
    numbers = Tracking((0.9, 0.999), 1e-8, "epd"), COEFFICIENTS
    run(unrouted_all, [(x[3], x[1], x[2], None, x[0]) for x in ours], numbers)
    for each, (grad, m, v, value) in zip(ours, theirs, strict=True):
        unrouted_(value, m, v, None, grad, numbers)
        for found, expected in zip(each[1:], (m, v, value), strict=True):
            close(found, expected)


def test_what_is_not_finite_is_stored_as_torch_rounds_it() -> None:
    value = torch.tensor([float("inf"), -float("inf"), float("nan"), 3.39e38, -0.0, 1e-40, 1 + 2**-8, 1 + 3 * 2**-8])
    stored, zeros = torch.zeros(8, dtype=torch.bfloat16), torch.zeros(8)
    c = COEFFICIENTS._replace(decay=1.0, step_size=-0.0)
    run(adamw_all, [(value, zeros, zeros, stored, None)], c)
    torch.testing.assert_close(stored, value.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


def test_sums_do_not_depend_on_the_number_of_threads() -> None:
    found = []
    threads = torch.get_num_threads()
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        jobs = [tuple(tensors((40, 700), 1)[:3]), tuple(tensors((30_000,), 2)[:3])]
        found.append([*run(track_all, jobs, Tracking((0.9, 0.999), 1e-8, "epd"), by_row=True), *jobs[0][1:3]])
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares_of_every_part(dtype: torch.dtype) -> None:
    """The same number alone as among others, whatever the shape; what is not plain leaves all of them to torch."""
    g = torch.Generator().manual_seed(0)
    shapes = [(), (1,), (0,), (3, 4097), (6, 100), (130, 64)]
    listed, counts = [torch.randn(shape, generator=g).to(dtype) for shape in shapes], [1, 1, 1, 1, 3, 2]
    found = native.Native().squares(listed, counts)
    parts = [part for each, count in zip(listed, counts, strict=True) for part in each.reshape(count, -1)]
    torch.testing.assert_close(
        found, torch.stack([p.double().square().sum() for p in parts]).float(), rtol=1e-6, atol=0
    )
    alone = [native.Native().squares([part.contiguous()], [1]) for part in parts]
    assert torch.equal(torch.cat(alone), found)
    assert native.Native().squares([*listed, torch.ones(3, 3).T], [*counts, 1]) is None
    assert native.Native().squares([*listed, torch.ones(3, dtype=torch.float64)], [*counts, 1]) is None


@pytest.mark.parametrize("limit", [None, 0.01])
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["0.weight", "0.bias", "2.weight", "1.weight", "1.bias"])
def test_a_gradient_that_is_not_finite_changes_nothing(name: str, broken: float, limit: float | None) -> None:
    """Compiled; of a large layer, small ones, biases, and what is not routed."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(200, 200), torch.nn.LayerNorm(200), torch.nn.Linear(200, 3))
    optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=(2,), compile=True, max_grad_norm=limit))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]])
    dict(model.named_parameters())[name].grad.view(-1)[-1] = broken
    with pytest.raises(NonFiniteGradientError, match=rf"of {name.removesuffix('.weight')}.*nothing was updated"):
        optimizer.step()
    after = [model.state_dict(), optimizer.state_dict()["state"]]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_autograd_sees_what_was_written() -> None:
    """A graph that still needs a weight is refused, as after any other optimizer's step."""
    weight = torch.ones(3, requires_grad=True)
    loss = weight.square().sum()
    run(adamw_all, [(weight.detach(), torch.ones(3), torch.ones(3), None, None)], COEFFICIENTS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "change",
    [
        lambda job: (job[0].double(), *job[1:]),
        lambda job: tuple(t.double() for t in job),
        lambda job: tuple(t.T for t in job),
        lambda job: (job[0].half(), *job[1:]),
    ],
)
def test_other_tensors_are_left_to_torch(change) -> None:
    shared = Tracking((0.9, 0.999), 1e-8, "epd")
    job = tuple(tensors((6, 9), 0)[:3])
    sums = torch.zeros(6)
    assert not list(native.Native().run(track_all, [job], shared._replace(gate=torch.tensor(True)), [6], sums))
    ours, theirs = change(job), change(tuple(tensors((6, 9), 0)[:3]))
    assert not list(native.Native().run(track_all, [ours], shared, [heights(ours)], sums))
    assert not sums.any()
    found = passes.Passes(True, 0, torch.device("cpu")).run(track_all, [ours], shared, [heights(ours)])
    assert torch.equal(found, track_(*theirs, shared))


def test_one_job_that_is_left_to_torch_leaves_the_others_compiled() -> None:
    """Each result and each moment is that of its own job."""
    shared = Tracking((0.9, 0.999), 1e-8, "epd")
    ours, theirs = ([tuple(tensors((3, 5), seed)[:3]) for seed in range(3)] for _ in range(2))
    ours[0], theirs[0] = (tuple(t.double() for t in jobs[0]) for jobs in (ours, theirs))
    left = [t.clone() for t in ours[0]]
    sums = torch.zeros(9)
    assert [list(done) for done in native.Native().run(track_all, ours, shared, [3] * 3, sums)] == [[1, 2]]
    assert all(map(torch.equal, ours[0], left))
    assert not sums[:3].any()
    for i in (1, 2):
        torch.testing.assert_close(sums[3 * i :][:3], track_(*theirs[i], shared), rtol=1e-5, atol=0)
        close(ours[i][1], theirs[i][1])
        close(ours[i][2], theirs[i][2])


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("/no/such/c++", "No such file"),
        ("c++ 'x", "No closing quotation"),
        ("false", "failed"),
        ("sh -c 'echo broken >&2; exit 1'", "broken"),
    ],
)
def test_without_a_working_compiler_auto_warns_and_true_is_an_error(monkeypatch, compiler: str, reason: str) -> None:
    """And the step is made uncompiled."""
    monkeypatch.setenv("CXX", compiler)
    native._library.cache_clear()
    shared = Tracking((0.9, 0.999), 1e-8, "epd")
    job = tuple(tensors((6, 9), 0)[:3])
    automatic = passes.Passes("auto", 2**30, torch.device("cpu"))
    with pytest.warns(UserWarning, match=f"run uncompiled, which is slower: .*{reason}"):
        found = automatic.run(track_all, [job], shared, [6])
    assert torch.equal(found, track_(*tensors((6, 9), 0)[:3], shared))
    assert not automatic.compiles
    with pytest.raises(RuntimeError, match=rf"compile=True, but compiling failed .*{reason}.*use compile=False"):
        passes.Passes(True, 0, torch.device("cpu")).run(track_all, [job], shared)
    native._library.cache_clear()


def test_without_a_temporary_folder_auto_warns(monkeypatch) -> None:
    def fails(*arguments: object, **more: object) -> None:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr("tempfile.TemporaryDirectory", fails)
    native._library.cache_clear()
    automatic = passes.Passes("auto", 2**30, torch.device("cpu"))
    with pytest.warns(UserWarning, match="No usable temporary directory"):
        automatic.run(track_all, [tuple(tensors((6, 9), 0)[:3])], Tracking((0.9, 0.999), 1e-8, "epd"))


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("shape", [(3, 0), (0, 5), (0,)])
def test_sums_of_nothing_are_zero(shape: tuple[int, ...], by_row: bool) -> None:
    """A process may hold no row of a sharded weight."""
    (found,) = run(track_all, [tuple(tensors(shape, 0)[:3])], Tracking((0.9, 0.999), 1e-8, "epd"), by_row)
    assert found.sum() == 0


def test_a_subclass_whose_data_is_elsewhere_is_left_to_torch() -> None:
    class Elsewhere(torch.Tensor):
        pass

    job = tuple(t.as_subclass(Elsewhere) for t in tensors((6, 9), 0)[:3])
    shared = Tracking((0.9, 0.999), 1e-8, "epd")
    assert not list(native.Native().run(track_all, [tuple(job)], shared, [1], torch.zeros(1)))


def test_nothing_of_it_is_left_on_disk(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    native._library.cache_clear()
    assert native._library().molf_pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_small_layers(dtype: torch.dtype) -> None:
    """P = W + Σ s B A rounded once, the same bits alone as among others; a large layer is left to torch."""
    g = torch.Generator().manual_seed(0)

    def layers(rows: int, columns: int, count: int) -> Products:
        bases = [torch.randn(rows, columns, generator=g) for _ in range(count)]
        targets = [torch.zeros(rows, columns, dtype=dtype) for _ in range(count)]
        pair = torch.randn(count, 5, rows, generator=g), torch.randn(count, 5, columns, generator=g)
        return Products(targets, bases, *pair)

    listed, scales = [layers(3, 70, 1), layers(64, 64, 4), layers(256, 128, 1)], torch.rand(5, generator=g)
    versions = [each.targets[0]._version for each in listed]
    torch.set_num_threads(2)
    assert native.Native().superpose(listed, scales) == [0, 1]
    assert [each.targets[0]._version - old for each, old in zip(listed, versions, strict=True)] == [1, 1, 0]
    assert not listed[2].targets[0].any()
    for each in listed[:2]:
        for i, (target, base, left, right) in enumerate(zip(*each, strict=True)):
            exact = base.double() + (left * scales[:, None]).double().T @ right.double()
            torch.testing.assert_close(
                target.double(), exact, rtol=2**-8 if target.dtype != base.dtype else 0, atol=2**-20
            )
            alone = Products([torch.zeros_like(target)], [base], each.left[i : i + 1], each.right[i : i + 1])
            torch.set_num_threads(1)
            assert native.Native().superpose([alone], scales) == [0]
            assert torch.equal(alone.targets[0], target)


@pytest.mark.parametrize(("rows", "columns"), [(0, 4), (4, 0)])
def test_products_of_nothing_are_left_to_torch(rows: int, columns: int) -> None:
    """A process may hold no row of a sharded layer."""
    empty = Products(
        [torch.zeros(rows, columns)], [torch.zeros(rows, columns)], torch.zeros(1, 5, rows), torch.zeros(1, 5, columns)
    )
    assert native.Native().superpose([empty], torch.ones(5)) == []


def test_products_with_scales_of_another_dtype_are_left_to_torch() -> None:
    layers = Products([torch.zeros(4, 6)], [torch.zeros(4, 6)], torch.ones(1, 5, 4), torch.ones(1, 5, 6))
    assert native.Native().superpose([layers], torch.ones(5).double()) == []
    assert native.Native().superpose([layers], torch.ones(5)) == [0]


def test_a_state_is_not_half_loaded_where_compiling_fails(monkeypatch) -> None:
    def optimizer_of(model: torch.nn.Module) -> MoLFAdamW:
        return create_molf_optimizer(model, MoLFConfig(expert_ranks=(2,), compile=True, policy="fixed-lora"))

    def fails() -> None:
        raise CompileError("broken")

    model, other = (torch.nn.Sequential(torch.nn.Linear(6, 6)) for _ in range(2))
    optimizer, loading = optimizer_of(model), optimizer_of(other)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = copy.deepcopy((other.state_dict(), loading.state_dict()["state"]))
    monkeypatch.setattr(native, "_library", fails)
    with pytest.raises(CompileError, match="compile=True, but compiling failed"):
        loading.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close((other.state_dict(), loading.state_dict()["state"]), before, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_squares_do_not_depend_on_the_default_dtype(dtype: torch.dtype) -> None:
    listed = [torch.randn(7, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float32)]
    expected = native.Native().squares(listed, [1])
    torch.set_default_dtype(dtype)
    try:
        found = native.Native().squares(listed, [1])
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_sums_that_compiled_code_cannot_write_are_left_to_torch(dtypes: tuple[torch.dtype, ...]) -> None:
    shared = Tracking((0.9, 0.999), 1e-8, "epd")
    ours, theirs = ([tuple(t.to(dtype) for t in tensors((3, 5), 0)[:3]) for dtype in dtypes] for _ in range(2))
    found = passes.Passes(True, 0, torch.device("cpu")).run(track_all, ours, shared, [3, 3])
    expected = torch.cat([track_(*job, shared).to(found.dtype) for job in theirs])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_a_negated_view_has_its_sign() -> None:
    """As autograd gives it to a parameter of one element under a conjugated number."""
    found = []
    for negated in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(200, 200), torch.nn.LayerNorm(200))
        optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=(2,), compile=True))
        for parameter in model.parameters():
            ones = torch.ones_like(parameter)
            parameter.grad = torch._neg_view(ones) if negated else -ones
        optimizer.step()
        found.append([*model.parameters()])
    assert all(map(torch.equal, *found))
