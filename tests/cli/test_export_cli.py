"""``molf export`` of real runs in process: every method's forms, what is printed and written, and what is refused."""

import json
import re
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from molf.assets import BUNDLED_MODEL
from molf.cli import main

TRAIN = [
    "train", "--model_name_or_path", str(BUNDLED_MODEL), "--task", "world-fact", "--max_examples", "16",
    "--max_steps", "3", "--per_device_train_batch_size", "8", "--learning_rate", "3e-3", "--warmup_steps", "0",
    "--gradient_checkpointing", "false", "--save_strategy", "no", "--eval_at_end", "false", "--use_cpu", "true",
    "--disable_tqdm", "true",
]  # fmt: skip
PRUNED = pytest.mark.filterwarnings(  # PEFT, of AdaLoRA's own files: it takes a rank of 0 for an unsharded tensor
    "ignore:The following rank_pattern keys:RuntimeWarning", "ignore:Adapter .default.:peft.utils.warning.PeftWarning"
)


def trained(out: Path, method: str, *more: str) -> Path:
    torch.set_num_threads(1)
    assert main([*TRAIN, "--method", method, *more, "--output_dir", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def molf_e(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("export") / "molf-e", "molf-e", "--expert_ranks", "2", "4")


@pytest.fixture(scope="module")
def molf(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("export") / "molf", "molf", "--expert_ranks", "4")


def exported(run: Path, out: Path, *arguments: object) -> dict[str, Any]:
    """The record that the command writes."""
    assert main(["export", str(run), "--output_dir", str(out), *map(str, arguments)]) == 0
    return json.loads((out / "export.json").read_text())


def refused(capsys, *arguments: object) -> str:
    """Exit status 2 and one line on stderr; returns it."""
    capsys.readouterr()
    assert main(["export", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("molf: error:")]
    assert len(lines) == 1
    assert captured.out == ""
    return lines[0]


@PRUNED
@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "adalora", "molf-e"])
def test_adapters_of_every_method_are_merged_and_copied(tmp_path, method: str) -> None:
    run = trained(tmp_path / "run", method, *(["--expert_ranks", "2", "4"] if method == "molf-e" else []))
    merged = exported(run, tmp_path / "merged", "--to", "merged")
    adapter = exported(run, tmp_path / "adapter", "--to", "adapter")
    assert merged["difference"]["max_abs"] <= merged["tolerance"] < 1e-3
    assert adapter["difference"]["max_abs"] == 0
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        one = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
        other = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")(ids).logits
        base = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL)(ids).logits
    torch.testing.assert_close(one, other, rtol=0, atol=merged["tolerance"])
    assert (one - base).abs().max() > 10 * merged["tolerance"]


def test_what_is_printed_and_in_the_card(tmp_path, capsys, molf: Path) -> None:
    out = tmp_path / "out"
    record = exported(molf, out, "--to", "delta", "--rank", "8")
    printed = capsys.readouterr().out.splitlines()
    found, total = record["difference"], f"{100 * record['energy']['total']:.2f} %"
    layers = [line.split() for line in printed if line.startswith("  model.")]
    assert layers == [[name, f"{100 * share:.2f}", "%"] for name, share in record["energy"]["layers"].items()]
    assert len(layers) == 28
    assert f"energy kept at rank 8: {total} of the change" in printed
    text = "\n".join(printed)
    assert "carried whole: model.embed_tokens, " in text
    assert f"max |Δ logit| {found['max_abs']:.3g} of {found['max_logit']:.3g}, KL {found['kl']:.3g} nats" in text
    assert "16 prompts of the run's data: world-fact" in text
    card = (out / "README.md").read_text()
    for part in (
        f"base_model: {BUNDLED_MODEL}",
        f"| base model | {BUNDLED_MODEL}, revision main |",
        "| method | molf |",
        "| experts | dense, lora_r4 (scale 2) |",
        "| data | task world-fact, max_examples 16 |",
        f"| largest difference of a logit | {found['max_abs']:.3g} |",
        f"| KL(trained, export), nats per token | {found['kl']:.3g} |",
        f"Rank 8 keeps {total}",
        "| layers | dense | lora_r4 |",
        "| steps | 3 |",
        f"| torch | {torch.__version__} | {torch.__version__} |",
    ):
        assert part in card, part
    shares = json.loads((molf / "metrics.json").read_text())["expert_share"]
    assert record["routing"]["all layers"] == pytest.approx(shares)
    assert record["data"] == {"task": "world-fact", "max_examples": 16}
    assert record["metrics"] == json.loads((molf / "metrics.json").read_text())
    assert set(record["routing"]) > {"all layers", "q_proj", "down_proj"}


