"""Write docs/api.md from the docstrings of the public names.

python scripts/api_page.py            # rewrite
python scripts/api_page.py --check    # exit status 1 if the page is not what the docstrings say
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from pathlib import Path
from typing import Any

import molf
from molf.train import callbacks

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
METHODS = {
    "MoLFAdamW": ("step", "state_dict", "load_state_dict", "sync_weights"),
    "RoutingRecorder": ("record", "close"),
}
PROPERTIES = {"MoLFAdamW": ("routing", "routed_modules", "experts", "steps_taken"), "MoLFConfig": ("experts", "scales")}


def page() -> str:
    """The whole page."""
    lines = ["# API", "", "From the docstrings, by `python scripts/api_page.py`. `import molf` needs torch alone.", ""]
    for name in molf.__all__:
        lines += entry(name, getattr(molf, name))
    lines += ["## For Trainers", "", "In `molf.train.callbacks`; they need the `train` extra.", ""]
    for name in ("RoutingCallback", "SpeedCallback", "before_loggers"):
        lines += entry(name, getattr(callbacks, name))
    return "\n".join(lines).rstrip() + "\n"


def entry(name: str, item: Any) -> list[str]:
    """A public name with its signature and docstring, its fields, and its methods with their first lines."""
    lines = [f"## {name}", "", "```text", f"{name}{signature(item)}", "", inspect.getdoc(item) or "", "```", ""]
    for field in dataclasses.fields(item) if dataclasses.is_dataclass(item) else ():
        lines.append(f"* `{field.name}`: {field.metadata['help']}")
    for method in METHODS.get(name, ()):
        function = getattr(item, method)
        lines.append(f"* `{method}{signature(function)}`: {first_line(function)}")
    for name_of_property in PROPERTIES.get(name, ()):
        found = inspect.getattr_static(item, name_of_property, None)
        lines.append(
            f"* `{name_of_property}`: {first_line(found) if found else 'names of the experts, in index order.'}"
        )
    return [*lines, ""] if lines[-1] else lines


def signature(item: Any) -> str:
    """Parameters without types, or nothing where there is no signature of its own."""
    if inspect.isclass(item) and issubclass(item, BaseException):
        return ""
    parameters = [p for p in inspect.signature(item).parameters.values() if p.name != "self"]
    parts = [str(p.replace(annotation=inspect.Parameter.empty)) for p in parameters]
    return f"({', '.join(parts)})"


def first_line(item: Any) -> str:
    """The first line of its docstring."""
    return (inspect.getdoc(item) or "").split("\n")[0]


def main() -> int:
    """Rewrite the page, or compare with it."""
    if "--check" in sys.argv[1:]:
        return int(page() != PAGE.read_text())
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
