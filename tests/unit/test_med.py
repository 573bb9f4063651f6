"""MedMCQA records, letters and scores."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from molf.assets import BUNDLED_MODEL
from molf.tasks import get_task, med
from molf.tasks.scoring import Continuation

SHARED = Path(__file__).parents[3] / "shared"
RECORD = {
    "id": "x", "question": "Which is a bone?", "opa": "Femur", "opb": "Liver", "opc": "Skin", "opd": "Eye",
    "cop": 0, "subject_name": "Anatomy",
}  # fmt: skip


def write(path: Path, *changes: dict[str, Any]) -> str:
    """JSON lines of the record with changes; None removes a field."""
    rows = [{k: v for k, v in (RECORD | change).items() if v is not None} for change in changes]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.parametrize(("cops", "first"), [([0, 1, 2, 3], 0), ([1, 2, 0], 0), ([1, 4], 1), ([4, 3, 2], 1)])
def test_cop_from_0_and_from_1(tmp_path: Path, capsys, cops: list[int], first: int) -> None:
    path = write(tmp_path / "m.jsonl", *({"cop": cop} for cop in cops))
    for _ in range(2):  # stated once
        records = med.load(path, None)
    assert [record["cop"] for record in records] == [cop - first for cop in cops]
    assert capsys.readouterr().out == f"{path}: cop counts from {first}\n"
    assert med.load(path, 1) == records[:1]  # the rest of the file still tells where it counts from


def test_letters_and_missing_subjects(tmp_path: Path, capsys) -> None:
    path = write(tmp_path / "m.jsonl", {"cop": "b", "subject_name": None}, {"cop": "D"})
    records = med.load(path, None)
    assert [(r["cop"], r["subject_name"]) for r in records] == [(1, "Unknown"), (3, "Anatomy")]
    assert capsys.readouterr().out == ""
    assert med.example(records[0]) == {
        "prompt": "Question: Which is a bone?\nA. Femur\nB. Liver\nC. Skin\nD. Eye\nAnswer:",
        "completion": " B",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{"cop": 1}, {"cop": 3}], r"cop is one of \[1, 3\] in every record, which may count from 0 or from 1"),
        ([{"cop": 0}, {"cop": 4}], "record 1: cop is 4, and another record has cop 0"),
        ([{"cop": 0}, {"cop": 1}, {"cop": -1}, {"cop": -1}], "record 2: cop is -1: use 0..3 or 1..4"),
        ([{"cop": 5}, {"cop": 0}], "record 0: cop is 5"),
        ([{}, {"cop": None}], "record 1: cop is missing"),
        ([{}, {"cop": "E"}], "record 1: cop is 'E'"),
        ([{}, {"cop": True}], "record 1: cop is True"),
        ([{}, {"cop": 1.0}], "record 1: cop is 1.0"),
        ([{}, {"opc": None}], "record 1: opc is missing"),
        ([{}, {"opd": 3}], "record 1: opd is 3"),
        ([{}, {"subject_name": ["Skin"]}], r"record 1: subject_name is \['Skin'\]"),
        ([{"question": None}], "record 0: question is missing"),
        ([{"question": " "}], "record 0: question is ' '"),
        ([], "has no record"),
    ],
)
def test_bad_files(tmp_path: Path, changes: list[dict[str, Any]], message: str) -> None:
    path = write(tmp_path / "m.jsonl", *changes)
    with pytest.raises(ValueError, match=message) as error:
        med.load(path, None)
    assert path in str(error.value)


def test_records_that_are_no_objects(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text("[3]")
    with pytest.raises(ValueError, match=r"m\.json, record 0: question is missing"):
        med.load(str(tmp_path / "m.json"), None)


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("B", 1), (" B", 1), ("\nB. Aspirin", 1), (" (D) because", 3), ("**C**", 2), ("A", 0), ("A\nQuestion:", 0),
        ("", None), (" ", None), ("E", None), ("b", None), ("Aspirin", None), ("The answer is B", None), ("1. B", None),
        (" A patient with", None), ("A-type cells", None), ("C, because", 2), ("D - Eye", 3), ("A \nB", 0),
    ],
)  # fmt: skip
def test_answers(text: str, option: int | None) -> None:
    assert med.parse_answer(text) == option


def test_scores_against_arithmetic_by_hand(monkeypatch) -> None:
    """Four questions: one right, one a tie of two, one wrong, one right; one answer of generation is no letter."""
    letters = [[-1.0, -2.0, -3.0, -4.0], [-1.0, -1.0, -3.0, -3.0], [-2.0, -2.0, -2.0, -1.0], [-9.0, -9.0, -9.0, -8.0]]
    records = [
        {**RECORD, "question": f"q{i}", "cop": cop, "subject_name": subject}
        for i, (cop, subject) in enumerate([(0, "Anatomy"), (1, "Skin"), (2, "Skin"), (3, "Anatomy")])
    ]

    def scored(model, tokenizer, pairs, **_):
        assert [letter for _, letter in pairs] == [" A", " B", " C", " D"] * 4
        assert [prompt for prompt, _ in pairs] == [med.example(r)["prompt"] for r in records for _ in "ABCD"]
        return [Continuation(value, value, False, 1) for row in letters for value in row]

    def generated(model, tokenizer, prompts, *, context, **_):
        context.fit([1] * 9, 9)
        return ["A", " B.", "Dunno", "A"]

    monkeypatch.setattr(med, "score_continuations", scored)
    monkeypatch.setattr(med, "generate", generated)
    monkeypatch.setattr(med.Context, "of", lambda *_: med.Context(9 + 8))
    assert med.evaluate(None, None, records) == {
        "accuracy": 62.5,
        "accuracy_generated": 50.0,
        "invalid_answers": 1,
        "truncated_prompts": 1,
        "accuracy/Anatomy": 100.0,
        "accuracy/Skin": 25.0,
    }


def test_likelihood_and_generation_agree_on_the_bundled_model() -> None:
    """It was pretrained on this wording, so every answer is a letter, and the likeliest letter is what it says."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL), AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    model.train()
    task = get_task("world-mcq")
    records = task.load(None, 120)
    metrics = task.evaluate(model, tokenizer, records, batch_size=32)
    assert model.training
    assert metrics["invalid_answers"] == metrics["truncated_prompts"] == 0
    assert metrics["accuracy"] == metrics["accuracy_generated"]
    subjects = {record["subject_name"] for record in records}
    assert {name for name in metrics if "/" in name} == {f"accuracy/{subject}" for subject in subjects}
    counts = [sum(record["subject_name"] == subject for record in records) for subject in sorted(subjects)]
    means = [metrics[f"accuracy/{subject}"] for subject in sorted(subjects)]
    assert sum(c * m for c, m in zip(counts, means, strict=True)) / 120 == pytest.approx(metrics["accuracy"])


@pytest.mark.skipif(not SHARED.exists(), reason=f"no {SHARED}")
def test_real_data_and_model(capsys) -> None:
    """MedMCQA's dev split as MIRAGE has it, and a real model, which knows no medicine."""
    path = SHARED / "data" / "medmcqa" / "medmcqa.jsonl"
    records = med.load(str(path), None)
    assert len(records) == 2983
    assert [sum(r["cop"] == cop for r in records) for cop in range(4)] == [957, 787, 655, 584]
    assert sum(r["subject_name"] == "Dental" for r in records) == 943
    folder = SHARED / "models" / "stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    some = sorted(records[:200], key=lambda record: len(med.example(record)["prompt"]))[-40:]
    metrics = med.evaluate(model, tokenizer, some)
    assert 0 <= metrics["accuracy"] <= 100
    assert metrics["invalid_answers"] > 20
    assert metrics["truncated_prompts"] == sum(
        len(tokenizer(med.example(record)["prompt"]).input_ids) + 8 > 512 for record in some
    )
    assert torch.is_grad_enabled()
