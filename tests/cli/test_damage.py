"""Checkpoints that are damaged, of another run or hostile; full disks; models that bring code or pickles; no memory."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from huggingface_hub.errors import HTTPError
from safetensors.torch import load_file
from test_resume import assert_identical

import molf.cli.train
import molf.train.run
from molf.assets import BUNDLED_MODEL
from molf.cli import main
from molf.files import claim
from molf.train import resume, verify
from molf.train.resume import check_checkpoint, last_checkpoint
from molf.train.verify import MANIFEST

ARGUMENTS = [
    "--task", "fact", "--max_examples", "24", "--max_steps", "2", "--per_device_train_batch_size", "8",
    "--learning_rate", "1e-3", "--warmup_steps", "0", "--save_strategy", "steps", "--save_steps", "1",
    "--gradient_checkpointing", "false", "--eval_at_end", "false", "--use_cpu", "true", "--disable_tqdm", "true",
]  # fmt: skip


def command(facts: Path, out: Path, *more: str, model: Path = BUNDLED_MODEL, method: str = "molf") -> list[str]:
    words = ["--model_name_or_path", str(model), "--dataset_path", str(facts), "--output_dir", str(out)]
    ranks = {"molf": ["--expert_ranks", "4"], "molf-e": ["--expert_ranks", "2", "4"], "lora": ["--expert_ranks", "4"]}
    own = [] if "--expert_ranks" in more else ranks.get(method, [])
    return ["train", *ARGUMENTS, *words, "--method", method, *own, *more]


def fails(capsys, arguments: list[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("molf: error:")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, facts) -> Callable[[str], Path]:
    """A run of two steps by a method, with both checkpoints; not to be changed."""
    runs: dict[str, Path] = {}

    def of(method: str) -> Path:
        if method not in runs:
            torch.set_num_threads(1)
            runs[method] = tmp_path_factory.mktemp(method) / "run"
            assert main(command(facts, runs[method], method=method)) == 0
        return runs[method]

    return of


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """The checkpoints whose weights a Trainer began to load."""
    loaded: list[str] = []
    monkeypatch.setattr(transformers.Trainer, "_load_from_checkpoint", lambda self, path, *rest: loaded.append(path))
    return loaded


class Payload:
    """A pickle that makes a file when it is run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def torch_pickle(path: Path) -> bytes:
    torch.save(Payload(path), file := io.BytesIO())
    return file.getvalue()


DAMAGE: dict[str, Callable[[bytes, Path], bytes]] = {
    "truncated": lambda data, _: data[: len(data) // 2],
    "emptied": lambda data, _: b"",
    "appended to": lambda data, _: data + b"garbage",
    "one byte": lambda data, _: data[:-9] + b"\x7f" + data[-8:],
    "text": lambda data, _: b"not what it should be\n" * 100,
    "a pickle": lambda data, trace: pickle.dumps(Payload(trace)),
    "a torch pickle": lambda data, trace: torch_pickle(trace),
}
FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_its_checkpoint_skipped(tmp_path, trained, capsys, name: str, damage: str) -> None:
    """With the manifest whatever was changed; without one, as a plain Trainer leaves it, what cannot be read."""
    for checkpoint in ("checkpoint-1", "checkpoint-2"):
        shutil.copytree(trained("molf") / checkpoint, tmp_path / checkpoint, copy_function=os.link)
    newest = tmp_path / "checkpoint-2"
    damaged = DAMAGE[damage]((newest / name).read_bytes(), tmp_path / "payload")
    (newest / name).unlink()
    (newest / name).write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"{name} is (damaged|not the file that was saved)"):
        check_checkpoint(newest)
    (newest / MANIFEST).unlink()
    harmless = damage in ("one byte", "appended to")  # to the format: it may be read, and is then what was saved
    if not harmless:
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            check_checkpoint(newest)
        assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
        assert f"skipped {newest}: {newest / name} is damaged" in capsys.readouterr().out
    assert not (tmp_path / "payload").exists()


