"""``molf plan --gpus N`` against what N processes hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import run
from train_programs import state_bytes
from transformers import AutoConfig

from models import causal_lm
from molf import MoLFConfig
from molf.assets import BUNDLED_MODEL
from molf.plan.memory import Workload, plan_method

CONFIGS = {"molf": {"expert_ranks": (16,)}, "molf-e": {"expert_ranks": (8, 16), "train_base": False}}


@pytest.mark.parametrize(
    ("name", "method", "world"),
    [
        ("bundled", "molf", 2),
        ("gpt2", "molf", 2),  # its weights are stored transposed
        ("bundled", "molf-e", 2),
        pytest.param("bundled", "molf", 3, marks=pytest.mark.slow),
        pytest.param("bundled", "molf-e", 4, marks=pytest.mark.slow),
    ],
)
def test_state_per_process(tmp_path: Path, name: str, method: str, world: int) -> None:
    shape = AutoConfig.from_pretrained(BUNDLED_MODEL) if name == "bundled" else causal_lm(name).config
    work = Workload(model=shape, dtype=torch.float32, batch=1, length=8)
    plan = plan_method(method, MoLFConfig(**CONFIGS[method]), work)
    expected = plan.memory(world, sharded=True)
    found = run(tmp_path, world, state_bytes, name, CONFIGS[method])
    for rank in found:
        assert sum(rank.values()) <= sum(expected[kind] for kind in rank)
    for kind in found[0]:
        assert found[0][kind] == expected[kind]  # the first process has the largest parts
