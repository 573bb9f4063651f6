"""``molf bench``: what it accepts, what it builds, how it counts, and that its tables cannot miss a row.

Nothing here looks at how long something takes.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType

from molf import MoLFAdamW, MoLFConfig, create_molf_optimizer
from molf.bench.contenders import DEFAULTS, KINDS, Contender, build, default_contenders, lora_wins
from molf.bench.device import copy_bandwidth, floor_bytes, waits
from molf.bench.environment import environment
from molf.bench.memory import tensor_bytes
from molf.bench.presets import PRESETS, Settings, build_model
from molf.bench.results import Results, ratio, summary
from molf.bench.timing import interleave
from molf.bench.workload import OptimizerStep, TrainStep
from molf.cli import main
from molf.cli.bench import parse

ROOT = Path(__file__).parents[2]
TINY = Settings("tiny", "cpu", "float32", batch=2, length=16, ranks=(4,), efficient_ranks=(2, 4))


def refusal(capsys, *words: str) -> str:
    """Exit status 2 and one line on stderr; returns it."""
    capsys.readouterr()
    assert main(["bench", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("label", "optimizer", "preset", "options"),
    [
        ("molf", "molf", "tiny", {}),
        ("molf@cpu-deep", "molf", "cpu-deep", {}),
        ("molf:expert_ranks=[2,2],score_fn=pfn,top_k=2", "molf", "tiny",
         {"expert_ranks": [2, 2], "score_fn": "pfn", "top_k": 2}),
        ("molf@cpu-growth-1:policy=fixed-dense", "molf", "cpu-growth-1", {"policy": "fixed-dense"}),
        ('molf:{"expert_ranks": [2, 2], "top_k": 2}', "molf", "tiny", {"expert_ranks": [2, 2], "top_k": 2}),
        ("fft:fused=False,foreach=True", "torch.optim:AdamW", "tiny", {"fused": False, "foreach": True}),
        ("torch.optim:SGD:lr=0.1,momentum=0.9", "torch.optim:SGD", "tiny", {"lr": 0.1, "momentum": 0.9}),
        ('torch.optim:Adafactor@qwen2.5-0.5b:{"lr": 0.01}', "torch.optim:Adafactor", "qwen2.5-0.5b", {"lr": 0.01}),
    ],
)  # fmt: skip
def test_contender_names(label: str, optimizer: str, preset: str, options: dict) -> None:
    contender = Contender.parse(label, "tiny")
    assert (contender.label, contender.kind.optimizer, contender.preset) == (label, optimizer, PRESETS[preset])
    assert contender.kind.options == options
    contender.check(TINY)


def test_what_is_refused(tmp_path, capsys) -> None:
    """Before anything is built, and before the result file is touched."""
    out = tmp_path / "out.json"

    def refused(*words: str) -> str:
        return refusal(capsys, "step", "--preset", "tiny", "--out", str(out), *words)

    assert "contender 'adam': choose one of fft, fft-amp, " in refused("--contenders", "adam")
    assert "MoLFConfig has no field rank" in refused("--contenders", "molf:rank=3")
    assert "expert_ranks=(0,): every rank must be" in refused("--contenders", "molf:expert_ranks=[0]")
    assert "preset 'huge': choose one of tiny, " in refused("--contenders", "molf@huge")
    assert "unexpected keyword argument 'rate'" in refused("--contenders", "fft:rate=3")
    assert "No module named 'no_such'" in refused("--contenders", "no_such.module:Adam")
    assert "has no attribute 'Nadir'" in refused("--contenders", "torch.optim:Nadir")
    assert "missing a required argument: 'closure'" in refused("--contenders", "torch.optim:LBFGS")
    in_backward = "molf:step_in_backward=True"
    for words in (["step"], ["train", "--accumulation", "2"]):
        words += ["--preset", "tiny", "--out", str(out), "--contenders", in_backward]
        assert f"contender '{in_backward}': with step_in_backward" in refusal(capsys, *words)
    assert "its options are no JSON" in refused("--contenders", 'fft:{"lr":}')
    assert "write NAME[@PRESET][:OPTIONS]" in refused("--contenders", "molf:")
    assert "one is named twice" in refused("--contenders", "fft", "molf", "fft")
    assert "--baseline lora: choose one of the contenders fft" in refused("--contenders", "fft", "--baseline", "lora")
    assert "argument --rounds: 0: must be at least 1" in refused("--rounds", "0")
    assert "--warmup 1: give at least 2" in refused("--warmup", "1")
    assert "--turns -1: must not be negative" in refused("--turns", "-1")
    assert "--threads 1000000: this machine has" in refused("--threads", "1000000")
    assert not out.exists()
    assert "invalid choice: 'speed'" in refusal(capsys, "speed", "--preset", "tiny", "--out", str(out))
    assert "required: --out" in refusal(capsys, "step", "--preset", "tiny")


def test_an_optimizer_that_cannot_step_a_dense_model_is_one_line(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("molf.cli.bench.copy_bandwidth", lambda device: 1.0)
    words = ["step", "--preset", "tiny", "--device", "cpu", "--out", str(tmp_path / "out.json")]
    line = refusal(capsys, *words, "--contenders", "torch.optim:SparseAdam")
    assert "contender 'torch.optim:SparseAdam': SparseAdam does not support dense gradients" in line


def test_a_pipe_is_written_to_and_stays_one(tmp_path) -> None:
    """As a device such as /dev/null does: it was replaced by a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    Results(pipe, "step", {}, ["fft"], ["fft"]).write()
    assert pipe.is_fifo()
    assert json.loads(os.read(reader, 2**16))["bench"] == "step"
    os.close(reader)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.published])
