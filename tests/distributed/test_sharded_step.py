"""What a step on several processes costs, keeps and refuses."""

import pytest
import torch
from processes import run
from programs import (
    a_new_head,
    collectives_of_a_step,
    differ_after_a_write,
    eight_bits_that_differ,
    mixed_precision,
    narrow_layers,
    refusals,
    with_seeds_of_their_own,
)

MOLF = {"expert_ranks": (4, 3)}
EFFICIENT = {"expert_ranks": (4, 3), "train_base": False}


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_two_all_reduces_of_known_size_whatever_the_number_of_modules(tmp_path, layers, clip):
    fields = {**MOLF, "max_grad_norm": clip}
    found = run(tmp_path, 2, collectives_of_a_step, "llama", fields, "fsdp2", num_hidden_layers=layers)[0]
    assert found["modules"] == 7 * layers
    # of every module dA, R x in, and a number for dB and, where gradients are clipped, for dW; one of each other tensor
    numbers = found["looked_at"] + (found["modules"] if clip else 0)
    first, second = 4 * (7 * found["inputs"] + numbers), 4 * 3 * found["modules"]
    assert found["calls"] == [("allreduce_", first), ("allreduce_", second)]


@pytest.mark.parametrize("layers", [1, 3])
def test_an_adapter_needs_no_gradient_of_other_processes(tmp_path, layers):
    found = run(tmp_path, 2, collectives_of_a_step, "llama", EFFICIENT, "fsdp2", num_hidden_layers=layers)[0]
    numbers = 2 * found["modules"]
    assert found["calls"] == [("allreduce_", 4 * numbers), ("allreduce_", 4 * 2 * found["modules"])]


def test_ddp_needs_no_collective(tmp_path):
    assert run(tmp_path, 2, collectives_of_a_step, "llama", MOLF, "ddp")[0]["calls"] == []


@pytest.mark.parametrize(("fields", "factors"), [(MOLF, "A replicated"), (EFFICIENT, "")])
def test_state_is_spread(tmp_path, fields, factors):
    ranks = run(tmp_path, 2, collectives_of_a_step, "llama", fields, "fsdp2")
    for rank in ranks:
        assert rank["bytes_here"] == pytest.approx(rank["bytes_sharded"] / 2 + rank["bytes_replicated"], rel=0.1)
        replicated = 3 * 4 * 7 * rank["inputs"] if factors else 0
        assert rank["bytes_replicated"] == replicated


def test_mixed_precision_has_no_copy_but_w(tmp_path):
    run(tmp_path, 2, mixed_precision, "fsdp2", 12)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_processes_that_differ_stop(tmp_path, kind):
    # a DDP process whose state differs writes another P as well, and weights are compared first
    names = ["(lora_A)", "lora_A_exp_avg", "step"] if kind == "fsdp2" else ["weight differs"] * 4
    for messages in run(tmp_path, 2, differ_after_a_write, kind):
        for name, message in zip(names, messages, strict=True):
            assert name in message
            assert "differs between processes" in message
            assert "model.layers.0.self_attn.o_proj.weight" in message


def test_moments_in_8_bits_are_compared(tmp_path):
    pytest.importorskip("torchao")
    for kind, same, differs in run(tmp_path, 2, eight_bits_that_differ):
        assert (kind, same) == ("OptimState8bit", "")
        assert "0.weight (exp_avg) differs between processes" in differs


def test_what_is_refused(tmp_path):
    expected = [
        "Make the optimizer after fully_shard",
        "step_in_backward=True",
        "keep_base=False rounds model.layers.0.self_attn.q_proj.weight",
        "moments_8bit=True is not supported on sharded",
        "tensor-parallel weights cannot be routed",
        "call fully_shard on the model itself",
        "FSDP1",
        "embed_tokens.weight was frozen when the model was wrapped",
        "was trained when the model was wrapped",
        "lora_B is sharded by its ranks",
    ]
    for messages in run(tmp_path, 2, refusals):
        for part, message in zip(expected, messages, strict=True):
            assert part in message


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_seeds_of_processes_may_differ(tmp_path, kind):
    """Over 200 steps every process holds the same bits, and DDP's have nothing to say to each other in a step."""
    first, second = run(tmp_path, 2, with_seeds_of_their_own, kind, 200)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_a_head_that_each_process_draws_is_the_first_ones(tmp_path):
    """Masters were each process's own, and accelerate, which loads the state into itself, undid what DDP had sent."""
    first, second = run(tmp_path, 2, a_new_head, 2)
    for here, there in zip(first, second, strict=True):
        assert torch.equal(here, there)


@pytest.mark.parametrize("compiles", [False, True])
def test_a_process_that_holds_no_row_of_a_layer_takes_part(tmp_path, compiles):
    alone = run(tmp_path / "one", 1, narrow_layers, "one", compiles, 8)[0]
    for rank in run(tmp_path / "two", 2, narrow_layers, "fsdp2", compiles, 8):
        for here, there in zip(rank, alone, strict=True):
            assert {name: winners for name, (winners, _) in here.items()} == {n: w for n, (w, _) in there.items()}
            for name, (_, scores) in here.items():
                assert scores == pytest.approx(there[name][1], rel=1e-4)


def test_a_process_that_holds_no_row_of_a_layer_in_16_bits_takes_part(tmp_path):
    """The look whether its P is the state's asked for the largest of no numbers."""
    one, other = run(tmp_path, 2, narrow_layers, "fsdp2", False, 4, torch.bfloat16)
    assert one == other
