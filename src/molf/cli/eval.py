"""``molf eval``: a task's metrics of a model, wherever it was trained."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..files import of_option, write_json
from ..tasks import TASKS, get_task
from ..train.load import check_revision, load_trained, naming, versions
from ..train.quantize import quantized_as
from .parser import Parser

DESCRIPTION = """The metrics of a task, for a transformers folder, a hub id or a PEFT adapter.

    molf eval --model DIR --task world-fact --output metrics.json

Model and prompts are as molf train has them at the end of a run, so the metrics of a run's folder are those of its
metrics.json, as long as precision and device are the same. The base of a run is quantised as it was in training.
"""


def run(argv: Sequence[str]) -> None:
    """Evaluate, print a table and maybe write it.

    Raises:
        ValueError: For bad options, data or weights.
        OSError: If model or data cannot be read.
    """
    options = _options(argv)
    task = get_task(options.task)
    with of_option("dataset_path", options.dataset_path):
        records = task.load(options.dataset_path, options.max_examples)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    hub = {"revision": options.model_revision, "trust_remote_code": options.trust_remote_code}
    found = None if options.use_cpu else torch.accelerator.current_accelerator(check_available=True)
    device = found or torch.device("cpu")
    quantization, quantized = quantized_as(Path(options.model), device)
    with naming(options.model):
        model, tokenizer = load_trained(options.model, options.dtype, options.eos_token, quantized, **hub)
    model = model.to(device).eval()
    metrics = task.evaluate(model, tokenizer, records, batch_size=options.batch_size)
    print(f"{options.model}: {len(records)} records of {task.name}\n{table(metrics, task.primary)}")
    if quantized:
        print(f"on a base quantised to {quantization}, as in training")
    if options.output is not None:
        report = {
            "model": options.model,
            "model_revision": options.model_revision,
            "task": task.name,
            "dataset_path": options.dataset_path,
            "records": len(records),
            "dtype": options.dtype,
            "quantization": quantization,
            "device": str(device),
            "primary": task.primary,
            "metrics": metrics,
            "versions": versions(),
        }
        with of_option("output", options.output, "written"):
            write_json(options.output, report)
        print(f"written to {options.output}")


def table(metrics: Mapping[str, float], primary: str) -> str:
    """The metrics as aligned lines, the primary one first; shares in percent, counts as whole numbers.

    Example:
        >>> print(table({"efficacy": 100.0, "score": 71.25, "truncated_prompts": 3}, "score"))
        score               71.250
        efficacy           100.000
        truncated_prompts        3
    """
    names = [primary, *(name for name in metrics if name != primary)]
    values = [f"{metrics[name]:.3f}" if isinstance(metrics[name], float) else str(metrics[name]) for name in names]
    left, right = max(map(len, names)), max(map(len, values))
    return "\n".join(f"{name:{left}}  {value:>{right}}" for name, value in zip(names, values, strict=True))


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="molf eval", description=DESCRIPTION)
    parser.add_argument("--model", required=True, help="transformers folder, hub id, or PEFT adapter")
    parser.add_argument("--model_revision", default="main", help="revision on the hub")
    parser.add_argument("--task", required=True, help=f"one of {', '.join(TASKS)}")
    parser.add_argument("--dataset_path", help="the task's file, folder or hub id[:split]")
    parser.add_argument("--max_examples", type=int, help="at most this many records, from the start of the data")
    parser.add_argument("--batch_size", type=int, default=64, help="prompts per forward pass")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "auto"), default="float32", help="precision (auto: as stored)"
    )
    parser.add_argument("--eos_token", help="end token, for a tokenizer without one")
    parser.add_argument("--use_cpu", action="store_true", help="even where there is an accelerator")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--output", type=Path, help="JSON file for metrics and versions")
    options = parser.parse_args(argv)
    for name in ("max_examples", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    check_revision(options.model, options.model_revision)
    if options.output is not None and options.output.is_dir():
        raise ValueError(f"output={options.output} is a folder: name a file")
    if options.output is not None:
        there = next(folder for folder in options.output.absolute().parents if folder.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise ValueError(f"output={options.output}: {there} is no folder to write to; name another one")
    return options
