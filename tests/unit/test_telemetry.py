"""What a Trainer's log says of routing, against numbers worked out by hand; what recording costs; and no network."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from models import causal_lm, lm_step, tokens
from molf import MoLFConfig, MoLFOptimizerFactory, create_molf_optimizer, read_routing
from molf.assets import BUNDLED_MODEL
from molf.train.callbacks import RoutingCallback, SpeedCallback, before_loggers
from molf.train.run import _PeakMemory
from molf.train.telemetry import LostUpdates, RoutingMetrics


def record(*rows: tuple[list[float], list[int]] | None) -> dict:
    return {"scores": [row and row[0] for row in rows], "winners": [row and row[1] for row in rows]}


def test_metrics_by_hand() -> None:
    metrics = RoutingMetrics(["layers.0.q", "layers.0.k", "layers.1.q"], ["dense", "lora_r2"])
    metrics.add(record(([4.0, 1.0], [0]), ([1.0, 2.0], [1]), None))
    metrics.add(record(([1.0, 4.0], [1]), ([1.0, 2.0], [1]), ([0.0, 0.0], [0])))
    assert metrics.take() == {
        "molf/dense_share": 2 / 5,
        "molf/share/q": 2 / 3,
        "molf/share/k": 0.0,
        "molf/margin": (0.75 + 0.5 + 0.75 + 0.5) / 4,
        "molf/switch_rate": 1 / 2,
    }
    assert metrics.take() == {}
    metrics.add(record(None, ([0.0, 0.0], [0]), ([0.0, 0.0], [0])))  # compared nothing
    assert metrics.take() == {}
    metrics.add(record(None, None, ([1.0, 0.5], [1])))
    assert metrics.take()["molf/switch_rate"] == 1.0  # since the entry before


@pytest.mark.parametrize("top_k", [1, 2])
def test_metrics_counted_together_are_those_counted_one_by_one(top_k: int) -> None:
    """Of 100 steps with modules that are absent and modules that never take part."""
    names, experts = [f"layers.{i}.{kind}" for i in range(3) for kind in "qkv"], ["dense", "lora_r2", "lora_r8"]
    together, single = (RoutingMetrics(names, experts, top_k) for _ in range(2))
    chance, taken = random.Random(0), []
    for _ in range(100):
        rows = [None if i == 8 or chance.random() < 0.2 else [chance.random() for _ in experts] for i in range(9)]
        order = [None if row is None else sorted(range(3), key=lambda e, row=row: -row[e])[:top_k] for row in rows]
        step = {"scores": rows, "winners": order}
        together.add(step)
        single.add(step)
        single._count()
        taken.append(step)
    found = together.take()
    assert found == pytest.approx(single.take(), rel=1e-12)
    decisions = [best for step in taken for best in step["winners"] if best is not None]
    assert found["molf/dense_share"] == sum(0 in best for best in decisions) / len(decisions)


def test_metrics_without_a_dense_expert() -> None:
    metrics = RoutingMetrics(["layers.0.q"], ["lora_r2", "lora_r8"])
    metrics.add(record(([3.0, 1.0], [0])))
    assert metrics.take() == {"molf/share/q": 1.0, "molf/margin": pytest.approx(2 / 3)}


@pytest.mark.parametrize(("lr", "least", "most"), [(1e-9, 0.9999, 1.0), (0.1, 0.0, 0.05)])
def test_lost_updates_are_those_that_the_weight_does_not_show(lr: float, least: float, most: float) -> None:
    """Of bf16 weights near 0.02 a step of 1e-9 changes none, one of 0.1 nearly every one."""
    model = causal_lm("llama", torch.bfloat16)
    optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=(), lr=lr))
    lost = LostUpdates(optimizer)
    before = {name: module.weight.clone() for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    model(input_ids=tokens(0), labels=tokens(0)).loss.backward()
    lost.before_step()
    optimizer.step()
    modules = optimizer.routed_modules
    found = lost.after_step([[0]] * len(modules))
    same = [model.get_submodule(name).weight == before[name] for name in modules]  # no weight has over 4,096 elements
    assert found == pytest.approx(sum(s.sum().item() for s in same) / sum(s.numel() for s in same))
    assert least <= found <= most
    assert lost.after_step([[0]] * len(modules)) is None


def test_lost_updates_are_not_those_of_lora_winners_or_fp32() -> None:
    model = causal_lm("llama", torch.bfloat16)
    optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=(2,)))
    lost = LostUpdates(optimizer)
    lost.before_step()
    assert lost.after_step([[1]] * len(optimizer.routed_modules)) is None
    lost = LostUpdates(create_molf_optimizer(causal_lm("llama"), MoLFConfig(expert_ranks=(2,))))
    lost.before_step()
    assert lost.after_step([[0]] * 14) is None


def logged(callback: RoutingCallback, state: SimpleNamespace) -> dict[str, float]:
    state.log_history.append({"loss": 1.0})
    callback.on_log(None, state, None, logs={"loss": 1.0})
    return state.log_history[-1]


def started(path: Path, optimizer: torch.optim.Optimizer) -> tuple[RoutingCallback, SimpleNamespace, SimpleNamespace]:
    """A callback that logs every step, as a Trainer starts it, and the Trainer's arguments and state."""
    args = SimpleNamespace(logging_first_step=False, logging_strategy="steps")
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, logging_steps=1, log_history=[])
    callback = RoutingCallback(path)
    callback.on_train_begin(args, state, None, optimizer=optimizer)
    callback.on_step_begin(args, state, None)
    return callback, args, state


