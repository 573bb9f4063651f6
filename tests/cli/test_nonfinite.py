"""NaN and infinity in weights, gradients, losses and batches: stopped or skipped by every method, and never saved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_resume import assert_identical
from torch import nn
from transformers import TrainerCallback

import molf.train.run
from molf import NonFiniteError, read_routing
from molf.assets import BUNDLED_MODEL
from molf.cli import main
from molf.train.nonfinite import check_state
from molf.train.resume import check_checkpoint

ARGUMENTS = [
    "--model_name_or_path", str(BUNDLED_MODEL), "--task", "fact", "--max_examples", "16", "--max_steps", "6",
    "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--learning_rate", "1e-3",
    "--warmup_steps", "0", "--save_strategy", "steps", "--save_steps", "1", "--gradient_checkpointing", "false",
    "--eval_at_end", "false", "--use_cpu", "true", "--disable_tqdm", "true", "--logging_steps", "1",
]  # fmt: skip
RANKS = {"fft": [], "lora": ["--expert_ranks", "4"], "molf": ["--expert_ranks", "4"], "molf-e": ["--expert_ranks", "2"]}


class Fault(TrainerCallback):
    """Breaks something of a trainer at the given steps, the first being 1."""

    def __init__(self, trainer: Any, kind: str, steps: tuple[int, ...]) -> None:
        self.trainer, self.kind, self.steps = trainer, kind, steps
        trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        self.name, self.parameter = next(item for item in trained.items() if "layers.1.mlp.up_proj" in item[0])
        if kind == "gradient":
            self.parameter.register_hook(
                lambda grad: grad.index_fill(0, torch.tensor([0]), torch.inf) if self.now else grad
            )
        elif kind == "nan gradient":
            self.parameter.register_hook(lambda grad: grad * self.factor)
        elif kind == "batch":
            trainer.model.get_input_embeddings().register_forward_hook(lambda *a: a[-1] * self.factor)
        elif kind == "loss":
            compute = trainer.compute_loss
            trainer.compute_loss = lambda *a, **kw: compute(*a, **kw) - 1 + self.factor

    @property
    def now(self) -> bool:
        return self.trainer.state.global_step + 1 in self.steps

    @property
    def factor(self) -> float:
        return torch.nan if self.now else 1.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.kind == "weight" and self.now:
            self.parameter.data[0, 0] = torch.inf

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.kind == "overflow" and self.now:
            self.parameter.data[0, 0] = torch.inf
        if self.kind == "moment" and self.now:
            self.trainer.optimizer.state[self.parameter]["exp_avg_sq"][0, 0] = torch.inf


@pytest.fixture
def inject(monkeypatch) -> Callable[..., list[Fault]]:
    """Breaks the trainers that are made from now on; returns what it broke."""
    make = molf.train.run._make_trainer

    def break_at(kind: str, *steps: int) -> list[Fault]:
        faults: list[Fault] = []

        def broken(*args: Any, **kwargs: Any) -> Any:
            trainer = make(*args, **kwargs)
            faults.append(Fault(trainer, kind, steps))
            trainer.add_callback(faults[-1])
            return trainer

        monkeypatch.setattr(molf.train.run, "_make_trainer", broken)
        return faults

    return break_at


def command(method: str, facts: Path, out: Path, *more: str) -> list[str]:
    words = ["--method", method, *RANKS[method], "--dataset_path", str(facts), "--output_dir", str(out)]
    return ["train", *ARGUMENTS, *words, *more]


def fails(capsys, arguments: list[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("molf: error:")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("method", "kind", "message"),
    [
        ("fft", "nan gradient", "step 2: the gradient of {} or its norm is not finite; nothing was updated"),
        ("molf", "nan gradient", "step 2: the gradient of {} or its norm is not finite; nothing was updated"),
        ("molf-e", "gradient", "step 2: the gradient of {} or its norm is not finite; nothing was updated"),
        ("lora", "weight", "the weight {} is not finite; nothing was updated"),
        ("molf", "weight", "the weight {} is not finite; nothing was updated"),
        ("lora", "loss", "step 2: the loss is not finite; nothing was updated"),
        ("fft", "batch", "nothing was updated. Nor are 50 of 50 gradients, the first of model.embed_tokens.weight"),
        ("fft", "overflow", "the weight {} is not finite; nothing was saved"),
        ("molf", "moment", "the optimizer's exp_avg_sq of {} is not finite; nothing was saved"),
    ],
)
def test_the_run_stops_with_a_name_and_a_good_checkpoint(
    tmp_path, facts, capsys, inject, method: str, kind: str, message: str
) -> None:
    """The Trainer clips, where it does, after the look: one NaN has not become all gradients' by then."""
    out = tmp_path / "run"
    faults = inject(kind, 2)
    error = fails(capsys, command(method, facts, out))
    assert message.format(faults[0].name) in error
    assert [path.name for path in out.glob("*checkpoint*")] == ["checkpoint-1"]
    check_checkpoint(out / "checkpoint-1")
    weights = load_file(next((out / "checkpoint-1").glob("*.safetensors")))
    assert all(value.isfinite().all() for value in weights.values())
    assert not list(out.glob("*.safetensors"))