def test_weights_of_another_run_and_other_payloads(tmp_path, trained, facts, capsys, loads, monkeypatch) -> None:
    """A file that is good in itself, in the wrong place; a pickle that no one loads stays unloaded."""
    out = tmp_path / "run"
    shutil.copytree(trained("molf"), out, ignore=shutil.ignore_patterns("metrics.json"))
    last = out / "checkpoint-2"
    torch.save(Payload(tmp_path / "payload"), last / "training_args.bin")
    assert "training_args.bin is damaged" in fails(capsys, command(facts, out, "--resume_from_checkpoint", str(last)))
    shutil.copy(trained("molf") / "checkpoint-1" / "model.safetensors", last)
    manifest = json.loads((last / MANIFEST).read_text())
    del manifest["files"]["training_args.bin"]
    (last / MANIFEST).write_text(json.dumps(manifest))
    error = fails(capsys, command(facts, out, "--resume_from_checkpoint", str(last)))
    assert "model.safetensors is not the file that was saved (another SHA-256): take an older checkpoint" in error
    assert not loads
    shutil.copy(trained("molf") / "checkpoint-2" / "model.safetensors", last)
    read, sha256 = [], verify.sha256
    monkeypatch.setattr(verify, "sha256", lambda path: (read.append(path.name), sha256(path))[1])
    assert main(command(facts, out, "--resume_from_checkpoint", str(last))) == 0
    assert loads == [str(last)]
    assert sorted(read) == sorted(manifest["files"])  # once
    assert not (tmp_path / "payload").exists()


@pytest.mark.parametrize(
    ("method", "to", "more", "message"),
    [
        ("molf", "molf", ["--expert_ranks", "8"], r"expert_ranks=[4], this run has [8]"),
        ("molf", "molf", ["--score_fn", "pfn"], "score_fn=epd, this run has pfn"),
        ("molf", "molf", ["--lora_alpha", "3"], "scales=[2.0], this run has [1.5]"),
        ("molf", "fft", [], "optimizer.pt is MoLFAdamW's, and this run has another optimizer"),
        ("fft", "molf", [], "optimizer.pt is AdamW's, and this run has MoLFAdamW"),
        ("molf-e", "molf-e", ["--expert_ranks", "2", "8"], "is of another adapter: its r is 6, here 10"),
        ("molf-e", "molf-e", ["--expert_ranks", "4", "2"], "expert_ranks=[2, 4], this run has [4, 2]"),
        ("lora", "lora", ["--lora_alpha", "4"], "is of another adapter: its lora_alpha is 8.0, here 4.0"),
        ("lora", "molf", [], "is of another model or method"),
        ("molf", "lora", [], "is of another model or method"),
    ],
)
def test_a_checkpoint_of_another_method_is_refused_before_any_weight_is_loaded(
    tmp_path, trained, facts, capsys, loads, method: str, to: str, more: list[str], message: str
) -> None:
    """By what is in the checkpoint: a run directory of its own has no run.json to compare with."""
    checkpoint = trained(method) / "checkpoint-1"
    copied = tmp_path / "elsewhere" / "checkpoint-1"
    shutil.copytree(checkpoint, copied)
    resume = ["--resume_from_checkpoint", str(copied), *more]
    assert message in fails(capsys, command(facts, tmp_path / "run", *resume, method=to))
    assert not loads
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_checkpoint_of_another_model_is_refused_before_any_weight_is_loaded(
    tmp_path, trained, facts, capsys, loads
) -> None:
    wide, flat = tmp_path / "wide", tmp_path / "flat"
    for folder, change in (
        (wide, {"intermediate_size": 96}),
        (flat, {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}),
    ):
        config = transformers.AutoConfig.from_pretrained(BUNDLED_MODEL, **change)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(BUNDLED_MODEL).save_pretrained(folder)
    checkpoint = tmp_path / "elsewhere" / "checkpoint-1"
    shutil.copytree(trained("molf") / "checkpoint-1", checkpoint)
    resume = ["--resume_from_checkpoint", str(checkpoint)]
    assert "mlp.down_proj.weight has shape" in fails(capsys, command(facts, tmp_path / "a", *resume, model=wide))
    error = fails(capsys, command(facts, tmp_path / "b", *resume, model=flat))
    assert "the checkpoint has model.layers.3.input_layernorm.weight, this model has not" in error
    shutil.copy(trained("molf") / "run.json", tmp_path / "elsewhere")
    error = fails(capsys, command(facts, tmp_path / "c", *resume, model=flat))
    assert f"model_name_or_path was {BUNDLED_MODEL}" in error
    assert not loads


