"""``molf eval`` in process: a model's metrics, an adapter's, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from molf.assets import BUNDLED_MODEL
from molf.cli import main
from molf.tasks import get_task

MCQ = ["--task", "world-mcq", "--max_examples", "4"]
TRAIN = [
    "train", "--model_name_or_path", str(BUNDLED_MODEL), "--method", "lora", "--expert_ranks", "4", "--task",
    "world-fact", "--max_examples", "24", "--num_train_epochs", "10", "--learning_rate", "3e-3",
    "--per_device_train_batch_size", "8", "--gradient_checkpointing", "false", "--save_strategy", "no",
    "--use_cpu", "true", "--disable_tqdm", "true",
]  # fmt: skip


def evaluated(out: Path, *arguments: object) -> dict[str, Any]:
    """The report that the command writes."""
    assert main(["eval", "--use_cpu", "--output", str(out), *map(str, arguments)]) == 0
    return json.loads(out.read_text())


def refused(capsys, *arguments: object) -> str:
    """Exit status 2 and one line on stderr; returns it."""
    capsys.readouterr()
    assert main(["eval", "--use_cpu", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("molf: error:")]
    assert len(lines) == 1
    assert captured.out == ""
    return lines[0]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """The run of ``molf train --method lora`` on 24 edits."""
    out = tmp_path_factory.mktemp("eval") / "lora"
    torch.set_num_threads(1)
    assert main([*TRAIN, "--output_dir", str(out)]) == 0
    return out


@pytest.mark.parametrize(("name", "primary"), [("world-fact", "score"), ("world-mcq", "accuracy")])
def test_the_bundled_model(tmp_path, capsys, name: str, primary: str) -> None:
    """Table and file have the metrics that the task's evaluator gives, the primary one first."""
    task = get_task(name)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL), AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    expected = task.evaluate(model, tokenizer, task.load(None, 12), batch_size=8)
    capsys.readouterr()
    out = tmp_path / "new" / "metrics.json"
    report = evaluated(out, "--model", BUNDLED_MODEL, "--task", name, "--max_examples", 12, "--batch_size", 8)
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert report["metrics"] == expected
    assert (report["model"], report["task"], report["records"]) == (str(BUNDLED_MODEL), name, 12)
    assert (report["primary"], report["versions"]["torch"]) == (primary, torch.__version__)
    assert first == f"{BUNDLED_MODEL}: 12 records of {name}"
    assert last == f"written to {out}"
    assert {line.split()[0]: float(line.split()[1]) for line in lines} == pytest.approx(expected, abs=5e-4)
    assert lines[0].split()[0] == primary
    assert len({len(line) for line in lines}) == 1
    assert [path.name for path in out.parent.iterdir()] == ["metrics.json"]


def test_an_adapter_scores_what_its_training_scored(tmp_path, adapter: Path) -> None:
    """Exactly, because it is the same computation; and the adapter is there, for its base scores otherwise."""
    facts = ["--task", "world-fact", "--max_examples", 24]
    trained = json.loads((adapter / "metrics.json").read_text())
    metrics = evaluated(tmp_path / "lora.json", "--model", adapter, *facts)["metrics"]
    assert metrics == {name: trained[name] for name in metrics}
    assert {"score", "efficacy", "efficacy_magnitude"} <= metrics.keys()
    base = evaluated(tmp_path / "base.json", "--model", BUNDLED_MODEL, *facts)["metrics"]
    assert metrics["efficacy_magnitude"] > base["efficacy_magnitude"] + 0.1


