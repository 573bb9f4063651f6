"""Every command and every code block of README.md runs, and its numbers are those of the committed results."""

import json
import re
import subprocess
import sys
from pathlib import Path

from molf.cli import main

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
SHELL = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines() if line]
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
SHORTER = {
    "demo": ["--edits", "16", "--epochs", "1"],
    "train": ["--max_examples", "16", "--use_cpu", "true"],
    "compare": "--methods fft molf --learning_rates 1e-3 --seeds 0 --max_examples 8 --num_train_epochs 1".split(),
}


def test_python_blocks(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(PYTHON[0], names)
    assert names["optimizer"].routing["model.layers.0.mlp.up_proj"].experts == ("dense", "lora_r16")
    exec(PYTHON[1], names)
    assert len([line for line in PYTHON[0].splitlines() if line]) == 10
    assert (tmp_path / "ada" / "model.safetensors").exists()
    assert names["optimizer"].experts == ("lora_r4", "lora_r16")


def test_molf_commands(tmp_path, monkeypatch, capsys) -> None:
    """In the order of the README, with options appended that shorten them."""
    (tmp_path / "src").symlink_to(ROOT / "src")
    monkeypatch.chdir(tmp_path)
    commands = [line.split() for line in SHELL if line.startswith("molf ")]
    assert [command[1] for command in commands] == ["demo", "train", "compare"]
    said = {}
    for command in commands:
        assert main([*command[1:], *SHORTER[command[1]]]) == 0
        said[command[1]] = capsys.readouterr().out
    table = said["demo"].split("dense wins\n")[1].splitlines()
    assert [line.split()[0] for line in table[1:5]] == ["fft", "lora", "molf", "molf-e"]
    assert all(len(line.split()) == 9 for line in table[1:5])
    demo = tmp_path / "runs" / "demo"
    for name in ("molf/model.safetensors", "molf-e/adapter_model.safetensors", "molf/routing.jsonl"):
        assert (demo / name).exists()
    assert len(json.loads((demo / "demo.json").read_text())) == 4
    assert (tmp_path / "runs" / "train" / "model.safetensors").exists()
    assert (tmp_path / "runs" / "compare" / "comparison.md").exists()


def test_install_commands() -> None:
    """The make targets, and pip's lines as pip resolves them against what is installed here."""
    for target in ("demo", "test"):
        assert f"`make {target}`" in TEXT
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)
    lines = [line.partition("#")[0].strip() for line in SHELL if line.startswith("pip install")]
    assert len(lines) == 2
    for line in lines:
        words = [word.strip("'") for word in line.split()[2:]]
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--no-build-isolation", *words]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)


def test_numbers_are_those_of_the_results() -> None:
    for name in ("fact_stories3m", "demo", "train", "compare_stories3m"):
        assert f"<!-- begin: {name} -->" in TEXT
        assert f"<!-- begin: {name} -->\n<!-- end" not in TEXT, "run benchmarks/tables.py"
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"], check=True, timeout=60)