def test_published_shapes_have_the_published_number_of_parameters(name: str) -> None:
    totals = {"qwen2.5-0.5b": 0.49, "qwen2.5-1.5b": 1.54, "qwen2.5-3b": 3.09, "gemma-3-1b": 1.0, "llama-3.2-1b": 1.24}
    model = build_model(PRESETS[name], torch.bfloat16, "meta", 0)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1e9 * totals[name], rel=0.01)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_cpu_small_is_the_shape_of_the_bars() -> None:
    model = build_model(PRESETS["cpu-small"], torch.float32, "meta", 0)
    routed = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert sum(m.weight.numel() for m in routed) == 8 * (4 * 512 * 512 + 3 * 512 * 1408)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_every_named_contender_is_known() -> None:
    for bench, names in DEFAULTS.items():
        assert set(names.split()) <= set(KINDS)
        assert set(default_contenders(bench, "float32")) >= {"fft", "molf", "molf-e"}
        assert default_contenders(bench, "bfloat16")[:2] == ["fft", "fft-amp"]


def test_ratios_are_taken_per_round() -> None:
    """A machine that slows down tenfold in the middle changes no ratio."""
    drift = [1.0, 1.0, 10.0, 10.0, 10.0]
    assert ratio([2 * d for d in drift], drift) == {"median": 2.0, "q1": 2.0, "q3": 2.0}
    assert ratio([1.0, 20.0, 3.0], [1.0, 10.0, 1.0])["median"] == 2.0  # not 3, the ratio of the medians
    assert summary([4.0, 1.0, 2.0, 3.0]) == {"median": 2.5, "q1": 1.75, "q3": 3.25}
    assert summary([7.0]) == {"median": 7.0, "q1": 7.0, "q3": 7.0}


class Fake:
    """A workload that takes no time and writes down when it was run."""

    def __init__(self, contender: Contender, log: list[str]) -> None:
        self.contender, self.log, self.settings = contender, log, TINY
        log.append(f"make {contender.label}")

    def warm_up(self, steps: int) -> list[float]:
        self.log.append(f"warm {self.contender.label}")
        return [9.0] * steps

    def round(self, steps: int) -> dict[str, float]:
        self.log.append(self.contender.label)
        return {"total": 2.0 if self.contender.label == "molf" else 1.0}

    def facts(self) -> dict[str, int]:
        return {"parameters": 1}


