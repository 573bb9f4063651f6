"""``molf demo``: the bundled model learns counterfactual facts of its world by every method.

Each method is one ``molf train`` in a process of its own, so that its peak memory is its own, and leaves a run
directory like any other. The settings were chosen once for the bundled model and are printed in each ``run.json``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..assets import BUNDLED_MODEL
from ..files import of_option, write_json
from ..table import aligned
from ..world import counterfactual_edits, make_world
from .parser import Parser

METHODS: dict[str, list[str]] = {
    "fft": ["--learning_rate", "1e-3"],
    "lora": ["--learning_rate", "3e-3", "--expert_ranks", "16"],
    "molf": ["--learning_rate", "1e-3", "--expert_ranks", "16"],
    "molf-e": ["--learning_rate", "3e-3", "--expert_ranks", "4", "16"],
}
"""What differs between the methods; they share the edits, epochs, batch, schedule and seed."""

COLUMNS = ("method", "score", "efficacy", "paraphrase", "neighbours", "loss", "seconds", "peak MiB", "dense wins")

RECORD = "demo.json"
"""The results, empty before there are any; what tells a demo's folder from any other."""


def run(argv: Sequence[str]) -> None:
    """Train by every method, print one table, and write it to ``demo.json``.

    Raises:
        ValueError: For bad options.
        ChildProcessError: If a method fails.
    """
    parser = Parser(prog="molf demo", description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="where models and logs go")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="methods to run")
    parser.add_argument("--edits", type=int, default=300, help="number of counterfactual edits")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the edits")
    parser.add_argument("--seed", type=int, default=0, help="seed of the edits and of training")
    options = parser.parse_args(argv)
    if options.epochs < 1:
        raise ValueError(f"--epochs {options.epochs}: must be at least 1")
    if len(set(options.methods)) < len(options.methods):
        raise ValueError(f"--methods {' '.join(options.methods)}: one is named twice; name each once")
    edits = counterfactual_edits(make_world(), options.edits, options.seed)
    with of_option("output_dir", options.output_dir, "written"):
        _take(options.output_dir, options.methods)
    data = options.output_dir / "edits.json"
    data.write_text(json.dumps(edits, indent=1))
    config = options.output_dir / "train.yaml"
    config.write_text(yaml.safe_dump(_settings(data, options), sort_keys=False))
    print(f"{len(edits)} counterfactual edits of the world that {BUNDLED_MODEL.name} knows, e.g.")
    print("  " + _example(edits[0]))
    results = []
    for method in options.methods:
        out = options.output_dir / method
        print(f"\n== {method}: molf train --config {config} --method {method} {' '.join(METHODS[method])}", flush=True)
        command = [sys.executable, "-m", "molf", "train", "--config", str(config), "--method", method]
        done = subprocess.run([*command, *METHODS[method], "--output_dir", str(out)], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise ChildProcessError(f"{method} ended with status {done.returncode}; its error is above")
        print(done.stdout.split("\n{")[0])
        results.append(json.loads((out / "metrics.json").read_text()))
    write_json(options.output_dir / RECORD, results)
    print("\n" + table(results))
    print(f"\nmodels, metrics and routing logs: {options.output_dir}")
    print(f"as one page: molf report {' '.join(str(options.output_dir / method) for method in options.methods)}")


def _take(folder: Path, methods: Sequence[str]) -> None:
    """Mark the folder as a demo's, or remove the runs of an earlier demo.

    Raises:
        ValueError: If it holds what a demo writes, and is no demo's.
        OSError: If it cannot be written.
    """
    if not _is_demo(folder / RECORD):
        for path in (folder / name for name in (RECORD, "edits.json", "train.yaml", *methods)):
            if path.exists():
                raise ValueError(f"--output_dir {folder}: {path} is there and not a demo's; choose another folder")
        write_json(folder / RECORD, [])
    for method in methods:
        if (folder / method / "run.json").is_file():
            shutil.rmtree(folder / method)


def _is_demo(record: Path) -> bool:
    if not record.is_file():
        return False
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(found, list) and all(isinstance(row, dict) and row.get("method") in [*METHODS] for row in found)


def _settings(data: Path, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "model_name_or_path": str(BUNDLED_MODEL),
        "task": "fact",
        "dataset_path": str(data),
        "num_train_epochs": options.epochs,
        "per_device_train_batch_size": 16,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_strategy": "epoch",
        "seed": options.seed,
    }


def _example(record: dict[str, Any]) -> str:
    rewrite = record["requested_rewrite"]
    prompt = rewrite["prompt"].format(rewrite["subject"])
    return f"{prompt!r}: {rewrite['target_true']['str']} -> {rewrite['target_new']['str']}"


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as an aligned text table; scores and dense wins in percent, loss in nats per token."""
    rows = [COLUMNS]
    for r in results:
        share = r.get("expert_share", {}).get("dense")
        rows.append(
            (
                r["method"],
                *(f"{r[key]:.1f}" for key in ("score", "efficacy", "paraphrase", "neighbourhood")),
                f"{r['train_loss']:.3f}",
                f"{r['seconds']:.1f}",
                f"{r['peak_memory_mib']:.0f}",
                "-" if share is None else f"{100 * share:.1f}",
            )
        )
    return aligned(rows, right=range(1, len(COLUMNS)))
