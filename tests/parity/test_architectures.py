"""Nothing assumes causal language models: an encoder-decoder and an encoder classifier against the reference twin."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from molf import MoLFAdamW, MoLFConfig, create_molf_optimizer, molf_lora_config
from molf.optim.reference import MoLFAdamWReference, superpose

BART = BartConfig(
    vocab_size=67, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, dropout=0.0,
)  # fmt: skip
BERT = BertConfig(
    vocab_size=67, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,
)  # fmt: skip
T5 = T5Config(
    vocab_size=67, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0
)  # fmt: skip


def seq2seq() -> nn.Module:
    torch.manual_seed(0)
    return BartForConditionalGeneration(BART)


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(BERT)


def loss(model: Any, step: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(step)
    ids = torch.randint(3, 67, (4, 12), generator=g)
    generates = model.config.is_encoder_decoder
    labels = torch.randint(3, 67, (4, 8), generator=g) if generates else torch.randint(3, (4,), generator=g)
    return model(input_ids=ids, labels=labels).loss


def reference_of(model: nn.Module, twin: nn.Module, optimizer: MoLFAdamW, trained: list[nn.Parameter]) -> Any:
    """The twin superposed, with the model's first A, and its optimizer; ``trained`` is what else the twin trains."""
    config, names = optimizer.config, [name.removeprefix("base_model.model.") for name in optimizer.routed_modules]
    layers = superpose(twin, names, config)
    inside = {id(p) for layer in layers.values() for p in layer.parameters()}
    if config.train_base:
        trained = [p for p in twin.parameters() if id(p) not in inside]
    else:
        twin.requires_grad_(False)
        for parameter in (*trained, *(p for layer in layers.values() for p in (*layer.A, *layer.B))):
            parameter.requires_grad_(True)
    for name, layer in zip(optimizer.routed_modules, layers.values(), strict=True):
        module: Any = model.get_submodule(name)
        A = optimizer.state[module.weight]["lora_A"] if config.train_base else module.lora_A["default"].weight
        with torch.no_grad():
            for part, own in zip(A.split(config.expert_ranks), layer.A, strict=True):
                own.copy_(part)
    return layers, MoLFAdamWReference(layers, config, [(p, 0.1 if p.dim() > 1 else 0.0) for p in trained])


@pytest.mark.parametrize("train_base", [True, False])
@pytest.mark.parametrize(("make", "task_type"), [(seq2seq, "SEQ_2_SEQ_LM"), (classifier, "SEQ_CLS")])
def test_winners_and_weights_are_the_references(make: Any, task_type: str, train_base: bool) -> None:
    """Float64: MoLF on the plain model, MoLF-Efficient by PEFT, whose classifier trains a copy of the head."""
    config = MoLFConfig(expert_ranks=(2, 4), train_base=train_base, lr=3e-4, lora_lr=1e-3, max_grad_norm=1.0)
    twin = make().double()
    model: Any = copy.deepcopy(twin)
    if not train_base:
        adapter = molf_lora_config(config, task_type=task_type)
        model = get_peft_model(model, adapter, autocast_adapter_dtype=False).double()
    optimizer = create_molf_optimizer(model, config)
    linears = [module for module in twin.modules() if isinstance(module, nn.Linear)]
    assert len(optimizer.routed_modules) == len(linears) - 1  # all but the head
    layers, reference = reference_of(
        model, twin, optimizer, [*twin.classifier.parameters()] if make is classifier else []
    )
    seen = set()
    for step in range(12):
        for one in (model, twin):
            one.zero_grad()
            loss(one, step).backward()
        optimizer.step()
        reference.step()
        winners = [[optimizer.experts.index(w) for w in r.winners] for r in optimizer.routing.values()]
        assert winners == [reference.winners[name] for name in layers], step
        seen |= {row[0] for row in winners}
    assert len(seen) > 1, "the winners never switched: nothing was tested"
    merged = model if train_base else model.merge_and_unload()
    expected = {name: p for name, p in twin.named_parameters() if ".A." not in name and ".B." not in name}
    for name, layer in layers.items():
        expected |= {f"{name}.weight": layer.merged(), f"{name}.bias": expected.pop(f"{name}.b")}
        del expected[f"{name}.W"]
    found = dict(merged.named_parameters())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert make is classifier or merged.lm_head.weight is merged.model.shared.weight


def test_heads_are_not_routed() -> None:
    """Neither a tied output head nor a classifier of several layers; both train with MoLF as what is not routed."""
    one = MoLFConfig(expert_ranks=(2,))
    for model, heads in (
        (T5ForConditionalGeneration(T5), {"lm_head"}),
        (BartForSequenceClassification(BART), {"classification_head.dense", "classification_head.out_proj"}),
    ):
        optimizer = create_molf_optimizer(model, one)
        linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        assert linears - set(optimizer.routed_modules) == heads
        assert all(p.requires_grad for name in heads for p in model.get_submodule(name).parameters())


def test_a_head_that_peft_does_not_know_is_named() -> None:
    config = MoLFConfig(expert_ranks=(2, 4), train_base=False, exclude_modules=r".*classification_head.*")
    adapter = molf_lora_config(config, modules_to_save=["classification_head"])
    optimizer = create_molf_optimizer(get_peft_model(BartForSequenceClassification(BART), adapter), config)
    trained = [name for group in optimizer.param_groups[2:] for name in group["param_names"]]
    assert len(trained) == 4
    assert all("classification_head.modules_to_save.default." in name for name in trained)
    assert not [name for name in optimizer.routed_modules if "classification_head" in name]


def test_t5_trains_and_keeps_its_tied_embeddings(tmp_path) -> None:
    """Its feed-forward layers read the dtype of their weight, so the model has to stay as it was."""
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5)
    optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=(2,), lr=3e-3, lora_lr=3e-3))
    losses = []
    for _ in range(8):
        losses.append(loss(model, 0))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    again = T5ForConditionalGeneration.from_pretrained(tmp_path)
    assert again.encoder.embed_tokens.weight is again.shared.weight
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