@pytest.mark.parametrize("method", ["molf", "lora"])
def test_a_run_that_only_scores_scores_as_one_that_trained(tmp_path, facts, method: str) -> None:
    """Also of training in bf16, whose autocast the Trainer leaves on its model: scores are those of what is saved.

    And of a model that names no special tokens, which are saved as the tokenizer's.
    """
    out, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(BUNDLED_MODEL, model)
    for path in (model / "config.json", model / "generation_config.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": None, "pad_token_id": None}))
    words = ["--eval_at_end", "true", "--bf16", "true", "--resume_from_checkpoint", "auto"]
    assert main(command(facts, out, *words, method=method, model=model)) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    saved = {path.name: path.read_bytes() for path in out.glob("*.json") if path.name != "metrics.json"}
    for path in (out / "metrics.json", *out.glob("*.safetensors")):
        path.unlink()
    assert main(command(facts, out, *words, method=method, model=model)) == 0
    again = json.loads((out / "metrics.json").read_text())
    scores = ("efficacy_magnitude", "exact_match", "paraphrase", "neighbourhood", "score")
    assert {name: again[name] for name in scores} == {name: metrics[name] for name in scores}
    for name in ("config.json", "generation_config.json", "adapter_config.json"):
        assert name not in saved or (out / name).read_bytes() == saved[name]
    evaluated = ["eval", "--model", str(out), "--task", "fact", "--dataset_path", str(facts), "--max_examples", "24"]
    assert main([*evaluated, "--output", str(tmp_path / "eval.json")]) == 0
    found = json.loads((tmp_path / "eval.json").read_text())["metrics"]
    assert {name: found[name] for name in scores} == {name: metrics[name] for name in scores}


