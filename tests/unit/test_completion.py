"""Prompts and completions of one's own: their score by arithmetic of its own, long ones, and what is refused."""

import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTTrainer

from molf.assets import BUNDLED_MODEL
from molf.tasks import batches, completion
from molf.train.arguments import TrainArguments
from toy_tokenizers import model_for, tokenizer_of

RECORDS = [
    {"prompt": "Ada Alder plays the", "completion": " drum"},
    {"prompt": "Leo Lark speaks", "completion": " Cestic, and Ada Alder plays the organ."},
    {"prompt": "Leo", "completion": " Lark" * 40},
]


@pytest.fixture(scope="module")
def bundled():
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL).double()
    return model, AutoTokenizer.from_pretrained(BUNDLED_MODEL)


def test_the_score_is_the_mean_over_all_completion_tokens(bundled) -> None:
    model, tokenizer = bundled
    losses, right = [], []
    with torch.no_grad():
        for record in RECORDS:
            prompt = tokenizer(record["prompt"]).input_ids
            ids = [*tokenizer(record["prompt"] + record["completion"]).input_ids, tokenizer.eos_token_id]
            logits, wanted = (
                model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1],
                torch.tensor(ids[len(prompt) :]),
            )
            losses += F.cross_entropy(logits, wanted, reduction="none").tolist()
            right.append(bool((logits.argmax(-1) == wanted).all()))
    found = completion.evaluate(model, tokenizer, RECORDS, batch_size=2)
    mean = math.fsum(losses) / len(losses)
    assert found["completion_loss"] == pytest.approx(mean, rel=1e-6)
    assert found["likelihood"] == pytest.approx(100 * math.exp(-mean), rel=1e-6)
    assert found["exact_match"] == pytest.approx(100 * sum(right) / len(right))
    assert "truncated_prompts" not in found


def test_exact_match_asks_for_the_end_too(bundled) -> None:
    model, tokenizer = bundled
    prompt = "Ada Alder plays the"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    said = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    assert tokenizer.eos_token_id in said
    said = said[: said.index(tokenizer.eos_token_id)]
    whole, part = ({"prompt": prompt, "completion": tokenizer.decode(ids)} for ids in (said, said[:-1]))
    assert completion.evaluate(model, tokenizer, [whole, part])["exact_match"] == 50


@pytest.mark.parametrize("family", ["llama", "qwen2", "appends-eos"])
def test_tokens_that_merge_belong_to_the_completion_as_in_training(tmp_path: Path, family: str) -> None:
    """The loss of SFTTrainer's own labels; a first token, which nothing is before, is in neither."""
    records = [{"prompt": "Say it twice.\n", "completion": "\nAda Alder"}, {"prompt": "A", "completion": "da Alder"}]
    tokenizer = tokenizer_of(family)
    model = model_for(tokenizer)
    args = TrainArguments(output_dir=str(tmp_path), use_cpu=True, gradient_checkpointing=False, disable_tqdm=True)
    data = Dataset.from_list(records)
    rows = SFTTrainer(model, args=args, train_dataset=data, processing_class=tokenizer).train_dataset
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor(row["input_ids"])
            keep = len(ids) - (1 if family == "appends-eos" else 0)  # which SFTTrainer trains twice
            labels = torch.tensor(row["labels"])[1:keep]
            total += float(F.cross_entropy(model(ids[None]).logits[0, : keep - 1], labels, reduction="sum"))
            count += int((labels != -100).sum())
    found = completion.evaluate(model, tokenizer, records)
    assert found["completion_loss"] == pytest.approx(total / count, rel=1e-5)


def test_long_records_are_scored_a_few_at_a_time(bundled, monkeypatch) -> None:
    model, tokenizer = bundled
    records = [{"prompt": "Ada", "completion": " Alder" * length} for length in (1, 2, 30, 31)]
    expected, shapes = completion.evaluate(model, tokenizer, records), []
    monkeypatch.setattr(batches, "TOKENS", 40)
    with model.register_forward_pre_hook(
        lambda _, __, given: shapes.append(given["input_ids"].shape), with_kwargs=True
    ):
        found = completion.evaluate(model, tokenizer, records)
    assert found == pytest.approx(expected, rel=1e-9)
    assert [rows for rows, _ in shapes] == [1, 1, 2]
    assert all(rows == 1 or rows * width <= 40 for rows, width in shapes)


def test_prompts_that_are_cut_are_counted(bundled) -> None:
    model, tokenizer = bundled
    short = {"prompt": "Ada Alder plays the", "completion": " drum"}
    long = {**short, "prompt": "Leo " * model.config.max_position_embeddings + short["prompt"]}
    assert completion.evaluate(model, tokenizer, [short, long])["truncated_prompts"] == 1


def test_what_a_record_needs(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    good = {"prompt": "a", "completion": " b"}
    chat = [{"role": "user", "content": "a"}]
    for bad, words in (
        ({"prompt": "a"}, "needs a non-empty string 'completion'$"),
        ({"prompt": "", "completion": " b"}, "needs a non-empty string 'prompt'$"),
        ([], "needs a non-empty string 'prompt'$"),
        (
            {"messages": chat},
            r"needs a non-empty string 'prompt'; write chats as text by their template \(docs/quickstart.md#chats\)$",
        ),
        ({"prompt": chat, "completion": chat}, "needs a non-empty string 'prompt'; write chats as text"),
    ):
        path.write_text("\n".join(map(json.dumps, (good, bad))))
        with pytest.raises(ValueError, match=rf"data\.jsonl, record 1: {words}"):
            completion.load(str(path), None)
        assert completion.load(str(path), 1) == [good]
    path.write_text(json.dumps([{**good, "id": 1}]))
    assert completion.load(str(path), None) == [good]
    with pytest.raises(ValueError, match="dataset_path is not given: name a file, folder or hub id of prompts"):
        completion.load(None, None)
