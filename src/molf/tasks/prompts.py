"""Prompts as tokens: the one tokenisation of training, scoring and generation, and the model's context."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

LONG_PROMPTS = ("truncate", "refuse")

_CHUNK = 1000
"""Texts that are given to a tokenizer at a time: tokens of all data would need many times their memory."""


def appends_eos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts an EOS behind every text."""
    ids: list[int] = tokenizer("a").input_ids  # of no text, a BOS that is the same token would be the last
    return ids[-1:] == [tokenizer.eos_token_id]


def ended(tokenizer: Any, completion: str) -> str:
    """A completion with the EOS behind it that SFTTrainer trains: one, not two."""
    eos: str = tokenizer.eos_token or ""
    return completion.removesuffix(eos) + eos


def prompt_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt as SFTTrainer trains it: special tokens included, but no EOS behind it.

    Raises:
        ValueError: If the prompt has no token.
    """
    return _of_prompt(tokenizer, prompt, tokenizer(prompt).input_ids)


def _of_prompt(tokenizer: Any, prompt: str, ids: list[int]) -> list[int]:
    if ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(str(tokenizer.eos_token)):
        ids = ids[:-1]  # an EOS that the tokenizer appends to every text; in training the completion follows here
    if not ids:
        raise ValueError(f"the prompt {prompt!r} has no token: a prompt needs text, or a tokenizer that adds BOS")
    return ids


def tokenize_pairs(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], merge: bool = False
) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids of every prompt and its completion, split as SFTTrainer splits prompt + completion.

    Args:
        tokenizer: The tokenizer.
        pairs: Prompts and completions.
        merge: Whether tokens may merge across the boundary. SFTTrainer has the completion start where the tokens of
            both are no longer those of the prompt; no loss has the first token of a text.

    Raises:
        ValueError: If a prompt has no token, no token of a completion remains, or tokens merge that may not.
    """
    for start in range(0, len(pairs), _CHUNK):
        chunk = pairs[start : start + _CHUNK]
        prompts = tokenizer([prompt for prompt, _ in chunk]).input_ids
        texts = tokenizer([prompt + completion for prompt, completion in chunk]).input_ids
        for (prompt, completion), own, whole in zip(chunk, prompts, texts, strict=True):
            ids = _of_prompt(tokenizer, prompt, own)
            if len(own) > len(ids) and whole[-1] == tokenizer.eos_token_id:
                whole = whole[:-1]
            common = sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(ids, whole, strict=False)))
            common = max(common, 1) if merge else common
            if len(whole) <= common or (common < len(ids) and not merge):
                raise ValueError(
                    f"the tokens of prompt {prompt!r} are no prefix of those of prompt + completion {completion!r}: "
                    "end the prompt at a word and start the completion with a space"
                )
            yield whole[:common], whole[common:]


def context_length(model: Any, tokenizer: Any) -> int | None:
    """Tokens that the model takes: its ``max_position_embeddings``, else the tokenizer's limit, else None."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        return positions
    limit = getattr(tokenizer, "model_max_length", None)
    return limit if isinstance(limit, int) and limit < 10**9 else None  # transformers writes 10**30 for "none"


def _vocabulary(model: Any) -> int | None:
    """Rows of the input embedding; None where transformers finds none, or they are in other processes."""
    try:
        return len(model.get_input_embeddings().weight) or None
    except (AttributeError, NotImplementedError):
        return None


@dataclass
class Context:
    """The model's context and vocabulary, what happens to prompts that do not fit, and how many did not.

    Attributes:
        length: In tokens, prompt and completion together; None is no limit.
        bos: The token id that stays in front when the rest is cut, None if prompts start without one.
        long_prompts: "truncate" cuts from the left, because the question stands at the end; "refuse" raises.
        vocabulary: How many token ids the model has an embedding of; None is not known.
    """

    length: int | None
    bos: int | None = None
    long_prompts: str = "truncate"
    vocabulary: int | None = None
    _cut: set[tuple[int, ...]] = field(default_factory=set, repr=False)

    @property
    def truncated(self) -> int:
        """How many different prompts were cut so far."""
        return len(self._cut)

    def __post_init__(self) -> None:
        if self.long_prompts not in LONG_PROMPTS:
            raise ValueError(f"long_prompts={self.long_prompts!r}: choose one of {', '.join(LONG_PROMPTS)}")

    @classmethod
    def of(cls, model: Any, tokenizer: Any, long_prompts: str = "truncate") -> Context:
        """The context of a model and its tokenizer."""
        bos = getattr(tokenizer, "bos_token_id", None)
        return cls(context_length(model, tokenizer), bos, long_prompts, _vocabulary(model))

    def shorten(self, limit: int | None) -> None:
        """Make it no longer than ``limit``, if there is one."""
        self.length = min((n for n in (self.length, limit) if n is not None), default=None)

    def check(self, tokenizer: Any, rows: Iterable[list[int]]) -> None:
        """Refuse token ids that the model does not know.

        Raises:
            ValueError: Naming the last such token.
        """
        last = max((max(ids, default=0) for ids in rows), default=0)
        if self.vocabulary is not None and last >= self.vocabulary:
            raise ValueError(
                f"token {last} of the tokenizer ({tokenizer.convert_ids_to_tokens(last)}) is none of the "
                f"{self.vocabulary} that the model has an embedding of: take the model's own tokenizer, or "
                "resize_token_embeddings(len(tokenizer)) and save the model"
            )

    def fit(self, prompt: list[int], reserve: int) -> list[int]:
        """The prompt, or its end, so that ``reserve`` more tokens have room.

        Raises:
            ValueError: If it is too long and to be refused, or nothing of it would remain.
        """
        if self.length is None or len(prompt) + reserve <= self.length:
            return prompt
        keep = [prompt[0]] if prompt[0] == self.bos else []
        room = self.length - reserve - len(keep)
        if self.long_prompts == "refuse" or room < 1:
            remedy = "shorten it, or set long_prompts to truncate" if room >= 1 else "the completion leaves it no room"
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and a completion of {reserve} exceed the context of "
                f"{self.length} tokens: {remedy}"
            )
        self._cut.add(tuple(prompt))
        return keep + prompt[len(prompt) - room :]