def test_auto_starts_continues_and_ends(tmp_path, trained, facts, capsys) -> None:
    """One and the same command, whatever the last one left; other settings or another folder are never run over."""
    out = tmp_path / "run"
    auto = command(facts, out, "--resume_from_checkpoint", "auto")
    out.mkdir()
    shutil.copy(trained("molf") / "run.json", out)
    (out / "checkpoint-2").mkdir()
    assert "has no checkpoint that is whole" in fails(capsys, [*auto[:-1], "last"])
    assert "holds run.json of an earlier run" in fails(capsys, auto[:-2])
    assert "learning_rate was 0.001" in fails(capsys, [*auto, "--learning_rate", "1e-4"])
    capsys.readouterr()
    assert main(auto) == 0
    assert "checkpoint-2: not a checkpoint folder" in capsys.readouterr().out
    assert_identical(*(load_file(run / "model.safetensors") for run in (out, trained("molf"))))
    (out / "metrics.json").unlink()
    (out / "model.safetensors").write_bytes(b"half")
    assert main(auto) == 0  # ended in the middle of its last save, and not of an epoch
    assert_identical(*(load_file(run / "model.safetensors") for run in (out, trained("molf"))))
    assert json.loads((out / "metrics.json").read_text())["steps"] == 2
    assert not (out / "checkpoint-3").exists()
    before = (out / "metrics.json").stat().st_mtime_ns
    assert main(auto) == 0
    assert "is over: these are its metrics" in capsys.readouterr().out
    assert (out / "metrics.json").stat().st_mtime_ns == before
    assert "learning_rate was 0.001" in fails(capsys, [*auto, "--learning_rate", "1e-4"])
    (out / "run.json").unlink()
    for path in (*out.glob("checkpoint-*"), out / "metrics.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "holds config.json of an earlier run" in fails(capsys, auto)
    (tmp_path / "other" / "checkpoint-9").mkdir(parents=True)
    assert "holds checkpoint-9 of an earlier run" in fails(capsys, command(facts, tmp_path / "other"))


def test_a_folder_that_another_process_trains_in_is_refused(tmp_path, trained, facts, capsys, monkeypatch) -> None:
    """It would end in a checkpoint that cannot be written, or in a mixture of both."""
    run = tmp_path / "run"
    shutil.copytree(trained("molf"), run)
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    resume = command(facts, run, "--resume_from_checkpoint", str(run / "checkpoint-1"))
    other, waited = claim(run, "the test"), []
    with monkeypatch.context() as patched:
        patched.setattr("molf.files.time.sleep", waited.append)
        assert f"{run} is in use: another process trains in this output_dir" in fails(capsys, resume)
    assert waited == [1] * 10
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files
    os.close(other)
    assert main(resume) == 0


@pytest.mark.parametrize("name", ["run.json", "metrics.json"])
@pytest.mark.parametrize("text", ['{"steps": ', "[1]"])
def test_what_a_run_says_of_itself_is_named_if_it_is_damaged(tmp_path, trained, facts, capsys, name, text) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained("molf"), out)
    (out / name).write_text(text)
    error = fails(capsys, command(facts, out, "--resume_from_checkpoint", "auto"))
    assert f"{out / name} is damaged: " in error


def test_a_run_that_was_started_again_has_no_result_until_it_ends(tmp_path, trained, facts, monkeypatch) -> None:
    def interrupted(*arguments: Any) -> None:  # no signal: a shell's background jobs ignore SIGINT
        raise KeyboardInterrupt

    out = tmp_path / "run"
    shutil.copytree(trained("molf"), out)
    with monkeypatch.context() as patched:
        patched.setattr(molf.train.run, "_save", interrupted)
        assert main(command(facts, out, "--resume_from_checkpoint", str(out / "checkpoint-1"))) == 130
    assert not (out / "metrics.json").exists()
    assert main(command(facts, out, "--resume_from_checkpoint", "auto")) == 0
    assert json.loads((out / "metrics.json").read_text())["steps"] == 2


def test_a_checkpoint_of_another_folder_is_continued_in_one_that_holds_no_run(
    tmp_path, trained, facts, capsys, monkeypatch
) -> None:
    """With all of the routing that led to it; a folder that holds another run would have a mix of both."""
    whole, out = trained("molf"), tmp_path / "run"
    resume = ["--resume_from_checkpoint", str(whole / "checkpoint-1")]
    used = tmp_path / "used"
    shutil.copytree(trained("fft"), used, copy_function=os.link)
    assert "expert_ranks was [] in the run of" in fails(capsys, command(facts, used, *resume))
    (used / "run.json").unlink()
    assert "used holds config.json of an earlier run" in fails(capsys, command(facts, used, *resume))

    def interrupted(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:100])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("shutil.copy", interrupted)
        assert main(command(facts, out, *resume)) == 130
    assert main(command(facts, out, *resume)) == 0
    assert_identical(*(load_file(run / "model.safetensors") for run in (out, whole)))
    assert (out / "routing.jsonl").read_text() == (whole / "routing.jsonl").read_text()
    shares = [json.loads((run / "metrics.json").read_text())["expert_share"] for run in (out, whole)]
    assert shares[0] == shares[1]


