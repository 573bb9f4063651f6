"""What an export holds, tensor by tensor, on tiny models of several architectures."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import molf.export.make
from export_runs import TEMPLATE, make_base, make_run
from molf import MoLFConfig
from molf.export.make import ExportOptions, export
from molf.export.verify import difference, rounding_tolerance
from molf.train.quantize import quantized

EXPERTS = MoLFConfig(expert_ranks=(2, 4), train_base=False)
MOLF = MoLFConfig(expert_ranks=(4,))


def made(run: Path, out: Path, to: str, **options: Any) -> dict[str, Any]:
    return export(run, out, ExportOptions(to=to, **options))


def tensors(folder: Path, pattern: str = "*.safetensors") -> dict[str, torch.Tensor]:
    return {key: value for path in sorted(folder.glob(pattern)) for key, value in load_file(path).items()}


def change(adapter: dict[str, torch.Tensor], layer: str) -> torch.Tensor:
    """B̃ A of a layer, float64."""
    A, B = (adapter[f"base_model.model.{layer}.lora_{x}.weight"].double() for x in "AB")
    return B @ A


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("arch", "tied"), [("qwen2", True), ("gemma3", True), ("llama", False)])
def test_merged_is_rounded_once_and_keeps_what_belongs_to_it(tmp_path, arch: str, tied: bool, dtype: str) -> None:
    """From a base in that precision; every weight is the exact W + Σ s B A, rounded."""
    precision = getattr(torch, dtype)
    base = make_base(tmp_path / "base", arch, precision)
    run = make_run(tmp_path / "run", base, "molf-e", EXPERTS)
    out = tmp_path / "out"
    report = made(run, out, "merged", max_shard_size="60KB")
    assert report["dtype"] == dtype
    assert len(list(out.glob("model-*.safetensors"))) > 1
    start, adapter, merged = tensors(base), tensors(run), tensors(out)
    assert start.keys() == merged.keys()
    assert ("lm_head.weight" in merged) is not tied
    moved = 0
    for name, value in merged.items():
        assert value.dtype == precision
        layer = name.removesuffix(".weight")
        if f"base_model.model.{layer}.lora_A.weight" not in adapter:
            assert torch.equal(value, start[name]), name
            continue
        moved += 1
        exact = start[name].double() + change(adapter, layer)
        sums = 2.0**-20 * (start[name].double().abs() + change(adapter, layer).abs().max())  # float32, 7 terms
        assert ((value.double() - exact).abs() <= torch.finfo(precision).eps / 2 * exact.abs() + sums).all(), name
        if dtype == "bfloat16":  # float32's error crosses a rounding boundary once in 2^(24-8-4); two roundings, often
            assert (value != exact.bfloat16()).double().mean() < 4 * 2.0**-12, name
    assert moved == 14
    model = AutoModelForCausalLM.from_pretrained(out)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert model.dtype == precision
    assert GenerationConfig.from_pretrained(out).max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE


def test_a_merged_model_stops_where_it_was_taught_to(tmp_path) -> None:
    """The end token of training, not the base's, is in its configurations."""
    run = make_run(tmp_path / "run", make_base(tmp_path / "base", "qwen2"), "molf-e", EXPERTS)
    tokenizer = AutoTokenizer.from_pretrained(run)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(40)
    tokenizer.save_pretrained(run)
    made(run, tmp_path / "out", "merged")
    end = GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    assert 40 in (end if isinstance(end, list) else [end])
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == 40


@pytest.mark.parametrize("arch", ["qwen2", "llama"])
def test_a_whole_model_is_copied_and_converted(tmp_path, arch: str) -> None:
    base = make_base(tmp_path / "base", arch)
    run = make_run(tmp_path / "run", base, "molf", MOLF, other=True, shard="60KB")
    assert len(list(run.glob("model-*.safetensors"))) > 1
    report = made(run, tmp_path / "same", "merged")
    assert report["difference"]["max_abs"] == report["difference"]["kl"] == 0
    source, same = tensors(run), tensors(tmp_path / "same")
    assert source.keys() == same.keys()
    assert all(torch.equal(value, same[key]) for key, value in source.items())
    made(run, tmp_path / "half", "merged", dtype="bfloat16")
    half = tensors(tmp_path / "half")
    assert all(torch.equal(value.bfloat16(), half[key]) for key, value in source.items())


