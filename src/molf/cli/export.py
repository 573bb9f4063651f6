"""``molf export``: a run as a merged model or as adapters, verified."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..export.make import DTYPES, FORMS, ExportOptions, export
from .parser import Parser

DESCRIPTION = """A run of molf train as files that others take.

    molf export runs/train --to merged --dtype bfloat16

merged: a whole transformers model. adapter: one PEFT adapter. experts: one PEFT adapter per LoRA expert of molf-e.
delta: the dense change of a whole model as one PEFT adapter of --rank R. The export is loaded anew and its logits are
compared with the trained model's before it takes its place; the difference is printed and in its README.md.
"""


def run(argv: Sequence[str]) -> None:
    """Export a run and print how near it is to the trained model.

    Raises:
        ValueError: For bad options, a run or base that cannot be read, or an export that is too far off.
        OSError: If the export cannot be written.
    """
    options = _options(argv)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    target = options.output_dir or options.run / f"export-{options.to}"
    chosen = ExportOptions(
        to=options.to,
        dtype=options.dtype,
        rank=options.rank,
        drop_other=options.drop_other,
        dequantize=options.dequantize,
        tolerance=options.tolerance,
        max_shard_size=options.max_shard_size,
    )
    report = export(options.run, target, chosen, base=options.base, trust_remote_code=options.trust_remote_code)
    print(summary(report))
    print(f"exported to {target}")


def summary(report: Mapping[str, Any]) -> str:
    """What was made, how much of the change it keeps, and how near it is to the trained model."""
    lines = [f"{report['to']} of {report['method']} on {report['base']}, {report['dtype']}"]
    if "energy" in report:
        lines += [f"  {name}  {100 * share:.2f} %" for name, share in report["energy"]["layers"].items()]
        lines.append(f"energy kept at rank {report['rank']}: {100 * report['energy']['total']:.2f} % of the change")
        if report["carried"]:
            lines.append(
                f"carried whole: {_few(report['carried'])}; servers that take LoRA alone refuse that: --drop_other "
                "leaves it out"
            )
        if report["dropped"]:
            lines.append(f"left out: {_few(report['dropped'])}; what that costs is in the difference")
    found = report["difference"]
    lines.append(
        f"loaded anew, on {report['prompts']} prompts of {report['source']}: max |Δ logit| {found['max_abs']:.3g} of "
        f"{found['max_logit']:.3g}, KL {found['kl']:.3g} nats per token"
    )
    if "base_difference" in report:
        lines.append(f"  (the base: KL {report['base_difference']['kl']:.3g} nats per token)")
    lines.append(f"tolerance: {report['tolerance_rule']}")
    return "\n".join(lines)


def _few(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="molf export", description=DESCRIPTION)
    parser.add_argument("run", type=Path, help="run directory of molf train")
    parser.add_argument("--to", required=True, choices=FORMS, help="what to make")
    parser.add_argument("--output_dir", type=Path, help="where it goes (default: RUN/export-FORM)")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="precision (auto: the run's)")
    parser.add_argument("--rank", type=int, help="delta: rank of the adapter")
    parser.add_argument("--drop_other", action="store_true", help="delta: leave out what a LoRA cannot hold")
    parser.add_argument("--dequantize", action="store_true", help="merged: allow it for a run on a quantised base")
    parser.add_argument("--tolerance", type=float, help="largest difference of a logit from the trained model")
    parser.add_argument("--max_shard_size", default="5GB", help="merged: size of one file")
    parser.add_argument("--base", help="folder or hub id of the base model, if it has moved")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    options = parser.parse_args(argv)
    if options.tolerance is not None and not 0 <= options.tolerance < math.inf:
        raise ValueError(f"tolerance={options.tolerance}: must be finite and not negative")
    return options
