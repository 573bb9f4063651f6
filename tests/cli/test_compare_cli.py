"""molf compare from the command line: a small sweep, continued, with a run that fails; and bad input."""

import json
from pathlib import Path

import pytest
import yaml

from molf.assets import BUNDLED_MODEL
from molf.cli import main
from molf.cli.compare import _pairs

OPTIONS = {
    "task": "world-fact",
    "model_name_or_path": str(BUNDLED_MODEL),
    "max_examples": 12,
    "num_train_epochs": 1,
    "gradient_checkpointing": False,
    "use_cpu": True,
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "compare.yaml"
    sweep = {"methods": ["fft", "molf"], "learning_rates": [1.0e-3], "seeds": [0], "output_dir": str(tmp_path / "out")}
    path.write_text(yaml.safe_dump({**OPTIONS, **sweep, "per_method": {"molf": {"expert_ranks": [4]}}}))
    return path


def test_a_sweep_is_run_once_and_continued(tmp_path: Path, config: Path, capsys) -> None:
    """A failing run is recorded and does not stop the rest; the second call runs what is new and nothing else."""
    bad = yaml.safe_load(config.read_text())
    bad["per_method"]["fft"] = {"report_to": "wandb"}  # known, but not installed: seen when the trainer is made
    config.write_text(yaml.safe_dump(bad))
    assert main(["compare", "--config", str(config)]) == 0
    printed = capsys.readouterr().out
    assert "failed: fft at 0.001, seed 0: the trainer cannot be made" in printed
    assert "Best on the test split: molf at learning rate 0.001 (1 seed(s))." in printed
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "results").glob("*.json")}
    assert len(done) == 2
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    metrics = next(run["metrics"] for run in results["runs"] if run["status"] == "done")
    assert {"validation", "test"} <= metrics.keys()
    assert not list((tmp_path / "out" / "runs").rglob("*.safetensors"))
    assert (
        main(["compare", "--config", str(config), "--learning_rates", "1e-3", "2e-3", "--methods", "molf", "fft"]) == 0
    )
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "results").glob("*.json")}
    assert len(after) == 4
    assert all(after[name] == made for name, made in done.items())
    assert "fft" in (tmp_path / "out" / "comparison.md").read_text()


def test_bad_input_is_one_line_and_starts_nothing(
    tmp_path: Path, config: Path, model_without_eos: Path, capsys
) -> None:
    def fails(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("molf: error:")]
        assert len(lines) == 1
        return lines[0]

    compare = ["compare", "--config", config]
    assert "learning_rates=[0.001, 0.001] has an entry twice" in fails(*compare, "--learning_rates", "1e-3", "1e-3")
    assert "expected at least one argument" in fails(*compare, "--learning_rates")
    assert "method='full': choose one of" in fails(*compare, "--methods", "molf", "full")
    assert "learning_rte" in fails(*compare, "--learning_rte", "3")
    assert "lora_lr=0.1: fft does not use it" in fails(*compare, "--lora_lr", "0.1")
    assert "model nowhere/at-all cannot be read" in fails(*compare, "--model_name_or_path", "nowhere/at-all")
    assert "has no EOS token" in fails(*compare, "--model_name_or_path", model_without_eos)
    assert "workers=0" in fails(*compare, "--workers", "0")
    assert "--threads 1000000: this machine has" in fails(*compare, "--threads", "1000000")
    assert "test_size=99 do not split 12 records" in fails(*compare, "--test_size", "99")
    assert "validation_size=0 and" in fails(*compare, "--validation_size", "0")
    assert "task='none'" in fails(*compare, "--task", "none")
    assert "dataset_path is not given" in fails("compare", "--model_name_or_path", BUNDLED_MODEL)
    assert "lora, which is not in methods" in fails("compare", "--config", _with(config, per_method={"lora": {}}))
    assert "methods is empty" in fails("compare", "--config", _with(config, methods=[]))
    assert "learning_rates=0.1: give a list" in fails("compare", "--config", _with(config, learning_rates=0.1))
    assert "must hold a mapping" in fails("compare", "--config", _text(tmp_path / "list.yaml", "- 1"))
    twice = config.read_text() + "per_method: {}\n"
    assert "per_method is given twice" in fails("compare", "--config", _text(tmp_path / "twice.yaml", twice))
    for name in ("config", "help"):
        odd = _text(tmp_path / "odd.yaml", f"{config.read_text()}{name}: x\n")
        assert f"odd.yaml: {name}='x' is for the command line" in fails("compare", "--config", odd)
    assert "is not YAML" in fails("compare", "--config", _text(tmp_path / "broken.yaml", "a: [1"))
    assert not (tmp_path / "out").exists()


def test_no_is_a_word_and_no_flag() -> None:
    """As in ``--save_strategy no``; a flag's yes and no are read where ``molf train`` reads them."""
    words = "--save_strategy no --use_cpu yes --bf16 false --max_examples 12".split()
    assert _pairs(words) == {"save_strategy": "no", "use_cpu": "yes", "bf16": False, "max_examples": 12}


def test_no_run_that_ends_well_is_an_error_and_its_results_are_json(tmp_path: Path, config: Path, capsys) -> None:
    broken = _with(config, methods=["molf"], per_method={"molf": {"report_to": "wandb"}})
    assert main(["compare", "--config", str(broken)]) == 2
    assert "none of 1 runs ended well, the first because of: the trainer cannot be made" in capsys.readouterr().err
    text = (tmp_path / "out" / "results.json").read_text()
    assert json.loads(text)["rows"][0]["learning_rate"] is None
    assert "NaN" not in text


def _with(config: Path, **change: object) -> Path:
    path = config.with_name("changed.yaml")
    return _text(path, yaml.safe_dump({**yaml.safe_load(config.read_text()), **change}))


def _text(path: Path, text: str) -> Path:
    path.write_text(text)
    return path
