"""Random command lines and configuration files: exit status 0 or 2, at most one line of error, never a traceback."""

import contextlib
import dataclasses
import io
import itertools
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from molf.cli import COMMANDS, main
from molf.cli.train import parse
from molf.tasks import TASKS
from molf.train.arguments import MethodArguments, TrainArguments
from molf.train.methods import METHODS

# TRL's and transformers', of options that will have other names
pytestmark = pytest.mark.filterwarnings("ignore:.* will be removed in v[0-9.]+:FutureWarning")

OWN = [field.name for field in dataclasses.fields(MethodArguments)]
# deepspeed and parallelism change the process; log levels are its own; full_determinism sets variables for good
PROCESS_WIDE = {
    "deepspeed",
    "parallelism_config",
    "log_level",
    "log_level_replica",
    "full_determinism",
    "tf32",
    "enable_jit_checkpoint",
}
OPTIONS = [field.name for field in dataclasses.fields(TrainArguments) if field.init and field.name not in PROCESS_WIDE]
NAMES = st.one_of(st.sampled_from(OWN), st.sampled_from(OPTIONS), st.sampled_from([*OWN, "learning_rte", "config", ""]))
EVAL = ["model", "model_revision", "task", "dataset_path", "max_examples", "batch_size", "dtype", "eos_token", "output"]
COMPARE = ["methods", "learning_rates", "seeds", "output_dir", "workers", "threads", "keep_models", "config"]
DEMO = ["output_dir", "methods", "edits", "epochs", "seed"]

WORDS = st.one_of(
    st.integers(-3, 9).map(str),
    st.floats(allow_nan=True).map(str),
    st.sampled_from(["1" + "0" * 400, "1e400", "-0", "0x10", "1_0", "true", "False", "none", "no", "last",
                     "[1]", '{"a": 1}', "{", "a=b"]),
    st.sampled_from(["", " ", "\n", "\x00", "\ud800", "(", "*", "%s", "{a}", "--",
                     "-", "@x", "~", "/", "/dev/null", ".", "é💥"]),
    st.sampled_from([*METHODS, *TASKS, "all-linear", "epd", "float32", "steps", "adamw_torch", "world-mcq:train"]),
    st.text(max_size=3),
)  # fmt: skip
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.floats(),
    st.just(10**400),
    st.dates(),
    st.binary(max_size=2),
    WORDS,
)
VALUES = st.recursive(
    LEAVES, lambda v: st.lists(v, max_size=2) | st.dictionaries(st.text(max_size=2), v, max_size=2), max_leaves=4
)


def examples(count: int):
    """The same examples in every run; ten times as many in the test that is marked slow."""
    return settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


@pytest.fixture(autouse=True, scope="module")
def _only_the_command_line():
    """In a folder of its own, no run is started and the environment is put back."""
    environment, here = dict(os.environ), Path.cwd()
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        patch.setattr("molf.cli.train.train", lambda method, args: {})
        patch.setattr("molf.cli.compare.run_sweep", _no_sweep)
        patch.setattr(subprocess, "run", _no_process)
        Path("facts.json").write_text("[]")
        yield
        os.chdir(here)
    os.environ.clear()
    os.environ.update(environment)


def _no_sweep(*arguments: Any, **options: Any) -> None:
    raise ValueError("the sweep would start")


def _no_process(*arguments: Any, **options: Any) -> Any:
    raise ChildProcessError("the run would start")


