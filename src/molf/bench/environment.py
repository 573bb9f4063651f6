"""Where and with what a measurement was made."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_VARIABLES = ("OMP_", "MKL_", "KMP_", "MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "TORCH", "CUDA_VISIBLE_DEVICES")


def environment(device: str, seed: int, arguments: Sequence[str]) -> dict[str, Any]:
    """Versions, device, threads, load, seed and command; ``torch`` is the version that runs."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in ("transformers", "peft", "torchao")},
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "variables": {key: value for key, value in sorted(os.environ.items()) if key.startswith(_VARIABLES)},
        "seed": seed,
        "command": f"molf bench {' '.join(arguments)}",
        "commit": _commit(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load_at_start": load(),
    }


def load() -> list[float] | None:
    """Load averages of the last 1, 5 and 15 minutes, where the system knows them."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str | None:
    """The source checkout's commit, with "-dirty" if the code differs from it; None for an installed package."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    try:
        commit, changes = (
            subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "src"])
        )
    except (OSError, subprocess.CalledProcessError):  # no git, or not the owner's checkout
        return None
    return f"{commit}-dirty" if changes else commit
