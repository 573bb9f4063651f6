"""How likely a causal language model finds given continuations: one batched forward pass, no generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from tqdm import tqdm

from .prompts import Context, tokenize_pair


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


@torch.no_grad()
def score_continuations(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    batch_size: int = 64,
    description: str = "evaluate",
    long_prompts: str = "truncate",
    context: Context | None = None,
) -> list[Continuation]:
    """Score every (prompt, continuation) pair under ``model``.

    Args:
        model: A causal language model; it is left in the mode that it was in.
        tokenizer: Its tokenizer; special tokens are added as in training.
        pairs: Prompts and continuations; a continuation starts with its space.
        batch_size: Pairs per forward pass; pairs that differ in their last token only count as one.
        description: Label of the progress bar.
        long_prompts: What happens to a prompt that does not fit into the model's context with its continuation:
            "truncate" from the left or "refuse".
        context: Where truncated prompts are counted; it brings its own ``long_prompts``.

    Raises:
        ValueError: If a prompt's tokens are no prefix of prompt + continuation's, a prompt is refused, or a token has
            no embedding.
    """
    context = context or Context.of(model, tokenizer, long_prompts)
    tokens = []
    for prompt, completion in pairs:
        ids, wanted = tokenize_pair(tokenizer, prompt, completion)
        tokens.append((context.fit(ids, len(wanted)), wanted))
    context.check(tokenizer, (part for pair in tokens for part in pair))
    sharing: dict[tuple[int, ...], list[int]] = {}  # the letters of one question differ in the last token only
    for i, (ids, wanted) in enumerate(tokens):
        sharing.setdefault(tuple(ids + wanted[:-1]), []).append(i)
    order = sorted(sharing, key=len, reverse=True)
    firsts: dict[tuple[tuple[int, ...], int], float] = {}
    results: list[Continuation | None] = [None] * len(tokens)
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    try:
        with tqdm(total=len(tokens), desc=description, unit="prompt", leave=False) as progress:
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                width = len(rows[0])
                inputs = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
                mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
                logits = model(input_ids=inputs, attention_mask=mask).logits
                for index, row in enumerate(rows):
                    for i in sharing[row]:
                        targets = torch.tensor(tokens[i][1], device=device)
                        # only these places in fp32: all of them would be the batch times the vocabulary
                        found = _score(logits[index, len(row) - len(targets) : len(row)].float(), targets)
                        # continuations that begin alike tie exactly: rows of other lengths round otherwise
                        first = firsts.setdefault((tuple(tokens[i][0]), tokens[i][1][0]), found.first_logprob)
                        results[i] = found._replace(first_logprob=first)
                    progress.update(len(sharing[row]))
    finally:
        model.train(training)
    return [result for result in results if result is not None]


def _score(logits: torch.Tensor, targets: torch.Tensor) -> Continuation:
    """One continuation from the logits before each of its tokens, ``(tokens, vocabulary)``."""
    chosen = F.log_softmax(logits, dim=-1).gather(-1, targets[:, None])
    return Continuation(float(chosen.sum()), float(chosen[0]), bool((logits.argmax(-1) == targets).all()))