@pytest.mark.parametrize(
    ("ranks", "alpha", "names"),
    [((2, 4), None, ["lora_r2", "lora_r4"]), ((2, 3, 2), (32.0, 5.0, 7.0), ["lora_r2_0", "lora_r3", "lora_r2_1"])],
)
def test_the_experts_sum_to_the_adapter(tmp_path, ranks, alpha, names) -> None:
    """Stacked, they are the adapter: A bit for bit, s_i B_i too where s_i is a power of two, else within a rounding."""
    config = MoLFConfig(expert_ranks=ranks, lora_alpha=alpha, train_base=False)
    run = make_run(tmp_path / "run", make_base(tmp_path / "base", "llama"), "molf-e", config)
    out = tmp_path / "out"
    assert made(run, out, "experts")["folders"] == names
    whole = tensors(run)
    parts = [tensors(out / name) for name in names]
    settings = [json.loads((out / name / "adapter_config.json").read_text()) for name in names]
    assert [one["r"] for one in settings] == list(ranks)
    scales = [one["lora_alpha"] / one["r"] for one in settings]
    assert scales == pytest.approx(config.scales, rel=1e-15)
    assert not any(one["use_rslora"] for one in settings)
    for key, value in whole.items():
        if "lora_A" in key:
            assert torch.equal(torch.cat([part[key] for part in parts]), value)
            continue
        stacked = torch.cat([s * part[key] for s, part in zip(scales, parts, strict=True)], dim=1)
        if alpha is None:
            assert torch.equal(stacked, value)
        torch.testing.assert_close(stacked, value, rtol=2.0**-22, atol=0)  # one division, one product
    layer = "model.layers.0.mlp.up_proj"
    total = sum(s * change(part, layer) for s, part in zip(scales, parts, strict=True))
    torch.testing.assert_close(total, change(whole, layer), rtol=0, atol=1e-7 * change(whole, layer).abs().max().item())


def test_experts_of_an_adapter_that_has_more_are_refused(tmp_path) -> None:
    """As of an embedding, which is not routed."""
    run = make_run(tmp_path / "run", make_base(tmp_path / "base", "llama"), "molf-e", EXPERTS)
    held = tensors(run) | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(6, 1231)}
    save_file(held, run / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"embed_tokens.lora_embedding_A of the adapter belongs to no expert"):
        made(run, tmp_path / "out", "experts")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # PEFT's, of its own pattern
