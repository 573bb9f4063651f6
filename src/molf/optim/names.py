"""Layer and projection of a module, from its name: what tables and figures are arranged by."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


def places(modules: Sequence[str]) -> list[tuple[int | None, str]]:
    """Layer number and projection of every module.

    The layer is the first number in the name; the projection is the shortest ending that tells the modules of a layer
    apart. A module without a number has no layer.

    Example:
        >>> places(["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"])
        [(0, 'q_proj'), (1, 'q_proj')]
        >>> places(["h.0.attn.c_proj", "h.0.mlp.c_proj"])
        [(0, 'attn.c_proj'), (0, 'mlp.c_proj')]
    """
    layers, kinds = [], []
    for name in modules:
        found = _NUMBER.search(name)
        layers.append(int(found[1]) if found else None)
        kinds.append(name if found is None else f"{name[: found.start(1)]}*{name[found.end(1) :]}")
    endings = {kind: _ending(kind, set(kinds) - {kind}) for kind in set(kinds)}
    return [(layer, endings[kind]) for layer, kind in zip(layers, kinds, strict=True)]


def _ending(kind: str, others: set[str]) -> str:
    parts = kind.split(".")
    for length in range(1, len(parts)):
        ending = ".".join(parts[-length:])
        if parts[-length] != "*" and not any(other == ending or other.endswith(f".{ending}") for other in others):
            return ending
    return kind
