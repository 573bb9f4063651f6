"""Batches of forward passes that get smaller where memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from ..errors import out_of_memory
from ..optim.sharding import is_sharded

Item = TypeVar("Item")
Result = TypeVar("Result")

TOKENS = 2**13
"""Tokens of a batch at most, with padding: in fp32 the logits of 150,000 words for each of them are 5 GB."""


def in_batches(
    run: Callable[[Sequence[Item]], Result],
    items: Sequence[Item],
    batch_size: int,
    model: Any,
    tokens: Callable[[Item], int] = lambda _: 1,
) -> Iterator[tuple[Sequence[Item], Result]]:
    """Run over the items in batches; one that memory is too small for is run again in halves, as are those behind it.

    Args:
        run: What is done with a batch; it leaves nothing behind when it fails.
        items: All items, the largest first.
        batch_size: Items per batch at first.
        model: What ``run`` calls. A sharded one is not called again: the other processes would be in another layer.
        tokens: Of an item how many tokens have logits, all of which a batch holds at once.

    Yields:
        Every batch and its result, in the order of the items.
    """
    start = 0
    while start < len(items):
        batch = items[start : start + max(1, min(batch_size, TOKENS // tokens(items[start])))]
        try:
            result = run(batch)
        except (MemoryError, RuntimeError) as error:
            if len(batch) == 1 or not out_of_memory(error) or is_sharded(model):
                raise
            batch_size = len(batch) // 2
        else:
            start += len(batch)
            yield batch, result
