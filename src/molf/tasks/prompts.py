"""Prompts as tokens: the one tokenisation of training, scoring and generation, and the model's context."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

LONG_PROMPTS = ("truncate", "refuse")


def appends_eos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts an EOS behind every text."""
    ids: list[int] = tokenizer("a").input_ids  # of no text, a BOS that is the same token would be the last
    return ids[-1:] == [tokenizer.eos_token_id]


def prompt_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt as SFTTrainer trains it: special tokens included, but no EOS behind it.

    Raises:
        ValueError: If the prompt has no token.
    """
    ids: list[int] = tokenizer(prompt).input_ids
    if ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(str(tokenizer.eos_token)):
        ids = ids[:-1]  # an EOS that the tokenizer appends to every text; in training the completion follows here
    if not ids:
        raise ValueError(f"the prompt {prompt!r} has no token: a prompt needs text, or a tokenizer that adds BOS")
    return ids


def tokenize_pair(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the completion, split as SFTTrainer splits prompt + completion.

    Raises:
        ValueError: If no token of the completion remains, or tokens merge across the boundary.
    """
    prompt_ids = prompt_tokens(tokenizer, prompt)
    whole: list[int] = tokenizer(prompt + completion).input_ids
    if len(tokenizer(prompt).input_ids) > len(prompt_ids) and whole[-1] == tokenizer.eos_token_id:
        whole = whole[:-1]
    if whole[: len(prompt_ids)] != prompt_ids or len(whole) == len(prompt_ids):
        raise ValueError(
            f"the tokens of prompt {prompt!r} are no prefix of those of prompt + completion {completion!r}: "
            "end the prompt at a word and start the completion with a space"
        )
    return prompt_ids, whole[len(prompt_ids) :]


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
            remedy = "shorten it, or set long_prompts to truncate" if room >= 1 else "ask for a shorter completion"
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and a completion of {reserve} exceed the context of "
                f"{self.length} tokens: {remedy}"
            )
        self._cut.add(tuple(prompt))
        return keep + prompt[len(prompt) - room :]
