"""Greedy generation in batches: the same as one by one, up to EOS, within the context."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from molf.assets import BUNDLED_MODEL
from molf.tasks import get_task
from molf.tasks.generation import generate
from molf.tasks.prompts import Context, context_length
from molf.tasks.scoring import score_continuations
from molf.world import make_world, multiple_choice_text, statement
from toy_tokenizers import model_for, tokenizer_of

WORLD = make_world()


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BUNDLED_MODEL)


def test_batches_equal_one_by_one_in_the_order_given(model, tokenizer) -> None:
    """Prompts of very different lengths, by three batch sizes, against transformers' own call on each alone."""
    prompts = [statement(fact, 0)[0] for fact in WORLD.facts[:1670:167]]
    prompts += [multiple_choice_text(record)[0] for record in get_task("world-mcq").load(None, 3)]
    assert len({len(tokenizer(prompt).input_ids) for prompt in prompts}) > 4
    alone = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        said = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids.input_ids.shape[1] :]
        alone.append(tokenizer.decode(said, skip_special_tokens=True))
    assert len(set(alone)) > 5
    for batch_size in (1, 5, 32):
        assert generate(model, tokenizer, prompts, max_new_tokens=12, batch_size=batch_size) == alone
    assert generate(model, tokenizer, []) == []


def test_it_says_what_the_world_is(model, tokenizer) -> None:
    facts = WORLD.facts[:40]
    said = generate(model, tokenizer, [statement(fact, 0)[0] for fact in facts], max_new_tokens=16)
    assert said == [f" {fact.object}." for fact in facts]


def test_it_stops_at_eos_and_needs_no_pad_token(model, tokenizer) -> None:
    """With the full stop as EOS the sentence ends before it; padding side, pad token and mode stay as they were."""
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side = ".", None, "right"
    facts = WORLD.facts[:6]
    model.train()
    passes: list[Any] = []
    with model.register_forward_pre_hook(lambda *call: passes.append(call)):
        said = generate(model, tokenizer, [statement(fact, 0)[0] for fact in facts], max_new_tokens=90)
    assert len(passes) == max(len(tokenizer(f" {fact.object}.").input_ids) for fact in facts)
    assert said == [f" {fact.object}" for fact in facts]
    assert (tokenizer.pad_token, tokenizer.padding_side, model.training) == (None, "right", True)
    model.eval()


def test_the_models_own_generation_settings_do_not_apply(tokenizer) -> None:
    """An untrained model repeats itself; a penalty, sampling or beams would change what it says."""
    model = model_for(tokenizer)
    prompts = [statement(fact, 0)[0] for fact in WORLD.facts[:4]]
    plain = generate(model, tokenizer, prompts, max_new_tokens=24)
    for name, value in {"repetition_penalty": 9.0, "do_sample": True, "no_repeat_ngram_size": 1}.items():
        setattr(model.generation_config, name, value)
        ids = tokenizer(prompts[0], return_tensors="pt")
        said = model.generate(**ids, max_new_tokens=24)[0, ids.input_ids.shape[1] :]
        assert tokenizer.decode(said, skip_special_tokens=True) != plain[0]
        assert generate(model, tokenizer, prompts, max_new_tokens=24) == plain


@pytest.mark.parametrize("adapter", [False, True])
def test_no_setting_that_a_model_brings_applies_or_is_lost(tokenizer, adapter: bool) -> None:
    """Those that have no neutral value to be set against them as well."""
    inner = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    model = get_peft_model(inner, LoraConfig(r=2, target_modules=["q_proj"])) if adapter else inner
    prompts = [statement(WORLD.facts[0], 0)[0]]
    plain = generate(model, tokenizer, prompts, max_new_tokens=8)
    for name, value in {
        "suppress_tokens": tokenizer(plain[0]).input_ids,
        "min_new_tokens": 8,
        "forced_eos_token_id": tokenizer.eos_token_id,
        "stop_strings": ["e"],
        "return_dict_in_generate": True,
    }.items():
        inner.generation_config = own = GenerationConfig(**{name: value})
        assert generate(model, tokenizer, prompts, max_new_tokens=8) == plain, name
        assert inner.generation_config is model.generation_config is own


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma"])
def test_long_prompts_are_cut_from_the_left_and_counted(family: str) -> None:
    """What is cut does not matter: the end of a prompt (behind BOS) gives the same answer and the same score."""
    tokenizer = tokenizer_of(family)
    model = model_for(tokenizer, positions=24).eval()
    end = " Ada Alder plays the piano"
    prompts = [f"{start} was born in{end * 4}" for start in ("Leo Lark", "Karin Elm and Boris Cole")] + ["Leo speaks"]
    context = Context.of(model, tokenizer)
    assert context.length == 24
    first, second, short = generate(model, tokenizer, prompts, max_new_tokens=6, context=context)
    assert first == second
    assert context.truncated == 2
    assert short == generate(model, tokenizer, prompts[2:], max_new_tokens=6, long_prompts="refuse")[0]
    context = Context.of(model, tokenizer)
    scores = score_continuations(model, tokenizer, [(p, f" {x}") for p in prompts for x in "AB"], context=context)
    assert scores[0].logprob == pytest.approx(scores[2].logprob, abs=1e-5)
    assert scores[1].logprob == pytest.approx(scores[3].logprob, abs=1e-5)
    assert context.truncated == 2
    rows = [context.fit(tokenizer(p).input_ids, 6) for p in prompts]
    assert [len(row) for row in rows[:2]] == [18, 18]
    assert tokenizer.bos_token_id in (None, rows[0][0])
    with pytest.raises(ValueError, match="exceed the context of 24 tokens: shorten it, or set long_prompts"):
        generate(model, tokenizer, prompts, max_new_tokens=6, long_prompts="refuse")
    with pytest.raises(ValueError, match="exceed the context of 24 tokens"):
        score_continuations(model, tokenizer, [(prompts[0], " B")], long_prompts="refuse")
    with pytest.raises(ValueError, match="the completion leaves it no room"):
        generate(model, tokenizer, prompts, max_new_tokens=24)


