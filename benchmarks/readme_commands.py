"""Run the two commands of README.md as they stand there and keep what they print.

python benchmarks/readme_commands.py       # writes benchmarks/results/readme_commands.json, then
python benchmarks/tables.py                # rewrites README.md
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Both commands in a fresh folder; the second uses the first's data."""
    commands = re.findall(r"^molf ((?:demo|train).*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "src").symlink_to(ROOT / "src")
        printed, seconds = [], []
        for command in commands:
            start = time.perf_counter()
            line = [sys.executable, "-m", "molf", *command.split()]
            environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(line, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            printed.append([text for text in done.stdout.splitlines() if not text.startswith("{'")])
            seconds.append(time.perf_counter() - start)
        result = {
            "demo": json.loads((Path(folder) / "runs" / "demo" / "demo.json").read_text()),
            "demo_seconds": seconds[0],
            "train": "\n".join(printed[1]),
            "versions": json.loads((Path(folder) / "runs" / "train" / "run.json").read_text())["versions"],
        }
    path = ROOT / "benchmarks" / "results" / "readme_commands.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
