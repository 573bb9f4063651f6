"""The command line in process: what it prints, writes and refuses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import molf.cli.demo
from molf import read_routing
from molf.assets import BUNDLED_MODEL
from molf.cli import main
from molf.tasks import completion

COMMON = {
    "model_name_or_path": str(BUNDLED_MODEL),
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "learning_rate": 1.0e-3,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
}


@pytest.fixture
def config(tmp_path: Path, facts: Path) -> Path:
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump({**COMMON, "task": "fact", "dataset_path": str(facts), "max_examples": 16}))
    return path


def fails(capsys, *arguments: str) -> str:
    """Exit status 2 and one line on stderr; returns it."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("molf: error:")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("method", ["fft", "lora", "molf", "molf-e"])
def test_train_writes_a_plain_model_or_adapter(tmp_path, config, capsys, method: str) -> None:
    out = tmp_path / "run"
    ranks = {"fft": [], "lora": ["4"], "molf": ["2", "4"], "molf-e": ["2", "4"]}[method]
    extra = ["--expert_ranks", *ranks] if ranks else []
    assert main(["train", "--config", str(config), "--method", method, *extra, "--output_dir", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "trainable parameters:" in printed
    assert ("routed modules: 28" in printed) == (method in ("molf", "molf-e"))
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["steps"] == 2
    assert metrics["train_loss"] > 0
    assert {"score", "efficacy", "paraphrase", "neighbourhood", "exact_match"} <= metrics.keys()
    resolved = json.loads((out / "run.json").read_text())
    assert resolved["versions"]["torch"] == torch.__version__
    assert resolved["method"]["method"] == method
    assert resolved["training"]["learning_rate"] == 1e-3
    assert AutoTokenizer.from_pretrained(out)("Ada").input_ids
    prompt = AutoTokenizer.from_pretrained(out)("Ada Alder plays the", return_tensors="pt").input_ids
    if method in ("lora", "molf-e"):
        model = AutoPeftModelForCausalLM.from_pretrained(out)
        assert {p.name for p in out.glob("*.safetensors")} == {"adapter_model.safetensors"}
    else:
        model = AutoModelForCausalLM.from_pretrained(out)
        assert load_file(out / "model.safetensors").keys() == load_file(BUNDLED_MODEL / "model.safetensors").keys()
        assert model.lm_head.weight is model.model.embed_tokens.weight
    before = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL)(input_ids=prompt).logits
    assert not torch.equal(before, model(input_ids=prompt).logits)
    if method in ("molf", "molf-e"):
        header, records = read_routing(out / "routing.jsonl")
        assert len(records) == 2
        assert len(header["modules"]) == 28
        assert sum(metrics["expert_share"].values()) == pytest.approx(1)


def test_prompt_completion_lines_and_bf16(tmp_path, capsys) -> None:
    data = tmp_path / "data.jsonl"
    rows = [
        {"prompt": "Ada Alder plays the", "completion": " drum"},
        {"prompt": "Leo Lark speaks", "completion": " Cestic"},
    ]
    data.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    options = [f"--{key}={value}" for key, value in COMMON.items()]
    command = ["train", *options, "--dataset_path", str(data), "--dtype", "bfloat16", "--expert_ranks", "2"]
    assert main([*command, "--output_dir", str(tmp_path / "run")]) == 0
    assert all(v.dtype == torch.bfloat16 for v in load_file(tmp_path / "run" / "model.safetensors").values())
    assert "score" not in json.loads((tmp_path / "run" / "metrics.json").read_text())


@pytest.mark.parametrize(
    ("written", "ranks", "modules", "routed"),
    [
        ({"expert_ranks": 2, "target_modules": r".*\.q_proj"}, (2,), r".*\.q_proj", 4),
        ({"expert_ranks": [2, 4], "target_modules": ["q_proj", "v_proj"]}, (2, 4), ["q_proj", "v_proj"], 8),
        ({"expert_ranks": [2], "target_modules": "up_proj", "lora_alpha": 3}, (2,), ["up_proj"], 4),
    ],
)
def test_yaml_values_and_lists(tmp_path, config, written, ranks, modules, routed: int) -> None:
    config.write_text(config.read_text() + yaml.safe_dump(written))
    assert main(["train", "--config", str(config), "--eval_at_end", "false", "--output_dir", str(tmp_path / "r")]) == 0
    resolved = json.loads((tmp_path / "r" / "run.json").read_text())["molf"]
    assert (tuple(resolved["expert_ranks"]), resolved["target_modules"]) == (ranks, modules)
    assert len(read_routing(tmp_path / "r" / "routing.jsonl")[0]["modules"]) == routed


def test_what_is_refused(tmp_path, config, capsys) -> None:
    train = ["train", "--config", config, "--output_dir", tmp_path / "run"]
    assert "unknown command 'trian': choose one of demo, compare," in fails(capsys, "trian")
    assert "unknown option: --no_such_option 3" in fails(capsys, *train, "--no_such_option", "3")
    assert "learning_rate" in fails(capsys, *train, "--learning_rate", "fast")
    assert "method='full': choose one of fft, lora, rslora, dora, pissa, adalora, molf, molf-e" in fails(
        capsys, *train, "--method", "full"
    )
    assert "expert_ranks=[4]: fft does not use it" in fails(capsys, *train, "--method", "fft", "--expert_ranks", "4")
    assert "top_k=9" in fails(capsys, *train, "--top_k", "9")
    assert "lora_dropout=0.1" in fails(capsys, *train, "--lora_dropout", "0.1")
    assert "nowhere" in fails(capsys, *train, "--model_name_or_path", tmp_path / "nowhere")
    assert "has no checkpoint" in fails(capsys, *train, "--resume_from_checkpoint", "last")
    assert "not a checkpoint folder" in fails(capsys, *train, "--resume_from_checkpoint", tmp_path)
    bad = tmp_path / "bad.yaml"
    bad.write_text("learning_rte: 3\n")
    assert "learning_rte" in fails(capsys, "train", "--config", bad, "--model_name_or_path", "x", "--dataset_path", "y")
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert "mapping" in fails(capsys, "train", "--config", tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    assert "not YAML" in fails(capsys, "train", "--config", tmp_path / "broken.yaml")
    assert "model_name_or_path is not given" in fails(capsys, "train", "--dataset_path", "x")
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": " b"}\n{"prompt": "a"}\n')
    plain = [
        "train",
        *[f"--{k}={v}" for k, v in COMMON.items()],
        "--output_dir",
        tmp_path / "run",
        "--dataset_path",
        data,
    ]
    assert "record 1: needs a non-empty string 'completion'" in fails(capsys, *plain)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_path_that_cannot_be_used_is_named_with_its_option(tmp_path, config, capsys) -> None:
    missing, file = tmp_path / "missing", tmp_path / "file"
    file.write_text("")
    train = ["train", "--config", config, "--output_dir", tmp_path / "run"]
    lines = ["train", "--model_name_or_path", BUNDLED_MODEL, "--dataset_path", missing]
    fact = ["--task", "fact", "--dataset_path", missing]
    compare = ["compare", "--task", "world-fact", "--model_name_or_path", BUNDLED_MODEL]
    for option, words in {
        "dataset_path": (lines, [*train, *fact], ["eval", "--model", BUNDLED_MODEL, *fact], [*compare, *fact]),
        "eval_dataset_path": ([*train, "--eval_dataset_path", missing],),
        "chat_template_path": ([*train, "--chat_template_path", missing],),
        "config": (["train", "--config", missing], ["plan", "--config", missing], ["compare", "--config", missing]),
    }.items():
        for command in words:
            assert f"{option}={missing} cannot be read: " in (line := fails(capsys, *command))
            assert "; give another path" in line
    (tmp_path / "routing.jsonl").write_text(json.dumps({"schema": 1, "modules": ["a"], "experts": ["dense"]}) + "\n")
    for option, command in (
        ("output_dir", [*compare, "--methods", "fft"]),
        ("output_dir", ["demo"]),
        ("out", ["bench", "step", "--preset", "tiny"]),
        ("output", ["report", tmp_path]),
        ("png", ["report", tmp_path]),
    ):
        inside = file / "x"
        assert f"{option}={inside} cannot be written: " in fails(capsys, *command, f"--{option}", inside)


def test_options_that_do_nothing_or_nonsense_are_refused(tmp_path, config, model_without_eos, capsys) -> None:
    train = ["train", "--config", config, "--output_dir", tmp_path / "run"]
    assert "has no EOS token: set one with --eos_token" in fails(
        capsys, *train, "--model_name_or_path", model_without_eos
    )
    assert "lora_lr=0.1: fft does not use it" in fails(capsys, *train, "--method", "fft", "--lora_lr", "0.1")
    assert "score_fn=pfn: lora does not use it" in fails(capsys, *train, "--method", "lora", "--score_fn", "pfn")
    assert "lora takes lora_weight_decay" in fails(capsys, *train, "--method", "lora", "--weight_decay", "0.5")
    assert "molf is the optimizer" in fails(capsys, *train, "--optim", "adafactor")
    assert "optim_args=a=1: molf does not use it" in fails(capsys, *train, "--optim_args", "a=1")
    assert "molf does not use it" in fails(capsys, *train, "--optim_target_modules", "q_proj")
    assert "model_init_kwargs={'a': 1}: molf does" in fails(capsys, *train, "--model_init_kwargs", '{"a": 1}')
    assert "fp16=True: a CPU would train in fp32" in fails(capsys, *train, "--fp16", "true")
    assert "validation_size=inf: must be positive and" in fails(capsys, *train, "--validation_size", "inf")
    assert "gradient_accumulation_steps=0" in fails(capsys, *train, "--gradient_accumulation_steps", "0")
    revision = f"model_revision=v2: {BUNDLED_MODEL} is a folder, which has no revisions; leave it out"
    assert revision in fails(capsys, *train, "--model_revision", "v2")
    command = ["eval", "--task", "world-fact", "--model", BUNDLED_MODEL, "--model_revision", "v2"]
    assert revision in fails(capsys, *command)
    assert "unknown option: stray" in fails(capsys, *train, "stray")
    assert "--config: name a YAML file" in fails(capsys, "train", "--config")
    assert "eos_token='<none>'" in fails(capsys, *train, "--eos_token", "<none>")
    assert "the trainer cannot be made" in fails(capsys, *train, "--report_to", "wandb")
    for text, message in (
        ("1: 2", "must hold a mapping of option names to values"),
        ("lora_weight_decay: [1]", "lora_weight_decay=[1] in the configuration file has the wrong type: give float"),
        ("lora_lr: true", "lora_lr=True in the"),
        ("help: true", "bad.yaml: help=True is for the command line; leave it out"),
        ("lora_lr: 1.0\nlora_lr: 2.0", "bad.yaml is not YAML: lora_lr is given twice: keep one in"),
    ):
        (tmp_path / "bad.yaml").write_text(config.read_text() + text + "\n")
        assert message in fails(capsys, "train", f"--config={tmp_path / 'bad.yaml'}", "--output_dir", tmp_path / "run")
    broken = tmp_path / "model"
    shutil.copytree(BUNDLED_MODEL, broken)
    (broken / "model.safetensors").write_bytes(b"x" * 100)
    assert "weights of" in fails(capsys, *train, "--model_name_or_path", broken)
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--method fft --optim galore_adamw", "galore_torch"),
        ("--lr_scheduler_type warmup_stable_decay", "lr_scheduler_kwargs=None does not fit"),
        ('--lr_scheduler_kwargs {"least":1}', "lr_scheduler_kwargs={'least': 1} does not fit lr_scheduler_type=cosine"),
        ("--num_train_epochs inf", "num_train_epochs=inf: must be positive and finite"),
        ("--neftune_noise_alpha -1", "neftune_noise_alpha=-1.0: must be 0 or more"),
        ("--activation_offloading true", "activation_offloading=True: there is no accelerator"),
        (
            "--dataloader_drop_last true --per_device_train_batch_size 17",
            "dataloader_drop_last=True: 16 examples fill no",
        ),
        (
            "--method pissa --expert_ranks 65",
            "expert_ranks=[65]: pissa starts from the singular directions of W, of",
        ),
        (
            "--eval_strategy epoch --metric_for_best_model best --load_best_model_at_end true --save_strategy epoch",
            "best",
        ),
    ],
)
def test_what_others_would_end_in_a_traceback_for(tmp_path, config, capsys, options: str, message: str) -> None:
    if "offloading" in options and torch.accelerator.is_available():
        pytest.skip("there is something to offload from")
    train = ["train", "--config", config, "--output_dir", tmp_path / "run", "--eval_at_end", "false"]
    assert message in fails(capsys, *train, *options.split())