def test_the_moment_of_a_single_number_is_looked_at_too() -> None:
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    check_state(model, optimizer)
    optimizer.state[model.weight]["exp_avg"].fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="exp_avg of weight is not finite"):
        check_state(model, optimizer)


@pytest.mark.parametrize("method", ["fft", "molf"])
def test_skipped_steps_change_nothing_are_counted_and_resume_exactly(tmp_path, facts, inject, method: str) -> None:
    """Resumed after a skipped step; and where a run stopped, so that the first step of the resume is skipped."""
    out = tmp_path / "run"
    inject("nan gradient", 2, 5)
    arguments = command(method, facts, out, "--on_nonfinite", "skip")
    assert main(arguments) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["steps"], metrics["skipped_steps"]) == (6, 2)
    for before, skipped, after in ((1, 2, 3), (4, 5, 6)):
        steps = [out / f"checkpoint-{step}" for step in (before, skipped, after)]
        weights = [load_file(step / "model.safetensors") for step in steps]
        states = [torch.load(step / "optimizer.pt", weights_only=True)["state"] for step in steps]
        assert_identical((weights[0], states[0]), (weights[1], states[1]))
        assert not torch.equal(*(w["model.layers.0.mlp.up_proj.weight"] for w in weights[1:]))
    state = (out / "checkpoint-6" / "trainer_state.json").read_text()
    assert "NaN" not in state
    history = json.loads(state)["log_history"]
    assert [entry["step"] for entry in history if "skipped" in entry] == [2, 5]
    assert all("layers.1.mlp.up_proj" in entry["skipped"] for entry in history if "skipped" in entry)
    if method == "molf":
        assert [record["step"] for record in read_routing(out / "routing.jsonl")[1]] == [1, 2, 3, 4]
    again = tmp_path / "again"
    if method == "molf":
        assert main(command(method, facts, again)) == 2
    else:
        shutil.copytree(out, again, ignore=shutil.ignore_patterns("metrics.json", "checkpoint-[456]"))
    assert main(command(method, facts, again, "--on_nonfinite", "skip", "--resume_from_checkpoint", "last")) == 0
    for name in ("optimizer.pt", "scheduler.pt"):
        assert_identical(*(torch.load(run / "checkpoint-6" / name, weights_only=True) for run in (out, again)))
    assert_identical(*(load_file(run / "model.safetensors") for run in (out, again)))
    assert json.loads((again / "metrics.json").read_text())["skipped_steps"] == 2
    if method == "molf":
        assert (out / "routing.jsonl").read_text() == (again / "routing.jsonl").read_text()


def test_skipping_gives_up(tmp_path, facts, capsys, inject) -> None:
    inject("loss", 2, 4, 5, 6)
    skip = ["--on_nonfinite", "skip", "--nonfinite_limit", "2"]
    error = fails(capsys, command("lora", facts, tmp_path / "run", *skip))
    assert "step 6: the loss is not finite" in error
    assert "It is step 3 in a row; nonfinite_limit=2 were skipped" in error
    inject("weight", 2)
    error = fails(capsys, command("fft", facts, tmp_path / "weight", *skip))
    assert "up_proj.weight is not finite; nothing was updated" in error  # skipping heals no weight
    assert "on_nonfinite='ignore': choose one of stop, skip" in fails(
        capsys, command("fft", facts, tmp_path / "x", "--on_nonfinite", "ignore")
    )
    assert "nonfinite_limit=0" in fails(capsys, command("fft", facts, tmp_path / "x", "--nonfinite_limit", "0"))