def test_tokens_per_second(tmp_path) -> None:
    results = Results(tmp_path / "out.json", "train", {}, ["fft"], ["fft"], tokens=2048)
    for ms in (900.0, 1000.0, 5000.0):
        results.add_round("fft", {"total": ms})
    assert results.entry("fft")["tokens_per_s"] == 2048.0
    assert "2048" in results.table()


def rehearse(path: Path, make, turns: int = 0) -> Results:
    contenders = [Contender.parse(label, "tiny") for label in ("fft", "molf", "lora")]
    results = Results(path, "step", {}, [contender.label for contender in contenders], ["fft"])
    interleave(contenders, make, results, rounds=3, warmup=2, turns=turns)
    return results


@pytest.fixture
def _no_collection(monkeypatch):
    """Nothing is alive that could be freed, and a look at the whole heap takes its time."""
    monkeypatch.setattr("molf.bench.timing.free", lambda: None)


@pytest.mark.usefixtures("_no_collection")
@pytest.mark.parametrize(
    ("turns", "order"),
    [(0, "fft molf lora fft molf lora fft molf lora"), (2, "fft molf lora fft fft molf molf lora lora")],
)
def test_order_of_rounds(tmp_path, turns: int, order: str) -> None:
    log: list[str] = []
    results = rehearse(tmp_path / "out.json", lambda contender: Fake(contender, log), turns)
    assert [word for word in log if " " not in word] == order.split()
    made = ["make fft", "warm fft", "make molf", "warm molf", "make lora", "warm lora"]
    assert [word for word in log if " " in word] == made * max(turns, 1)
    if not turns:
        assert log[:6] == made
    entry = json.loads((tmp_path / "out.json").read_text())["contenders"]["molf"]
    assert entry["rounds"] == {"total": [2.0, 2.0, 2.0]}
    assert entry["warmup"] == [9.0, 9.0] * max(turns, 1)
    assert entry["ratios"]["fft"]["total"]["median"] == 2.0
    assert "molf" in results.table()


def test_nothing_is_compared_with_what_measured_nothing(tmp_path: Path) -> None:
    """Under memory pressure a tiny model's peak may be 0 MiB beyond what the process had."""
    results = Results(tmp_path / "out.json", "memory", {}, ["fft", "molf"], ["fft"])
    results.add_round("fft", {"total": 0.0})
    results.add_round("molf", {"total": 0.5})
    assert results.entry("molf")["ratios"] == {}
    assert results.table().splitlines()[-1].split()[-1] == "-"
    assert json.loads((tmp_path / "out.json").read_text())["contenders"]["molf"]["rounds"] == {"total": [0.5]}


@pytest.mark.usefixtures("_no_collection")
def test_compilations_are_counted_apart(tmp_path, monkeypatch) -> None:
    """Those of the warm-up with the contender that they were made for; those that spoil a round for all."""
    made = [0]
    monkeypatch.setattr("molf.bench.timing.compilations", lambda: made[0])

    class Compiling(Fake):
        def warm_up(self, steps: int) -> list[float]:
            made[0] += 2
            return super().warm_up(steps)

        def round(self, steps: int) -> dict[str, float]:
            made[0] += self.contender.label == "molf"
            return super().round(steps)

    results = rehearse(tmp_path / "out.json", lambda contender: Compiling(contender, []), turns=2)
    assert [results.entry(label)["compilations"] for label in ("fft", "molf", "lora")] == [4, 4, 4]
    assert json.loads((tmp_path / "out.json").read_text())["compilations_in_rounds"] == 3


@pytest.mark.usefixtures("_no_collection")
def test_a_killed_bench_leaves_what_it_has(tmp_path) -> None:
    log: list[str] = []

    class Killed(Fake):
        def round(self, steps: int) -> dict[str, float]:
            if log.count("lora") == 1:
                raise KeyboardInterrupt
            return super().round(steps)

    with pytest.raises(KeyboardInterrupt):
        rehearse(tmp_path / "out.json", lambda contender: Killed(contender, log))
    data = json.loads((tmp_path / "out.json").read_text())
    assert not data["complete"]
    assert [len(entry["rounds"]["total"]) for entry in data["contenders"].values()] == [1, 1, 1]


