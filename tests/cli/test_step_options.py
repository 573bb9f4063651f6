"""The options of ``molf train`` that change how a step is made: passed on, or refused where they would be ignored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from molf.assets import BUNDLED_MODEL
from molf.cli import main
from molf.cli.train import parse
from molf.optim import native
from molf.train.methods import METHODS
from molf.train.resume import check_same
from molf.train.run import _resolved

FIRST = ["--model_name_or_path", "x", "--dataset_path", "y", "--use_cpu", "true"]
STEP = {"compile": "false", "keep_base": "false", "moments_8bit": "true", "step_in_backward": "true"}
INVERSE_SQRT = "--lr_scheduler_type inverse_sqrt --lr_scheduler_kwargs"
ALONE = ["--max_grad_norm", "0"]
SHARES = {"random": ["--random_shares", "1", "1"]}


def test_the_options_reach_the_config() -> None:
    method, args = parse([*FIRST, *ALONE, *(word for name, value in STEP.items() for word in (f"--{name}", value))])
    config = method.molf_config(args)
    assert (config.compile, config.keep_base, config.moments_8bit, config.step_in_backward) == (
        False,
        False,
        True,
        True,
    )
    method, args = parse(FIRST)
    config = method.molf_config(args)
    assert [getattr(config, name) for name in STEP] == ["auto", True, False, False]


def test_yaml_may_say_true(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("compile: true\nkeep_base: false\n")
    method, args = parse([*FIRST, "--config", str(tmp_path / "run.yaml")])
    assert method.molf_config(args).compile is True
    assert method.molf_config(args).keep_base is False


@pytest.mark.parametrize("option", STEP)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_would_ignore_an_option_refuses_it(name: str, option: str) -> None:
    used = METHODS[name].routes and not (name == "molf-e" and option in ("keep_base", "moments_8bit"))
    words = [*FIRST, *ALONE, *SHARES.get(name, []), "--method", name, f"--{option}", STEP[option]]
    if used:
        parse(words)
    else:
        with pytest.raises(ValueError, match=f"^{option}=.*: {name} does not use it; leave it out or choose molf$"):
            parse(words)


def test_molf_e_that_trains_the_rest_keeps_a_base_and_moments() -> None:
    parse([*FIRST, "--method", "molf-e", "--train_other", "true", "--keep_base", "false", "--moments_8bit", "true"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gradient_accumulation_steps", "2", *ALONE], "gradient_accumulation_steps=2: .* set it to 1"),
        ([], r"max_grad_norm=1\.0: .* set it to 0"),
        (["--fp16", "true", *ALONE], "fp16=True: .* set it to False"),
        (["--on_nonfinite", "skip", *ALONE], "on_nonfinite=skip: .* set it to stop"),
    ],
)
def test_what_needs_all_gradients_is_refused_with_steps_in_the_backward_pass(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse([*FIRST, "--step_in_backward", "true", *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--max_steps 0", "max_steps=0: must be at least 1"),
        ("--max_steps -2", "max_steps=-2: must be at least 1"),
        ("--pad_to_multiple_of 0", "pad_to_multiple_of=0: must be at least 1"),
        ("--pad_to_multiple_of -8", "pad_to_multiple_of=-8: must be at least 1"),
        ("--label_smoothing_factor 1", r"label_smoothing_factor=1\.0: must be 0 or more, and below 1"),
        ("--label_smoothing_factor -0.1", r"label_smoothing_factor=-0\.1: must be 0 or more"),
        ("--auto_find_batch_size true", "auto_find_batch_size=True: .* lower per_device_train_batch_size, --dry_run"),
        ('--accelerator_config {"use_seedable_sampler":false}', "use_seedable_sampler=False: .*; leave it out"),
        (
            '--accelerator_config {"gradient_accumulation_kwargs":{"num_steps":4}}',
            "num_steps=4: it would replace gradient_accumulation_steps; give that one",
        ),
        (f'{INVERSE_SQRT} {{"timescale":0}}', "lr_scheduler_kwargs={'timescale': 0} does not fit .*=inverse_sqrt"),
        ("--save_steps 0", "save_steps=0: must be positive"),
        ("--save_steps -3", "save_steps=-3.*: .* set save_strategy to no"),
        ("--save_strategy best --metric_for_best_model loss", "save_strategy=best: .* set eval_strategy to steps or"),
        ("--load_best_model_at_end true --save_strategy no", "load_best_model_at_end=True: .* set eval_strategy to"),
    ],
)
def test_what_would_do_something_else_than_it_says_is_refused(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse([*FIRST, *words.split()])


@pytest.mark.parametrize(
    "words",
    [
        "--max_steps -1", "--pad_to_multiple_of 8", "--label_smoothing_factor 0.5", f'{INVERSE_SQRT} {{"timescale":1}}',
        '--accelerator_config {"gradient_accumulation_kwargs":{"sync_each_batch":true}}',
        "--save_steps 0.5", "--save_steps 0 --save_strategy epoch",
        "--task world-fact --eval_strategy epoch --save_strategy best --load_best_model_at_end true",
    ],
)  # fmt: skip
def test_what_is_next_to_it_is_taken(words: str) -> None:
    parse([*FIRST, *words.split()])


def test_a_word_for_compile_is_one_of_three() -> None:
    with pytest.raises(ValueError, match="compile='maybe': choose one of auto, true, false"):
        parse([*FIRST, "--compile", "maybe"])


@pytest.mark.parametrize(
    "words",
    [
        ["--validation_size", "0.2"], ["--test_size", "4"], ["--split_seed", "1"], ["--long_prompts", "refuse"],
        ["--bf16", "true"], ["--optim", "sgd"], ["--label_smoothing_factor", "0.1"], ["--dataloader_drop_last", "true"],
        ["--neftune_noise_alpha", "5"], ["--loss_type", "dft"], ["--completion_only_loss", "false"],
        ["--eos_token", "</s>"], ["--lr_scheduler_kwargs", '{"num_cycles": 2}'], ["--keep_base", "false"],
        ["--train_sampling_strategy", "group_by_length"], ["--average_tokens_across_devices", "false"],
    ],
)  # fmt: skip
def test_a_run_with_other_data_or_arithmetic_is_not_continued(tmp_path: Path, words: list[str]) -> None:
    """Each changes what is trained, or on what; a resume took them without a word."""
    first = ["--model_name_or_path", "x", "--task", "world-fact", "--use_cpu", "true", "--bf16", "false"]
    first += ["--method", "fft" if "--optim" in words else "molf"]
    runs = []
    for more in ([], words):
        method, args = parse([*first, *more])
        runs.append(_resolved(method, args)[1])
    (tmp_path / "run.json").write_text(json.dumps(runs[0], default=str))
    check_same(tmp_path, runs[0])
    with pytest.raises(ValueError, match=f"^{words[0][2:]} was .*, now it is .*: a resumed run continues exactly"):
        check_same(tmp_path, runs[1])


@pytest.mark.parametrize(
    "words",
    [
        "--eval_strategy epoch", "--eval_steps 3", "--eval_delay 1", "--metric_for_best_model score",
        "--greater_is_better true", "--eval_examples 9", "--eval_dataset_path z", "--per_device_eval_batch_size 2",
        "--eval_packing true", "--bf16_full_eval true", "--fp16_full_eval true",
    ],
)  # fmt: skip
@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy", "linear"])
def test_a_schedule_that_goes_by_evaluations_is_not_continued_with_others(
    tmp_path: Path, schedule: str, words: str
) -> None:
    """They decide its learning rates; those of any other schedule go by the step alone."""
    first = ["--model_name_or_path", "x", "--task", "world-fact", "--use_cpu", "true", "--lr_scheduler_type", schedule]
    first += ["--eval_strategy", "steps", "--eval_steps", "2"]
    if schedule != "linear":
        first += ["--lr_scheduler_kwargs", '{"mode": "min"}']  # else that would follow greater_is_better
    runs = []
    for more in ("", words):
        method, args = parse([*first, *more.split()])
        runs.append(_resolved(method, args)[1])
    (tmp_path / "run.json").write_text(json.dumps(runs[0], default=str))
    check_same(tmp_path, runs[0])
    if schedule == "linear":
        check_same(tmp_path, runs[1])
        return
    name = words.split()[0].removeprefix("--")
    with pytest.raises(ValueError, match=f"^{name} was .*, now it is .*: a resumed run continues exactly"):
        check_same(tmp_path, runs[1])


def test_compiling_that_fails_is_one_line(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "/no/such/c++")
    native._library.cache_clear()
    words = [
        "--model_name_or_path",
        str(BUNDLED_MODEL),
        "--task",
        "world-fact",
        "--max_examples",
        "8",
        "--use_cpu",
        "true",
    ]
    out = ["--output_dir", str(tmp_path / "run"), "--disable_tqdm", "true", "--compile", "true"]
    assert main(["train", "--method", "molf", *words, *out]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("molf: error")]
    assert len(errors) == 1
    assert "compile=True, but compiling failed (/no/such/c++: [Errno 2] No such file" in errors[0]
    assert errors[0].endswith("use compile=False")
    assert not list(tmp_path.glob("run/*.safetensors"))
