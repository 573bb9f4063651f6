"""torch's distributed checkpoint: saved by some processes, loaded by others, and the run goes on as it would have."""

import pytest
import torch
from processes import run
from programs import begin_and_save, gathered_and_loaded, load_and_go_on

STEPS = (6, 12)
CASES = {
    "molf": {"expert_ranks": (4,), "lora_alpha": 4.0, "lr": 1e-3, "lora_lr": 1e-3},
    "molf-e": {"expert_ranks": (2, 5), "train_base": False, "lora_lr": 3e-3},
}
SEVERAL = {"several": {**CASES["molf"], "expert_ranks": (4, 3), "lora_alpha": (4.0, 6.0)}}


def _goes_on(tmp_path, case, before, after, asynchronous=False):
    """Train and save on ``before``, load and go on with ``after``: (kind, world)."""
    folder, fields = str(tmp_path / "saved"), (CASES | SEVERAL)[case]
    old = run(tmp_path / "a", before[1], begin_and_save, folder, fields, STEPS, before[0], asynchronous)[0]
    new = run(tmp_path / "b", after[1], load_and_go_on, folder, fields, STEPS, after[0])
    for rank in new:
        assert rank["winners"] == old["winners"]
        assert rank["losses"] == pytest.approx(old["losses"], rel=1e-5)
    for name, weight in old["weights"].items():
        if before == after:
            assert torch.equal(new[0]["weights"][name], weight), name
        else:
            torch.testing.assert_close(new[0]["weights"][name], weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("after", [("one", 1), ("fsdp2", 2)])
@pytest.mark.parametrize("case", CASES)
def test_saved_sharded(tmp_path, case, after):
    _goes_on(tmp_path, case, ("fsdp2", 2), after)


def test_saved_by_one_process(tmp_path):
    _goes_on(tmp_path, "molf", ("one", 1), ("fsdp2", 2))


def test_several_virtual_experts(tmp_path):
    """Their groups have no parameters, and torch's ``set_state_dict`` takes one such group at most."""
    _goes_on(tmp_path, "several", ("fsdp2", 2), ("fsdp2", 2))


@pytest.mark.parametrize("way", [("one", 1), ("fsdp2", 2)])
def test_a_whole_state_of_the_first_process(tmp_path, way):
    """What ``full_state_dict`` and ``cpu_offload`` flatten on their way: tuples, and lists that are empty."""
    for before, after in run(tmp_path, way[1], gathered_and_loaded, CASES["molf"], STEPS, way[0]):
        assert before["winners"] == after["winners"]
        for name, weight in before["weights"].items():
            assert torch.equal(weight, after["weights"][name]), name


def test_saved_while_training_goes_on(tmp_path):
    _goes_on(tmp_path, "molf", ("fsdp2", 2), ("fsdp2", 2), asynchronous=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("fsdp2", 2), ("fsdp2", 4)),
        (("fsdp2", 4), ("fsdp2", 2)),
        (("fsdp2", 4), ("one", 1)),
        (("one", 1), ("fsdp2", 4)),
        (("fsdp2", 4), ("fsdp2", 4)),
        (("hsdp", 4), ("fsdp2", 2)),
        (("ddp", 2), ("fsdp2", 2)),
        (("fsdp2", 2), ("ddp", 2)),
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_saved_by_other_numbers_of_processes(tmp_path, case, before, after):
    _goes_on(tmp_path, case, before, after)
