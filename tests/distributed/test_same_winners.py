"""One process, DDP, FSDP2 and HSDP: the same winners at every step and the same weights."""

from itertools import pairwise

import pytest
import torch
from processes import run
from programs import history
from torch.distributed.fsdp import CPUOffloadPolicy

STEPS = 50
CASES = {
    "molf": {"expert_ranks": (4, 3), "lora_alpha": (3.0, 5.0), "lr": 1e-3, "lora_lr": 1e-3, "max_grad_norm": 0.5},
    "molf-e": {"expert_ranks": (2, 5), "train_base": False, "lora_lr": 3e-3},
    "fewer-ranks-than-processes": {"expert_ranks": (1, 1), "train_base": False, "lora_lr": 3e-3},
    "superposed": {"expert_ranks": (4,), "lora_alpha": 6.0, "lr": 1e-3, "lora_lr": 1e-3},
}
SPREADS = [("ddp", 2), ("fsdp2", 2)]
WIDE = [("fsdp2", 4), ("hsdp", 4)]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Histories of one process, each trained once."""
    known = {}

    def get(model, case, **options):
        key = (model, case, *options)
        if key not in known:
            folder = tmp_path_factory.mktemp("one")
            known[key] = run(folder, 1, history, model, "one", CASES[case], STEPS, **_options(case, options))[0]
        return known[key]

    return get


def _options(case, options):
    return {**options, "adapter": case == "superposed"}


def _compare(alone, ranks, case="molf"):
    assert any(now != before for before, now in pairwise(alone["winners"]))
    for rank in ranks:
        assert rank["winners"] == alone["winners"]
        for here, there in zip(rank["losses"], alone["losses"], strict=True):
            assert here == pytest.approx(there, rel=1e-5)
        for name, weight in alone["weights"].items():
            # Adam divides by sqrt(v), so that rounding in a tiny gradient is a visible part of a step: 1 % of the way
            way = STEPS * max(CASES[case].get("lr", 0), CASES[case]["lora_lr"])
            torch.testing.assert_close(rank["weights"][name], weight, rtol=0, atol=0.01 * way)
        for name, value in ranks[0]["state"].items():
            assert torch.equal(value, rank["state"][name]), name


@pytest.mark.parametrize(("kind", "world"), SPREADS)
@pytest.mark.parametrize("case", CASES)
def test_tiny_gemma3(tmp_path, one_process, case, kind, world):
    ranks = run(tmp_path, world, history, "gemma3", kind, CASES[case], STEPS, **_options(case, {}))
    _compare(one_process("gemma3", case), ranks, case)


@pytest.mark.parametrize(("kind", "world"), SPREADS)
def test_bundled_model(tmp_path, one_process, kind, world):
    _compare(one_process("bundled", "molf"), run(tmp_path, world, history, "bundled", kind, CASES["molf"], STEPS))


def test_weights_that_are_stored_transposed_share_their_inputs(tmp_path, one_process):
    _compare(one_process("gpt2", "molf"), run(tmp_path, 2, history, "gpt2", "fsdp2", CASES["molf"], STEPS))


@pytest.mark.parametrize(("kind", "world"), [("fsdp2", 2)])
def test_accumulation_without_reducing_in_between(tmp_path, one_process, kind, world):
    ranks = run(tmp_path, world, history, "gemma3", kind, CASES["molf"], STEPS, accumulate=2)
    _compare(one_process("gemma3", "molf", accumulate=2), ranks)


@pytest.mark.parametrize("options", [{"checkpointing": True}, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}])
def test_less_memory(tmp_path, one_process, options):
    ranks = run(tmp_path, 2, history, "gemma3", "fsdp2", CASES["molf"], STEPS, **options)
    _compare(one_process("gemma3", "molf"), ranks)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "world"), WIDE)
@pytest.mark.parametrize("case", CASES)
def test_four_processes(tmp_path, one_process, case, kind, world):
    ranks = run(tmp_path, world, history, "gemma3", kind, CASES[case], STEPS, **_options(case, {}))
    _compare(one_process("gemma3", case), ranks, case)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "world"), WIDE)
def test_four_processes_on_the_bundled_model(tmp_path, one_process, kind, world):
    _compare(one_process("bundled", "molf"), run(tmp_path, world, history, "bundled", kind, CASES["molf"], STEPS))