def test_a_delta_of_layers_that_peft_takes_for_experts_is_refused(tmp_path) -> None:
    """Dense layers of a mixture of experts that have the names of its experts' tensors."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4}
    config = Qwen3MoeConfig(vocab_size=1231, num_experts_per_tok=2, mlp_only_layers=[0], **shape, **heads)
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "base")
    run = make_run(tmp_path / "run", tmp_path / "base", "molf", MOLF)
    with pytest.raises(ValueError, match=r"PEFT makes no adapter of model\.layers\.0\.mlp.*use --to merged"):
        made(run, tmp_path / "out", "delta", rank=4)
    assert not (tmp_path / "out").exists()


def test_the_adapter_is_the_runs(tmp_path) -> None:
    """And it says which base it is for, wherever that is now."""
    base = make_base(tmp_path / "base", "qwen2")
    run = make_run(tmp_path / "run", base, "molf-e", EXPERTS)
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=f"model {base} cannot be read"):
        made(run, tmp_path / "out", "adapter")
    report = export(run, tmp_path / "out", ExportOptions("adapter"), base=str(moved))
    assert report["difference"]["max_abs"] == 0
    source, same = tensors(run), tensors(tmp_path / "out")
    assert all(torch.equal(value, same[key]) for key, value in source.items())
    config = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").peft_config["default"]
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (6, 6, str(moved))
    plain = (config.bias, config.modules_to_save, config.use_dora, config.rank_pattern, config.alpha_pattern)
    assert plain == ("none", None, False, {}, {})  # what servers of LoRA ask for
    made_half = export(run, tmp_path / "half", ExportOptions("adapter", dtype="bfloat16"), base=str(moved))
    assert made_half["dtype"] == "bfloat16"
    assert all(torch.equal(v.bfloat16(), tensors(tmp_path / "half")[k]) for k, v in source.items())


@pytest.mark.parametrize("arch", ["qwen2", "gemma3", "llama"])
def test_delta_at_full_rank_is_the_trained_model(tmp_path, arch: str) -> None:
    """Tied embeddings, norms, biases and an untied head go along whole."""
    run = make_run(tmp_path / "run", make_base(tmp_path / "base", arch), "molf", MOLF, other=True)
    report = made(run, tmp_path / "out", "delta", rank=32, tolerance=1e-4)
    assert report["energy"]["total"] == pytest.approx(1, abs=1e-12)
    assert "model.embed_tokens" in report["carried"]
    assert ("lm_head" in report["carried"]) == (arch == "llama")
    assert ("model.layers.0.self_attn.q_proj.bias" in report["carried"]) == (arch == "qwen2")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (32, 32, {})


def test_delta_is_the_best_of_its_rank(tmp_path) -> None:
    """What is lost are the smaller singular values (Eckart and Young), and the energies say so."""
    base = make_base(tmp_path / "base", "llama")
    run = make_run(tmp_path / "run", base, "molf", MOLF)
    report = made(run, tmp_path / "out", "delta", rank=8)
    start, after, adapter = tensors(base), tensors(run), tensors(tmp_path / "out")
    assert {key.rpartition(".lora_")[2] for key in adapter} == {"A.weight", "B.weight"}  # a plain LoRA
    kept = whole = 0.0
    for layer, energy in report["energy"]["layers"].items():
        delta = after[f"{layer}.weight"].double() - start[f"{layer}.weight"].double()
        squares = torch.linalg.svdvals(delta).square()
        lost = (delta - change(adapter, layer)).square().sum()
        torch.testing.assert_close(lost, squares[8:].sum(), rtol=1e-4, atol=0)
        assert energy == pytest.approx((squares[:8].sum() / squares.sum()).item(), abs=1e-6)
        kept, whole = kept + squares[:8].sum().item(), whole + squares.sum().item()
    assert len(report["energy"]["layers"]) == 14
    assert report["energy"]["total"] == pytest.approx(kept / whole, abs=1e-6)
    assert 0.1 < report["energy"]["total"] < 0.9
    assert 0 < report["difference"]["kl"] < report["base_difference"]["kl"]


def test_delta_loses_nothing_silently(tmp_path) -> None:
    base = make_base(tmp_path / "base", "qwen2")
    run = make_run(tmp_path / "run", base, "molf", MOLF, other=True)
    whole = made(run, tmp_path / "whole", "delta", rank=32)
    dropped = made(run, tmp_path / "dropped", "delta", rank=32, drop_other=True)
    assert whole["dropped"] == dropped["carried"] == []
    assert "model.norm.weight" in dropped["dropped"]
    assert "model.layers.0.self_attn.q_proj.bias" in dropped["dropped"]
    assert {key.rpartition(".lora_")[2] for key in tensors(tmp_path / "dropped")} == {"A.weight", "B.weight"}
    assert dropped["difference"]["kl"] > 1e3 * whole["difference"]["kl"]
    assert "Left out: model.embed_tokens.weight" in (tmp_path / "dropped" / "README.md").read_text()
    gpt2 = make_run(tmp_path / "gpt2", make_base(tmp_path / "base2", "gpt2"), "molf", MOLF, other=True)
    with pytest.raises(ValueError, match=r"transformer.wte, which is tied, and PEFT cannot carry that tie: use --to"):
        made(gpt2, tmp_path / "none", "delta", rank=32)
    made(gpt2, tmp_path / "gpt2-dropped", "delta", rank=32, drop_other=True, tolerance=10)
    with pytest.raises(ValueError, match="rank=33: choose from 1 to 32"):
        made(run, tmp_path / "none", "delta", rank=33)
    with pytest.raises(ValueError, match="rank=0: choose from 1 to 32"):
        made(run, tmp_path / "none", "delta", rank=0)
    for other, problem in (("llama", "is not the base of"), (None, "there is no change to export")):
        base = run if other is None else make_base(tmp_path / other, other)
        with pytest.raises(ValueError, match=problem):
            export(run, tmp_path / "none", ExportOptions("delta", rank=2), base=str(base))
    assert not (tmp_path / "none").exists()


def test_a_delta_must_be_nearer_than_the_base(tmp_path, monkeypatch) -> None:
    run = make_run(tmp_path / "run", make_base(tmp_path / "base", "gpt2"), "molf", MOLF)
    assert made(run, tmp_path / "out", "delta", rank=32, tolerance=1e-4)["energy"]["total"] == pytest.approx(1)
    with pytest.raises(ValueError, match=r"differs from the trained model: .* the tolerance is 0.0001"):
        made(run, tmp_path / "none", "delta", rank=2, tolerance=1e-4)
    make = molf.export.make.make_delta

    def reversed_delta(*arguments: Any) -> Any:
        delta = make(*arguments)
        for name, p in delta.model.named_parameters():
            if ".lora_B." in name:  # twice the change away from the trained model
                p.data.mul_(-1)
        return delta

    run = make_run(tmp_path / "run2", make_base(tmp_path / "base2", "llama"), "molf", MOLF, size=0.005)
    monkeypatch.setattr(molf.export.make, "make_delta", reversed_delta)
    with pytest.raises(ValueError, match=r"no nearer to the trained model than the base is .* choose a higher --rank"):
        made(run, tmp_path / "none", "delta", rank=32)
    assert not (tmp_path / "none").exists()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning", "ignore:Setting `save_emb:UserWarning")
def test_a_tied_head_with_an_adapter_is_not_merged(tmp_path) -> None:
    config = MoLFConfig(expert_ranks=(2, 4), train_base=False, target_modules=["q_proj", "lm_head"])
    run = make_run(tmp_path / "run", make_base(tmp_path / "base", "qwen2"), "molf-e", config)
    with pytest.raises(ValueError, match=r"a weight that is tied .*: use --to adapter"):
        made(run, tmp_path / "out", "merged")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ["bnb-4bit", "bnb-8bit", "torchao-int8"])
def test_a_quantised_base_is_merged_only_when_dequantised(tmp_path, kind: str) -> None:
    """Into the weights that the model was trained on, not into the base's original ones."""
    base = make_base(tmp_path / "base", "llama", hidden_size=64, intermediate_size=64)
    run = make_run(tmp_path / "run", base, "molf-e", EXPERTS, quantization=kind, dtype="float32")
    with pytest.raises(ValueError, match=f"quantised to {kind}; .* use --to adapter .* or --dequantize"):
        made(run, tmp_path / "out", "merged")
    report = made(run, tmp_path / "out", "merged", dequantize=True)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    layer = "model.layers.0.mlp.up_proj"
    quantised = AutoModelForCausalLM.from_pretrained(base, **quantized(kind, torch.device("cpu"), torch.float32))
    units = torch.eye(64)
    weight = quantised.get_submodule(layer)(units).T.detach().double()
    original, merged = tensors(base)[f"{layer}.weight"].double(), tensors(tmp_path / "out")[f"{layer}.weight"]
    lost = (weight - original).abs().max()
    assert lost > 1e-4  # the quantisation
    exact = weight + change(tensors(run), layer)
    assert (merged.double() - exact).abs().max() < 0.1 * lost
    assert report["difference"]["max_abs"] < 1e-4
    adapter = made(run, tmp_path / "adapter", "adapter")
    assert adapter["difference"]["max_abs"] < 1e-4