def test_a_line_that_no_tokenizer_takes_is_named(tmp_path) -> None:
    path = tmp_path / "data.jsonl"
    half = (
        '{"prompt": "a \\ud800", "completion": " b"}',
        r"record 1: an escape \\ud800 to \\udfff without its other half",
    )
    for line, words in (half, ("[" * 100_000, r"neither a JSON list nor JSON lines: .*\(line 2\)")):
        path.write_text('{"prompt": "a", "completion": " b"}\n' + line)
        with pytest.raises(ValueError, match=rf"data\.jsonl.*{words}"):
            completion.load(str(path), None)


def test_json_lines_end_at_newlines_only_and_may_have_a_mark(tmp_path) -> None:
    path = tmp_path / "data.jsonl"
    record = {"prompt": "Ada\u2028Alder\x85 speaks", "completion": " Cestic"}
    path.write_text("\ufeff" + json.dumps(record, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert completion.load(str(path), None) == [record]
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"data\.jsonl is not UTF-8 text"):
        completion.load(str(path), None)


@pytest.mark.parametrize("special", ["eos_token", "pad_token", None])
def test_a_token_that_the_model_does_not_know_is_refused(tmp_path, capsys, special: str | None) -> None:
    """As where a tokenizer got more tokens and the embeddings were not resized."""
    model, data, out = (str(tmp_path / name) for name in ("model", "data.jsonl", "run"))
    shutil.copytree(BUNDLED_MODEL, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({special: "<more>"} if special else {"additional_special_tokens": ["<more>"]})
    tokenizer.save_pretrained(model)
    Path(data).write_text(json.dumps({"prompt": "The", "completion": " lion" + ("" if special else "<more>")}) + "\n")
    command = ["train", "--dataset_path", data, "--model_name_or_path", model, "--use_cpu", "true", "--max_steps", "1"]
    command += ["--expert_ranks", "2", "--disable_tqdm", "true"]
    error = fails(capsys, *command, "--output_dir", out)
    assert "token 1231 of the tokenizer (<more>) is none of the 1231 that the model has" in error
    assert not Path(out).exists()
    if special == "pad_token":  # which is not used then
        command += ["--per_device_train_batch_size", "1"]
        for more in (["--pad_to_multiple_of", "8"], ["--eval_strategy", "epoch", "--eval_dataset_path", data]):
            assert "token 1231 of the tokenizer (<more>)" in fails(capsys, *command, *more, "--output_dir", out)
        assert main([*command, "--output_dir", out]) == 0


def test_long_examples_are_cut_from_the_left_or_refused(tmp_path, capsys) -> None:
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": "Ada Alder " * length + "plays the", "completion": " drum"} for length in (1, 200)]
    path.write_text("\n".join(map(json.dumps, rows)))
    options = ["train", *[f"--{key}={value}" for key, value in COMMON.items()], "--expert_ranks", "2"]
    command = [*options, "--dataset_path", str(path), "--output_dir", str(tmp_path / "run")]
    assert "record 1 (1 of 2 are too long)" in fails(capsys, *command, "--long_prompts", "refuse")
    assert main(command) == 0
    assert "1 of 2 prompts are longer than 256 tokens: cut from the left" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["truncated_examples"] == 1


def test_a_used_folder_is_refused_and_a_resume_is_exact_or_refused(tmp_path, config, facts, capsys) -> None:
    out, data = tmp_path / "run", tmp_path / "facts.json"
    shutil.copy(facts, data)
    options = [
        "--dataset_path",
        data,
        "--expert_ranks",
        "2",
        "--save_strategy",
        "steps",
        "--save_steps",
        "1",
        "--max_steps",
        "3",
    ]
    command = ["train", "--config", config, "--output_dir", out, *options, "--logging_steps", "1"]
    assert main([str(word) for word in command]) == 0
    whole = json.loads((out / "metrics.json").read_text())
    assert "holds run.json of an earlier run" in fails(capsys, *command)
    resume = [*command, "--resume_from_checkpoint"]
    assert "the run is over, all 3 steps are done" in fails(capsys, *resume, "last")
    first = out / "checkpoint-1"
    assert "learning_rate was 0.001" in fails(capsys, *resume, first, "--learning_rate", "1")
    assert "score_fn was epd" in fails(capsys, *resume, first, "--score_fn", "pfn")
    assert "shuffle_dataset was False" in fails(capsys, *resume, first, "--shuffle_dataset", "true")
    assert "ignore_data_skip was False" in fails(capsys, *resume, first, "--ignore_data_skip", "true")
    data.write_text(facts.read_text().replace("the", "a"))
    for wanted in (first, "auto"):
        assert "training examples are not those of the run" in fails(capsys, *resume, wanted)
    shutil.copy(facts, data)
    assert main([str(word) for word in (*resume, first)]) == 0
    again = json.loads((out / "metrics.json").read_text())
    assert again["train_loss"] == pytest.approx(whole["train_loss"], abs=1e-3)
    assert {key: again[key] for key in ("score", "steps")} == {key: whole[key] for key in ("score", "steps")}
    assert again["resumed_from"] == str(first)
    (first / "optimizer.pt").write_bytes((first / "optimizer.pt").read_bytes()[:1000])
    assert "optimizer.pt is damaged" in fails(capsys, *resume, first)
    (first / "optimizer.pt").unlink()
    assert "optimizer.pt is missing" in fails(capsys, *resume, first)


def test_the_loss_of_a_resumed_run_counts_every_step_once(tmp_path, config) -> None:
    """Where a checkpoint is between two entries of the log, the entry after it is of the steps since the checkpoint."""

    def trained(name: str, *more: str) -> Path:
        options = ["--expert_ranks", "2", "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "1", *more]
        words = ["train", "--config", config, "--output_dir", tmp_path / name, "--eval_at_end", "false", *options]
        assert main([str(word) for word in words]) == 0
        return tmp_path / name

    def loss(run: Path) -> float:
        return json.loads((run / "metrics.json").read_text())["train_loss"]

    every = json.loads((trained("every", "--logging_steps", "1") / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in every if "loss" in entry]
    run = trained("run", "--logging_steps", "3")
    assert loss(run) == pytest.approx(sum(losses) / 4)
    for step, counted in ((3, losses), (2, losses[2:])):
        resume = ["--logging_steps", "3", "--resume_from_checkpoint", str(run / f"checkpoint-{step}")]
        assert loss(trained("run", *resume)) == pytest.approx(sum(counted) / len(counted))


def test_what_is_missing_is_named_with_its_extra(tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "routing.jsonl").write_text(json.dumps({"schema": 1, "modules": ["a"], "experts": ["dense"]}) + "\n")
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    out = tmp_path / "report.html"
    assert "plotly" in (error := fails(capsys, "report", tmp_path, "--output", out))
    assert "pip install 'molf[report]'" in error


def test_a_non_finite_gradient_is_one_line_and_keeps_the_checkpoint(tmp_path, config, capsys) -> None:
    """A learning rate that overflows: the run stops with the module's name, the checkpoint before is whole."""
    command = ["train", "--config", str(config), "--output_dir", str(tmp_path / "run"), "--expert_ranks", "2"]
    command += ["--learning_rate", "1e10", "--save_strategy", "steps", "--save_steps", "1", "--num_train_epochs", "3"]
    line = fails(capsys, *command, "--warmup_steps", "0")
    assert "is not finite; nothing was updated" in line
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        assert all(v.isfinite().all() for v in load_file(checkpoint / "model.safetensors").values())


@pytest.mark.parametrize("caches", [True, False])
def test_a_model_is_saved_with_its_own_cache_setting(tmp_path, config, caches: bool) -> None:
    """The Trainer's is of training: with it, generation computes the whole text anew for every token."""
    base, out = tmp_path / "base", tmp_path / "run"
    shutil.copytree(BUNDLED_MODEL, base)
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, "use_cache": caches}))
    saving = "--max_steps 1 --save_strategy steps --save_steps 1 --gradient_checkpointing true --method fft".split()
    assert (
        main(["train", "--config", str(config), "--model_name_or_path", str(base), *saving, "--output_dir", str(out)])
        == 0
    )
    for folder in (out, out / "checkpoint-1"):
        assert json.loads((folder / "config.json").read_text())["use_cache"] is caches


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("compare --task world-fact --method lora", "method given for all methods: a sweep sets methods"),
        ("compare --task world-fact --seed 3", "seed given for all methods: a sweep sets methods"),
        ("demo --method lora", "unrecognized arguments: --method lora"),
        ("bench step --preset tiny --out OUT --round 1", "unrecognized arguments: --round 1"),
    ],
)
def test_options_are_not_abbreviated(tmp_path, monkeypatch, capsys, command: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, *command.split())
    assert list(tmp_path.iterdir()) == []


