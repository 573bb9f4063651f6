"""The examples and every Python block of docs/trainers.md run, in order, offline."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "trainers.md").read_text()
pytestmark = pytest.mark.filterwarnings(
    "ignore:.gradient_checkpointing.* is deprecated:FutureWarning",  # TRL 1.16, with transformers' older names
    "ignore:.*is_gradient_checkpointing.* is deprecated:FutureWarning",
)


def main(name: str) -> Any:
    AcceleratorState._reset_state(reset_partial_state=True)  # other tests' trainers leave theirs in the process
    return runpy.run_path(str(ROOT / "examples" / name))["main"]


def test_torch_loop(tmp_path: Path, capsys) -> None:
    main("torch_loop.py")(str(tmp_path), epochs=2)
    assert (tmp_path / "model.safetensors").exists()
    losses = [float(found) for found in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert losses[1] < losses[0]


def test_accelerate_loop_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Interrupted within an epoch and at its end."""
    run = main("accelerate_loop.py")
    run(str(tmp_path / "full"))
    full = load_file(tmp_path / "full" / "adapter_model.safetensors")
    for stop in (6, 8):
        run(str(tmp_path / str(stop)), stop_after=stop)
        assert not (tmp_path / str(stop) / "adapter_model.safetensors").exists()
        run(str(tmp_path / str(stop)), resume=True)
        again = load_file(tmp_path / str(stop) / "adapter_model.safetensors")
        assert again.keys() == full.keys()
        assert all(torch.equal(again[name], full[name]) for name in full)


@pytest.mark.parametrize(("name", "weights"), [("dpo.py", "adapter_model"), ("grpo.py", "model")])
def test_trl_examples(tmp_path: Path, name: str, weights: str) -> None:
    main(name)(str(tmp_path), steps=2)
    assert (tmp_path / f"{weights}.safetensors").exists()


def test_blocks_of_the_documentation(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 9
    assert (tmp_path / "runs" / "trainer" / "model.safetensors").exists()
    assert names["optimizer"].experts == ("lora_r4", "lora_r16")
    for linked in re.findall(r"\]\(\.\./(.*?)\)", DOCS):
        assert (ROOT / linked).is_file()