class Interrupted(transformers.TrainerCallback):
    """Ends the run in a step, before it is saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["molf", "lora"])
def test_later_checkpoints_are_set_aside_before_an_older_one_is_continued(
    tmp_path, facts, capsys, monkeypatch, method: str
) -> None:
    """Else the next start takes one of them: it trains nothing, or finds that the log, cut by then, lacks its steps."""
    train, out = molf.train.run.train, tmp_path / "run"

    def run(*more: str, to: int | None = None) -> int:
        ends = [] if to is None else [Interrupted(to)]
        monkeypatch.setattr(molf.cli.train, "train", lambda *arguments: train(*arguments, ends))
        return main(command(facts, out, "--max_steps", "6", "--save_steps", "2", *more, method=method))

    def result(folder: Path) -> list[Any]:
        metrics = json.loads((folder / "metrics.json").read_text())
        log = folder / "routing.jsonl"
        weights = load_file(next(folder.glob("*model.safetensors")))
        return [weights, log.read_text() if log.exists() else None, metrics.get("expert_share")]

    synced: list[Path] = []
    monkeypatch.setattr(resume, "sync", synced.append)
    assert run() == 0
    whole, older = result(out), ["--resume_from_checkpoint", str(out / "checkpoint-2")]
    capsys.readouterr()
    assert run(*older, to=3) == 130
    assert synced == [out / "set-aside-1", out], "where they are is known before the log is cut, also to the disk"
    told = f"the run goes on from step 2: checkpoint-4, checkpoint-6 moved to {out / 'set-aside-1'}; remove that when"
    assert told in capsys.readouterr().out
    assert [path.name for path in out.glob("*checkpoint*")] == ["checkpoint-2"]
    assert run("--resume_from_checkpoint", "auto", to=5) == 130
    assert run("--resume_from_checkpoint", "auto") == 0
    assert_identical(result(out), whole)
    assert run(*older) == 0
    for number in (1, 2):
        aside = out / f"set-aside-{number}" / "checkpoint-4"
        other = ["--resume_from_checkpoint", str(aside), "--output_dir", str(tmp_path / f"other-{number}")]
        assert run(*other) == 0
        assert_identical(result(tmp_path / f"other-{number}"), whole)


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A disk of 28 MiB: a checkpoint of the bundled model has about 16."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=28m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk, and not in every container")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("fill", [0, 3])
def test_a_full_disk_is_one_line_and_older_checkpoints_resume(tmp_path, trained, facts, capsys, disk, fill) -> None:
    """Full within the optimizer's state, or already within the weights."""
    (disk / "filler").write_bytes(b"\0" * (fill * 2**20))
    out = disk / "run"
    error = fails(capsys, command(facts, out))
    assert f"{out / 'checkpoint-2'} cannot be written, with " in error
    assert "MiB free on its disk" in error
    assert "make room or give permission, and continue with --resume_from_checkpoint last" in error
    assert [path.name for path in out.glob("*checkpoint*")] == ["checkpoint-1"]
    check_checkpoint(out / "checkpoint-1")
    subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
    assert main(command(facts, out, "--resume_from_checkpoint", "last")) == 0
    assert_identical(*(load_file(run / "model.safetensors") for run in (out, trained("molf"))))
    assert (out / "routing.jsonl").read_text() == (trained("molf") / "routing.jsonl").read_text()


def test_a_disk_that_fills_at_the_end_is_one_line(facts, capsys, disk) -> None:
    subprocess.run(["mount", "-o", "remount,size=2m", str(disk)], check=True)
    assert "run cannot be written" in fails(capsys, command(facts, disk / "run", "--save_strategy", "no"))
    assert not (disk / "run" / "metrics.json").exists()