def test_an_export_that_says_something_else_is_an_error(tmp_path, monkeypatch) -> None:
    """An expert's B is 1 % off: refused, and the older export stays."""
    run = make_run(tmp_path / "run", make_base(tmp_path / "base", "llama"), "molf-e", EXPERTS)
    out = tmp_path / "out"
    made(run, out, "adapter")
    older = {path.name: path.read_bytes() for path in out.iterdir()}
    write = molf.export.make.write_adapter

    def wrong(config: Any, found: dict[str, torch.Tensor], folder: Path) -> None:
        write(
            config,
            {k: v * (1.01 if k.endswith("0.mlp.up_proj.lora_B.weight") else 1) for k, v in found.items()},
            folder,
        )

    monkeypatch.setattr(molf.export.make, "write_adapter", wrong)
    with pytest.raises(ValueError, match=r"differs from the trained model: max .* nats per token .* tolerance is"):
        made(run, out, "adapter")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == older
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    made(run, out, "adapter", tolerance=1.0)
    assert "as asked for" in (out / "README.md").read_text()


def test_a_delta_whose_files_say_something_else_is_an_error(tmp_path, monkeypatch) -> None:
    """The loaded adapter is 1 % off in one B: still nearer to the trained model than the base, and refused."""
    run = make_run(tmp_path / "run", make_base(tmp_path / "base", "llama"), "molf", MOLF)
    reload = molf.export.make.verify.reload

    def wrong(*arguments: Any) -> Any:
        model = reload(*arguments)
        next(p for name, p in model.named_parameters() if "0.mlp.up_proj.lora_B" in name).data.mul_(1.01)
        return model

    monkeypatch.setattr(molf.export.make.verify, "reload", wrong)
    with pytest.raises(ValueError, match="the export differs from the model of rank 16 that it was made from"):
        made(run, tmp_path / "out", "delta", rank=16)
    assert not (tmp_path / "out").exists()


