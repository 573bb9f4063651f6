"""The synthetic world and the bundled model that knows it."""

import contextlib
import json
import random
import sqlite3
from itertools import islice

import pytest
import torch

from molf import world as w
from molf.assets import BUNDLED_MODEL


def test_the_world_is_a_function_of_its_seed() -> None:
    first, again, other = w.make_world(0), w.make_world(0), w.make_world(1)
    assert first == again
    assert first.facts != other.facts
    assert list(islice(w.pretraining_texts(first, 3), 50)) == list(islice(w.pretraining_texts(again, 3), 50))
    assert (len(first.people), len(first.cities), len(first.countries), len(first.works)) == (200, 50, 10, 100)
    assert len(first.facts) == len({(fact.subject, fact.relation) for fact in first.facts}) == 1670


def test_no_prompt_has_two_answers() -> None:
    world, answers = w.make_world(), {}
    for fact in world.facts:
        for phrasing in range(len(w.RELATIONS[fact.relation].statements)):
            prompt, completion = w.statement(fact, phrasing)
            assert answers.setdefault(prompt, completion) == completion
    starts = [other for prompt in answers for other in (prompt,)]
    longer = [a for a in starts for b in ("the year", "the") if f"{a} {b}" in answers]
    assert not longer, f"one prompt goes on where another ends: {longer[:3]}"


def test_multiple_choice_and_sql_records_are_right() -> None:
    world, rng = w.make_world(), random.Random(0)
    for fact in rng.sample(world.facts, 100):
        record = w.multiple_choice(world, fact, rng)
        options = [record[key] for key in ("opa", "opb", "opc", "opd")]
        assert options[record["cop"]] == fact.object
        assert len(set(options)) == 4
        assert w.multiple_choice_text(record)[1] == f" {'ABCD'[record['cop']]}"
    for _ in range(100):
        record = w.sql_question(world, rng)
        with contextlib.closing(sqlite3.connect(":memory:")) as database:
            database.executescript(record["sql_context"])
            assert database.execute(record["sql"]).fetchall(), record


def test_edits_have_paraphrases_and_neighbours_that_are_not_edited() -> None:
    world = w.make_world()
    edits = w.counterfactual_edits(world, 300)
    assert edits == w.counterfactual_edits(world, 300)
    edited = {(e["requested_rewrite"]["subject"], e["requested_rewrite"]["relation_id"]) for e in edits}
    assert len(edited) == 300
    with_neighbours = 0
    for edit in edits:
        rewrite = edit["requested_rewrite"]
        true, relation = rewrite["target_true"]["str"], rewrite["relation_id"]
        assert world.value(rewrite["subject"], relation) == true != rewrite["target_new"]["str"]
        assert len(edit["paraphrase_prompts"]) == 3
        with_neighbours += bool(edit["neighborhood_prompts"])
        stem = w.RELATIONS[relation].statements[0]
        subjects = [f.subject for f in world.facts if stem.format(f.subject) in edit["neighborhood_prompts"]]
        assert all(world.value(s, relation) == true and (s, relation) not in edited for s in subjects)
    assert with_neighbours > 250
    with pytest.raises(ValueError, match="count=5000"):
        w.counterfactual_edits(world, 5000)


def test_the_bundled_model_knows_its_world() -> None:
    """At least 95 % of the facts by greedy completion, measured here, and its card says what it says."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from molf.tasks.scoring import score_continuations

    assert sum(path.stat().st_size for path in BUNDLED_MODEL.glob("*.safetensors")) <= 5_000_000
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    assert len(tokenizer) <= 2048
    assert sum(p.numel() for p in model.parameters()) <= 2_000_000
    assert model.config.model_type == "qwen2"
    assert model.config.tie_word_embeddings
    facts = w.make_world().facts
    results = score_continuations(model, tokenizer, [w.statement(fact, 0) for fact in facts])
    known = sum(result.greedy for result in results) / len(facts)
    figures = json.loads((BUNDLED_MODEL / "training.json").read_text())
    assert known >= 0.95
    assert known == pytest.approx(figures["facts_known"], abs=0.002)
    assert f"{figures['held_out_loss_nats_per_token']:.4f}" in (BUNDLED_MODEL / "README.md").read_text()
