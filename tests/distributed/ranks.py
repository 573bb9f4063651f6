"""Processes that work together, for tests: ``python ranks.py``, one JSON request per line on stdin.

This process imports everything once and forks for every rank: a launch then takes seconds, not a quarter of a minute.
What the launcher would set is in the environment of each; what they print goes to a file of each.

Request: {"processes": n, "task": name, "arguments": [...], "timeout": seconds}; the names are in ``TASKS``.
Answer: {"status": [exit status of each rank, or minus a signal], "out": [...], "err": [...]}.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

import molf.cli.train
from molf.train.distributed import first_error, from_first
from molf.train.run import train

TASKS: dict[str, Callable[..., Any]] = {}


def task(function: Callable[..., Any]) -> Callable[..., Any]:
    TASKS[function.__name__] = function
    return function


@task
def cli(*argv: str) -> int:
    return molf.cli.main(list(argv))


@task
def script(path: str, *argv: str) -> None:
    sys.argv = [path, *argv]
    runpy.run_path(path, run_name="__main__")


class _Dump(TrainerCallback):
    """Every rank's weights and optimizer state at the end of training."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any):
        found = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(found, f"{self.folder}/rank{args.process_index}.pt")


@task
def train_and_dump(folder: str, *argv: str) -> None:
    train(*molf.cli.train.parse(argv), [_Dump(folder)])


@task
def agree(folder: str, broken: int) -> None:
    """What ``first_error`` and ``from_first`` give to every rank."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    error = first_error(ValueError(f"of rank {rank}") if rank == broken else None)
    found = {"none": first_error(None), "error": str(error), "first": from_first(lambda: f"by {rank}")}
    Path(folder, f"rank{rank}.json").write_text(json.dumps(found))


class _Killed(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.process_index == 1 and state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


@task
def train_and_kill(step: int, *argv: str) -> None:
    """The second rank ends by SIGKILL after a number of steps."""
    train(*molf.cli.train.parse(argv), [_Killed(step)])


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _rank(rank: int, request: dict[str, Any], port: int, files: list[Path]) -> int:
    """One rank, in a process of its own; returns its exit status."""
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(request["processes"]),
        "LOCAL_WORLD_SIZE": str(request["processes"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    try:
        status = TASKS[request["task"]](*request["arguments"]) or 0
    except BaseException:  # noqa: BLE001  this is the end of a process
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def launch(request: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        count, port = request["processes"], _free_port()
        files = [[Path(folder, f"{name}{rank}") for name in ("out", "err")] for rank in range(count)]
        children = []
        for rank in range(count):
            child = os.fork()
            if child == 0:
                os._exit(_rank(rank, request, port, files[rank]))
            children.append(child)
        status = _wait(children, request["timeout"])
        out, err = ([pair[i].read_text() if pair[i].exists() else "" for pair in files] for i in (0, 1))
        return {"status": status, "out": out, "err": err}


def _wait(children: list[int], timeout: float) -> list[int]:
    """As a launcher does: where one fails, or time runs out, the others are ended."""
    end = time.monotonic() + timeout
    found: dict[int, int] = {}
    while len(found) < len(children):
        for child in set(children) - found.keys():
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                found[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end or any(found.values()):
            for child in set(children) - found.keys():
                os.kill(child, signal.SIGKILL if time.monotonic() > end else signal.SIGTERM)
        time.sleep(0.02)
    return [found[child] for child in children]


if __name__ == "__main__":
    torch.set_num_threads(1)
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the ranks print is no answer
    for line in requests:
        print(json.dumps(launch(json.loads(line))), file=answers, flush=True)
