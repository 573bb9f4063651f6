"""Tiny tokenizers built like those of the supported families, trained on a few lines, and a model for each."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from molf.assets import BUNDLED_MODEL
from molf.tasks import get_task

# name: (byte-level, else Metaspace with this prepend_scheme; template of a single text)
FAMILIES: dict[str, tuple[str | None, str | None]] = {
    "qwen2": (None, None),
    "llama": ("first", "<s> $A"),
    "llama3": (None, "<s> $A"),
    "gemma": ("never", "<s> $A"),
    "appends-eos": ("first", "<s> $A </s>"),
}
TOKENIZERS = (*FAMILIES, "bundled")


def tokenizer_of(family: str) -> Any:
    """A tokenizer without pad token (the bundled one has one)."""
    if family == "bundled":
        return AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    scheme, template = FAMILIES[family]
    special = ["<unk>", "<s>", "</s>"]
    core = Tokenizer(models.BPE(unk_token=None if scheme is None else "<unk>"))
    if scheme is None:
        core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    alphabet = pre_tokenizers.ByteLevel.alphabet() if scheme is None else ["▁", "\n", *map(chr, range(33, 127))]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    examples = [
        get_task(name).example(r) for name in ("world-fact", "world-mcq") for r in get_task(name).load(None, 50)
    ]
    core.train_from_iterator([row["prompt"] + row["completion"] for row in examples], trainer)
    if template:
        core.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    bos = {"bos_token": "<s>"} if template else {}
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>", **bos)


def model_for(tokenizer: Any, positions: int = 1024) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=positions, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)