def test_an_adapter_without_tokenizer_takes_its_bases(tmp_path, adapter: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(adapter, bare, ignore=shutil.ignore_patterns("tokenizer*", "chat_template*"))
    facts = ["--task", "world-fact", "--max_examples", 24]
    reports = [evaluated(tmp_path / "m.json", "--model", folder, *facts)["metrics"] for folder in (adapter, bare)]
    assert reports[0] == reports[1]


def test_precision(tmp_path) -> None:
    """bfloat16 has 8 bits of mantissa, so the probabilities differ, but not by much."""
    facts = ["--model", BUNDLED_MODEL, "--task", "world-fact", "--max_examples", 8]
    full, half = (
        evaluated(tmp_path / "m.json", *facts, "--dtype", dtype)["metrics"]["efficacy_magnitude"]
        for dtype in ("float32", "bfloat16")
    )
    assert full != half
    assert full == pytest.approx(half, abs=0.1)


def test_bad_options_and_data(tmp_path, capsys) -> None:
    model = ["--model", BUNDLED_MODEL]
    assert "required: --model, --task" in refused(capsys)
    assert "unrecognized arguments: --no_such_option 3" in refused(capsys, *model, *MCQ, "--no_such_option", "3")
    assert "task='facts': choose one of completion, fact, med, sql" in refused(capsys, *model, "--task", "facts")
    assert "dataset_path is not given" in refused(capsys, *model, "--task", "fact")
    missing = tmp_path / "missing.json"
    assert "missing.json" in refused(capsys, *model, "--task", "fact", "--dataset_path", missing)
    assert "world-mcq has its own records" in refused(capsys, *model, *MCQ, "--dataset_path", missing)
    assert "max_examples=0" in refused(capsys, *model, "--task", "world-mcq", "--max_examples", "0")
    assert "batch_size=-1" in refused(capsys, *model, *MCQ, "--batch_size", "-1")
    assert "invalid choice: 'int3'" in refused(capsys, *model, *MCQ, "--dtype", "int3")
    assert "is a folder: name a file" in refused(capsys, *model, *MCQ, "--output", tmp_path)
    (tmp_path / "file").touch()
    inside = tmp_path / "file" / "metrics.json"
    assert f"{tmp_path / 'file'} is no folder to write to" in refused(capsys, *model, *MCQ, "--output", inside)
    (tmp_path / "file").unlink()
    assert "eos_token='<none>'" in refused(capsys, *model, *MCQ, "--eos_token", "<none>")
    assert list(tmp_path.iterdir()) == []


def test_bad_models(tmp_path, capsys) -> None:
    assert f"model {tmp_path / 'none'} cannot be read" in refused(capsys, "--model", tmp_path / "none", *MCQ)
    assert "model owner/none cannot be read" in refused(capsys, "--model", "owner/none", *MCQ)  # offline
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED_MODEL, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "are damaged" in refused(capsys, "--model", folder, *MCQ)
    tensors = load_file(BUNDLED_MODEL / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, weights, {"format": "pt"})
    assert f"lack 1 of the model's tensors, such as {name}" in refused(capsys, "--model", folder, *MCQ)
    save_file({**tensors, name: torch.zeros(3, 3)}, weights, {"format": "pt"})
    assert "of another shape" in refused(capsys, "--model", folder, *MCQ)
    weights.unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert "model.safetensors" in refused(capsys, "--model", folder, *MCQ)


def test_bad_adapters(tmp_path, capsys, adapter: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(adapter / weights.name)  # not the copy, which is mapped into memory and cut below
    weights.write_bytes(b"x" * 100)
    assert "are damaged" in refused(capsys, "--model", folder, *MCQ)
    save_file(dict(sorted(tensors.items())[1:]), weights)
    assert "Found missing adapter keys" in refused(capsys, "--model", folder, *MCQ)
    weights.unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    assert "adapter_model.safetensors" in refused(capsys, "--model", folder, *MCQ)
    save_file(tensors, weights)
    config = json.loads((folder / "adapter_config.json").read_text())
    for changes, message in (
        ({"base_model_name_or_path": str(tmp_path / "none")}, "/none"),
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"peft_type": "NONE"}, "is not PEFT's: 'NONE'"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))
        assert message in refused(capsys, "--model", folder, *MCQ)


def test_a_tokenizer_without_end(tmp_path, model_without_eos, capsys) -> None:
    """A task that generates refuses it or is told one; a task that only scores needs none."""
    folder = model_without_eos
    assert "no EOS token" in refused(capsys, "--model", folder, *MCQ)
    report = evaluated(tmp_path / "m.json", "--model", folder, *MCQ, "--eos_token", "<|endoftext|>")
    assert report["metrics"]["invalid_answers"] == 0
    assert "score" in evaluated(tmp_path / "m.json", "--model", folder, "--task", "world-fact")["metrics"]
