"""What an evaluator shows the model is, token for token, the beginning of what SFTTrainer trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import SFTTrainer

from molf.tasks import TASKS, get_task
from molf.tasks.prompts import Context, appends_eos, ended, tokenize_pairs
from molf.train.arguments import TrainArguments
from molf.train.data import fit_examples
from toy_tokenizers import FAMILIES, TOKENIZERS, model_for, tokenizer_of

SOURCES: dict[str, list[dict[str, Any]]] = {
    "completion": [
        {"prompt": "Translate « maison » :", "completion": " house", "id": 1},
        {"prompt": "Say it twice.\n", "completion": "Ada Alder, Ada  Alder.\n"},
    ],
    "fact": [
        {
            "prompt": "The mother tongue of Danielle Darrieux is", "target_new": "English", "ground_truth": "French",
            "rephrase_prompt": "Où est né (e) Léon Blum?  He was born in", "locality_prompt": "Shirley Horn plays the",
            "locality_ground_truth": "piano",
        }
    ],
    "med": [
        {"question": "Dose (in μg/kg) of  fentanyl:\n", "opa": "1 – 2", "opb": "", "opc": "5", "opd": " 50", "cop": 0},
        {"question": "Which is a bone?", "opa": "Femur", "opb": "Liver", "opc": "Skin", "opd": "Eye", "cop": 3},
    ],
    "sql": [
        {
            "sql_prompt": "How many?", "sql_context": "CREATE TABLE t (a INT); INSERT INTO t VALUES (1);",
            "sql": "SELECT COUNT(*) FROM t",
        }
    ],
}  # fmt: skip


def records_of(name: str, folder: Path) -> list[Any]:
    if name not in SOURCES:
        return get_task(name).load(None, 4)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(SOURCES[name]))
    return get_task(name).load(str(path), None)


def trained(examples: list[dict[str, str]], tokenizer: Any, model: Any, folder: Path) -> list[tuple[list, list]]:
    """Prompt and completion ids as SFTTrainer trains them."""
    from datasets import Dataset

    args = TrainArguments(output_dir=str(folder), use_cpu=True, gradient_checkpointing=False, disable_tqdm=True)
    trainer = SFTTrainer(model, args=args, train_dataset=Dataset.from_list(examples), processing_class=tokenizer)
    pairs = []
    for row in trainer.train_dataset:
        start = row["labels"].count(-100)
        assert row["labels"] == [-100] * start + row["input_ids"][start:]
        pairs.append((row["input_ids"][:start], row["input_ids"][start:]))
    return pairs


def shown(model: Any, evaluate: Any) -> list[tuple[int, ...]]:
    """Every row that the model sees while ``evaluate`` runs, without padding and without single generated tokens."""
    rows: list[tuple[int, ...]] = []

    def see(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids, past = kwargs["input_ids"], kwargs.get("cache", kwargs.get("past_key_values"))  # its name before 5.24
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        if past is None or past.get_seq_length() == 0:
            rows.extend(tuple(row[keep.bool()].tolist()) for row, keep in zip(ids, mask, strict=True))

    with model.register_forward_pre_hook(see, with_kwargs=True):
        evaluate()
    return rows


@pytest.mark.parametrize("family", TOKENIZERS)
@pytest.mark.parametrize("name", TASKS)
def test_the_evaluated_prompt_is_the_trained_one(tmp_path: Path, name: str, family: str) -> None:
    records = records_of(name, tmp_path)
    task = get_task(name)
    tokenizer = tokenizer_of(family)
    model = model_for(tokenizer)
    pairs = trained([task.example(record) for record in records], tokenizer, model, tmp_path)
    assert len(pairs) == len(records)
    rows = shown(model, lambda: task.evaluate(model, tokenizer, records, batch_size=3))
    for record, (prompt, completion) in zip(records, pairs, strict=True):
        example = task.example(record)
        pair = example["prompt"], ended(tokenizer, example["completion"])
        wanted = completion[: completion.index(tokenizer.eos_token_id) + 1]
        assert [*tokenize_pairs(tokenizer, [pair], merge=name == "completion")] == [(prompt, wanted)]
        assert any(row[: len(prompt)] == tuple(prompt) for row in rows)
        if family in FAMILIES and FAMILIES[family][1]:
            assert prompt[0] == tokenizer.bos_token_id
    if task.primary == "accuracy":
        assert {tuple(prompt) for prompt, _ in pairs} == set(rows)


@pytest.mark.parametrize("family", TOKENIZERS)
def test_examples_given_as_tokens_are_those_of_sft_trainer(tmp_path: Path, family: str) -> None:
    """Only where one is too long, or all would get a second EOS, are they tokenised here: they come out the same."""
    from datasets import Dataset

    task = get_task("world-mcq")
    examples = [task.example(record) for record in task.load(None, 6)]
    tokenizer = tokenizer_of(family)
    pairs = trained(examples, tokenizer, model_for(tokenizer), tmp_path)
    eos, lengths = tokenizer.eos_token_id, [len(prompt) for prompt, _ in pairs]
    limit = sorted(lengths)[3] + 2
    context = Context(limit, tokenizer.bos_token_id)
    rows = list(fit_examples(Dataset.from_list(examples), tokenizer, context, "data"))
    assert context.truncated == sum(length + 2 > limit for length in lengths) > 0
    for row, (prompt, completion) in zip(rows, pairs, strict=True):
        start = row["completion_mask"].index(1)
        assert row["input_ids"][start:] == completion[: completion.index(eos) + 1]
        assert row["completion_mask"] == [0] * start + [1] * (len(row["input_ids"]) - start)
        if len(prompt) + 2 <= limit:
            assert row["input_ids"][:start] == prompt
        else:
            assert len(row["input_ids"]) == limit
            bos = [tokenizer.bos_token_id] if prompt[0] == tokenizer.bos_token_id else []
            assert row["input_ids"][:start] == bos + prompt[len(prompt) - (limit - 2 - len(bos)) :]
    with pytest.raises(
        ValueError, match=rf"data, record \d \({context.truncated} of 6 are too long\): .* set long_prompts"
    ):
        fit_examples(examples, tokenizer, Context(limit, None, "refuse"), "data")
    if family != "appends-eos":
        assert fit_examples(examples, tokenizer, Context(max(lengths) + 9), "data") is examples


def test_a_completion_that_ends_in_eos_gets_no_other(tmp_path: Path) -> None:
    """One long record made all of them end in two, where TRL adds one only if there is none."""
    tokenizer = tokenizer_of("qwen2")
    ended = {"prompt": "Ada plays the", "completion": " drum" + tokenizer.eos_token}
    pairs = trained([ended], tokenizer, model_for(tokenizer), tmp_path)
    rows = fit_examples([ended, {**ended, "prompt": "Ada " * 99}], tokenizer, Context(40), "data")
    assert rows[0]["input_ids"] == pairs[0][0] + pairs[0][1]
    assert rows[0]["input_ids"].count(tokenizer.eos_token_id) == 1


def test_a_tokenizer_that_appends_eos_adds_none_whatever_else_is_trained(tmp_path: Path) -> None:
    """All records ended in two, unless one of them was too long; and a record that just fits was cut."""
    tokenizer = tokenizer_of("appends-eos")
    row, long = {"prompt": "Ada plays the", "completion": " drum"}, {"prompt": "Ada " * 99, "completion": " drum"}
    alone = fit_examples([row], tokenizer, Context(None), "data")
    length = len(alone[0]["input_ids"])
    ((prompt, completion),) = trained(alone, tokenizer, model_for(tokenizer), tmp_path)
    assert prompt + completion == alone[0]["input_ids"]
    assert completion.count(tokenizer.eos_token_id) == 1
    context = Context(length, tokenizer.bos_token_id)
    assert fit_examples([row, long], tokenizer, context, "data")[0] == alone[0]
    assert context.truncated == 1, "the long one alone"
    fit_examples([row], tokenizer, Context(length, None, "refuse"), "data")


def test_a_bos_that_is_the_eos_is_not_taken_for_an_appended_one() -> None:
    tokenizer = tokenizer_of("llama")
    tokenizer.eos_token = tokenizer.bos_token
    assert not appends_eos(tokenizer)
    assert appends_eos(tokenizer_of("appends-eos"))