def test_another_optimizer_is_refused(tmp_path) -> None:
    adamw = torch.optim.AdamW(causal_lm("llama").parameters())
    with pytest.raises(ValueError, match=r"optimizer=AdamW routes nothing: .*MoLFOptimizerFactory"):
        started(tmp_path / "routing.jsonl", adamw)


@pytest.mark.parametrize("step_in_backward", [False, True])
def test_lost_updates_are_found_wherever_the_step_is_made(tmp_path, step_in_backward: bool) -> None:
    model = causal_lm("llama", torch.bfloat16)
    config = MoLFConfig(expert_ranks=(2,), lr=0.1, policy="fixed-dense", step_in_backward=step_in_backward)
    optimizer = create_molf_optimizer(model, config)
    callback, args, state = started(tmp_path / "routing.jsonl", optimizer)
    model(input_ids=tokens(0), labels=tokens(0)).loss.backward()
    optimizer.step()
    callback.on_optimizer_step(args, state, None)
    assert logged(callback, state)["molf/lost_update_fraction"] < 0.05
    callback.close()


def test_a_training_that_begins_after_an_error_is_recorded_once(tmp_path) -> None:
    """The Trainer calls ``on_train_end`` only if there was none."""
    model = causal_lm("llama")
    optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=(2,)))
    callback, args, state = started(tmp_path / "routing.jsonl", optimizer)
    lm_step(model, optimizer, 0)
    first = callback.recorder
    callback.on_train_begin(args, state, None, optimizer=optimizer)
    lm_step(model, optimizer, 1)
    callback.close()
    assert first is not None
    assert first.latest is not None
    assert [first.latest["step"], len(read_routing(tmp_path / "routing.jsonl")[1])] == [1, 2]


def test_a_skipped_step_is_not_counted(tmp_path) -> None:
    """There is no new record then: the one before was counted again."""
    optimizer = create_molf_optimizer(causal_lm("llama", torch.bfloat16), MoLFConfig(expert_ranks=(2,)))
    callback, args, state = started(tmp_path / "routing.jsonl", optimizer)
    count = len(optimizer.routed_modules)
    assert callback.recorder is not None
    for winner in (0, 1):
        callback.recorder.latest = record(*[([2.0, 1.0], [winner])] * count)
        callback.on_optimizer_step(args, state, None)
    callback.on_step_begin(args, state, None)
    callback.on_optimizer_step(args, state, None)
    found = logged(callback, state)
    assert (found["molf/dense_share"], found["molf/switch_rate"]) == (0.5, 1.0)
    assert "molf/lost_update_fraction" not in found, "nothing was updated"
    callback.close()


