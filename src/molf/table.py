"""A table for a terminal."""

from __future__ import annotations

from collections.abc import Container, Sequence


def aligned(rows: Sequence[Sequence[str]], right: Container[int]) -> str:
    """Rows as columns of equal width, a line under the first.

    Args:
        rows: Of equal length, the first with the names of the columns.
        right: The columns that are aligned at their right.

    Example:
        >>> print(aligned([("method", "score"), ("fft", "9.5")], right=[1]))
        method  score
        -------------
        fft       9.5
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0].rstrip(), "-" * max(map(len, lines)), *(line.rstrip() for line in lines[1:])])