def test_help_and_version(capsys) -> None:
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "demo" in capsys.readouterr().out


def test_a_demo_takes_no_folder_of_other_runs_and_no_odd_number(tmp_path, capsys) -> None:
    assert "edits" in fails(capsys, "demo", "--edits", "many")
    assert "--methods fft fft: one is named twice" in fails(
        capsys, "demo", "--output_dir", tmp_path / "none", "--methods", "fft", "fft", "--edits", "1", "--epochs", "1"
    )
    (tmp_path / "runs" / "molf").mkdir(parents=True)  # where molf train puts its runs
    (tmp_path / "runs" / "molf" / "run.json").write_text("{}")
    assert "is there and not a demo's" in fails(capsys, "demo", "--output_dir", tmp_path / "runs")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["molf"]
    assert (tmp_path / "runs" / "molf" / "run.json").exists()
    assert "count=0" in fails(capsys, "demo", "--edits", "0", "--output_dir", tmp_path / "none")


@pytest.fixture
def untrained(monkeypatch) -> None:
    """A demo whose runs are there at once, or end in an error where the folder holds ``broken``."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        out = Path(command[-1])
        out.mkdir(exist_ok=True)
        (out / "run.json").write_text("{}")
        numbers = dict.fromkeys("score efficacy paraphrase neighbourhood train_loss seconds peak_memory_mib".split(), 0)
        (out / "metrics.json").write_text(json.dumps({"method": out.name, **numbers}))
        return subprocess.CompletedProcess(command, int((out.parent / "broken").exists()), "")

    monkeypatch.setattr(molf.cli.demo.subprocess, "run", run)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("edits.json", "[]"),
        ("train.yaml", "model: mine"),
        ("demo.json", '{"mine": 1}'),
        ("demo.json", '[{"method": "mine"}]'),
        ("demo.json", "mine"),
    ],
)
def test_a_demo_takes_no_file_of_others(tmp_path, capsys, untrained, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    (tmp_path / "fft").mkdir()
    (tmp_path / "fft" / "run.json").write_text("mine")
    problem = fails(capsys, "demo", "--output_dir", tmp_path, "--methods", "fft", "--edits", "1")
    assert f"{tmp_path / name} is there and not a demo's; choose another folder" in problem
    assert ((tmp_path / name).read_text(), (tmp_path / "fft" / "run.json").read_text()) == (text, "mine")
    assert {path.name for path in tmp_path.iterdir()} == {name, "fft"}


def test_a_second_demo_removes_the_runs_of_the_first_and_nothing_else(tmp_path, capsys, untrained) -> None:
    """Also where the first one ended with an error, and left no results."""
    out = tmp_path / "demo"
    demo = ["demo", "--output_dir", str(out), "--methods", "fft", "molf", "--edits", "1"]
    out.mkdir()
    (out / "broken").touch()
    assert "fft ended with status 1" in fails(capsys, *demo)
    (out / "broken").unlink()
    (out / "fft" / "checkpoint-1").mkdir()
    (out / "molf").mkdir()
    (out / "molf" / "notes.txt").write_text("mine")
    assert main(demo) == 0
    assert [row["method"] for row in json.loads((out / "demo.json").read_text())] == ["fft", "molf"]
    assert (out / "molf" / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in (out / "fft").iterdir()) == ["metrics.json", "run.json"]