def test_a_plain_trainer_reports_to_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Data(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> dict:
            ids = tokens(index)[0]
            return {"input_ids": ids, "labels": ids}

    args = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"), per_device_train_batch_size=4, max_steps=4, logging_steps=2,
        report_to="tensorboard", save_strategy="no", use_cpu=True, disable_tqdm=True, max_grad_norm=0.0,
        dataloader_pin_memory=False,
    )  # fmt: skip
    config = MoLFConfig(expert_ranks=(2,), lr=1e-4, lora_lr=1e-4)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(tmp_path / "board")
    try:
        trainer = transformers.Trainer(
            causal_lm("llama", torch.bfloat16), args, train_dataset=Data(),
            optimizer_cls_and_kwargs=(MoLFOptimizerFactory, {"config": config}),
        )  # fmt: skip
        before_loggers(trainer, RoutingCallback(tmp_path / "routing.jsonl"))
        trainer.train()
    finally:
        del os.environ["TENSORBOARD_LOGGING_DIR"]
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    expected = {"dense_share", "margin", "switch_rate", "lost_update_fraction", "share/q_proj", "share/down_proj"}
    assert {f"train/molf/{name}" for name in expected} <= tags
    shares = [event.value for event in board.Scalars("train/molf/dense_share")]
    winners = [[row[0] for row in r["winners"]] for r in read_routing(tmp_path / "routing.jsonl")[1]]
    by_hand = [1 - sum(map(sum, pair)) / 28 for pair in (winners[:2], winners[2:])]
    assert shares == pytest.approx(by_hand)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["molf/dense_share"] for entry in logged] == pytest.approx(by_hand)
    assert 0 < logged[0]["molf/lost_update_fraction"] < 1


def test_seconds_and_tokens_go_on_after_a_resume(monkeypatch) -> None:
    clock = iter([98.0, 100.0, 104.0, 106.0, 109.0, 110.0])
    monkeypatch.setattr("molf.train.callbacks.time.perf_counter", lambda: next(clock))
    state = SimpleNamespace(
        log_history=[{"step": 1, "seconds": 50.0, "num_tokens": 900}, {"step": 1, "eval_loss": 1.0}]
    )
    speed = SpeedCallback(lambda: 7.0)
    speed.on_train_begin(None, state, None)
    for _ in range(2):
        speed.on_epoch_begin(None, state, None)  # the first at 100: loggers took 2 seconds to start
    for tokens_so_far, expected in ((400, (54.0, 100.0)), (500, (56.0, 50.0))):
        logs = {"loss": 1.0, "num_tokens": tokens_so_far}
        state.log_history.append(dict(logs))
        speed.on_log(None, state, None, logs=logs)
        assert (logs["seconds"], logs["tokens_per_second"], logs["peak_memory_mib"]) == (*expected, 7.0)
        assert logs["num_tokens"] == 900 + tokens_so_far
        assert state.log_history[-1] == logs
    last = {"train_runtime": 6.0, "num_tokens": 500}
    state.log_history.append(dict(last))
    speed.on_log(None, state, None, logs=last)
    assert last == state.log_history[-1] == {"train_runtime": 6.0, "num_tokens": 1400}
    evaluation = {"eval_loss": 1.0}
    speed.on_log(None, state, None, logs=evaluation)
    assert evaluation == {"eval_loss": 1.0, "seconds": 56.0}
    speed.on_evaluate(None, state, None)  # at 109, so it took 3 seconds, which are not the training's
    logs = {"loss": 1.0, "num_tokens": 600}
    state.log_history.append(dict(logs))
    speed.on_log(None, state, None, logs=logs)
    assert (logs["seconds"], logs["tokens_per_second"], speed.paused) == (57.0, 100.0, 5.0)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        for name in "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split():
            setattr(self, name, nn.Linear(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            x = x + 0.1 * layer(x).tanh()
        return x


@pytest.mark.parametrize("width", [96, 128])  # of width 64, where a step takes 25 ms, it is 0.9 %
def test_recording_costs_under_one_percent_of_a_step(tmp_path, width: int) -> None:
    """Recorder and callback, 196 modules at 512 tokens; CPU time, which other processes do not add to."""
    model = nn.Sequential(*(Block(width) for _ in range(28)))
    optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=(8,)))
    callback, args, state = started(tmp_path / "routing.jsonl", optimizer)
    state.logging_steps = 4
    control = SimpleNamespace(should_save=False)
    recording, inner = 0.0, callback.recorder.record

    def timed(call: Callable[..., Any], *arguments: Any, **more: Any) -> None:
        nonlocal recording
        start = time.process_time()
        call(*arguments, **more)
        recording += time.process_time() - start

    callback.recorder.record = lambda: timed(inner)
    x = torch.randn(512, width)
    for step in range(10):
        if step == 2:  # the first ones warm up
            recording, start = 0.0, time.process_time()
        timed(callback.on_step_begin, args, state, control)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        timed(callback.on_optimizer_step, args, state, control)
        timed(callback.on_step_end, args, state, control)
        state.global_step += 1
        if state.global_step % state.logging_steps == 2:
            timed(logged, callback, state)
    share = recording / (time.process_time() - start)
    callback.close()
    assert len(read_routing(tmp_path / "routing.jsonl")[1]) == 10
    assert len(state.log_history) == 3
    assert share < 0.01


