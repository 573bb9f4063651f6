"""MoLF-Efficient over a quantised base: it trains, the base keeps its bytes, the adapter loads again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import molf.train.quantize
from molf import MoLFConfig, create_molf_optimizer, molf_lora_config
from molf.assets import BUNDLED_MODEL
from molf.cli import main
from molf.plan.memory import Workload, plan_method
from molf.train.callbacks import describe
from molf.train.load import load_model
from molf.train.methods import METHODS
from molf.train.quantize import PACKAGES, quantized

KINDS = [name for name in PACKAGES if name != "none"]
EFFICIENT = MoLFConfig(expert_ranks=(2, 4), train_base=False, lora_lr=3e-3)
IDS = torch.arange(10, 42).view(2, 16)


def load(kind: str) -> Any:
    return load_model(str(BUNDLED_MODEL), "float32", **quantized(kind, torch.device("cpu"), torch.float32))


def base_bytes(model: nn.Module) -> dict[str, bytes]:
    """Of everything but the adapter: weights, scales and what else a quantised layer saves."""
    flat = {}
    for name, value in model.state_dict().items():
        if "lora_" not in name:
            parts = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else [None]
            for part in parts:
                tensor = value if part is None else getattr(value, part)
                flat[f"{name}.{part}"] = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return flat


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_over_a_base_that_keeps_its_bytes(tmp_path: Path, kind: str) -> None:
    model = get_peft_model(load(kind), molf_lora_config(EFFICIENT, task_type="CAUSAL_LM"))
    optimizer = create_molf_optimizer(model, EFFICIENT)
    assert len(optimizer.routed_modules) == 28
    before, losses = base_bytes(model), []
    for step in range(12):
        if step == 6:
            logits(model)  # an evaluation in between does no harm
        model.train()
        losses.append(model(input_ids=IDS, labels=IDS).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]
    assert {winner for routing in optimizer.routing.values() for winner in routing.winners} <= set(optimizer.experts)
    assert base_bytes(model) == before
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == {
        name.replace(".default", "") for name in model.state_dict() if "lora_" in name
    }
    assert torch.equal(logits(PeftModel.from_pretrained(load(kind), tmp_path)), logits(model))


@pytest.mark.parametrize("kind", KINDS)
def test_molf_plan_counts_the_quantised_base(kind: str) -> None:
    """All but a 4-bit layer's code table and its description, which are below 256 bytes."""
    held = {name: value for name, value in base_bytes(load(kind)).items() if not name.startswith("lm_head")}  # tied
    work = Workload(AutoConfig.from_pretrained(BUNDLED_MODEL), torch.float32, 2, 8, quantization=kind)
    planned = plan_method("molf-e", EFFICIENT, work).memory()["weights"]
    assert planned <= sum(map(len, held.values())) < planned + 256 * 28
    whole = plan_method("molf", MoLFConfig(expert_ranks=(2,)), work).memory()["weights"]
    assert whole == 4 * load_model(str(BUNDLED_MODEL), "float32").num_parameters(), "molf's base is not quantised"


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_dense_expert_is_refused(kind: str) -> None:
    dense, message = MoLFConfig(expert_ranks=(2, 4)), r"q_proj\.weight is quantised .* use train_base=False with a PEFT"
    model = load(kind)
    with pytest.raises(ValueError, match=message):
        create_molf_optimizer(model, dense)
    with pytest.raises(ValueError, match=message):
        create_molf_optimizer(get_peft_model(model, molf_lora_config(dense)), dense)


def gradients(model: nn.Module) -> torch.Tensor:
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


def test_4bit_gradients_survive_an_evaluation() -> None:
    """bitsandbytes packs 4-bit weights on some CPUs in eval mode, and has no backward pass for packed ones."""
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("bitsandbytes packs weights only on CPUs with AVX512-BF16")
    options = quantized("bnb-4bit", torch.device("cpu"), torch.float32)
    model, packed = (
        get_peft_model(AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, **options), molf_lora_config(EFFICIENT))
        for _ in range(2)
    )
    create_molf_optimizer(model, EFFICIENT)
    with torch.no_grad():  # A gets a gradient where B is not zero
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    before = gradients(model)
    logits(model)
    assert torch.equal(gradients(model), before)
    logits(packed)
    with pytest.raises(ValueError, match="was packed for inference by a forward pass in eval mode"):
        create_molf_optimizer(packed, EFFICIENT)


def command(kind: str, facts: Path, out: Path, method: str = "molf-e", *more: str) -> list[str]:
    options = {
        "model_name_or_path": BUNDLED_MODEL, "task": "fact", "dataset_path": facts, "method": method,
        "quantization": kind, "max_examples": 16, "max_steps": 2, "learning_rate": 1e-3, "warmup_steps": 0,
        "per_device_train_batch_size": 8, "gradient_checkpointing": "false", "save_strategy": "no", "use_cpu": "true",
        "disable_tqdm": "true", "output_dir": out,
    }  # fmt: skip
    return ["train", *(f"--{key}={value}" for key, value in options.items()), *more]


