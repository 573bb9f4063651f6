"""Rewrite the measured parts of README.md and docs from the JSON files in ``benchmarks/results``.

python benchmarks/tables.py            # rewrite
python benchmarks/tables.py --check    # exit status 1 if a page or the figure is not what the results say
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import performance

from molf.cli.demo import table
from molf.report.compare import markdown, summarise, verdict

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def fact_stories3m() -> str:
    """Mean ± sd over seeds of every method; fails when a run is missing."""
    data = json.loads((RESULTS / "fact_stories3m.json").read_text())
    runs: dict[str, list[dict[str, Any]]] = {}
    for run in data["runs"]:
        runs.setdefault(run["method"], []).append(run)
    seeds = sorted({run["seed"] for run in data["runs"]})
    columns = ("exact_match", "efficacy", "paraphrase", "neighbourhood")
    lines = [
        "| method | options | exact match | efficacy | paraphrase | neighbourhood | dense wins |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in ("fft", "lora", "molf", "molf-e"):
        if sorted(run["seed"] for run in runs[method]) != seeds:
            raise ValueError(f"{method} has not the seeds {seeds}: run benchmarks/fact_stories3m.py")
        cells = [spread([run["metrics"][column] for run in runs[method]]) for column in columns]
        shares = [run["metrics"].get("expert_share", {}).get("dense") for run in runs[method]]
        dense = "-" if None in shares else spread([100 * share for share in shares])
        cells.append(dense)
        lines.append(f"| {method} | `{runs[method][0]['arguments']}` | {' | '.join(cells)} |")
    versions = data["runs"][0]["versions"]
    note = (
        "\nA 3.1 M-parameter Llama pretrained on stories (stories3M) after 1,000 real CounterFact facts, 8 epochs, "
        f"batch 32: percent, mean ± sd of seeds {', '.join(map(str, seeds))}; exact match is greedy decoding of the "
        "new fact. Learning rates were fixed beforehand: this shows what the commands do, it does not rank them. "
        f"Each run on one thread of a shared CPU, torch {versions['torch']}, transformers {versions['transformers']}, "
        f"peft {versions['peft']}, trl {versions['trl']}. `python benchmarks/fact_stories3m.py` makes it again."
    )
    return "\n".join([*lines, note])


def spread(values: list[float]) -> str:
    """Mean ± sd, one decimal."""
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def demo() -> str:
    """The demo's table as it was printed here."""
    data = json.loads((RESULTS / "readme_commands.json").read_text())
    versions = data["versions"]
    note = f"Seed 0, {versions['device']} of a shared machine, torch {versions['torch']}; {data['demo_seconds']:.0f} s."
    return f"```text\n{table(data['demo'])}\n```\n\n{note}"


def train() -> str:
    """What the README's ``molf train`` printed here."""
    return f"```text\n{json.loads((RESULTS / 'readme_commands.json').read_text())['train']}\n```"


def compare_stories3m() -> str:
    """Table and verdict of the committed sweep, made again from its runs."""
    data = json.loads((RESULTS / "compare_stories3m.json").read_text())
    rows = summarise(data["runs"], data["primary"])
    rates = sorted({run["arguments"]["learning_rate"] for run in data["runs"]})
    sentences = "\n".join(f"> {line}  " for line in verdict(rows, rates).splitlines())
    return f"{markdown(rows, data['primary'])}\n\n{sentences}"


def lr_scale() -> str:
    """Final training loss by the product of learning rate and scale, as a multiple of the smallest product's."""
    data = json.loads((RESULTS / "lr_scale.json").read_text())
    runs = {(r["model"], r["method"], r["scale"] * r["lora_lr"]): r["losses"][-1] for r in data["runs"]}
    products = sorted({key[2] for key in runs})
    columns = list(dict.fromkeys(key[:2] for key in runs))
    lines = [
        "| `lora_lr` x scale | " + " | ".join(f"{method}, {model}" for model, method in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for product in products:
        cells = [f"{runs[(*c, product)]:.2f} ({runs[(*c, product)] / runs[(*c, products[0])]:.1f}x)" for c in columns]
        lines.append(f"| {product:.3g} | {' | '.join(cells)} |")
    versions = data["versions"]
    dense = [100 * r["dense_share"] for r in data["runs"] if r["method"] == "molf"]
    note = (
        "\nTraining loss over the last 12 of 96 steps, and its multiple of the first line's: 128 facts of the bundled "
        "world, rank 16, one seed; MoLF's dense expert at 1e-3, scale 2 or 11.3; it won "
        f"{min(dense):.1f} to {max(dense):.1f} % of the decisions. CPU, "
        f"torch {versions['torch']}, transformers {versions['transformers']}. `python benchmarks/lr_scale.py` makes it "
        "again."
    )
    return "\n".join([*lines, note])


def filled(text: str, makers: Sequence[Callable[[], str]]) -> str:
    """The page with every part between its markers made again."""
    for make in makers:
        name = make.__name__
        begin, end = f"<!-- begin: {name} -->\n", f"<!-- end: {name} -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}{make()}\n{end}{rest.split(end)[1]}"
    return text


def main() -> int:
    """Rewrite the pages and the figure, or compare with them."""
    pages = {
        ROOT / "README.md": (fact_stories3m, demo, train, compare_stories3m),
        ROOT / "docs" / "tuning.md": (lr_scale,),
        ROOT / "docs" / "performance.md": performance.TABLES,
    }
    texts = {path: filled(path.read_text(), makers) for path, makers in pages.items()}
    if "--check" in sys.argv[1:]:
        drawn = performance.FIGURE.exists() and performance.digest() in performance.FIGURE.read_text()
        return int(not drawn or any(text != path.read_text() for path, text in texts.items()))
    for path, text in texts.items():
        path.write_text(text)
    performance.draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