def test_an_export_replaces_an_older_one_and_nothing_else(tmp_path, capsys, molf_e: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(molf_e, run)
    assert main(["export", str(run), "--to", "experts"]) == 0
    out = run / "export-experts"
    assert (out / "lora_r2" / "adapter_model.safetensors").is_file()
    assert exported(run, out, "--to", "merged", "--dtype", "bfloat16")["dtype"] == "bfloat16"
    assert not (out / "lora_r2").exists()
    older = {path.name: path.read_bytes() for path in out.iterdir()}
    problem = refused(capsys, run, "--to", "merged", "--dtype", "bfloat16", "--tolerance", 0, "--output_dir", out)
    assert "the tolerance is 0. Nothing was written" in problem
    assert {path.name: path.read_bytes() for path in out.iterdir()} == older
    assert "is there and no export of molf" in refused(capsys, run, "--to", "adapter", "--output_dir", run)
    assert not list(run.glob(".*"))


def test_a_run_and_an_export_never_share_a_folder(tmp_path, capsys, molf_e: Path) -> None:
    """The folder of experts has no model of its own, so nothing else tells molf train that it is taken."""
    out = tmp_path / "out"
    record = exported(molf_e, out, "--to", "experts")
    assert sorted(record["files"]) == sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert {"export.json", "README.md", "lora_r2/adapter_model.safetensors"} <= {*record["files"]}
    for more in ([], ["--resume_from_checkpoint", "auto"]):
        assert main([*TRAIN, "--method", "lora", *more, "--output_dir", str(out)]) == 2
        assert f"output_dir={out} holds export.json of an earlier run or export" in capsys.readouterr().err
    (out / "run.json").write_text("{}")
    problem = refused(capsys, molf_e, "--to", "experts", "--output_dir", out)
    assert f"output_dir={out} holds run.json, which its export.json does not list" in problem
    assert (out / "run.json").read_text() == "{}"


@pytest.fixture
def hub_id(tmp_path, monkeypatch) -> tuple[str, str]:
    """A hub id in the local cache, with the bundled model as "dev" and another one as "main"; and dev's commit."""
    cache = tmp_path / "hub"
    for branch, commit in (("main", "a" * 40), ("dev", "b" * 40)):
        snapshot = cache / "models--owner--tiny" / "snapshots" / commit
        shutil.copytree(BUNDLED_MODEL, snapshot)
        if branch == "main":
            tensors = load_file(snapshot / "model.safetensors")
            save_file(
                {key: 1.5 * value for key, value in tensors.items()}, snapshot / "model.safetensors", {"format": "pt"}
            )
        (cache / "models--owner--tiny" / "refs").mkdir(exist_ok=True)
        (cache / "models--owner--tiny" / "refs" / branch).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return "owner/tiny", "b" * 40


@pytest.mark.filterwarnings("ignore:Could not find a config file in owner/tiny:UserWarning")  # PEFT asks the hub
@pytest.mark.parametrize(("method", "form"), [("molf-e", ["adapter"]), ("molf", ["delta", "--rank", "8"])])
def test_the_base_is_the_commit_that_was_trained_on(tmp_path, hub_id, method: str, form: list[str]) -> None:
    """Also after the branch has moved on: the run and the export name the commit, and it is loaded."""
    name, commit = hub_id
    run = trained(
        tmp_path / "run", method, "--expert_ranks", "4", "--model_name_or_path", name, "--model_revision", "dev"
    )
    assert json.loads((run / "run.json").read_text())["model_commit"] == commit
    (tmp_path / "hub" / "models--owner--tiny" / "refs" / "dev").write_text("a" * 40)
    record = exported(run, tmp_path / "out", "--to", *form)
    assert record["revision"] == commit
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["revision"] == commit
    assert record["difference"]["kl"] < 1  # main would be another model altogether
    if method == "molf-e":  # and molf train's own adapter says so
        assert json.loads((run / "adapter_config.json").read_text())["revision"] == commit
        assert record["difference"]["max_abs"] == 0


def test_prompts_where_the_data_are_gone(tmp_path, facts, capsys) -> None:
    data = tmp_path / "facts.json"
    shutil.copy(facts, data)
    run = trained(tmp_path / "run", "lora", "--task", "fact", "--dataset_path", str(data))
    assert exported(run, tmp_path / "one", "--to", "adapter")["source"] == f"the run's data: fact, {data}"
    data.unlink()
    source = exported(run, tmp_path / "two", "--to", "adapter")["source"]
    assert source.startswith("statements of the bundled world, because ")
    assert "facts.json" in source
    assert source in (tmp_path / "two" / "README.md").read_text()


def test_what_does_not_fit(tmp_path, capsys, molf: Path, molf_e: Path) -> None:
    out = ["--output_dir", tmp_path / "out"]
    assert "required: run, --to" in refused(capsys)
    assert "invalid choice: 'gguf'" in refused(capsys, molf, "--to", "gguf", *out)
    assert "tolerance=-1.0: must be finite" in refused(capsys, molf, "--to", "merged", "--tolerance", "-1", *out)
    for form in ("adapter", "experts"):
        assert f"--to {form}: molf trained a whole model, no adapter; use --to merged, or --to delta" in refused(
            capsys, molf, "--to", form, *out
        )
    assert "--to delta: molf-e trained an adapter already; use --to adapter" in refused(
        capsys, molf_e, "--to", "delta", "--rank", 4, *out
    )
    assert "--to delta needs --rank" in refused(capsys, molf, "--to", "delta", *out)
    assert "rank=129: choose from 1 to 128" in refused(capsys, molf, "--to", "delta", "--rank", 129, *out)
    assert "rank=4: --to merged does not use it" in refused(capsys, molf, "--to", "merged", "--rank", 4, *out)
    assert "drop_other=True: --to merged does not" in refused(capsys, molf, "--to", "merged", "--drop_other", *out)
    for size in ("abc", "5", "-5GB"):
        assert f"max_shard_size={size}: give a number" in refused(
            capsys, molf, "--to", "merged", f"--max_shard_size={size}", *out
        )
    assert "dequantize: only --to merged of a run on a quantised" in refused(
        capsys, molf, "--to", "merged", "--dequantize", *out
    )
    assert not (tmp_path / "out").exists()


def test_what_is_no_finished_run(tmp_path, capsys, molf_e: Path) -> None:
    out = ["--to", "adapter", "--output_dir", tmp_path / "out"]
    assert f"{tmp_path} is no run folder of molf train (no run.json in it)" in refused(capsys, tmp_path, *out)
    assert "is no run folder" in refused(capsys, BUNDLED_MODEL, *out)
    run = tmp_path / "run"
    shutil.copytree(molf_e, run)
    for name, message in (
        (
            "adapter_model.safetensors",
            "is unfinished (no adapter_model.safetensors in it): continue it with molf train",
        ),
        ("metrics.json", "is unfinished (no metrics.json in it): continue it with"),
    ):
        (run / name).rename(run / "aside")
        assert message in refused(capsys, run, *out)
        (run / "aside").rename(run / name)
    weights = (run / "adapter_model.safetensors").read_bytes()
    (run / "adapter_model.safetensors").write_bytes(weights[:-100])
    assert f"the adapter of {run} is damaged" in refused(capsys, run, *out)
    (run / "adapter_model.safetensors").write_bytes(weights)
    text = (run / "run.json").read_text()
    for new, message in (
        (text[:-20], "run.json is damaged"),
        (text.replace('"top_k"', '"top_j"'), "run.json is damaged or of another version of molf"),
        (text.replace('"method": "molf-e"', '"method": "molf-f"'), "of another version of molf: method='molf-f'"),
        (text.replace('"world-fact"', "null"), "of another version of molf: dataset_path is not given"),
        (text.replace('"float32"', '"float33"', 1), "of another version of molf: dtype='float33': choose"),
        (text.replace('"task"', '"tasks"', 1), "got an unexpected keyword argument 'tasks'"),
        (re.sub(r'"versions": {[^}]*}', '"versions": null', text), "run.json is damaged or of another version"),
        (text.replace(str(BUNDLED_MODEL), str(tmp_path / "gone")), f"model {tmp_path / 'gone'} cannot be read"),
        (text.replace(str(BUNDLED_MODEL), str(tmp_path / "gone")), "say so with --base"),
    ):
        (run / "run.json").write_text(new)
        assert message in refused(capsys, run, *out)
    (run / "run.json").write_text(text)
    log = (run / "routing.jsonl").read_text().splitlines()[0]
    for name, content, message in (
        ("metrics.json", "[1]", "metrics.json is damaged: it holds no mapping"),
        ("routing.jsonl", '{"schema": 1}\n', "routing.jsonl, line 1, is damaged: modules is None and no list of names"),
        ("routing.jsonl", log + "\n{}\n", "routing.jsonl is damaged: KeyError('winners')"),
        ("adapter_config.json", "{", f"the adapter of {run} is damaged"),
        ("adapter_config.json", "{}", f"the adapter of {run} is damaged"),
    ):
        whole = (run / name).read_text()
        (run / name).write_text(content)
        assert message in refused(capsys, run, *out)
        (run / name).write_text(whole)
    assert "run2" in refused(capsys, tmp_path / "run2", *out)
    assert not (tmp_path / "out").exists()


def test_a_full_or_unwritable_disk(tmp_path, capsys, molf: Path) -> None:
    """A limit on the size of files stands for a full disk: the write fails half way through the weights."""
    (tmp_path / "file").write_text("")
    assert "file" in refused(capsys, molf, "--to", "merged", "--output_dir", tmp_path / "file" / "out")
    out = tmp_path / "out"
    exported(molf, out, "--to", "merged")
    older = {path.name: path.read_bytes() for path in out.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
        problem = refused(capsys, molf, "--to", "merged", "--output_dir", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "File too large" in problem
    assert {path.name: path.read_bytes() for path in out.iterdir()} == older
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_rounding_leaves_nothing_of_is_refused(tmp_path, capsys, molf_e: Path) -> None:
    """An adapter so small that bf16 loses it: within the tolerance of rounding, and no nearer to it than the base."""
    run = tmp_path / "run"
    shutil.copytree(molf_e, run)
    weights = load_file(run / "adapter_model.safetensors")
    small = {name: tensor * (1e-4 if "lora_B" in name else 1) for name, tensor in weights.items()}
    save_file(small, run / "adapter_model.safetensors", metadata={"format": "pt"})
    merged = (run, "--output_dir", tmp_path / "merged", "--to", "merged")
    assert "no nearer to the trained model than the base is" in refused(capsys, *merged, "--dtype", "bfloat16")
    assert not (tmp_path / "merged").exists()
    exported(run, tmp_path / "fp32", "--to", "merged", "--dtype", "float32")
    exported(run, tmp_path / "asked", "--to", "merged", "--dtype", "bfloat16", "--tolerance", "100")
