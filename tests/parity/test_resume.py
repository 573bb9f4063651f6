"""Invariant 6: save, load in a fresh process, continue: weights, moments, RNG and routing log are bit-identical."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from resume_run import END, FORMS, HALF, build, continue_to
from safetensors.torch import load_file

from models import causal_lm, lm_step
from molf import MoLFConfig, ResumeError, create_molf_optimizer
from molf.cli import main
from molf.optim.quantized import is_quantized
from molf.train.sampling import _Drawn

DTYPES = ("float32", "bfloat16")
HERE = Path(__file__).parent


def assert_identical(a: Any, b: Any, where: str = "") -> None:
    assert type(a) is type(b), where
    if is_quantized(a):
        assert torch.equal(a.codes, b.codes), where
        assert torch.equal(a.scale, b.scale), where
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_identical(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_identical(*pair, f"{where}/{index}")
    else:
        assert a == b, where


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> Path:
    """Every form and dtype: an uninterrupted run here, its second half again in one fresh process."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("resume")
    for form in FORMS:
        for dtype in DTYPES:
            case = folder / f"{form}-{dtype}"
            case.mkdir()
            run = build(form, dtype)
            torch.save(copy.deepcopy(continue_to(HALF, 0, run, case / "routing.jsonl")), case / "half.pt")
            shutil.copy(case / "routing.jsonl", case / "half.jsonl")
            torch.save(continue_to(END, HALF, run, case / "routing.jsonl"), case / "full.pt")
            shutil.move(case / "routing.jsonl", case / "full.jsonl")
            shutil.move(case / "half.jsonl", case / "routing.jsonl")
    command = [sys.executable, str(HERE / "resume_run.py"), ",".join(FORMS), ",".join(DTYPES), str(folder)]
    path = os.pathsep.join([str(HERE.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path}, timeout=300)
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_resume_in_a_fresh_process_is_bit_identical(resumed: Path, form: str, dtype: str) -> None:
    case = resumed / f"{form}-{dtype}"
    full, again = (torch.load(case / name, weights_only=True) for name in ("full.pt", "resumed.pt"))
    assert_identical(full, again)
    half = torch.load(case / "half.pt", weights_only=True)
    assert not torch.equal(*(s["optimizer"]["state"][0]["exp_avg_sq" if form != "fused-frozen-base" else
                             "lora_B_exp_avg_sq"] for s in (half, full)))  # fmt: skip
    assert (case / "routing.jsonl").read_text() == (case / "full.jsonl").read_text()
    assert len((case / "full.jsonl").read_text().splitlines()) == END + 1


ARGUMENTS = [
    "--learning_rate", "1e-3", "--num_train_epochs", "2", "--per_device_train_batch_size", "4",
    "--max_grad_norm", "1.0", "--gradient_accumulation_steps", "2", "--gradient_checkpointing", "false",
    "--save_steps", "3", "--logging_steps", "1", "--disable_tqdm", "true", "--use_cpu", "true", "--max_examples", "24",
]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "extra"),
    [
        ("molf", ["--expert_ranks", "4", "--lora_lr", "2e-3"]),
        ("molf", ["--expert_ranks", "4", "8", "--dtype", "bfloat16"]),
        ("molf-e", ["--expert_ranks", "2", "4", "--lora_dropout", "0.1"]),
    ],
)
def test_resume_through_the_trainer_is_bit_identical(tmp_path: Path, method: str, extra: list[str], facts) -> None:
    """``molf train`` to the end, and from its checkpoint in a fresh process: same weights, state, RNG and log."""
    from molf.assets import BUNDLED_MODEL

    model = [
        "--model_name_or_path",
        str(BUNDLED_MODEL),
        "--method",
        method,
        "--task",
        "fact",
        "--dataset_path",
        str(facts),
    ]
    command = ["train", *model, *ARGUMENTS, *extra]
    assert main([*command, "--output_dir", str(tmp_path / "full")]) == 0
    (tmp_path / "again").mkdir()
    shutil.copytree(tmp_path / "full" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    shutil.copy(tmp_path / "full" / "routing.jsonl", tmp_path / "again")
    again = [*command, "--output_dir", str(tmp_path / "again"), "--resume_from_checkpoint", "last"]
    subprocess.run([sys.executable, "-m", "molf", *again], check=True, capture_output=True, timeout=300)
    weights = "adapter_model.safetensors" if method == "molf-e" else "model.safetensors"
    full, resumed = tmp_path / "full", tmp_path / "again"
    assert_identical(load_file(full / weights), load_file(resumed / weights))
    start = BUNDLED_MODEL / "model.safetensors" if method != "molf-e" else full / "checkpoint-3" / weights
    assert any(not torch.equal(v.float(), load_file(start)[k].float()) for k, v in load_file(full / weights).items())
    last = "checkpoint-6"
    for name in ("optimizer.pt", "scheduler.pt"):
        assert_identical(*(torch.load(run / last / name, weights_only=True) for run in (full, resumed)))
    assert (full / "routing.jsonl").read_text() == (resumed / "routing.jsonl").read_text()


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_samples_by_length_are_drawn_from_seed_and_epoch(tmp_path: Path, strategy: str, facts) -> None:
    """Resumed inside the second epoch, bit for bit; fft without dropout draws nothing else from the seed."""
    from molf.assets import BUNDLED_MODEL

    def train(out: Path, *more: str) -> dict[str, torch.Tensor]:
        data = ["--model_name_or_path", str(BUNDLED_MODEL), "--task", "fact", "--dataset_path", str(facts)]
        data += ["--method", "fft", "--eval_at_end", "false", "--train_sampling_strategy", strategy]
        assert main(["train", *data, *ARGUMENTS, *more, "--save_steps", "4", "--output_dir", str(out)]) == 0
        return load_file(out / "model.safetensors")

    whole = train(tmp_path / "full")
    (tmp_path / "again").mkdir()
    shutil.copytree(tmp_path / "full" / "checkpoint-4", tmp_path / "again" / "checkpoint-4")
    assert_identical(train(tmp_path / "again", "--resume_from_checkpoint", "last"), whole)
    for name in ("seed", "data_seed"):
        other = train(tmp_path / name, f"--{name}", "7")
        assert any(not torch.equal(other[key], weight) for key, weight in whole.items())


def test_epochs_of_samples_by_length_differ() -> None:
    sampler = SimpleNamespace(generator=None)
    args = SimpleNamespace(train_sampling_strategy="group_by_length", seed=3, data_seed=None)
    orders = []
    for epoch in (0.0, 1.0, 1.0):
        _Drawn(sampler).on_epoch_begin(args, SimpleNamespace(epoch=epoch), None)
        orders.append(torch.randperm(20, generator=sampler.generator).tolist())
    assert orders[0] != orders[1] == orders[2]


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torchao
@pytest.mark.parametrize(
    ("method", "extra"),
    [
        ("random", ["--random_shares", "0.8", "0.2"]),
        ("molf", ["--dtype", "bfloat16", "--keep_base", "false"]),
        ("molf", ["--moments_8bit", "true", "--step_in_backward", "true", "--gradient_accumulation_steps", "1",
                  "--max_grad_norm", "0", "--max_steps", "6"]),
    ],
)  # fmt: skip
def test_resume_with_less_state_is_bit_identical(tmp_path: Path, method: str, extra: list[str], facts) -> None:
    """W that some layers still share with their weight, or that is computed; 8-bit moments, steps in the backward."""
    from molf.assets import BUNDLED_MODEL

    data = ["--model_name_or_path", str(BUNDLED_MODEL), "--task", "fact", "--dataset_path", str(facts)]
    command = ["train", *data, *ARGUMENTS, "--method", method, "--expert_ranks", "4", *extra, "--eval_at_end", "false"]
    full, again = tmp_path / "full", tmp_path / "again"
    assert main([*command, "--output_dir", str(full)]) == 0
    for name in ("checkpoint-3", "routing.jsonl"):
        again.mkdir(exist_ok=True)
        (shutil.copytree if name == "checkpoint-3" else shutil.copy)(full / name, again / name)
    assert main([*command, "--output_dir", str(again), "--resume_from_checkpoint", "last"]) == 0
    assert_identical(*(load_file(run / "model.safetensors") for run in (full, again)))
    half, end, resumed = (
        torch.load(run / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)["state"]
        for run, step in ((full, 3), (full, 6), (again, 6))
    )
    assert_identical(end, resumed)
    assert (full / "routing.jsonl").read_text() == (again / "routing.jsonl").read_text()
    moved = [sum(bool(state["lora_B"].any()) for state in each.values() if "lora_B" in state) for each in (half, end)]
    if method == "random":  # the first LoRA win of some layers is before the checkpoint, of others behind it
        assert 0 < moved[0] < moved[1]
    assert ("--moments_8bit" in extra) == any(is_quantized(state.get("exp_avg")) for state in end.values())
    assert ("--keep_base" in extra) == ("base" not in end[0])
    bytes_of_tensors = sum(t.nbytes for state in end.values() for t in state.values() if not is_quantized(t))
    if "--moments_8bit" not in extra:  # what shares storage, with a weight or among itself, is written once
        assert (full / "checkpoint-6" / "optimizer.pt").stat().st_size < 1.2 * bytes_of_tensors


def test_a_module_that_lost_its_gradient_after_a_resume_is_an_error() -> None:
    """The published implementation's resume trains detached copies; here that is noticed at the first step."""
    config = MoLFConfig(expert_ranks=(2,))
    model = causal_lm("llama")
    optimizer = create_molf_optimizer(model, config)
    lm_step(model, optimizer, 0)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    stale = causal_lm("llama")
    other = create_molf_optimizer(stale, config)
    other.load_state_dict(optimizer.state_dict())
    layer = stale.model.layers[1].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
    with pytest.raises(ResumeError, match=r"after the resume no gradient reaches model\.layers\.1\.mlp\.up_proj"):
        lm_step(stale, other, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert_ranks": (2, 4)}, "has the groups"),
        ({"score_fn": "pfn"}, "score_fn='epd', this optimizer has 'pfn'"),
        ({"lora_alpha": 3.0}, "scales="),
        ({"top_k": 2}, "top_k=1, this optimizer has 2"),
        ({"exclude_modules": ["up_proj"]}, "param_names="),
        ({"train_base": False}, "has the groups"),
    ],
)
def test_a_state_of_another_configuration_is_refused_and_changes_nothing(change, message: str) -> None:
    model = causal_lm("llama")
    saver = create_molf_optimizer(model, MoLFConfig(expert_ranks=(4,)))
    lm_step(model, saver, 0)
    optimizer = create_molf_optimizer(causal_lm("llama"), MoLFConfig(**{"expert_ranks": (4,), **change}))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saver.state_dict())
    assert_identical(before, optimizer.state_dict())


def test_a_state_of_another_model_or_none_is_refused() -> None:
    optimizer = create_molf_optimizer(causal_lm("llama"), MoLFConfig(expert_ranks=(4,)))
    with pytest.raises(ValueError, match="has the groups"):
        optimizer.load_state_dict(create_molf_optimizer(causal_lm("phi"), MoLFConfig(expert_ranks=(4,))).state_dict())
    broken = copy.deepcopy(optimizer.state_dict())
    broken["state"][3]["lora_A"] = broken["state"][3]["lora_A"][:, :-1]
    with pytest.raises(ValueError, match=r"lora_A of model\.layers\.0\.self_attn\.o_proj\.weight has shape \(4, 31\)"):
        optimizer.load_state_dict(broken)
    with pytest.raises(ValueError, match="not saved by state_dict"):
        optimizer.load_state_dict({"model": 1})