def called(*words: str) -> str:
    """Call the command line; returns the one line of error, or "" where it ended well."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(words)
        except SystemExit as leaving:  # argparse after --help
            status = leaving.code
            assert status == 0
    lines = [line for line in err.getvalue().splitlines() if line.startswith("molf:")]
    assert "Traceback" not in err.getvalue()
    assert (status, len(lines)) in ((0, 0), (2, 1)), (status, err.getvalue())
    assert not lines or lines[0].removeprefix("molf: error: ").strip()
    return "".join(lines)


def options(names: Any, most: int = 3) -> Any:
    """Words such as --top_k 3 9."""
    one = st.tuples(names, st.lists(WORDS, max_size=2)).map(lambda pair: [f"--{pair[0]}", *pair[1]])
    return st.lists(one, max_size=most).map(lambda parts: list(itertools.chain.from_iterable(parts)))


TRAIN = ["--model_name_or_path", "x", "--dataset_path", "y", "--use_cpu"]
FILES = st.one_of(
    st.dictionaries(NAMES, VALUES, max_size=3).map(
        lambda chosen: yaml.dump({"model_name_or_path": "x", "dataset_path": "y", "use_cpu": True} | chosen).encode()
    ),
    st.dictionaries(st.one_of(NAMES, LEAVES), VALUES, max_size=3).map(lambda any_keys: yaml.dump(any_keys).encode()),
    st.binary(max_size=40),
    st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")),
    VALUES.map(lambda value: yaml.dump(value).encode()),
    st.sampled_from(
        [b"", b"---\n---\n", b"a: &a [*a]", b"\x89PNG\r\n", b"!!python/object:os.system x", b"? {a: 1}\n: 2"]
    ),
)


def check_train(words: list[str], file: bytes | None) -> None:
    if file is not None:
        Path("some.yaml").write_bytes(file)
        words = ["--config", "some.yaml", *words]
    else:
        words = [*TRAIN, *words]
    called("train", *words)


TRAIN_CASES = (options(NAMES), st.one_of(st.none(), FILES))


@examples(700)
@given(*TRAIN_CASES)
def test_train(words: list[str], file: bytes | None) -> None:
    check_train(words, file)


@pytest.mark.slow
@examples(7000)
@given(*TRAIN_CASES)
def test_train_slow(words: list[str], file: bytes | None) -> None:
    check_train(words, file)


OTHER_CASES = st.one_of(
    st.tuples(st.just("eval"), options(st.sampled_from(EVAL)), st.just(["--model", "x", "--task", "world-mcq"])),
    st.tuples(
        st.just("compare"), options(st.sampled_from(COMPARE)), st.just(["--task", "world-mcq", "--max_examples", "9"])
    ),
    st.tuples(st.just("compare"), options(NAMES), st.just(["--task", "world-mcq", "--model_name_or_path", "x"])),
    st.tuples(st.just("demo"), options(st.sampled_from(DEMO)), st.just([])),
    st.tuples(st.sampled_from([*COMMANDS, "", "-", "--", "é"]), options(st.text(max_size=3)), st.just([])),
)


@examples(300)
@given(OTHER_CASES)
def test_other_commands(case: tuple[str, list[str], list[str]]) -> None:
    command, words, first = case
    called(command, *first, *words)


@pytest.mark.slow
@examples(3000)
@given(OTHER_CASES)
def test_other_commands_slow(case: tuple[str, list[str], list[str]]) -> None:
    command, words, first = case
    called(command, *first, *words)


@examples(200)
@given(FILES, st.dictionaries(st.sampled_from([*COMPARE, "per_method", *OWN]), VALUES, max_size=3))
def test_compare_files(file: bytes, settings_: dict[str, Any]) -> None:
    base = {"task": "world-mcq", "model_name_or_path": "x", "max_examples": 9, "use_cpu": True}
    for content in (file, yaml.dump({**base, **settings_}).encode()):
        Path("compare.yaml").write_bytes(content)
        called("compare", "--config", "compare.yaml")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("target_modules: 0", "target_modules=0 in the configuration file has the wrong type: give list[str]"),
        ("per_device_train_batch_size: {a: 1}", "per_device_train_batch_size={'a': 1} in the"),
        ("validation_size: 1" + "0" * 400, "validation_size="),
        ("save_steps: .inf", "wrong type or size"),
        ("seed: true", "seed=True in the"),
    ],
)
def test_values_of_the_wrong_type_in_yaml_are_refused_by_name(line: str, message: str) -> None:
    Path("wrong.yaml").write_text(f"model_name_or_path: x\ndataset_path: y\nuse_cpu: true\n{line}\n")
    assert message in called("train", "--config", "wrong.yaml")


def test_no_without_quotes_is_a_word_for_what_is_no_flag() -> None:
    Path("no.yaml").write_text("model_name_or_path: x\ndataset_path: y\nsave_strategy: no\neval_strategy: no\n")
    args = parse(["--config", "no.yaml"])[1]
    assert (args.save_strategy, args.eval_strategy) == ("no", "no")


def test_compare_takes_a_regex_and_refuses_wrong_types() -> None:
    """Words that are not YAML were a traceback, and so were lists of lists."""
    assert "model x cannot be read" in called(
        "compare",
        "--task",
        "world-mcq",
        "--model_name_or_path",
        "x",
        "--methods",
        "molf",
        "--target_modules",
        "[qk]_proj",
    )
    for line in ("methods: [[1]]", "seeds: [true]", "workers: [1]", "output_dir: 3"):
        Path("wrong.yaml").write_text(f"task: world-mcq\nmodel_name_or_path: x\n{line}\n")
        assert line.partition(":")[0] + "=" in called("compare", "--config", "wrong.yaml")
    Path("wrong.yaml").write_text("task: world-mcq\nmodel_name_or_path: x\nmax_examples: [1]\n")
    assert "max_examples=[1]" in called("compare", "--config", "wrong.yaml")
    Path("wrong.yaml").write_text("task: world-mcq\nmodel_name_or_path: x\nper_method: {1: {lora_lr: 1}}\n")
    assert "per_method=" in called("compare", "--config", "wrong.yaml")
