"""Statistics of routing logs against numbers worked out by hand, and names of modules."""

import json

import numpy as np
import pytest

from molf.optim.names import places
from molf.report import runs
from molf.report.routing_content import routing_content, sentences
from molf.report.runs import read_routing_log
from molf.report.statistics import margins, shares, specialised, switch_rate, window_medians, windows
from run_folders import EXPERTS, MODULES, routing_lines


def log_of(tmp_path, lines):
    path = tmp_path / "routing.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_routing_log(path)


def test_shares_margins_and_specialisation_by_hand(tmp_path) -> None:
    lines = [
        {"schema": 1, "modules": ["a", "b"], "experts": ["dense", "lora_r2"]},
        {"step": 1, "lr": {}, "scores": [[3.0, 1.0], [1.0, 4.0]], "winners": [[0], [1]]},
        {"step": 2, "lr": {}, "scores": [[1.0, 2.0], None], "winners": [[1], None]},
        {"step": 3, "lr": {}, "scores": [[5.0, 1.0], [0.0, 0.0]], "winners": [[0], [0]]},
        {"step": 4, "lr": {}, "scores": [[8.0, 2.0], [4.0, 1.0]], "winners": [[0], [0]]},
    ]
    log = log_of(tmp_path, lines)
    assert log.steps.tolist() == [1, 2, 3, 4]
    assert log.best.tolist() == [[0, 1], [1, -1], [0, 0], [0, 0]]
    edges = windows(4, 2)
    assert edges.tolist() == [0, 2, 4]
    np.testing.assert_array_equal(
        shares(log.won, log.took_part, edges), [[[0.5, 0.5], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]]
    )
    np.testing.assert_allclose(margins(log.scores), [[2 / 3, 0.75], [0.5, np.nan], [0.8, np.nan], [0.75, 0.75]], 1e-6)
    np.testing.assert_allclose(window_medians(margins(log.scores), edges), [2 / 3, 0.75], 1e-6)
    assert switch_rate(log.best) == 2 / 4  # a twice in three; b counts from step 3 to 4 alone
    assert specialised(log.best, log.steps).tolist() == [3, 3]


def test_steps_that_compared_nothing_are_left_out(tmp_path) -> None:
    """At a learning rate of 0, where most schedules begin, all scores are 0 and dense wins every tie."""
    lines = routing_lines(4, ["a", "b"])
    for record in lines[2:]:
        record |= {"scores": [[1.0, 2.0]] * 2, "winners": [[1], [1]]}
    lines[1] |= {"scores": [[0.0, 0.0], None], "winners": [[0], None]}
    log = log_of(tmp_path, lines)
    assert log.steps.tolist() == [2, 3, 4]
    assert specialised(log.best, log.steps).tolist() == [2, 2]
    assert switch_rate(log.best) == 0
    assert routing_content(log)["whole"] == [[0.0, 0.0], [1.0, 1.0]]
    del lines[3]["winners"]
    with pytest.raises(ValueError, match="line 4, is damaged"):
        log_of(tmp_path, lines)


def test_a_log_that_grows_while_it_is_read_is_read_as_far_as_it_was(tmp_path, monkeypatch) -> None:
    lines = routing_lines(8)
    monkeypatch.setattr(runs, "stream_routing", lambda path: (lines[0], iter(lines[1:])))
    assert log_of(tmp_path, lines[:6]).steps.tolist() == [1, 2, 3, 4, 5]


def test_top_k_counts_every_winner(tmp_path) -> None:
    lines = routing_lines(4, ["m"], ["dense", "lora_r2", "lora_r8"])
    for line in lines[1:]:
        line["winners"] = [[2, 0]]
    log = log_of(tmp_path, lines)
    assert shares(log.won, log.took_part, np.array([0, 4]))[0, 0].tolist() == [1.0, 0.0, 1.0]
    assert set(log.best[:, 0]) == {2}


def test_content_of_a_long_log_is_binned_and_its_means_agree(tmp_path) -> None:
    log = log_of(tmp_path, routing_lines(1000))
    shown = routing_content(log)
    assert len(shown["windows"]) == len(shown["projection_shares"][0][0]) == len(shown["projection_margins"][0]) == 100
    assert shown["windows"][0][0] == 1
    assert shown["windows"][-1][1] == 1000
    assert shown["specialised"] == [2 * m + 2 for m in range(6)]
    assert shown["whole"][0] == [pytest.approx((2 * m + 1) / 1000) for m in range(6)]
    assert (shown["layers"], shown["projections"]) == (["0", "1", "2"], ["q_proj", "up_proj"])
    lengths = [b - a + 1 for a, b in shown["windows"]]
    assert sum(lengths) == 1000
    mean = sum(n * row[5] for n, row in zip(lengths, shown["shares"][0], strict=True)) / 1000
    assert mean == pytest.approx(11 / 1000, abs=5e-4)  # shares are rounded to three digits
    text = " ".join(sentences(log))
    assert f"6,000 decisions: {len(MODULES)} modules at 1,000 steps" in text
    assert "6 of 6 modules kept one winner through the second half" in text
    assert EXPERTS[0] in text


def test_logs_without_decisions_or_with_one_expert(tmp_path) -> None:
    lines = routing_lines(2, ["m"], ["lora_r4"])
    assert np.isnan(margins(log_of(tmp_path, lines).scores)).all()
    lines[1] |= {"scores": [None], "winners": [None]}
    lines[2] |= {"scores": [None], "winners": [None]}
    log = log_of(tmp_path, lines)
    shown = routing_content(log)
    assert shown["specialised"] == [-1]
    assert shown["whole"] == [[None]]
    assert json.dumps(shown, allow_nan=False)
    assert sentences(log)[0].startswith("0 decisions")


def test_places() -> None:
    assert places(["model.layers.10.mlp.up_proj", "lm_head"]) == [(10, "up_proj"), (None, "lm_head")]
    assert places(["h.0.attn.c_proj", "h.0.mlp.c_proj"]) == [(0, "attn.c_proj"), (0, "mlp.c_proj")]
    assert places(["0", "2"]) == [(0, "*"), (2, "*")]
    two = ["vision.layers.0.q", "text.layers.0.q"]
    assert len(set(places(two))) == 2
