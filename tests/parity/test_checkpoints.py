"""The mixins in a plain transformers Trainer, and the order in which a checkpoint reaches the disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_resume import assert_identical
from transformers import Trainer, TrainingArguments

from models import causal_lm, tokens
from molf import MoLFConfig, MoLFOptimizerFactory, NonFiniteError
from molf.train.callbacks import RoutingCallback, before_loggers
from molf.train.checkpoints import WholeCheckpoints, rotate
from molf.train.nonfinite import FiniteSteps
from molf.train.resume import check_checkpoint, last_checkpoint

CONFIG = MoLFConfig(expert_ranks=(2,), lr=1e-3, lora_lr=1e-3)


class SafeTrainer(FiniteSteps, WholeCheckpoints, Trainer):
    pass


def trainer(out: Path, kind: type[Trainer] = SafeTrainer, **more: Any) -> Any:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "save_total_limit": 1, **more}
    args = TrainingArguments(
        str(out), per_device_train_batch_size=4, max_grad_norm=0.0, use_cpu=True, disable_tqdm=True, report_to="none",
        dataloader_pin_memory=False, **options,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for step in range(4) for row in tokens(step)]
    optimizer = (MoLFOptimizerFactory, {"config": CONFIG})
    return kind(causal_lm("qwen2"), args, train_dataset=rows, eval_dataset=rows[:4], optimizer_cls_and_kwargs=optimizer)


def test_a_plain_trainer_resumes_from_a_whole_checkpoint(tmp_path) -> None:
    """``resume_from_checkpoint=True`` is transformers' own search; what was half-written has another name."""
    whole = trainer(tmp_path / "whole")
    whole.train()
    out = tmp_path / "run"
    trainer(out, max_steps=4).train()
    half = out / "unfinished-checkpoint" / "checkpoint-5"
    half.mkdir(parents=True)
    trainer(tmp_path / "other", save_total_limit=None).train()
    shutil.rmtree(out / "checkpoint-4")
    shutil.copytree(tmp_path / "other" / "checkpoint-2", out / "checkpoint-2")
    again = trainer(out)
    again.train(resume_from_checkpoint=True)
    assert_identical(again.optimizer.state_dict(), whole.optimizer.state_dict())
    assert_identical(*(load_file(run / "checkpoint-4" / "model.safetensors") for run in (tmp_path / "whole", out)))
    assert [path.name for path in out.glob("*checkpoint*")] == ["checkpoint-4"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_a_changed_byte_is_refused_before_any_weight_is_loaded(tmp_path, monkeypatch, name: str) -> None:
    """In the middle of a tensor, where only the manifest shows it."""
    trainer(tmp_path, max_steps=1).train()
    path = tmp_path / "checkpoint-1" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr(Trainer, "_load_from_checkpoint", lambda *_: pytest.fail("weights were loaded"))
    for wanted in (True, str(path.parent)):
        with pytest.raises(ValueError, match=rf"{path} is not the file that was saved"):
            trainer(tmp_path).train(resume_from_checkpoint=wanted)


def test_the_best_checkpoint_is_kept_and_found(tmp_path) -> None:
    best = {"metric_for_best_model": "eval_loss", "greater_is_better": True, "load_best_model_at_end": True}
    run = trainer(tmp_path, eval_strategy="steps", eval_steps=1, learning_rate=1e-3, **best)
    run.train()
    folder = Path(run.state.best_model_checkpoint)
    assert folder.parent == tmp_path
    assert folder.name != "checkpoint-4"
    check_checkpoint(folder)
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(folder)


def test_what_is_not_finite_stops_a_plain_trainer(tmp_path) -> None:
    run = trainer(tmp_path)
    with torch.no_grad():
        run.model.model.norm.weight[3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"the weight model\.norm\.weight is not finite; nothing was updated"):
        run.train()
    with pytest.raises(NonFiniteError, match=r"the weight model\.norm\.weight is not finite; nothing was saved"):
        run.save_model(str(tmp_path / "saved"))
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_whatever_ends_a_save_leaves_the_checkpoint_before(tmp_path, monkeypatch, error) -> None:
    def fail(self: Any, output_dir: str) -> None:
        if self.state.global_step == 2:
            raise error

    monkeypatch.setattr(Trainer, "_save_scaler", fail)
    with pytest.raises(type(error), match=r"checkpoint-2 cannot be written.*No space left|^$"):
        trainer(tmp_path).train()
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-1"]
    check_checkpoint(tmp_path / "checkpoint-1")


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name_and_older_ones_go(tmp_path, monkeypatch) -> None:
    """A loss of power keeps what was flushed: first every file, then the name, and only then may others be removed."""
    events: list[str] = []
    fsync, rename, rmtree = os.fsync, Path.rename, shutil.rmtree

    def record(what: str, path: Any) -> None:
        events.append(f"{what} {Path(path).relative_to(tmp_path)}")

    def recorded_fsync(descriptor: int) -> None:
        record("sync", os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def recorded_rename(self: Path, target: Path) -> Path:
        record("name", target)
        return rename(self, target)

    def recorded_rmtree(path: Any, **options: Any) -> None:
        if Path(path).exists():
            record("remove", path)
        rmtree(path, **options)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "rename", recorded_rename)
    monkeypatch.setattr(shutil, "rmtree", recorded_rmtree)
    made = trainer(tmp_path, max_steps=2)
    before_loggers(made, RoutingCallback(tmp_path / "routing.jsonl"))  # as molf train does
    made.train()
    events = events[events.index("name checkpoint-1") + 1 :]
    named = events.index("name checkpoint-2")
    saved = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    flushed = {event.rpartition("/")[2] for event in events[:named] if event.startswith("sync unfinished-checkpoint/")}
    assert saved | {"checkpoint-2"} <= {name.removesuffix(".part") for name in flushed}
    assert "manifest.json" in saved
    assert events[:named].count("sync routing.jsonl") == 2  # after the checkpoint before, and before this one
    assert events.index("remove checkpoint-1") > events.index("sync .", named) > named


def test_rotation_never_takes_the_newest_nor_the_best(tmp_path) -> None:
    def left(limit: int | None, best: str | None) -> list[str]:
        for step in (1, 2, 3, 10):  # 10 is damaged, and of an earlier attempt
            (tmp_path / f"checkpoint-{step}").mkdir(exist_ok=True)
        os.utime(tmp_path / "checkpoint-10", (2**31, 2**31))
        rotate(tmp_path / "checkpoint-3", limit, best)
        return sorted(path.name.removeprefix("checkpoint-") for path in tmp_path.iterdir())

    assert left(None, None) == left(0, None) == ["1", "10", "2", "3"]
    assert left(1, None) == ["3"]
    assert left(1, str(tmp_path / "checkpoint-1")) == left(2, str(tmp_path / "checkpoint-1")) == ["1", "3"]
    assert left(2, str(tmp_path / "checkpoint-7")) == ["10", "3"]
    assert left(3, None) == ["10", "2", "3"]


def test_half_of_a_plain_trainers_checkpoint_is_skipped_by_name(tmp_path, capsys) -> None:
    """Made without the mixin: no manifest, and files one after the other."""
    trainer(tmp_path, Trainer, save_total_limit=None, max_steps=3).train()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / "trainer_state.json").unlink()  # the last that it writes
    optimizer = tmp_path / "checkpoint-2" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    printed = capsys.readouterr().out
    assert "checkpoint-3: not a checkpoint folder (no trainer_state.json in it)" in printed
    assert f"{optimizer} is damaged" in printed
    assert last_checkpoint(tmp_path / "nowhere") is None