@pytest.mark.parametrize("kind", KINDS)
def test_molf_train_over_a_quantised_base(tmp_path: Path, facts: Path, kind: str) -> None:
    """The adapter is kept in fp32, which TRL rounds to bf16 over bitsandbytes; it resumes bit for bit."""
    out = tmp_path / "run"
    more = ["--expert_ranks", "2", "4", "--save_strategy", "steps", "--save_steps", "1"]
    assert main(command(kind, facts, out, "molf-e", *more)) == 0
    resolved = json.loads((out / "run.json").read_text())
    assert resolved["method"]["quantization"] == kind
    assert PACKAGES[kind][0] in resolved["versions"]
    adapter = load_file(out / "adapter_model.safetensors")
    assert {value.dtype for value in adapter.values()} == {torch.float32}
    assert any(not torch.equal(value, value.bfloat16().float()) for key, value in adapter.items() if "lora_B" in key)
    assert all(value.any() for key, value in adapter.items() if "lora_B" in key)
    resume = ["--resume_from_checkpoint", str(out / "checkpoint-1")]
    assert main(command(kind, facts, out, "molf-e", *more, *resume)) == 0
    again = load_file(out / "adapter_model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in adapter.items())
    original = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL)
    assert logits(PeftModel.from_pretrained(original, out)).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_molf_eval_of_a_quantised_run_gives_its_metrics(tmp_path: Path, facts: Path, kind: str, capsys) -> None:
    """Exactly, because the base is quantised as in training; on the original one they are others."""
    run, bare = tmp_path / "run", tmp_path / "bare"
    assert main(command(kind, facts, run, "lora", "--save_strategy", "steps", "--save_steps", "2")) == 0
    shutil.copytree(run, bare, ignore=shutil.ignore_patterns("run.json"))
    trained, found = json.loads((run / "metrics.json").read_text()), {}
    for folder in (run, run / "checkpoint-2", bare):
        out = tmp_path / "eval.json"
        words = ["--model", folder, "--task", "fact", "--dataset_path", facts, "--max_examples", "16", "--output", out]
        capsys.readouterr()
        assert main(["eval", "--use_cpu", *map(str, words)]) == 0
        assert (f"on a base quantised to {kind}, as in training" in capsys.readouterr().out) is (folder != bare)
        found[folder] = json.loads(out.read_text())
        assert found[folder]["quantization"] == ("none" if folder == bare else kind)
    expected = {name: trained[name] for name in found[run]["metrics"]}
    assert found[run]["metrics"] == found[run / "checkpoint-2"]["metrics"] == expected
    assert found[bare]["metrics"] != expected


def test_molf_eval_of_a_run_with_an_unknown_quantisation_is_refused(tmp_path: Path, capsys) -> None:
    shutil.copytree(BUNDLED_MODEL, tmp_path / "run")
    record = {"method": {"quantization": "int3"}, "training": {}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    assert main(["eval", "--use_cpu", "--model", str(tmp_path / "run"), "--task", "world-mcq"]) == 2
    assert "run.json is damaged or of another version of molf: quantization='int3'" in capsys.readouterr().err


def test_packed_weights_are_counted_as_what_they_stand_for() -> None:
    """As molf plan counts them, and as the model has them that is not quantised."""
    original = load_model(str(BUNDLED_MODEL), "float32").num_parameters()
    for kind in KINDS:
        line = describe(load(kind).requires_grad_(False), None, 1e-3)
        assert line.startswith(f"trainable parameters: 0 of {original:,} in the model"), kind


def test_what_molf_train_refuses(tmp_path: Path, facts: Path, capsys, monkeypatch) -> None:
    def fails(*arguments: str) -> str:
        capsys.readouterr()
        assert main(command(arguments[0], facts, tmp_path / "run", *arguments[1:])) == 2
        return capsys.readouterr().err

    assert "quantization='int3': choose one of none, bnb-4bit, bnb-8bit, torchao-int8" in fails("int3")
    for method in METHODS.keys() - {"lora", "rslora", "molf-e", "lora-sum"}:
        assert f"quantization=bnb-8bit: {method} needs the base's weights in full precision; leave it out or" in fails(
            "bnb-8bit", method
        )
    assert "molf-e with train_other needs" in fails("bnb-8bit", "molf-e", "--train_other", "true")
    monkeypatch.setattr(molf.train.quantize, "find_spec", lambda name: None)
    for kind in KINDS:
        assert f"{PACKAGES[kind][0]} is not installed; pip install 'molf[quantized]'" in fails(kind)
    monkeypatch.undo()
    folder = tmp_path / "model"  # one that is stored in a format whose package is not there
    shutil.copytree(BUNDLED_MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    stored = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
    message = fails("none", "molf-e", "--model_name_or_path", str(folder))
    assert message.startswith(f"molf: error: model {folder} cannot be read: ")
    assert "GPTQ" in message
    assert not (tmp_path / "run").exists()