@pytest.mark.usefixtures("_no_collection")
def test_a_contender_without_memory_is_noted_and_left_out(tmp_path) -> None:
    log: list[str] = []
    refused: list[int] = []

    def make(contender: Contender) -> Fake:
        if contender.label == "molf":
            refused.append(1)
            raise torch.OutOfMemoryError("no memory\ndetails")
        return Fake(contender, log)

    for turns in (0, 3):
        results = rehearse(tmp_path / "out.json", make, turns)
        entries = [results.entry(label) for label in ("fft", "molf", "lora")]
        assert [len(entry["rounds"].get("total", [])) for entry in entries] == [3, 0, 3]
        assert entries[1]["error"] == "no memory"
    assert len(refused) == 2  # once in each run: no turn tries it again


def step_of(label: str) -> OptimizerStep:
    return OptimizerStep(Contender.parse(label, "tiny"), TINY)


def apart(workload: OptimizerStep) -> set[bool]:
    """Whether W differs from P, over the routed layers."""
    state = workload.optimizer.state
    return {bool(s["lora_B"].any()) for s in state.values() if "lora_B" in s}


@pytest.mark.parametrize(
    ("label", "wins", "moved"),
    [("molf-dense", 1.0, False), ("molf-dense-late", 1.0, True), ("molf-lora", 0.0, True)],
)
def test_forced_winners(label: str, wins: float, moved: bool) -> None:
    workload = step_of(label)
    workload.warm_up(2)
    parts = workload.round(1)
    assert workload.facts()["dense_wins"] == wins
    assert apart(workload) == {moved}
    assert parts["without_matmuls"] == parts["total"] - parts["gradients"] - parts["rewrite"]


def test_a_late_contender_starts_with_lora_everywhere() -> None:
    workload = step_of("molf")
    rates = [group["lr"] for group in workload.optimizer.param_groups]
    workload._give_gradients()
    with lora_wins(workload.optimizer):
        workload.optimizer.step()
    assert {choice.winners for choice in workload.optimizer.routing.values()} == {("lora_r4",)}
    assert [group["lr"] for group in workload.optimizer.param_groups] == rates


