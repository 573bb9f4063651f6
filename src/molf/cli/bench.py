"""``molf bench step|train|memory``: what a step of each optimizer costs, side by side in one run."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from ..bench.contenders import DEFAULTS, KINDS, Contender, default_contenders
from ..bench.device import copy_bandwidth
from ..bench.environment import environment, load
from ..bench.memory import measure_apart
from ..bench.presets import PRESETS, Settings, get_preset
from ..bench.results import Results
from ..bench.timing import interleave, say
from ..bench.workload import OptimizerStep, TrainStep
from ..files import of_option
from .parser import Parser, check_threads

DESCRIPTION = """Time or weigh optimizers on a model with random weights: nothing is downloaded.

    molf bench step   --preset cpu-small --out step.json     optimizer.step() alone, on fixed gradients
    molf bench train  --preset cpu-small --out train.json    forward, backward, step, zero_grad on random tokens
    molf bench memory --preset cpu-small --out memory.json   peak memory of training steps, a process for each

Contenders take turns within every round, A B C A B C ..., and are divided by the baselines round by round: compare
ratios, not milliseconds. Each is NAME[@PRESET][:OPTIONS], such as molf@cpu-deep, molf:expert_ranks=[32,32],top_k=2 or
torch.optim:SGD:{"lr": 0.1}; OPTIONS are fields of MoLFConfig, or the optimizer's arguments. Names:

"""


def run(argv: Sequence[str]) -> None:
    """Measure, keep the result file up to date after every measurement, and print a table.

    Raises:
        ValueError: For bad options; nothing is measured then.
        ChildProcessError: If a process that measures memory fails.
    """
    options = parse(argv)
    settings = _settings(options)
    labels = options.contenders or default_contenders(options.bench, settings.dtype)
    contenders = [Contender.parse(label, options.preset) for label in labels]
    for contender in contenders:
        contender.check(settings)
        if contender.config(settings).step_in_backward and (options.bench == "step" or settings.accumulation > 1):
            raise ValueError(
                f"contender {contender.label!r}: with step_in_backward the step is made in the backward pass, of which "
                "there has to be one: use molf bench train with --accumulation 1"
            )
    baselines = _baselines(options.baseline, labels)
    if options.threads:
        check_threads(options.threads)
        torch.set_num_threads(options.threads)
    stamp = environment(settings.device, settings.seed, [shlex.quote(word) for word in argv])
    header: dict[str, Any] = {"settings": {**asdict(settings), "warmup": options.warmup}, "environment": stamp}
    tokens = settings.batch * settings.length * settings.accumulation if options.bench == "train" else 0
    results = Results(options.out, options.bench, header, labels, baselines, tokens)
    with of_option("out", options.out, "written"):
        results.write()
    if options.bench == "memory":
        _weigh(contenders, settings, results, options.rounds or 1)
    else:
        workload = OptimizerStep if options.bench == "step" else TrainStep
        results.header["copy_gb_per_s"] = copy_bandwidth(settings.device)
        interleave(
            contenders,
            lambda contender: workload(contender, settings),
            results,
            rounds=options.rounds or 9,
            warmup=options.warmup,
            turns=options.turns,
        )
    stamp["load_at_end"] = load()
    results.complete = True
    results.write()
    print(f"{results.table()}\n\nresults: {options.out}")


def _weigh(contenders: Sequence[Contender], settings: Settings, results: Results, rounds: int) -> None:
    for number in range(rounds):
        for contender in contenders:
            label = contender.label
            measured = measure_apart(contender, settings, torch.get_num_threads())
            if "error" in measured:
                results.add_facts(label, measured)
            else:
                results.add_facts(label, measured["facts"])
                results.add_round(label, measured["parts"])
            say(f"round {number + 1}/{rounds}: {label}: {measured.get('error') or results.totals(label)[-1]}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line's options.

    Raises:
        ValueError: For an option that is unknown, missing or out of its range.
    """
    names = "\n".join(f"  {name:16} {kind.help}" for name, kind in KINDS.items())
    parser = Parser(prog="molf bench", description=DESCRIPTION + names)
    add = parser.add_argument
    add("bench", choices=DEFAULTS, help="what to measure")
    add("--preset", required=True, choices=PRESETS, help="the model's shape")
    add("--out", required=True, type=Path, help="the result file, JSON")
    add("--contenders", nargs="+", help="what to compare; see above")
    add("--baseline", nargs="+", help="contenders that all are divided by; default: fft, fft-amp and lora")
    add("--rounds", type=_count, help="default 9, or 1 for memory")
    add(
        "--warmup",
        type=_count,
        default=3,
        help="steps before the rounds, told apart; at least 2, default 3",
    )
    add("--steps", type=_count, help="steps per round; default 5 for step, 1 for train")
    add("--turns", type=int, default=0, help="build contenders one at a time, N times over, where not all fit at once")
    add("--threads", type=_count, help="CPU threads; default: torch's")
    add("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    add("--dtype", choices=["float32", "bfloat16"], help="of the weights; default: the preset's")
    add("--batch", type=_count, help="sequences per forward pass; default: the preset's")
    add("--length", type=_count, help="tokens per sequence; default: the preset's")
    add("--ranks", nargs="+", type=_count, help="of MoLF's LoRA experts; default: the preset's")
    add(
        "--efficient_ranks",
        nargs="+",
        type=_count,
        help="of MoLF-Efficient's; their sum is LoRA's",
    )
    add("--accumulation", type=_count, default=1, help="forward and backward passes per step")
    add("--gradient_checkpointing", action="store_true", help="compute activations again in the backward pass")
    add("--seed", type=int, default=0, help="of weights, tokens and gradients")
    options = parser.parse_args(argv)
    if options.out.is_dir():
        raise ValueError(f"--out {options.out} is a folder: name a file")
    return options


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: must be at least 1")
    return value


def _settings(options: argparse.Namespace) -> Settings:
    """The run's settings: what is not given is the preset's, or follows from the bench."""
    preset = get_preset(options.preset)
    given = {field.name: getattr(options, field.name) for field in fields(Settings)}
    default = {
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "steps": 5 if options.bench == "step" else 1,
        **{name: getattr(preset, name) for name in ("dtype", "batch", "length", "ranks", "efficient_ranks")},
    }
    settings = Settings(**{**default, **{name: value for name, value in given.items() if value is not None}})
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is none; use --device cpu")
    if options.warmup < 2:
        raise ValueError(f"--warmup {options.warmup}: give at least 2, one that LoRA wins and one as later ones are")
    if options.turns < 0:
        raise ValueError(f"--turns {options.turns}: must not be negative")
    return settings


def _baselines(given: Sequence[str] | None, labels: Sequence[str]) -> list[str]:
    if len(set(labels)) < len(labels):
        raise ValueError(f"--contenders {' '.join(labels)}: one is named twice")
    missing = [name for name in given or () if name not in labels]
    if missing:
        raise ValueError(f"--baseline {missing[0]}: choose one of the contenders {', '.join(labels)}")
    usual = [name for name in ("fft", "fft-amp", "lora") if name in labels]
    return list(given or usual or labels[:1])
