"""``molf compare``: which method, at which learning rate, for these data? A sweep, a table and a verdict."""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from ..files import of_option, write_json
from ..report.compare import RULE, Row, markdown, summarise, verdict
from ..tasks import get_task
from ..train.arguments import MethodArguments
from ..train.data import split
from ..train.run import load_training_tokenizer
from ..train.sweep import Run, plan, read_results, run_sweep
from .parser import Parser, check_threads, is_mapping, read_settings
from .train import fits, parse, type_name

DESCRIPTION = """Methods x learning rates x seeds on one task and model, from a YAML file or from options.

    molf compare --task world-fact --model_name_or_path DIR --methods fft lora molf --learning_rates 3e-4 1e-3

Learning rates are chosen on a validation split and reported on a test split. Every other option is one of molf train,
and goes to every run; in the YAML file a mapping ``per_method`` gives a method options of its own. A sweep that was
interrupted goes on where it stopped, and several processes may share one folder.
"""


_TYPES = {
    "methods": list[str], "learning_rates": list[float], "seeds": list[int], "output_dir": str, "workers": int,
    "threads": int, "keep_models": bool,
}  # fmt: skip


def run(argv: Sequence[str]) -> None:
    """Sweep what has no result yet, then write results.json, comparison.md and the verdict.

    Raises:
        ValueError: For bad options, and nothing is run then; or if no run ended well.
    """
    options, common, per_method = _options(argv)
    task = get_task(str(common.get("task") or "completion"))
    sizes = 0.5 if task.edits else 0.2
    common.setdefault("validation_size", sizes)
    common.setdefault("test_size", sizes)
    common = {"save_strategy": "no", "disable_tqdm": True, **common}
    runs = plan(options.methods, options.learning_rates, options.seeds, common, per_method)
    data = _check(runs)
    with of_option("dataset_path", data.dataset_path):  # what is bad here stops the sweep before its first run
        records = task.load(data.dataset_path, data.max_examples)
    if not (data.validation_size and data.test_size):
        raise ValueError(
            f"validation_size={data.validation_size:g} and test_size={data.test_size:g}: a comparison needs both parts"
        )
    split(task, records, data.validation_size, data.test_size, data.split_seed)
    folder = Path(options.output_dir)
    print(f"{len(runs)} runs: {', '.join(options.methods)} x {options.learning_rates} x seeds {options.seeds}")
    with of_option("output_dir", folder, "written"):
        folder.mkdir(parents=True, exist_ok=True)
    run_sweep(runs, folder, workers=options.workers, threads=options.threads, keep_models=options.keep_models)
    results = read_results(runs, folder)
    rows = summarise(results, task.primary)
    text = f"{markdown(rows, task.primary)}\n\n{verdict(rows, options.learning_rates)}\n"
    write_json(folder / "results.json", {"primary": task.primary, "rule": RULE, "rows": _plain(rows), "runs": results})
    (folder / "comparison.md").write_text(text)
    for result in results:
        if result["status"] != "done":
            arguments = result["arguments"]
            name = f"{arguments['method']} at {arguments['learning_rate']:g}, seed {arguments['seed']}"
            print(f"{result['status']}: {name}: {result['error']}")
    print(f"\n{text}\nresults: {folder}")
    if all(result["status"] != "done" for result in results):
        raise ValueError(f"none of {len(results)} runs ended well, the first because of: {results[0]['error']}")


def _check(runs: Sequence[Run]) -> MethodArguments:
    """Look at every method's options and tokenizer as ``molf train`` will: a typo stops the sweep before it starts.

    Returns:
        The arguments of one of the runs, which all have the same data.
    """
    firsts = {(run.method, run.learning_rate): run for run in runs}
    with tempfile.TemporaryDirectory() as folder:
        for run in firsts.values():
            path = Path(folder) / "train.yaml"
            path.write_text(yaml.safe_dump(run.arguments))
            method, args = parse(["--config", str(path)])
            load_training_tokenizer(method, args)
    return cast(MethodArguments, method)


def _options(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any], dict[str, dict[str, Any]]]:
    """The sweep's own options, those of every run, and those of single methods."""
    parser = Parser(prog="molf compare", description=DESCRIPTION)
    parser.add_argument("--config", type=Path, help="YAML file with any of these options")
    parser.add_argument("--methods", nargs="+", default=["fft", "lora", "molf", "molf-e"], help="methods of molf train")
    parser.add_argument("--learning_rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3], help="the same for all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of training")
    parser.add_argument("--output_dir", default="runs/compare", help="folder of the sweep")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="CPU threads, divided among the workers"
    )
    parser.add_argument("--keep_models", action="store_true", help="keep the trained weights")
    config = parser.parse_known_args(argv)[0].config
    settings = read_settings(config) if config else {}
    per_method = settings.pop("per_method", {})
    if not is_mapping(per_method) or not all(is_mapping(own) for own in per_method.values()):
        raise ValueError(f"per_method={per_method!r}: give a mapping from method to its options")
    for name, kind in _TYPES.items():
        if name in settings and not fits(settings[name], kind):
            raise ValueError(f"{name}={settings[name]!r}: give {type_name(kind)}")
    names = {action.dest for action in parser._actions}
    parser.set_defaults(**{key: value for key, value in settings.items() if key in names})
    options, rest = parser.parse_known_args(argv)
    for name in ("methods", "learning_rates", "seeds"):
        if not isinstance(getattr(options, name), list):
            raise ValueError(f"{name}={getattr(options, name)!r}: give a list")
    if options.workers < 1 or options.threads < 1:
        raise ValueError(f"workers={options.workers}, threads={options.threads}: must be at least 1")
    check_threads(options.threads)
    common = {key: value for key, value in settings.items() if key not in names} | _pairs(rest)
    return options, common, per_method


def _pairs(words: Sequence[str]) -> dict[str, Any]:
    """``--key value ...`` as a mapping; values as YAML reads them, several as a list, none as true."""
    pairs: dict[str, list[Any]] = {}
    key = None
    for word in words:
        if word.startswith("--"):
            key, _, value = word[2:].partition("=")
            pairs[key] = [_value(value)] if value else []
        elif key is None:
            raise ValueError(f"unknown option: {word}")
        else:
            pairs[key].append(_value(word))
    return {key: values[0] if len(values) == 1 else values or True for key, values in pairs.items()}


def _value(word: str) -> Any:
    """A word as YAML reads it; one that is not YAML, such as the regex "[qk]_proj", is a string, and "no" a word."""
    try:
        value = yaml.safe_load(word)
    except (yaml.YAMLError, ValueError):  # ValueError: a date that is none
        return word
    return word if isinstance(value, bool) and word.lower() not in ("true", "false") else value


def _plain(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows for JSON, which has no NaN: null where a method has no result."""
    return [
        {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in vars(row).items()}
        for row in rows
    ]
