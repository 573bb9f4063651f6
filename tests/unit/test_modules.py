"""target_modules, exclude_modules, trainability and refusals."""

import copy
import re
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import BdLoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from models import ARCHITECTURES, causal_lm, lm_step
from molf import MoLFConfig, create_molf_optimizer, molf_lora_config
from molf.optim.modules import _memory


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_linear_routes_every_linear_but_the_head(name: str) -> None:
    model = causal_lm(name)
    head = model.get_output_embeddings()
    optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=(2,)))
    assert len(optimizer.routed_modules) == ARCHITECTURES[name][2]
    assert all(model.get_submodule(routed) is not head for routed in optimizer.routed_modules)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fused_equals_superposed_on_every_architecture(name: str) -> None:
    """Five steps in float64 with winners of both kinds; GPT-2's weights are stored transposed."""
    config = MoLFConfig(expert_ranks=(2, 4), lr=1e-3, lora_lr=3e-3, train_other=False)
    fused = causal_lm(name, torch.float64)
    lora = molf_lora_config(config, fan_in_fan_out=name == "gpt2")
    adapted = get_peft_model(copy.deepcopy(fused), lora, autocast_adapter_dtype=False).double()
    optimizer, other = create_molf_optimizer(fused, config), create_molf_optimizer(adapted, config)
    for layer in optimizer.routed_modules:
        real = adapted.base_model.model.get_submodule(layer)
        real.lora_A["default"].weight.data.copy_(optimizer.state[fused.get_submodule(layer).weight]["lora_A"])
    winners = set()
    for step in range(5):
        losses = [lm_step(model, opt, step) for model, opt in ((fused, optimizer), (adapted, other))]
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)
        pairs = zip(optimizer.routing.values(), other.routing.values(), strict=True)
        assert all(a.winners == b.winners for a, b in pairs)
        winners |= {winner for routing in optimizer.routing.values() for winner in routing.winners}
    assert len(winners) > 1


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"),
    [
        (["q_proj", "v_proj"], None, 4),
        (r".*\.self_attn\.[qk]_proj", None, 4),
        ("all-linear", ["down_proj"], 12),
        ("all-linear", r".*layers\.0\..*", 7),
        (["model.layers.1.mlp.up_proj"], None, 1),
    ],
)
def test_target_modules_mean_what_they_mean_in_peft(targets, exclude, expected: int) -> None:
    config = MoLFConfig(expert_ranks=(2,), target_modules=targets, exclude_modules=exclude)
    names = create_molf_optimizer(causal_lm("llama"), config).routed_modules
    peft_model = get_peft_model(causal_lm("llama"), molf_lora_config(config))
    assert len(names) == expected
    assert create_molf_optimizer(peft_model, config).routed_modules == [f"base_model.model.{name}" for name in names]


def test_a_compiled_model_has_the_names_of_the_plain_one() -> None:
    config = MoLFConfig(expert_ranks=(2,), target_modules=r"model\.layers\.\d+\.mlp\.up_proj")
    model = causal_lm("llama")
    plain, compiled = create_molf_optimizer(model, config), create_molf_optimizer(torch.compile(model), config)
    assert compiled.routed_modules == plain.routed_modules == [f"model.layers.{i}.mlp.up_proj" for i in (0, 1)]
    assert [g["param_names"] for g in compiled.param_groups] == [g["param_names"] for g in plain.param_groups]


