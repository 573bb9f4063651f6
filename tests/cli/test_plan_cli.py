"""molf plan and molf train --dry_run from the command line."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from models import causal_lm
from molf import MoLFConfig, create_molf_optimizer
from molf.assets import BUNDLED_MODEL
from molf.cli import main
from molf.plan.memory import Workload, plan_method
from molf.train.dry_run import DryRun, _Watch, compared

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories3M"
PLAN = ["plan", "--model_name_or_path", str(BUNDLED_MODEL)]


def test_a_plan_needs_no_data_and_no_weights(tmp_path, capsys) -> None:
    folder = tmp_path / "config-alone"
    folder.mkdir()
    (folder / "config.json").write_text((BUNDLED_MODEL / "config.json").read_text())
    options = ["--expert_ranks", "16", "--max_length", "32", "--gpus", "6"]
    assert main(["plan", "--model_name_or_path", str(folder), *options]) == 0
    printed = capsys.readouterr().out
    assert "molf: 946,176 of 946,176 parameters trained, and 155,648 in virtual experts" in printed
    assert re.search(r"model\.layers\.\*\.mlp\.up_proj\.lora_A +4 +16 x 128 +lora_r16", printed)
    assert [line.split()[0] for line in printed.split("GiB on one device, 8 x 32")[1].splitlines()[4:8]] == [
        "fft", "lora", "molf", "molf-e",
    ]  # fmt: skip
    assert [line.split()[0] for line in printed.split("Peak GiB per GPU:")[1].splitlines()[4:8]] == ["1", "2", "4", "6"]
    assert "warning: the output head is tied" in printed
    assert main(["plan", "--model_name_or_path", str(folder), *options, "--all", "true", "--method", "molf-e"]) == 0
    printed = capsys.readouterr().out
    assert "model.layers.3.mlp.up_proj.lora_B" in printed
    assert "warning" not in printed


def test_what_is_refused(capsys) -> None:
    def fails(*arguments: str) -> str:
        capsys.readouterr()
        assert main(list(arguments)) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("molf: error:")]
        return line

    assert "gpus=0: must be at least 1" in fails(*PLAN, "--gpus", "0")
    for command in (["plan"], ["train", "--task", "world-fact"]):
        for name in ("/nowhere", "./no/where", "no where"):
            reason = "there is no such folder, and no model of the hub has such a name"
            assert (
                fails(*command, "--model_name_or_path", name) == f"molf: error: model {name} cannot be read: {reason}"
            )
        assert fails(*command, "--model_name_or_path", "no/where") == (
            "molf: error: model no/where cannot be read: there is no such folder, the hub cannot be reached "
            "(HF_HUB_OFFLINE is set), and its cache does not have the model"
        )
    assert "unknown option: --all_of_it" in fails(*PLAN, "--all_of_it", "1")
    assert "nothing" in fails(*PLAN, "--target_modules", "nothing", "--expert_ranks", "2")
    assert "dataset_path is not given" in fails("train", *PLAN[1:])


def test_a_dry_run_counts_no_copy_of_w_that_is_not_there() -> None:
    watch = _Watch()
    for policy, share in (("fixed-dense", 1.0), ("fixed-lora", 0.0)):
        model = causal_lm("llama")
        optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=(4,), policy=policy))
        model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
        optimizer.step()
        watch.on_step_end(None, None, None, optimizer=SimpleNamespace(optimizer=optimizer))
        weights = [model.get_submodule(name).weight for name in optimizer.routed_modules]
        assert watch.shared == share * sum(4 * weight.numel() for weight in weights)
    plan = plan_method("molf", MoLFConfig(expert_ranks=(4,)), Workload(model.config, torch.float32, 1, 4))
    whole, shared = (DryRun(2**20, plan, 1, 4, size) for size in (0, plan.memory()["masters"]))
    assert whole.estimated - shared.estimated == plan.memory()["masters"]
    assert "for W, from each layer's first win" in compared(shared)
    assert "for W" not in compared(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "method"),
    [
        ("16", ["fft"]),
        ("16", ["molf"]),
        ("16", ["molf-e"]),
        ("2", ["molf", "--lora_lr", "1e-7"]),  # dense wins everywhere
        ("2", ["molf", "--lora_lr", "1e-2"]),  # LoRA wins everywhere
    ],
)
@pytest.mark.parametrize("model", ["bundled", "stories3M"])
def test_a_dry_run_is_within_ten_percent_of_the_plan(tmp_path, model: str, batch: str, method: list[str]) -> None:
    """In a process of its own, whose growth is measured; a small batch leaves the masters much of it."""
    if model == "stories3M" and not STORIES.exists():
        pytest.skip(f"{STORIES} is missing")
    name, eos = (str(STORIES), ["--eos_token", "</s>"]) if model == "stories3M" else (str(BUNDLED_MODEL), [])
    options = [
        "--task",
        "world-fact",
        "--max_examples",
        "64",
        "--use_cpu",
        "true",
    ]
    command = [sys.executable, "-m", "molf", "train", "--model_name_or_path", name, *eos, *options, "--method", *method]
    command += ["--per_device_train_batch_size", batch, "--dry_run", "true"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(r"took ([\d.]+) MiB at its peak; the estimate is ([\d.]+) MiB", done.stdout)
    assert found is not None
    measured, estimated = map(float, found.groups())
    assert estimated == pytest.approx(measured, rel=0.1)
    assert not list(tmp_path.iterdir()), "nothing is saved"