def test_code_of_a_model_runs_only_where_it_is_asked_for(tmp_path, facts, capsys, monkeypatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, trace = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(BUNDLED_MODEL, model)
    config = json.loads((model / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}, "model_type": "own"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text(
        f"open({str(trace)!r}, 'w').close()\nfrom transformers import Qwen2Config, Qwen2ForCausalLM\n"
        "class OwnConfig(Qwen2Config):\n    model_type = 'own'\n"
        "class Own(Qwen2ForCausalLM):\n    config_class = OwnConfig\n"
    )
    assert "trust_remote_code" in fails(capsys, command(facts, tmp_path / "run", model=model))
    evaluate = ["eval", "--model", str(model), "--task", "fact", "--dataset_path", str(facts), "--use_cpu"]
    assert "trust_remote_code" in fails(capsys, evaluate)
    assert not trace.exists()
    assert main(command(facts, tmp_path / "run", "--trust_remote_code", "true", model=model)) == 0
    assert trace.exists()


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_weights_in_a_pickle_are_refused_with_the_remedy(tmp_path, trained, facts, capsys, kind: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED_MODEL if kind == "model" else trained("lora"), folder)
    name = {"model": "model.safetensors", "adapter": "adapter_model.safetensors"}[kind]
    torch.save(load_file(folder / name), folder / ("pytorch_model.bin" if kind == "model" else "adapter_model.bin"))
    (folder / name).unlink()
    evaluate = ["eval", "--model", str(folder), "--task", "fact", "--dataset_path", str(facts), "--use_cpu"]
    for words in (command(facts, tmp_path / "run", model=folder), evaluate):
        assert "Weights are read from safetensors alone" in fails(capsys, words)


def test_no_memory_is_one_line(tmp_path, facts, capsys, monkeypatch) -> None:
    def failing(error: Exception | None) -> Callable[..., None]:
        def train(*arguments: Any) -> None:
            if error is not None:
                raise error
            torch.empty(2**55)

        return train

    for error in (None, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()):
        monkeypatch.setattr(molf.cli.train, "train", failing(error))
        line = fails(capsys, command(facts, tmp_path / "run"))
        assert "out of memory: " in line
        assert "smaller per_device_train_batch_size" in line
    monkeypatch.setattr(molf.cli.train, "train", failing(RuntimeError("a defect")))
    with pytest.raises(RuntimeError, match="a defect"):
        main(command(facts, tmp_path / "run"))


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (transformers.AutoModelForCausalLM, "from_pretrained"),
        (peft.AutoPeftModelForCausalLM, "from_pretrained"),
        (peft.PeftModel, "from_pretrained"),
        (molf.train.run, "_Trainer"),
        (molf.train.run._Trainer, "save_model"),
    ],
)
def test_no_memory_is_no_damaged_file_and_no_full_disk(
    tmp_path, trained, facts, capsys, monkeypatch, owner: Any, name: str
) -> None:
    words = command(facts, tmp_path / "run", "--save_strategy", "no")
    if owner is peft.AutoPeftModelForCausalLM:
        words = ["eval", "--model", str(trained("lora")), "--task", "fact", "--dataset_path", str(facts), "--use_cpu"]
    elif owner is peft.PeftModel:
        words = ["export", str(trained("lora")), "--to", "adapter", "--output_dir", str(tmp_path / "export")]
    monkeypatch.setattr(owner, name, lambda *_, **__: torch.empty(2**55))
    assert fails(capsys, words).startswith("molf: error: out of memory: ")


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path, capsys, facts) -> None:
    """It was "File exists", or "Not a directory", of no option."""
    (tmp_path / "taken").write_text("mine")
    for out in (tmp_path / "taken", tmp_path / "taken" / "run"):
        assert fails(capsys, command(facts, out)).endswith(
            f"output_dir={out}: {tmp_path / 'taken'} is a file; choose another folder"
        )
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, capsys, facts, monkeypatch) -> None:
    """--push_to_hub asks it when the trainer is made; that was a traceback."""

    def unreachable(self: Any, *_: Any, **__: Any) -> None:
        raise HTTPError("[Errno -2] Name or service not known")

    monkeypatch.setattr(transformers.Trainer, "init_hf_repo", unreachable)
    error = fails(capsys, command(facts, tmp_path / "run", "--push_to_hub", "true"))
    assert "the trainer cannot be made: [Errno -2] Name or service not known" in error