def test_of_a_peft_model_the_config_decides_what_trains_and_the_adapter_what_is_routed() -> None:
    model = get_peft_model(causal_lm("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.model.model.norm.weight.requires_grad_(False)
    config = MoLFConfig(expert_ranks=(2,), target_modules=["v_proj"], exclude_modules=["q_proj"])
    names = create_molf_optimizer(model, config).routed_modules
    assert names == [f"base_model.model.model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert all(p.requires_grad for p in model.parameters())


def test_plain_modules_and_classifiers() -> None:
    plain = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2, bias=False))
    optimizer = create_molf_optimizer(plain, MoLFConfig(expert_ranks=(2,)))
    assert optimizer.routed_modules == ["0", "2"]
    decays = {group["expert"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {"dense": 0.1, "lora_r2": 0.01, "dense_bias": 0.0, "other_no_decay": 0.0}

    from transformers import BertConfig, BertForSequenceClassification

    bert = BertForSequenceClassification(
        BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    names = create_molf_optimizer(bert, MoLFConfig(expert_ranks=(2,))).routed_modules
    assert "classifier" not in names
    assert "bert.encoder.layer.0.attention.self.query" in names


def test_what_is_not_routed() -> None:
    model = causal_lm("qwen2")
    model.model.norm.weight.requires_grad_(False)
    optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=(2,)))
    groups = {group["expert"]: group for group in optimizer.param_groups}
    assert groups["other"]["param_names"] == ["model.embed_tokens.weight"]
    assert all("norm" in name for name in groups["other_no_decay"]["param_names"])
    assert not model.model.norm.weight.requires_grad, "frozen by the user, stays frozen"

    config = MoLFConfig(expert_ranks=(2, 4), train_base=False)
    efficient = get_peft_model(causal_lm("qwen2"), molf_lora_config(config))
    create_molf_optimizer(efficient, config)
    assert all("lora_" in name for name, p in efficient.named_parameters() if p.requires_grad)
    both = MoLFConfig(expert_ranks=(2, 4), train_base=False, train_other=True)
    optimizer = create_molf_optimizer(efficient, both)
    groups = {group["expert"]: group for group in optimizer.param_groups}
    assert groups["other"]["param_names"] == ["base_model.model.model.embed_tokens.weight"]
    assert not efficient.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.requires_grad


@pytest.mark.parametrize(
    ("fields", "asked", "lost"),
    [
        ({}, None, 21),
        ({"train_other": False}, None, 14),
        ({"train_base": False, "train_other": True}, None, 7),
        ({"train_base": False, "train_other": True}, ["lm_head", "embed_tokens"], 5),
        ({"train_base": False}, None, 0),
        ({"train_base": False}, ["lm_head"], 0),
    ],
)
def test_what_peft_would_not_save_is_warned_of(tmp_path, fields, asked, lost: int) -> None:
    """The number is that of the trained values which a saved adapter does not bring back."""
    config = MoLFConfig(expert_ranks=(2, 4), lr=1e-2, lora_lr=1e-2, top_k=2, **fields)
    model = get_peft_model(causal_lm("llama"), molf_lora_config(config, modules_to_save=asked))
    message = rf"^base_model\S+ is trained and .*\({lost} such parameters\).*merge_and_unload\(\) before saving"
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        optimizer = create_molf_optimizer(model, config)
    assert len(found) == bool(lost)
    assert all(re.match(message, str(each.message)) for each in found)
    lm_step(model, optimizer, 0)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(causal_lm("llama"), tmp_path).state_dict()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(not torch.equal(loaded[name], p) for name, p in trained.items()) == lost


def test_modules_to_save_train_in_molf_efficient() -> None:
    config = MoLFConfig(expert_ranks=(2, 4), train_base=False)
    model = get_peft_model(causal_lm("llama"), molf_lora_config(config, modules_to_save=["lm_head"]))
    optimizer = create_molf_optimizer(model, config)
    names = [name for group in optimizer.param_groups for name in group["param_names"] if "lora" not in name]
    assert names == ["base_model.model.lm_head.modules_to_save.default.weight"]


def test_a_layer_of_a_class_that_fsdp_made_of_conv1d_is_routed() -> None:
    """``fully_shard`` gives what it wraps a class of another name."""
    model = nn.Sequential(nn.Linear(4, 4), Conv1D(4, 4))
    model[1].__class__ = type("FSDPConv1D", (Conv1D,), {})
    assert create_molf_optimizer(model, MoLFConfig(expert_ranks=(2,))).routed_modules == ["0", "1"]


def test_frozen_layers_are_not_routed() -> None:
    model = causal_lm("llama")
    model.model.layers[0].requires_grad_(False)
    names = create_molf_optimizer(model, MoLFConfig(expert_ranks=(2,))).routed_modules
    assert len(names) == 7
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
    efficient = MoLFConfig(expert_ranks=(2,), train_base=False, train_other=True)
    model = causal_lm("llama").requires_grad_(False)
    assert len(create_molf_optimizer(model, efficient).routed_modules) == 14, "virtual experts need no dense one"
    assert sum(p.requires_grad for p in model.parameters()) == 14, "what is not routed stays frozen"
    with pytest.raises(ValueError, match="no layer of LlamaForCausalLM that is not frozen"):
        create_molf_optimizer(causal_lm("llama").requires_grad_(False), MoLFConfig(expert_ranks=(2,)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight


class TiedByStorage(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.two.weight = nn.Parameter(self.one.weight)


BLOCKS = BdLoraConfig(target_modules_bd_b=["q_proj"], nblocks=2)


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (
            lambda: causal_lm("llama"),
            {"target_modules": ["nothing"]},
            r"target_modules=\['nothing'\].*no layer",
        ),
        (lambda: causal_lm("llama"), {"target_modules": "(["}, "no regular expression"),
        (lambda: causal_lm("llama"), {"target_modules": ["embed_tokens"]}, "embed_tokens, a Embedding: only linear"),
        (lambda: causal_lm("llama"), {"lora_dropout": 0.1}, r"lora_dropout=0.1: virtual LoRA .* get_peft_model"),
        (Tied, {}, "one is routed but its weight is tied .one.weight = two.weight.*exclude_modules"),
        (TiedByStorage, {}, "one is routed but its weight is tied .one.weight = two.weight.*exclude_modules"),
        (
            lambda: causal_lm("qwen2"),
            {"target_modules": ["lm_head"]},
            "lm_head is routed but its weight is tied",
        ),
        (
            lambda: nn.Sequential(nn.Embedding(4, 4, sparse=True), nn.Linear(4, 4)),
            {},
            "0 gives sparse gradients.*sparse=False",
        ),
        (
            lambda: get_peft_model(causal_lm("llama"), LoraConfig(r=4, target_modules=["q_proj"])),
            {"expert_ranks": (2, 4)},
            r"expert_ranks=\(2, 4\) \(total rank 6\) does not fit .* rank 4: make it with molf_lora_config",
        ),
        (
            lambda: get_peft_model(causal_lm("llama"), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)),
            {},
            "uses DoRA",
        ),
        (
            lambda: get_peft_model(causal_lm("llama"), LoraConfig(r=2, target_modules=["q_proj"], use_bdlora=BLOCKS)),
            {},
            "or a block-diagonal B",
        ),
    ],
)
def test_refused_by_name_with_the_remedy(model, config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_molf_optimizer(model(), MoLFConfig(**{"expert_ranks": (2,), **config}))


def test_quantised_dense_expert_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"0\.weight is quantised .*int8.*train_base=False"):
        create_molf_optimizer(model, MoLFConfig(expert_ranks=(2,)))


def test_two_adapters_as_experts_are_refused() -> None:
    model = get_peft_model(causal_lm("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"\(total rank 4\) does not fit the adapter .* rank 2"):
        create_molf_optimizer(model, MoLFConfig(expert_ranks=(2, 2), train_base=False))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="2 of them active: use one stacked adapter"):
        create_molf_optimizer(model, MoLFConfig(expert_ranks=(2, 2), train_base=False))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expert_ranks": (0,)}, "expert_ranks"),
        ({"expert_ranks": (), "train_base": False}, "nothing to train"),
        ({"top_k": 3}, r"top_k=3: choose from 1 to 2"),
        ({"top_k": 0}, "top_k=0"),
        ({"score_fn": "norm"}, "score_fn='norm': choose one of epd, pfn"),
        ({"lora_alpha": (1.0, 2.0)}, "lora_alpha"),
        ({"lora_alpha": 0}, "lora_alpha=0"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lora_lr": float("inf")}, "lora_lr=inf"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"eps": 1e-9, "moments_8bit": True}, "eps=1e-09: at least 1e-8"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
    ],
)
def test_config_refuses(fields, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoLFConfig(**fields)


def test_expert_names_and_scales() -> None:
    assert MoLFConfig(expert_ranks=(32, 32, 8)).experts == ("dense", "lora_r32[0]", "lora_r32[1]", "lora_r8")
    assert MoLFConfig(expert_ranks=(4, 16)).scales == (2.0, 2.0)
    assert MoLFConfig(expert_ranks=(4, 16), lora_alpha=8).scales == (4.0, 2.0)
    assert MoLFConfig(expert_ranks=(4, 16), lora_alpha=(8, 16), use_rslora=False).scales == (2.0, 1.0)


def test_weights_of_which_a_process_holds_nothing_are_not_tied() -> None:
    """Empty tensors are all in the same place: nowhere."""
    one, other = (nn.Parameter(torch.empty(0, 4)) for _ in range(2))
    assert one.data_ptr() == other.data_ptr()
    assert _memory(one) == _memory(one) != _memory(other)
    assert _memory(nn.Parameter(torch.ones(4))) != _memory(nn.Parameter(torch.ones(4)))
