"""Greedy generation in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import GenerationConfig

from .batches import in_batches
from .prompts import Context, prompt_tokens


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    description: str = "generate",
    long_prompts: str = "truncate",
    context: Context | None = None,
) -> list[str]:
    """What the model says after each prompt, by greedy decoding up to EOS.

    Batches are padded on the left by hand, so the tokenizer needs no pad token and keeps its padding side, and a
    prompt's answer does not depend on its neighbours (but for rounding). Settings of the model's own
    ``generation_config`` that would change greedy decoding, such as a repetition penalty, do not apply.

    Args:
        model: A causal language model; it is left in the mode that it was in.
        tokenizer: Its tokenizer; special tokens are added as in training.
        prompts: The prompts.
        max_new_tokens: Tokens to say at most.
        batch_size: Prompts per batch, fewer where memory runs out; batches hold prompts of like length.
        description: Label of the progress bar.
        long_prompts: What happens to a prompt that leaves no room for ``max_new_tokens`` in the model's context:
            "truncate" from the left or "refuse".
        context: Where truncated prompts are counted; it brings its own ``long_prompts``.

    Returns:
        The completions without special tokens, in the order of ``prompts``. Tokenizers differ in whether the
        space before the first word is part of it.

    Raises:
        ValueError: If the tokenizer has no EOS, ``max_new_tokens`` is not positive, a prompt is refused, or a
            token has no embedding.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError(
            "the tokenizer has no EOS token, so generation cannot stop: set it, on the command line with --eos_token"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 1")
    context = context or Context.of(model, tokenizer, long_prompts)
    rows = [context.fit(prompt_tokens(tokenizer, prompt), max_new_tokens) for prompt in prompts]
    context.check(tokenizer, [*rows, [eos]])
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    said = [""] * len(rows)
    settings = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, eos_token_id=eos, pad_token_id=eos, use_cache=True
    )
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    own, training = inner.generation_config, model.training
    inner.generation_config = GenerationConfig()  # transformers takes from it what the settings leave open
    model.eval()

    def continued(chunk: Sequence[int]) -> list[list[int]]:
        return _continue([rows[i] for i in chunk], model, settings, eos)

    try:
        with tqdm(total=len(order), desc=description, unit="prompt", leave=False) as progress:
            for chunk, found in in_batches(continued, order, batch_size, model):
                for i, new in zip(chunk, found, strict=True):
                    said[i] = tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                progress.update(len(chunk))
    finally:
        inner.generation_config = own
        model.train(training)
    return said


def _continue(rows: list[list[int]], model: Any, settings: GenerationConfig, eos: int) -> list[list[int]]:
    """The tokens that follow each row, up to EOS and without it; one batch, padded on the left."""
    device = next(model.parameters()).device
    width = max(map(len, rows))
    ids = torch.tensor([[eos] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)[:, width:].tolist()
    return [new[: new.index(eos)] if eos in new else new for new in output]
