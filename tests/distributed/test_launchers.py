"""torchrun and accelerate launch, as a user starts them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from train_programs import options

from molf.train.resume import last_checkpoint
from molf.train.verify import progress

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "molf"]
ACCELERATE = [str(Path(sys.executable).parent / "accelerate"), "launch", "--num_processes", "2"]


@contextmanager
def started(command: list[str], log: Path) -> Iterator[subprocess.Popen[str]]:
    """A process group of its own, which does not outlive the block; what it says goes to a file."""
    with log.open("w") as file:
        environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # for restarts with gloo (torch 2.13)
        process = subprocess.Popen(
            command, stdout=file, stderr=file, text=True, start_new_session=True, env=environment
        )
        try:
            yield process
        finally:
            for rank in (0, 1):
                if (found := pid_of(rank, process.pid)) is not None:
                    os.kill(found, signal.SIGKILL)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def pid_of(rank: int, launcher: int) -> int | None:
    """The process of a rank, among the children of its launcher."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children")
    for child in children.read_text().split() if children.exists() else ():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in environment:
            return int(child)
    return None


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")
def test_a_killed_process_ends_the_others_and_leaves_a_whole_checkpoint(tmp_path: Path, facts: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    steps = ["--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "2"]
    with started([*TORCHRUN, "train", *options("molf", facts, out, 10000, *steps)], log) as launcher:
        until = time.monotonic() + 90
        while not (out / "checkpoint-4").exists() and time.monotonic() < until and launcher.poll() is None:
            time.sleep(0.05)
        victim, other = (pid_of(rank, launcher.pid) for rank in (1, 0))
        assert victim, log.read_text()
        assert other, log.read_text()
        os.kill(victim, signal.SIGKILL)
        assert launcher.wait(timeout=30) != 0
    said = log.read_text()
    assert not Path(f"/proc/{other}").exists()
    assert "Signal 9 (SIGKILL)" in said
    assert len(re.findall("^molf: error: another process of this run has ended", said, re.MULTILINE)) <= 1
    assert said.count("molf: error") <= 1
    assert not re.search(r'File ".*/src/molf/(?!__main__)', said), said
    checkpoint = last_checkpoint(out)
    assert checkpoint is not None
    assert progress(Path(checkpoint))[0] >= 4


@pytest.mark.slow
def test_accelerate_launch(tmp_path: Path, facts: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    several = ["--multi_gpu", "--main_process_port", "0", "--module", "molf", "train"]
    with started([*ACCELERATE, *several, *options("molf", facts, out, 2, "--use_cpu", "true")], log) as launcher:
        assert launcher.wait(timeout=120) == 0, log.read_text()
    assert json.loads((out / "run.json").read_text())["processes"] == 2
    assert log.read_text().count(f"saved to {out}") == 1


@pytest.mark.slow
def test_accelerate_launch_on_cpus_is_refused(tmp_path: Path, facts: Path) -> None:
    """It would start one process."""
    out, log = tmp_path / "run", tmp_path / "log"
    command = [*ACCELERATE, "--cpu", "--quiet", "--module", "molf", "train", *options("molf", facts, out, 2)]
    with started(command, log) as launcher:
        assert launcher.wait(timeout=120) != 0
    assert "molf: error: accelerate launch --cpu starts one process" in log.read_text()
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")
def test_torchrun_restarts_and_auto_continues(tmp_path: Path, facts: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    steps = ["--save_strategy", "steps", "--save_steps", "2", "--resume_from_checkpoint", "auto", "--fsdp", "true"]
    restarting = [*TORCHRUN[:-2], "--max_restarts", "1", *TORCHRUN[-2:]]
    with started([*restarting, "train", *options("molf", facts, out, 30, *steps)], log) as launcher:
        until = time.monotonic() + 90
        while not (out / "checkpoint-4").exists() and time.monotonic() < until and launcher.poll() is None:
            time.sleep(0.05)
        victim = pid_of(1, launcher.pid)
        assert victim, log.read_text()
        os.kill(victim, signal.SIGKILL)
        assert launcher.wait(timeout=120) == 0, log.read_text()
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["steps"] == 30
    assert metrics["resumed_from"]
