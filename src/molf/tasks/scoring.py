"""How likely a causal language model finds given continuations: one batched forward pass, no generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from tqdm import tqdm


class Continuation(NamedTuple):
    """What a model says of one continuation of one prompt.

    Attributes:
        logprob: log p(continuation | prompt), all tokens, in nats.
        first_logprob: log p of its first token, in nats.
        greedy: Whether greedy decoding of the prompt gives exactly this continuation's tokens.
    """

    logprob: float
    first_logprob: float
    greedy: bool


def tokenize_pair(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the completion, split as SFTTrainer splits prompt + completion.

    Raises:
        ValueError: If no token of the completion remains, or tokens merge across the boundary.
    """
    prompt_ids: list[int] = tokenizer(prompt).input_ids
    whole: list[int] = tokenizer(prompt + completion).input_ids
    eos = tokenizer.eos_token_id
    if prompt_ids and prompt_ids[-1] == eos and not prompt.endswith(str(tokenizer.eos_token)):
        prompt_ids, whole = prompt_ids[:-1], whole[:-1] if whole[-1] == eos else whole
    if whole[: len(prompt_ids)] != prompt_ids or len(whole) == len(prompt_ids):
        raise ValueError(
            f"the tokens of prompt {prompt!r} are no prefix of those of prompt + completion {completion!r}: "
            "end the prompt at a word and start the completion with a space"
        )
    return prompt_ids, whole[len(prompt_ids) :]


@torch.no_grad()
def score_continuations(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    batch_size: int = 64,
    description: str = "evaluate",
) -> list[Continuation]:
    """Score every (prompt, continuation) pair under ``model``.

    Args:
        model: A causal language model; it is left in the mode that it was in.
        tokenizer: Its tokenizer; special tokens are added as in training.
        pairs: Prompts and continuations; a continuation starts with its space.
        batch_size: Pairs per forward pass.
        description: Label of the progress bar.

    Raises:
        ValueError: If a prompt's tokens are no prefix of prompt + continuation's.
    """
    tokens = [tokenize_pair(tokenizer, prompt, completion) for prompt, completion in pairs]
    order = sorted(range(len(tokens)), key=lambda i: -sum(map(len, tokens[i])))
    results: list[Continuation | None] = [None] * len(tokens)
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    with tqdm(total=len(order), desc=description, unit="prompt", leave=False) as progress:
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            rows = [tokens[i][0] + tokens[i][1] for i in chunk]
            width = max(map(len, rows))
            ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
            logits = model(input_ids=ids, attention_mask=mask).logits.float()
            logprobs = F.log_softmax(logits, dim=-1)
            best = logits.argmax(-1)
            for row, i in enumerate(chunk):
                prompt, completion = tokens[i]
                places = torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1, device=device)
                targets = torch.tensor(completion, device=device)
                chosen = logprobs[row, places, targets]
                results[i] = Continuation(
                    float(chosen.sum()), float(chosen[0]), bool((best[row, places] == targets).all())
                )
            progress.update(len(chunk))
    model.train(training)
    return [result for result in results if result is not None]