def test_contenders_have_equal_weights_gradients_and_tokens() -> None:
    ours, peer = step_of("molf"), step_of("fft")
    for (p, g), (q, h) in zip(ours.gradients, peer.gradients, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(g, h)
    tokens = [TrainStep(Contender.parse(label, "tiny"), TINY).batches for label in ("molf-e", "lora-2")]
    assert torch.equal(*tokens)


def test_the_matmuls_are_timed_where_the_step_makes_them(monkeypatch) -> None:
    """Within the step, whose time they are part of; and the optimizer is its own again."""
    workload = step_of("molf-lora")
    workload.warm_up(1)
    calls: list[str] = []
    for name, method in (("gradients", "_gradients"), ("rewrite", "_write_products")):
        own = getattr(MoLFAdamW, method)
        monkeypatch.setattr(
            MoLFAdamW, method, lambda self, *args, own=own, name=name: (calls.append(name), own(self, *args))[1]
        )
    parts = workload.round(2)
    assert Counter(calls) == {"gradients": 2 * len(workload.optimizer.stacks().all), "rewrite": 2}
    assert all(0 < parts[name] < parts["total"] for name in ("gradients", "rewrite", "without_matmuls"))
    assert not {"_gradients", "_write_products"} & vars(workload.optimizer).keys()


def test_gradients_are_the_mean_of_the_accumulated_batches() -> None:
    contender = Contender.parse("fft", "tiny")
    whole = TrainStep(contender, replace(TINY, accumulation=1, batch=4))
    parts = TrainStep(contender, replace(TINY, accumulation=2))
    parts.batches = whole.batches.view(2, 2, 16)
    for workload in (whole, parts):
        workload.forward_backward()
    for p, q in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize(
    ("label", "trainable"),
    [
        ("fft", 29536),  # every parameter
        ("molf-superposed", 29536 + 4 * 1232),  # 1,232 is Σ (in + out) of the 14 layers
        ("lora", 6 * 1232),
        ("lora-2", 6 * 1232),
        ("molf-e", 6 * 1232),
        ("torch.optim:SGD:lr=0.1", 29536),
    ],
)
def test_what_is_trained(label: str, trainable: int) -> None:
    model, optimizer = build(Contender.parse(label, "tiny"), TINY)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert held == {p for p in model.parameters() if p.requires_grad}


def test_floor_bytes() -> None:
    """Per bf16 parameter with fp32 masters and moments: 28 for AdamW, 36 where dense wins, 24 where LoRA does."""
    outs, ins, rank = 8, 16, 2

    def per_parameter(ranks: tuple[int, ...], wins: float, experts: int) -> float:
        model = nn.Sequential(nn.Linear(ins, outs, bias=False)).bfloat16()
        optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=ranks))
        return (floor_bytes(optimizer, wins) - experts * rank * (outs + ins)) / (outs * ins)

    assert per_parameter((), 1.0, 0) == 28
    assert per_parameter((rank,), 1.0, 4 + 16) == 36  # an expert: g, m, v read, m, v written
    assert per_parameter((rank,), 0.0, 4 + 16 + 16) == 24  # and m, v, w read, w written
    model = nn.Linear(ins, outs, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    assert floor_bytes(optimizer, 0.0) == 28 * outs * ins
    assert floor_bytes(torch.optim.SGD(model.parameters()), 0.0) is None


def test_waits_of_a_trace() -> None:
    """Those inside the step count, not the one that ends the trace; a GPU's copy of the range is not the range."""

    def event(name: str, start: float, end: float, device: DeviceType = DeviceType.CPU) -> SimpleNamespace:
        return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), device_type=device)

    trace = [
        event("step", 0, 100, DeviceType.CUDA),
        event("step", 10, 50),
        event("cudaStreamSynchronize", 20, 30),
        event("cudaDeviceSynchronize", 60, 70),
        event("Memcpy DtoH (Device -> Pageable)", 25, 26, DeviceType.CUDA),
        event("Memcpy HtoD (Pageable -> Device)", 22, 23, DeviceType.CUDA),
    ]
    found = {name: count for name, count in waits(trace).items() if count}
    assert found == {"cudaStreamSynchronize": 1, "copies_to_host": 1}


def test_no_memory_in_a_process_is_noted(tmp_path, monkeypatch, capsys) -> None:
    """As ``interleave`` does: the others are measured."""

    def measure(contender: Contender, settings: Settings, threads: int) -> dict:
        found = {"facts": {"parameters": 1}, "parts": {"total": 3.0, "made": 1.0}}
        return {"error": "no memory"} if contender.label == "molf" else found

    monkeypatch.setattr("molf.cli.bench.measure_apart", measure)
    out = tmp_path / "out.json"
    words = ["memory", "--preset", "tiny", "--device", "cpu", "--out", str(out), "--contenders", "fft", "molf", "lora"]
    assert main(["bench", *words]) == 0
    contenders = json.loads(out.read_text())["contenders"]
    assert [entry.get("error") for entry in contenders.values()] == [None, "no memory", None]
    assert contenders["lora"]["summary"]["total"]["median"] == 3.0
    assert "no memory" in capsys.readouterr().out


def test_shared_storage_is_counted_once() -> None:
    model = nn.Linear(16, 8)
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[model.weight] = {"view": model.weight.detach()[:2], "own": torch.zeros(5), "name": "W"}
    model.weight.grad = torch.zeros_like(model.weight)
    sizes = tensor_bytes(model, optimizer)
    assert sizes == {"weights": 4 * (16 * 8 + 8), "gradients": 4 * 16 * 8, "state": {"view": 0, "own": 20}}


def test_environment() -> None:
    stamp = environment("cpu", 3, ["step", "--seed", "3"])
    assert stamp["torch"] == torch.__version__
    assert (stamp["command"], stamp["seed"], stamp["threads"]) == ("molf bench step --seed 3", 3, 1)
    json.dumps(stamp)
    assert copy_bandwidth("cpu", mebibytes=1, copies=1) > 0