CALLS = """
import socket, sys
tried = []
def refuse(self, address, *rest):
    if self.family in (socket.AF_INET, socket.AF_INET6):
        tried.append(address)
        raise OSError("no network here")
    return connect(self, address, *rest)
connect, socket.socket.connect = socket.socket.connect, refuse
socket.getaddrinfo = lambda *a, **k: tried.append(a) or (_ for _ in ()).throw(OSError("no network here"))
from molf.cli import main
run, *train = sys.argv[1:]
status = main(["train", *train, "--output_dir", run]) or main(["report", run])
print("tried:", tried)
sys.exit(status)
"""


def test_nothing_phones_home(tmp_path: Path) -> None:
    """Training and its report with every switch for offline use off, and each attempt to connect noted."""
    environment = {k: v for k, v in os.environ.items() if "OFFLINE" not in k and k != "HF_HUB_DISABLE_TELEMETRY"}
    train = ["--model_name_or_path", str(BUNDLED_MODEL), "--task", "world-fact", "--max_examples", "8"]
    train += ["--max_steps", "2", "--expert_ranks", "2", "--use_cpu", "true", "--gradient_checkpointing", "false"]
    run = [sys.executable, "-c", CALLS, str(tmp_path / "run"), *train]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "tried: []"


@pytest.mark.skipif(torch.cuda.is_available() or not os.path.exists("/proc/self/statm"), reason="no resident memory")
def test_pages_of_files_are_no_memory_of_a_run(tmp_path) -> None:
    """Those that a base was quantised from stay in memory for as long as nothing else needs it."""
    size = 2**26
    (tmp_path / "weights").write_bytes(bytes(size))
    memory = _PeakMemory()
    mapped = torch.from_file(str(tmp_path / "weights"), size=size, dtype=torch.uint8)
    assert not mapped.any()
    assert memory.mib() < size / 2**21
    memory.model = torch.nn.ParameterList([torch.nn.Parameter(mapped[: size // 2], requires_grad=False)] * 2)
    assert memory.mib() == pytest.approx(size / 2**21, abs=8), "what a model uses of them it needs"
    held = torch.ones(size, dtype=torch.uint8)
    assert memory.mib() > 1.4 * len(held) / 2**20