def test_the_difference_is_what_it_says() -> None:
    one = [torch.randn(5, 11), torch.randn(3, 11)]
    other = [x + 0.1 * torch.randn_like(x) for x in one]
    found = difference(one, other)
    p = [torch.softmax(x.double(), -1) for x in one]
    q = [torch.softmax(x.double(), -1) for x in other]
    kl = sum((a * (a / b).log()).sum().item() for a, b in zip(p, q, strict=True)) / 8
    assert found.kl == pytest.approx(kl, rel=1e-9)
    assert found.max_abs == max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))
    assert found.tokens == 8
    assert math.isnan(difference(one, [other[0], other[1] * math.nan]).max_abs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_within_its_tolerance(tmp_path, dtype: str) -> None:
    """Rounding every weight stays below half of the tolerance, and above a hundredth of it."""
    model = AutoModelForCausalLM.from_pretrained(make_base(tmp_path / "base", "llama"))
    ids = torch.randint(3, 1231, (1, 40))
    with torch.no_grad():
        before = [model(input_ids=ids).logits[0]]
        limit = rounding_tolerance(model, getattr(torch, dtype), before)
        model.to(getattr(torch, dtype)).float()
        rounded = difference(before, [model(input_ids=ids).logits[0]]).max_abs
    assert limit / 100 < rounded < limit / 2


@pytest.mark.parametrize(
    ("method", "config", "to"),
    [("molf-e", EXPERTS, "adapter"), ("molf-e", EXPERTS, "experts"), ("molf", MOLF, "delta")],
)
def test_every_adapter_names_its_base_and_the_commit_that_was_trained_on(
    tmp_path, monkeypatch, method, config, to: str
) -> None:
    """Also where the base has moved; without the commit it would load on the hub's main branch of today.

    A relative path is written as an absolute one, and the adapter loads from another directory.
    """
    run = make_run(tmp_path / "run", make_base(tmp_path / "old", "llama"), method, config)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "model_commit": "0123abc"}))
    base = (tmp_path / "old").rename(tmp_path / "new")
    options = ExportOptions(to=to, rank=4 if to == "delta" else None)
    monkeypatch.chdir(tmp_path)
    export(run, tmp_path / "out", options, base="new")
    monkeypatch.chdir(run)
    folders = [path.parent for path in (tmp_path / "out").rglob("adapter_config.json")]
    assert len(folders) == (2 if to == "experts" else 1)
    for folder in folders:
        found = json.loads((folder / "adapter_config.json").read_text())
        assert (found["base_model_name_or_path"], found["revision"]) == (str(base), "0123abc")
        AutoPeftModelForCausalLM.from_pretrained(folder)


def test_texts_are_cut_to_what_the_model_takes(tmp_path) -> None:
    """A model with learned positions has none for more tokens than that."""
    run = make_run(tmp_path / "run", make_base(tmp_path / "base", "gpt2", n_positions=4), "molf", MOLF)
    assert made(run, tmp_path / "out", "merged")["prompts"] == 16
