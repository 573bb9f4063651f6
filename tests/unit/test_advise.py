"""The advice is code: it runs, applies to the model, and says what the log says."""

from pathlib import Path

import peft
import pytest

from models import causal_lm
from molf import create_molf_optimizer, molf_lora_config
from molf.cli import main
from molf.optim import MoLFConfig
from molf.report.advise import advise
from molf.report.runs import read_runs
from run_folders import routing_lines, write_run


def advised(run: Path) -> tuple[str, peft.LoraConfig | None]:
    text = advise(read_runs([run])[0])
    names: dict = {}
    exec(text, names)
    return text, names["config"]


def modules_of(config: MoLFConfig) -> list[str]:
    model = causal_lm("llama")
    if not config.train_base:
        model = peft.get_peft_model(model, molf_lora_config(config))
    return create_molf_optimizer(model, config).routed_modules


def test_dense_and_lora_modules_of_a_run_apply_to_the_model(tmp_path) -> None:
    modules = modules_of(MoLFConfig(expert_ranks=(4,)))
    run = write_run(tmp_path / "run", routing=routing_lines(20, modules))  # module m goes dense until step 2m + 1
    text, config = advised(run)
    dense = [name for m, name in enumerate(modules) if 2 * m + 1 > 10]
    assert config is not None
    assert sorted(config.modules_to_save) == sorted(dense)
    assert sorted(config.target_modules) == sorted(set(modules) - set(dense))
    assert f'"{modules[2]}",  # lora_r4 won 75 % of 20 steps, lora_r4 all from step 6, median margin 0.67\n' in text
    assert (
        f'"{modules[5]}",  # dense won 55 % of 20 steps, lora_r4 all from step 12, median margin 0.67, contested'
        in text
    )
    assert "dense won 95 % of 20 steps, lora_r4 all from step 20, median margin 0.67, contested" in text, "at the end"
    assert "What this is not" in text
    model = peft.get_peft_model(causal_lm("llama"), config)
    layer = model.get_submodule(f"base_model.model.{modules[0]}")
    assert (layer.r["default"], layer.scaling["default"]) == (4, 2.0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert f"base_model.model.{dense[0]}.modules_to_save.default.weight" in trained
    assert len(trained) == 2 * len(config.target_modules) + len(dense)


def test_ranks_of_molf_e(tmp_path) -> None:
    config = MoLFConfig(expert_ranks=(2, 8), train_base=False)
    modules = modules_of(config)
    assert modules[0].startswith("base_model.model.")
    lines = routing_lines(20, modules, config.experts)
    run = write_run(tmp_path / "run", "molf-e", routing=lines, ranks=(2, 8))
    _, advice = advised(run)
    assert advice is not None
    assert advice.modules_to_save is None
    model = peft.get_peft_model(causal_lm("llama"), advice)
    for m, name in enumerate(modules):
        layer = model.get_submodule(name)
        assert layer.r["default"] == (8 if 2 * m + 1 <= 10 else 2)
        assert layer.scaling["default"] == pytest.approx(2.0)


def test_lora_experts_together_win_against_dense(tmp_path) -> None:
    """40 % dense, 30 % for each of two LoRA experts: the module went to LoRA, of the rank that is first."""
    lines = routing_lines(20, ["a.0.x"], ("dense", "lora_r4[0]", "lora_r4[1]"))
    for step, line in enumerate(lines[1:]):
        line["winners"] = [[0 if step < 8 else 1 + step % 2]]
    text, config = advised(write_run(tmp_path / "run", routing=lines, ranks=(4, 4)))
    assert config is not None
    assert config.target_modules == {"a.0.x"}
    assert config.modules_to_save is None
    assert "0 of 1 modules wanted dense updates, 1 LoRA." in text
    assert "lora_r4[0] won 30 % of 20 steps, LoRA 60 % in all, " in text
    assert "contested" in text


def test_a_run_that_wanted_no_lora_has_no_config(tmp_path) -> None:
    lines = routing_lines(20, ["a.0.x"])
    for line in lines[1:]:
        line["winners"] = [[0]]
    text, config = advised(write_run(tmp_path / "run", routing=lines))
    assert config is None
    assert "train in full" in text


def test_what_is_refused(tmp_path, capsys) -> None:
    def fails(*arguments: object) -> str:
        assert main(["report", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    fft = write_run(tmp_path / "fft", "fft", ranks=())
    run = write_run(tmp_path / "run", routing=routing_lines(3))
    one = write_run(tmp_path / "one", routing=routing_lines(3, experts=["lora_r4"]))
    assert "has no routing" in fails(fft, "--advise")
    assert "had the one expert" in fails(one, "--advise")
    assert "takes one run" in fails(run, fft, "--advise")
    assert "takes one run" in fails(run, "--advise", "--png", tmp_path)
    text = (run / "run.json").read_text()
    (run / "run.json").write_text(text.replace('"policy": "score"', '"policy": "fixed-dense"'))
    assert "were not chosen by the score" in fails(run, "--advise")
    (run / "run.json").write_text(text.replace('"top_k": 1', '"top_k": 2'))
    assert "every expert won" in fails(run, "--advise")
    (run / "run.json").write_text(text.replace('"top_k": 1', '"of_the_future": 1'))
    assert "run.json is damaged or of another version of molf: " in (line := fails(run, "--advise"))
    assert "'of_the_future'" in line
    assert not list(tmp_path.rglob("*.html"))
