"""The server that forks ranks; see ``ranks.py``."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Launch = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def launch() -> Iterator[Launch]:
    """``launch(processes, task, *arguments)`` runs a task of ``ranks.py`` on every rank and returns what came of it."""
    command = [sys.executable, str(Path(__file__).parent / "ranks.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None

        def ask(
            processes: int, task: str, *arguments: Any, timeout: float = 120, fails: bool = False
        ) -> dict[str, Any]:
            request = {"processes": processes, "task": task, "arguments": arguments, "timeout": timeout}
            print(json.dumps(request, default=str), file=server.stdin, flush=True)
            answer = json.loads(server.stdout.readline())
            assert fails or not any(answer["status"]), answer["err"]
            return answer

        yield ask
        server.stdin.close()
