"""Runs of ``molf train`` that are killed: ``python kill_run.py``, one JSON request per line on stdin.

This process imports everything once and forks for every run, which then costs a second and not ten. A run counts what
it does to files of its output directory (opens for writing, renames, removals: Python's audit events); the event that
was asked for is reported, and after a delay this process ends the run with SIGKILL.

Request: {"argv": [...], "event": n or null, "delay": seconds}. Answer: {"status": exit status or -9, "events": count}.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from typing import Any

import torch

import molf.cli.train

_FILES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")


def run(argv: list[str], event: int | None, report: int) -> int:
    """Train; the event's number and in the end the count of events go to ``report``."""
    out = argv[argv.index("--output_dir") + 1]
    count = 0

    def hook(name: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        writes = name == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or name in _FILES) and str(args[0]).startswith(out):
            if count == event:
                os.write(report, b"now\n")
                select.select([], [], [], 0.001)  # so that a kill without delay falls on this very event
            count += 1

    sys.addaudithook(hook)
    status = molf.cli.main(argv)
    os.write(report, f"{count}\n".encode())
    return status


def killed_run(argv: list[str], event: int | None, delay: float) -> dict[str, int]:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        os._exit(run(argv, event, write))
    os.close(write)
    said = ""
    while part := os.read(read, 100).decode():
        said += part
        if part == "now\n":
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
    os.close(read)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {"status": status, "events": int(said.split()[-1]) if said and said.split()[-1].isdecimal() else -1}


if __name__ == "__main__":
    torch.set_num_threads(1)
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the runs print is no answer
    for line in requests:
        print(json.dumps(killed_run(**json.loads(line))), file=answers, flush=True)
