"""CounterFact records, training pairs and scores."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from molf.assets import BUNDLED_MODEL
from molf.tasks import fact
from molf.tasks.prompts import tokenize_pairs
from molf.tasks.scoring import Continuation, score_continuations

SHARED = Path(__file__).parents[3] / "shared"
ROME = {
    "requested_rewrite": {
        "prompt": "{} plays the",
        "subject": "Ada {Alder}",
        "target_new": {"str": "drum"},
        "target_true": {"str": "harp"},
    },
    "paraphrase_prompts": ["The instrument of Ada is the"],
    "neighborhood_prompts": ["Leo Lark plays the", "Leo Holt plays the"],
}
FLAT = {
    "prompt": "Ada plays the",
    "target_new": "drum",
    "ground_truth": "harp",
    "rephrase_prompt": "The instrument of Ada is the",
    "locality_prompt": "Leo plays the",
    "locality_ground_truth": "flute",
}


def test_both_forms() -> None:
    edit = fact.parse_edit(ROME)
    assert (edit.prompt, edit.target_new, edit.target_true) == ("Ada {Alder} plays the", "drum", "harp")
    assert edit.neighbours == (("Leo Lark plays the", "harp"), ("Leo Holt plays the", "harp"))
    assert fact.parse_edit(FLAT).neighbours == (("Leo plays the", "flute"),)
    assert fact.example(edit) == {"prompt": "Ada {Alder} plays the", "completion": " drum"}


@pytest.mark.parametrize("form", [json.dumps, lambda rows: "\n".join(map(json.dumps, rows))])
def test_load(tmp_path: Path, form) -> None:
    (tmp_path / "f.json").write_text(form([ROME, FLAT, FLAT]))
    assert len(fact.load_edits(tmp_path / "f.json")) == 3
    assert len(fact.load_edits(tmp_path / "f.json", 2)) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "has no record"),
        ("", "has no record"),
        ("{", "neither a JSON list nor JSON lines"),
        ('\n{}\n{"a"}', r"Expecting ':' delimiter \(line 3\)"),
        ("[\n{},\n{]", r"neither a JSON list nor JSON lines: .* \(line 3\)"),
        (json.dumps([ROME, {**FLAT, "target_new": ""}]), "record 1: no CounterFact record, target_new is ''"),
        (json.dumps([{"prompt": "a"}]), "record 0: no CounterFact record, 'target_new' is missing"),
        ("[3]", "record 0: no CounterFact record"),
        (json.dumps([{**ROME, "paraphrase_prompts": "Who"}]), "record 0: .* paraphrase_prompts is 'Who': needs a list"),
        (json.dumps([{**ROME, "neighborhood_prompts": {"a": 1}}]), "record 0: .* neighborhood_prompts is .*a list"),
        (
            json.dumps(
                [
                    {
                        **ROME,
                        "requested_rewrite": {
                            "prompt": None,
                            "subject": "A",
                            "target_new": {"str": "b"},
                            "target_true": {"str": "c"},
                        },
                    }
                ]
            ),
            "record 0: no CounterFact record, .* of another type",
        ),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        fact.load_edits(tmp_path / "f.json")
    assert str(tmp_path / "f.json") in str(error.value)


@pytest.mark.skipif(not SHARED.exists(), reason=f"no {SHARED}")
@pytest.mark.parametrize(("name", "count"), [("counterfact-val.json", 1919), ("counterfact_500_full.json", 500)])
def test_real_files(name: str, count: int) -> None:
    assert len(fact.load_edits(SHARED / "data" / "counterfact" / name)) == count


def test_scores_against_arithmetic_by_hand(monkeypatch) -> None:
    """Two edits, probabilities given: ties count half, and the primary metric is the harmonic mean."""
    answers = {
        ("p1", " n"): (0.5, 0.5, True), ("p1", " t"): (0.2, 0.2, False),
        ("p2", " n"): (0.3, 0.1, False), ("p2", " t"): (0.3, 0.3, True),
        ("q1", " n"): (0.1, 0.1, False), ("q1", " t"): (0.2, 0.2, True),
        ("l1", " t"): (0.9, 0.9, True), ("l1", " n"): (0.01, 0.01, False),
    }  # fmt: skip

    def scored(model, tokenizer, pairs, **_):
        return [Continuation(math.log(answers[p][0]), math.log(answers[p][1]), answers[p][2], 1) for p in pairs]

    monkeypatch.setattr(fact, "score_continuations", scored)
    edits = [fact.FactEdit("p1", "n", "t", ("q1",), (("l1", "t"),)), fact.FactEdit("p2", "n", "t", (), ())]
    metrics = fact.evaluate(None, None, edits)
    assert metrics["efficacy"] == 75
    assert metrics["efficacy_first"] == 50
    assert metrics["paraphrase"] == 0
    assert metrics["neighbourhood"] == 100
    assert metrics["score"] == 0
    assert metrics["exact_match"] == 50
    assert metrics["efficacy_magnitude"] == pytest.approx((0.3 + 0.0) / 2)


def test_scoring_equals_one_by_one_and_generation() -> None:
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    pairs = [
        ("Ada Alder plays the", " drum"),
        ("The birth year of Leo Lark is", " 1950"),
        ("Mira Knoll speaks", " Cestic"),
    ]
    for (prompt, completion), result in zip(pairs, score_continuations(model, tokenizer, pairs), strict=True):
        ids = tokenizer(prompt + completion, return_tensors="pt").input_ids
        start = len(tokenizer(prompt).input_ids)
        logprobs = torch.log_softmax(model(input_ids=ids).logits[0], -1).detach()
        parts = [logprobs[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1])]
        assert result.logprob == pytest.approx(sum(parts), abs=1e-4)
        assert result.first_logprob == pytest.approx(parts[0], abs=1e-4)
        prompt_ids = tokenizer(prompt, return_tensors="pt")
        said = model.generate(**prompt_ids, max_new_tokens=ids.shape[1] - start, do_sample=False, min_new_tokens=1)
        assert result.greedy == torch.equal(said[0], ids[0])
    assert isinstance(model, nn.Module)
    assert not model.training


def test_targets_that_begin_alike_tie_by_their_first_token() -> None:
    """Rows of different lengths round differently: without care the noise decides who is preferred."""
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    people = [f"{first} Alder" for first in ("Ada", "Leo", "Mira", "Nils", "Olga", "Rosa", "Simon", "Tilda")]
    pairs = [(f"{person} has an umbrella and", f" {end}") for person in people for end in ("qx", "qxj vzwk qqq", "qxz")]
    heads = {wanted[0] for _, wanted in tokenize_pairs(tokenizer, pairs)}
    assert len(heads) == 1
    scored = score_continuations(model, tokenizer, pairs, batch_size=5)
    for start in range(0, len(pairs), 3):
        assert len({result.first_logprob for result in scored[start : start + 3]}) == 1


def test_pairs_split_as_sft_trainer_splits_them() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    (prompt, completion) = next(tokenize_pairs(tokenizer, [("Ada Alder plays the", " drum")]))
    assert prompt + completion == tokenizer("Ada Alder plays the drum").input_ids
    with pytest.raises(ValueError, match="no prefix"):
        list(tokenize_pairs(tokenizer, [("Ada Alder pl", "ays")]))
