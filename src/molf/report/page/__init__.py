"""The report's page: HTML, CSS and JavaScript, put together with the data into one file that needs no network."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent


def page(content: dict[str, Any]) -> str:
    """One self-contained HTML page of a report's content; see ``molf.report.content``.

    Text of runs reaches the page in two ways only: as JSON in which "<" is escaped, and as the escaped title.
    """
    from plotly.offline import get_plotlyjs

    parts = {name: (_FOLDER / f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    filled = {
        "title": html.escape(content["title"]),
        "css": parts["css"],
        "data": json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        "plotly": get_plotlyjs(),
        "js": parts["js"],
    }
    pieces = []
    for piece in parts["html"].split("{{"):  # each mark is filled once, so that nothing in the data is taken for one
        name, mark, rest = piece.partition("}}")
        pieces.append(filled[name] + rest if mark else piece)
    return "".join(pieces)
