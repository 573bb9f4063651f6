"""``molf report``: one HTML page of one or several runs, figures for a paper, or a recommendation."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..files import of_option, write_text
from ..report.advise import advise
from ..report.content import content, unfinished
from ..report.page import page
from ..report.runs import common_folder, read_runs
from .parser import Parser

DESCRIPTION = """One self-contained HTML page of one or several runs: loss and score, who won where and
when, memory, time and configuration.

    molf report runs/demo/fft runs/demo/molf
"""


def run(argv: Sequence[str]) -> None:
    """Read the runs and write what was asked for.

    Raises:
        ValueError: For bad options, or a folder that is no run.
        OSError: If a file cannot be read or written.
    """
    options = _options(argv)
    runs = read_runs(options.runs)
    for each in runs:
        if not each.finished:
            print(f"molf: {unfinished(each)}", file=sys.stderr)
    if options.advise:
        print(advise(runs[0]), end="")
        return
    if options.png is not None:
        from ..report.figures import write_figures

        with of_option("png", options.png, "written"):
            for path in write_figures(runs, options.png):
                _say_written(path)
    output = options.output or common_folder([each.folder for each in runs]) / "report.html"
    with of_option("output", output, "written"):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, page(content(runs)), errors="replace")  # a folder's name need not be UTF-8
    _say_written(output)


def _say_written(path: Path) -> None:
    print(f"written to {str(path).encode('utf-8', 'backslashreplace').decode()}")


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="molf report", description=DESCRIPTION)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="output_dir of a molf train, or a folder with a routing.jsonl"
    )
    parser.add_argument("--output", type=Path, help="the HTML file; default is report.html in the folder of the run(s)")
    parser.add_argument("--png", type=Path, metavar="DIR", help="also write the figures there, for a paper")
    parser.add_argument(
        "--advise",
        action="store_true",
        help="print a LoraConfig for plain PEFT from one run's routing, and write nothing",
    )
    options = parser.parse_args(argv)
    if options.advise and (len(options.runs) > 1 or options.output or options.png):
        raise ValueError("--advise takes one run and writes no file: leave the other runs, --output and --png out")
    if options.output is not None and options.output.is_dir():
        raise ValueError(f"output={options.output} is a folder: name a file")
    if options.png is not None and options.png.exists() and not options.png.is_dir():
        raise ValueError(f"png={options.png} is a file: name a folder")
    return options