def test_from_a_checkout_with_torch_transformers_and_peft_alone(tmp_path) -> None:
    """What other extras install is hidden; PEFT itself needs accelerate and yaml."""
    hidden = "trl datasets scipy sklearn pandas pyarrow plotly matplotlib tensorboard torchao bitsandbytes sqlglot rich"
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({hidden!r}.split()))\n"
        "from molf.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    out = tmp_path / "step.json"
    words = f"bench step --preset tiny --contenders fft molf molf-e --rounds 2 --warmup 2 --steps 1 --out {out}".split()
    command = [sys.executable, "-c", code, *words, "--device", "cpu"]
    source = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**source, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert "/ fft" in done.stdout
    data = json.loads(out.read_text())
    assert data["complete"]
    assert data["environment"]["transformers"]
    assert all(len(entry["rounds"]["total"]) == 2 for entry in data["contenders"].values())
    assert data["contenders"]["molf"]["summary"].keys() == {"total", "gradients", "rewrite", "without_matmuls"}


@pytest.fixture(scope="module")
def performance():
    spec = importlib.util.spec_from_file_location("performance", ROOT / "benchmarks" / "performance.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_fail_where_a_row_is_missing(performance, tmp_path, monkeypatch) -> None:
    for path in performance.RESULTS.glob("bench_*_cpu*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(performance, "RESULTS", tmp_path)
    assert "molf-e" in performance.train()
    path = tmp_path / "bench_train_cpu.json"
    whole = json.loads(path.read_text())
    less = {**whole, "contenders": {k: v for k, v in whole["contenders"].items() if k != "molf-e"}}
    path.write_text(json.dumps(less))
    for make in (performance.train, performance.bars, performance.digest):
        with pytest.raises(ValueError, match="has no row molf-e"):
            make()
    path.write_text(json.dumps({**whole, "complete": False}))
    with pytest.raises(ValueError, match=r"did not end: run benchmarks/bench_cpu\.sh"):
        performance.train()
    path.unlink()
    with pytest.raises(ValueError, match=r"bench_train_cpu\.json is missing"):
        performance.bars()


def test_gpu_results(performance, tmp_path, monkeypatch) -> None:
    """What is not there was not measured."""
    monkeypatch.setattr(performance, "RESULTS", tmp_path)
    assert performance.gpu().count("not measured") == 2
    times = {"rounds": {"total": [2.0]}, "summary": {"total": summary([2.0])}, "warmup": [5.0], "dense_wins": None}
    entry = {
        **times,
        "tokens_per_s": 1.0,
        "floor_bytes": 10**6,
        "peak_mib": 1.0,
        "syncs": {"cudaStreamSynchronize": 1, "copies_to_host": 1},
    }
    stamp = {"device": "GPU", "command": "c", "torch": "t", "transformers": "t", "peft": "p", "commit": "c"}
    stamp |= {"load_at_start": [0.0], "load_at_end": [0.0]}
    head = {"complete": True, "environment": stamp, "copy_gb_per_s": 1.0, "settings": vars(TINY)}
    whole = {**head, "contenders": dict.fromkeys(performance.ON_GPU, entry)}
    for name in ("step_gpu_3b", "train_gpu_3b", "train_gpu_3b_checkpointing"):
        (tmp_path / f"bench_{name}.json").write_text(json.dumps(whole))
    lost = {
        **whole,
        "contenders": {**whole["contenders"], "fft-amp": {"error": "no memory", "summary": {}, "rounds": {}}},
    }
    (tmp_path / "bench_train_gpu_3b.json").write_text(json.dumps(lost))
    text = performance.gpu()
    assert text.count("not measured") == 1
    assert text.count("| fft-amp | out of memory |") == 1
    assert "cudaStreamSynchronize 1" in text
    (tmp_path / "bench_train_gpu_3b_checkpointing.json").unlink()
    assert "Qwen2.5-3B, training step with gradient checkpointing: not measured." in performance.gpu()


def test_the_figure_shows_the_results(performance, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(performance, "FIGURE", tmp_path / "figure.svg")
    performance.draw()
    assert performance.digest() in performance.FIGURE.read_text()
    assert performance.digest() in (ROOT / "docs" / "performance.svg").read_text(), "run benchmarks/tables.py"
    assert "-->\n<!-- end" not in (ROOT / "docs" / "performance.md").read_text(), "run benchmarks/tables.py"


def commands_of(script: str, monkeypatch) -> dict[str, Namespace]:
    """What a script would run, by the name of its result; the options parse and the contenders are known."""
    monkeypatch.setenv("PYTHON", "echo")
    path = ROOT / "benchmarks" / script
    done = subprocess.run(["bash", str(path), "--rounds", "3"], capture_output=True, text=True, check=True)
    lines = [line.removeprefix("-m molf bench ").split() for line in done.stdout.splitlines()]
    commands = {options.out.stem.removeprefix("bench_"): options for options in map(parse, lines)}
    for options in commands.values():
        assert options.rounds == (1 if options.bench == "memory" else 3)
        for label in options.contenders or default_contenders(options.bench, "float32"):
            Contender.parse(label, options.preset)
    return commands


def test_the_scripts_make_the_results_that_the_tables_read(performance, monkeypatch) -> None:
    read, load = set(), performance.load
    monkeypatch.setattr(performance, "load", lambda name: read.add(name) or load(name))
    for make in performance.TABLES:
        make()
    names = [f"train_gpu_{size}{suffix}" for size in performance.GPU_SHAPES for suffix in ("", "_checkpointing")]
    on_gpu = {*names, *(f"step_gpu_{size}" for size in performance.GPU_SHAPES)}
    # by the same commands
    on_another_cpu = {f"{bench}_cpu_{cpu}" for bench in ("step", "train") for cpu in performance.OTHER_CPUS}
    assert commands_of("bench_cpu.sh", monkeypatch).keys() == read - on_gpu - on_another_cpu
    commands = commands_of("bench_gpu.sh", monkeypatch)
    assert commands.keys() == on_gpu
    assert {tuple(options.contenders) for options in commands.values()} == {performance.ON_GPU}


def test_the_commands_of_the_page_parse() -> None:
    text = (ROOT / "docs" / "performance.md").read_text()
    lines = re.findall(r"^PYTHONPATH=src python -m molf bench ([^#\n]*)", text, re.MULTILINE)
    assert [parse(line.split()).bench for line in lines] == list(DEFAULTS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["step"],
        ["step", "--dtype", "bfloat16", "--turns", "2"],
        ["train", "--accumulation", "2", "--gradient_checkpointing"],
        ["train", "--dtype", "bfloat16", "--contenders", "fft-amp", "molf", "molf-e", 'torch.optim:SGD:{"lr": 0.1}'],
        ["memory", "--contenders", "fft", "fft-8bit", "molf"],
    ],
)
def test_each_bench_end_to_end(words: list[str], tmp_path) -> None:
    """In a process of its own, as users run it: torchao and transformers warn of their own future."""
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "molf", "bench", *words, "--preset", "tiny", "--rounds", "2", "--out", str(out)]
    done = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    data = json.loads(out.read_text())
    assert data["complete"]
    assert data["environment"]["load_at_end"]
    for label, entry in data["contenders"].items():
        assert label in done.stdout
        assert len(entry["rounds"]["total"]) == 2
        assert all(peer["total"]["median"] > 0 for peer in entry["ratios"].values())
        assert entry["parameters"] >= entry["trainable"] > 0
    if words[0] == "memory":
        bits = data["contenders"]["fft-8bit"]["bytes"]["state"]["exp_avg"]
        assert 0 < bits < data["contenders"]["fft"]["bytes"]["state"]["exp_avg"]
        assert data["contenders"]["molf"]["bytes"]["weights"] == data["contenders"]["fft"]["bytes"]["weights"]


@pytest.mark.slow
def test_a_failing_process_is_one_line(tmp_path, capfd) -> None:
    """The value of an option that only the optimizer itself refuses, in the process that measures memory."""
    words = ["bench", "memory", "--preset", "tiny", "--out", str(tmp_path / "out.json"), "--device", "cpu"]
    assert main([*words, "--contenders", "fft:lr=-1"]) == 2
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    assert "molf: error: fft:lr=-1 ended with status 1" in errors
