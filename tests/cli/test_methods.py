"""Every method of ``molf train``: what it trains, what it saves, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import molf.train.run
from molf import read_routing
from molf.assets import BUNDLED_MODEL
from molf.cli import main
from molf.train.adalora import orthogonality
from molf.train.methods import METHODS

ARGUMENTS = [
    "--model_name_or_path", str(BUNDLED_MODEL), "--task", "fact", "--max_examples", "16", "--max_steps", "2",
    "--per_device_train_batch_size", "8", "--learning_rate", "1e-3", "--warmup_steps", "0", "--save_strategy", "no",
    "--gradient_checkpointing", "false", "--eval_at_end", "false", "--use_cpu", "true", "--disable_tqdm", "true",
]  # fmt: skip
ADAPTERS = {"lora": 4, "rslora": 4, "dora": 4, "pissa": 8, "adalora": 6, "molf-e": 6, "lora-sum": 6}
"""Methods that save an adapter, with its rank; PiSSA's is doubled for the original base, AdaLoRA's is the first."""
EXTRA = {"fft": [], "random": ["--expert_ranks", "4", "--random_shares", "0.8", "0.2"]}
EXTRA |= {"adalora": ["--expert_ranks", "4", "--learning_rate", "0.1"]}  # it starts at E = 0 and A, B of 0.02
EXTRA |= {name: ["--expert_ranks", "2", "4"] for name in ("molf-e", "lora-sum", "fixed-lora")}
PRUNED = pytest.mark.filterwarnings(  # PEFT, of its own files: it takes a rank of 0 for an unsharded tensor
    "ignore:The following rank_pattern keys:RuntimeWarning", "ignore:Adapter .default.:peft.utils.warning.PeftWarning"
)


def command(method: str, facts: Path, out: Path, *more: str) -> list[str]:
    extra = EXTRA.get(method, ["--expert_ranks", "4"])
    return [
        "train",
        *ARGUMENTS,
        "--method",
        method,
        *extra,
        "--dataset_path",
        str(facts),
        *more,
        "--output_dir",
        str(out),
    ]


def fails(capsys, arguments: list[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    return capsys.readouterr().err


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return load_file(next(out.glob("*.safetensors")))


@pytest.fixture
def trained(monkeypatch) -> list[Any]:
    """The trainers that were made."""
    made: list[Any] = []
    make = molf.train.run._make_trainer
    monkeypatch.setattr(molf.train.run, "_make_trainer", lambda *a, **kw: made.append(make(*a, **kw)) or made[-1])
    return made


def logits(model: Any) -> torch.Tensor:
    ids = AutoTokenizer.from_pretrained(BUNDLED_MODEL)("Ada Alder plays the", return_tensors="pt").input_ids
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@PRUNED
@pytest.mark.parametrize(("method", "more"), [*((m, ()) for m in METHODS), ("molf-e", ("--train_other", "true"))])
def test_what_is_saved_is_the_trained_model(tmp_path, facts, trained, method: str, more: tuple[str, ...]) -> None:
    """Loaded on the untouched base it gives the trained model's logits, to fp32 rounding, and not the base's."""
    out = tmp_path / "run"
    assert main(command(method, facts, out, *more)) == 0
    adapter = method in ADAPTERS and not more
    model = (AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM).from_pretrained(out)
    assert [p.name for p in out.glob("*.safetensors")] == [
        "adapter_model.safetensors" if adapter else "model.safetensors"
    ]
    if adapter:
        assert model.peft_config["default"].r == ADAPTERS[method] or method == "adalora"
    after, before = logits(model), logits(AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL))
    scale = after.abs().max().item()
    torch.testing.assert_close(after, logits(trained[0].model), rtol=0, atol=1e-5 * scale)
    assert (after - before).abs().max() > 1e-4 * scale
    assert json.loads((out / "metrics.json").read_text())["steps"] == 2
    assert (out / "routing.jsonl").exists() == METHODS[method].routes


def test_peft_configs(tmp_path, facts) -> None:
    """The same scale 2 everywhere by default; alpha over r or over its root where alpha is given."""
    expected = {"lora": (8.0, False), "rslora": (4.0, True), "dora": (8.0, False), "lora-sum": (2 * 6**0.5, True)}
    for method, (alpha, use_rslora) in expected.items():
        assert main(command(method, facts, tmp_path / method)) == 0
        config = peft.PeftConfig.from_pretrained(tmp_path / method)
        assert (config.lora_alpha, config.use_rslora) == (pytest.approx(alpha), use_rslora)
        assert config.use_dora == (method == "dora")
    first, second = (tensors(tmp_path / name) for name in ("lora", "rslora"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    for method, more, scale in (("lora", (), 2), ("rslora", (), 4), ("lora", ("--use_rslora", "true"), 4)):
        out = tmp_path / f"alpha-{method}{len(more)}"
        assert main(command(method, facts, out, "--lora_alpha", "8", *more)) == 0
        config = peft.PeftConfig.from_pretrained(out)
        assert config.lora_alpha / (2 if config.use_rslora else 4) == pytest.approx(scale)


def test_controls_equal_what_they_stand_for(tmp_path, facts) -> None:
    runs = {
        "dense-all": command("dense-all", facts, tmp_path / "dense-all"),
        "all": command("molf", facts, tmp_path / "all", "--top_k", "2"),
        "fixed-dense": command("fixed-dense", facts, tmp_path / "fixed-dense", "--max_grad_norm", "0"),
        "fft": command("fft", facts, tmp_path / "fft", "--max_grad_norm", "0"),
    }
    assert [main(arguments) for arguments in runs.values()] == [0] * 4
    start = load_file(BUNDLED_MODEL / "model.safetensors")
    saved = {name: tensors(tmp_path / name) for name in runs}
    assert all(torch.equal(value, saved["all"][key]) for key, value in saved["dense-all"].items())
    for key, value in saved["fft"].items():  # two implementations of AdamW: 1 % of the two steps of size 1e-3
        torch.testing.assert_close(saved["fixed-dense"][key], value, rtol=0, atol=2e-5)
        assert (value - start[key]).abs().max() > 5e-4 or not value.any()  # biases that softmax ignores
    for name, winners in (("dense-all", [{0, 1}]), ("fixed-dense", [{0}])):
        records = read_routing(tmp_path / name / "routing.jsonl")[1]
        assert all({*row} in winners for record in records for row in record["winners"])


def test_lora_controls_change_what_they_may(tmp_path, facts) -> None:
    """The change of a layer's weight is of LoRA's rank; embeddings and norms train in both."""
    start = load_file(BUNDLED_MODEL / "model.safetensors")
    for method, rank in (("fixed-lora", 6), ("lora+other", 4)):
        assert main(command(method, facts, tmp_path / method)) == 0
        for key, value in tensors(tmp_path / method).items():
            change = value - start[key]
            assert change.any() or "bias" in key, key
            if "_proj.weight" in key:
                singular = torch.linalg.svdvals(change.double())
                assert singular[rank] < 1e-4 * singular[0]
                assert singular[rank - 1] > 1e-4 * singular[0]


def test_random_follows_shares_and_seed_and_repeats_after_a_resume(tmp_path, facts) -> None:
    out = tmp_path / "run"
    more = ("--save_strategy", "steps", "--save_steps", "1", "--max_steps", "4", "--logging_steps", "1")
    assert main(command("random", facts, out, *more)) == 0
    log, weights = (out / "routing.jsonl").read_text(), tensors(out)
    header, records = read_routing(out / "routing.jsonl")
    winners = [row[0] for record in records for row in record["winners"]]
    assert header["experts"] == ["dense", "lora_r4"]
    assert 0.62 < winners.count(0) / len(winners) < 0.98  # 0.8 within 4.8 standard deviations of 4 x 28 draws
    best = [max(range(2), key=row.__getitem__) for record in records for row in record["scores"]]
    assert winners != best
    assert main(command("random", facts, out, *more, "--resume_from_checkpoint", str(out / "checkpoint-2"))) == 0
    assert (out / "routing.jsonl").read_text() == log
    assert all(torch.equal(value, weights[key]) for key, value in tensors(out).items())
    assert main(command("random", facts, tmp_path / "other", "--seed", "7", "--max_steps", "4")) == 0
    other = read_routing(tmp_path / "other" / "routing.jsonl")[1]
    assert winners != [row[0] for record in other for row in record["winners"]]


def test_pissa_resumes_exactly(tmp_path, facts) -> None:
    """The base and the first adapter are made anew from the seed; the checkpoint has the trained one."""
    out = tmp_path / "run"
    more = ("--save_strategy", "steps", "--save_steps", "1", "--max_steps", "3")
    assert main(command("pissa", facts, out, *more)) == 0
    whole = tensors(out)
    assert main(command("pissa", facts, out, *more, "--resume_from_checkpoint", str(out / "checkpoint-1"))) == 0
    assert all(torch.equal(value, whole[key]) for key, value in tensors(out).items())


@PRUNED
def test_adalora_prunes_to_its_rank(tmp_path, facts, trained) -> None:
    out = tmp_path / "run"
    assert main(command("adalora", facts, out, "--max_steps", "8")) == 0
    ranks = json.loads((out / "metrics.json").read_text())["adalora_ranks"]
    assert ranks["mean"] == pytest.approx(4, abs=0.1)
    assert ranks["min"] < ranks["max"] <= 6
    assert ranks["min"] == 0  # such layers load, too
    after = logits(AutoPeftModelForCausalLM.from_pretrained(out))
    torch.testing.assert_close(after, logits(trained[0].model), rtol=0, atol=1e-5 * after.abs().max().item())
    kept = [value.shape[0] for key, value in tensors(out).items() if "lora_A" in key]
    assert (min(kept), max(kept), sum(kept) / len(kept)) == tuple(ranks.values())


@PRUNED
def test_adalora_trains_with_pefts_penalty(tmp_path, facts, trained) -> None:
    """PEFT adds the penalty to the model's own loss; the first step's loss has it too, accumulated or not."""
    base = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL)
    config = peft.AdaLoraConfig(init_r=6, target_r=4, total_step=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    ids = torch.arange(10, 22)[None]
    own = model(input_ids=ids, labels=ids).loss.item()
    config.orth_reg_weight = 0.0
    plain = model(input_ids=ids, labels=ids).loss.item()
    config.orth_reg_weight = 0.5
    penalty = orthogonality(model).item()
    assert penalty == pytest.approx(own - plain, abs=1e-5)
    assert penalty > 0.5
    whole = ("--logging_steps", "1")
    halves = (*whole, "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2")
    for index, (method, more) in enumerate((("lora", whole), ("adalora", whole), ("adalora", halves))):
        assert main(command(method, facts, tmp_path / str(index), *more)) == 0
    lora, *adaptive = (trainer.state.log_history[0]["loss"] for trainer in trained)
    assert adaptive == pytest.approx([lora + penalty] * 2, abs=0.05)  # A and B are drawn anew: 1.16 ± 0.01


def test_adalora_without_allocation_is_no_result(tmp_path, facts, capsys, monkeypatch) -> None:
    monkeypatch.setattr(peft.AdaLoraModel, "update_and_allocate", lambda self, step: None)
    assert "ranks never changed from 6" in fails(capsys, command("adalora", facts, tmp_path / "run"))
    assert not list((tmp_path / "run").glob("*.safetensors"))
    monkeypatch.undo()
    assert "needs 2 steps or more" in fails(capsys, command("adalora", facts, tmp_path / "one", "--max_steps", "1"))
    resume = command("adalora", facts, tmp_path / "run", "--resume_from_checkpoint", "last")
    assert "adalora's importance scores are in no checkpoint" in fails(capsys, resume)


@pytest.mark.parametrize(
    ("method", "option", "message"),
    [
        ("molf", "--random_shares 0.5 0.5", "molf does not use it; leave it out or choose random"),
        ("random", "--random_shares 0.5", "one share, not negative, per expert"),
        ("random", "--score_fn pfn", "score_fn=pfn: random does not use it"),
        ("dense-all", "--top_k 2", "top_k=2: dense-all does not use it"),
        ("fixed-dense", "--lora_lr 0.1", "lora_lr=0.1: fixed-dense does not use it"),
        ("fixed-lora", "--score_fn pfn", "score_fn=pfn: fixed-lora does not use it"),
        ("fixed-lora", "--optim adafactor", "fixed-lora is the optimizer"),
        ("lora+other", "--train_other false", "train_other=False: lora+other does not use it"),
        ("lora+other", "--lora_dropout 0.1", "lora_dropout=0.1: lora+other does not use it"),
        ("lora-sum", "--weight_decay 0.5", "lora-sum takes lora_weight_decay"),
        ("molf-e", "--weight_decay 0.5", "molf-e takes lora_weight_decay"),
        ("adalora", "--on_nonfinite skip", "on_nonfinite=skip: adalora scores its ranks"),
        (
            "adalora",
            "--load_best_model_at_end true --eval_strategy steps --eval_steps 1 --save_strategy steps --save_steps 1",
            "load_best_model_at_end=True: adalora's last ranks are not",
        ),
        ("lora-sum", "--lora_alpha 8 8", "lora_alpha=(8.0, 8.0): give one number"),
        ("rslora", "--use_rslora false", "use_rslora=False: rslora does not use it"),
        ("adalora", "--use_rslora true", "use_rslora=True: adalora does not use it"),
        ("dora", "--expert_ranks 2 4", "dora has one rank"),
        ("pissa", "--top_k 2", "top_k=2: pissa does not use it"),
    ],
)
def test_options_that_a_method_ignores_are_refused(tmp_path, facts, capsys, method, option, message) -> None:
    assert message in fails(capsys, command(method, facts, tmp_path / "run", *option.split()))
    assert not (tmp_path / "run").exists()


def test_random_needs_shares(tmp_path, facts, capsys) -> None:
    bare = ["train", *ARGUMENTS, "--method", "random", "--dataset_path", str(facts), "--output_dir", str(tmp_path)]
    assert "random_shares=None: policy='random' needs one number per expert" in fails(capsys, bare)
