"""How likely a causal language model finds given continuations: one batched forward pass, no generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from tqdm import tqdm

from .batches import in_batches
from .prompts import Context, tokenize_pairs


class Continuation(NamedTuple):
    """What a model says of one continuation of one prompt.

    Attributes:
        logprob: log p(continuation | prompt), all tokens, in nats.
        first_logprob: log p of its first token, in nats.
        greedy: Whether greedy decoding of the prompt gives exactly this continuation's tokens.
        tokens: How many tokens it has.
    """

    logprob: float
    first_logprob: float
    greedy: bool
    tokens: int


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
    merge: bool = False,
) -> list[Continuation]:
    """Score every (prompt, continuation) pair under ``model``.

    Args:
        model: A causal language model; it is left in the mode that it was in.
        tokenizer: Its tokenizer; special tokens are added as in training.
        pairs: Prompts and continuations; a continuation starts with its space.
        batch_size: Pairs per forward pass, fewer where they are long or memory runs out; pairs that differ in their
            last token only count as one.
        description: Label of the progress bar.
        long_prompts: What happens to a prompt that does not fit into the model's context with its continuation:
            "truncate" from the left or "refuse".
        context: Where truncated prompts are counted; it brings its own ``long_prompts``.
        merge: Whether tokens may merge across the boundary, see ``tokenize_pairs``.

    Raises:
        ValueError: If a prompt's tokens are no prefix of prompt + continuation's, a prompt is refused, or a token has
            no embedding.
    """
    context = context or Context.of(model, tokenizer, long_prompts)
    split = tokenize_pairs(tokenizer, pairs, merge)
    tokens = [(context.fit(ids, len(wanted)), wanted) for ids, wanted in split]
    context.check(tokenizer, (part for pair in tokens for part in pair))
    sharing: dict[tuple[int, ...], list[int]] = {}  # the letters of one question differ in the last token only
    for i, (ids, wanted) in enumerate(tokens):
        sharing.setdefault(tuple(ids + wanted[:-1]), []).append(i)
    order = sorted(sharing, key=len, reverse=True)
    firsts: dict[tuple[tuple[int, ...], int], float] = {}
    results: list[Continuation | None] = [None] * len(tokens)
    training = model.training
    model.eval()

    def scored(rows: Sequence[tuple[int, ...]]) -> list[tuple[int, Continuation]]:
        logits = _logits(model, rows)
        return [(i, _score(logits[n, : len(row)], tokens[i][1])) for n, row in enumerate(rows) for i in sharing[row]]

    try:
        with tqdm(total=len(tokens), desc=description, unit="prompt", leave=False) as progress:
            for _, batch in in_batches(scored, order, batch_size, model, len):
                for i, found in batch:
                    # continuations that begin alike tie exactly: rows of other lengths round otherwise
                    first = firsts.setdefault((tuple(tokens[i][0]), tokens[i][1][0]), found.first_logprob)
                    results[i] = found._replace(first_logprob=first)
                progress.update(len(batch))
    finally:
        model.train(training)
    return [result for result in results if result is not None]


def _logits(model: Any, rows: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """Of one batch, padded on the right, ``(rows, width, vocabulary)``."""
    device, width = next(model.parameters()).device, max(map(len, rows))
    inputs = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    logits: torch.Tensor = model(input_ids=inputs, attention_mask=mask).logits
    return logits


def _score(logits: torch.Tensor, wanted: list[int]) -> Continuation:
    """One continuation from the logits of its row, ``(tokens, vocabulary)``, whose last ones are before its tokens."""
    logits = logits[-len(wanted) :].float()  # only these in fp32: all of them would be the batch times the vocabulary
    targets = torch.tensor(wanted, device=logits.device)
    chosen = F.log_softmax(logits, dim=-1).gather(-1, targets[:, None])
    greedy = bool((logits.argmax(-1) == targets).all())
    return Continuation(float(chosen.sum()), float(chosen[0]), greedy, len(wanted))