def test_bad_arguments(model, tokenizer) -> None:
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        generate(model, tokenizer, ["a"], max_new_tokens=0)
    with pytest.raises(ValueError, match="long_prompts='drop': choose one of truncate, refuse"):
        generate(model, tokenizer, ["a"], long_prompts="drop")
    with pytest.raises(ValueError, match="has no token"):
        generate(model, tokenizer, [""])
    tokenizer.add_tokens(["<more>"])
    with pytest.raises(ValueError, match=r"\(<more>\) is none of the 1231 that the model has"):
        generate(model, tokenizer, ["a", "a<more>"])
    with pytest.raises(ValueError, match=r"\(<more>\) is none of the 1231 that the model has"):
        score_continuations(model, tokenizer, [("a", " b"), ("a", " <more>")])
    unknown = Context.of(nn.Linear(2, 2), tokenizer)  # no embedding is known: nothing is refused
    unknown.check(tokenizer, [[10**6]])
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        generate(model, tokenizer, ["a"])


def test_the_mode_survives_an_error(model, tokenizer, monkeypatch) -> None:
    def broken(**_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "generate", broken)
    model.train()
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(model, tokenizer, ["Ada"])
    assert model.training
    model.eval()


def test_memory_that_is_too_small_halves_the_batches(model, tokenizer, monkeypatch) -> None:
    """More than eight rows do not fit: what is said and scored is the same, each once."""
    pairs = [statement(fact, 0) for fact in WORLD.facts[:1670:80]]
    prompts = [prompt for prompt, _ in pairs]
    scores = score_continuations(model, tokenizer, pairs, batch_size=8)
    said = generate(model, tokenizer, prompts, max_new_tokens=2, batch_size=8)
    rows = []

    def forward(*args: Any, forward: Any = model.forward, **kwargs: Any) -> Any:
        rows.append(len(kwargs["input_ids"]))
        if rows[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 11.7 GiB")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", forward)
    limit = 8
    again = score_continuations(model, tokenizer, pairs)
    assert rows == [21, 10, 5, 5, 5, 5, 1]
    assert [found.greedy for found in again] == [found.greedy for found in scores]
    for kind in ("logprob", "first_logprob"):
        expected = [getattr(found, kind) for found in scores]
        assert [getattr(found, kind) for found in again] == pytest.approx(expected, abs=1e-4)
    assert generate(model, tokenizer, prompts, max_new_tokens=2) == said
    limit = 0
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        score_continuations(model, tokenizer, pairs)
    limit, rows = 8, []
    monkeypatch.setattr("molf.tasks.batches.is_sharded", lambda _: True)  # the other processes are in another layer
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        score_continuations(model, tokenizer, pairs)
    assert rows == [21]


def test_where_the_context_is_found(tokenizer) -> None:
    model = model_for(tokenizer, positions=48)
    assert context_length(model, tokenizer) == 48
    unlimited = SimpleNamespace(config=SimpleNamespace())  # ALiBi and recurrent models have no such number
    assert context_length(unlimited, tokenizer) == 256
    tokenizer.model_max_length = int(1e30)
    assert context_length(unlimited, tokenizer) is None
    assert Context(None).fit([1] * 5000, 5000) == [1] * 5000
