"""The memory that is planned is that of real tensors, and nothing is held twice."""

import torch
from models import causal_lm

from molf import MoLFConfig, create_molf_optimizer
from molf.plan.tracker import PeakTracker


def test_peak_of_tensors_and_views() -> None:
    outside = torch.zeros(1000)
    with PeakTracker() as tracker:
        _ = outside[:10].t()
        a = torch.zeros(256)
        b = a.view(16, 16)
        (a + 1).sum()
        del a
        assert tracker.now == 1024, "the view keeps it"
        del b
        assert tracker.now == 0
    assert tracker.peak == 2 * 1024 + 4


def test_loading_a_state_into_itself_holds_it_once() -> None:
    """accelerate does that when it prepares an optimizer; the state was there twice, the peak of a run."""
    optimizer = create_molf_optimizer(causal_lm("llama"), MoLFConfig(expert_ranks=(8,)))
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    size = sum(value.numel() * value.element_size() for value in tensors)
    with PeakTracker() as tracker:
        optimizer.load_state_dict(optimizer.state_dict())
    assert [value for state in optimizer.state.values() for value in state.values()] is not tensors
    assert all(a is b for a, b in zip(tensors, (v for s in optimizer.state.values() for v in s.values()), strict=True))
    assert tracker.peak < size / 4
