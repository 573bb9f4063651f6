"""Every command and every code block of these pages runs, in their order and in one folder."""

import doctest
import importlib
import re
import runpy
import sys
from pathlib import Path

import pytest

from molf.assets import BUNDLED_MODEL
from molf.cli import main
from molf.cli.compare import _options as compare_options

ROOT = Path(__file__).parents[2]
PAGES = (
    "quickstart", "tuning", "memory", "report", "troubleshooting", "compare", "method", "api", "faults", "export",
    "performance", "distributed",
)  # fmt: skip
SHORTER = {
    "train": "--max_examples 8 --max_steps 2 --use_cpu true --gradient_checkpointing false".split(),
    "compare": "--methods fft --learning_rates 1e-3 --seeds 0 --num_train_epochs 1 --use_cpu true".split(),
    "bench": "--preset tiny --rounds 1 --warmup 2 --contenders fft".split(),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the commands run: pages go on from what those before left."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "src").symlink_to(ROOT / "src")
    (folder / "runs").mkdir()
    (folder / "runs" / "train").symlink_to("molf")  # the README's run; here it is the quick start's
    return folder


@pytest.mark.parametrize("name", PAGES)
def test_code_blocks(name: str, folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    names: dict = {}
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "docs" / f"{name}.md").read_text(), re.DOTALL | re.MULTILINE)
    for language, block in blocks:
        if language == "python":
            exec(block, names)
        elif language == "yaml":
            Path("page.yaml").write_text(block)
            compare_options(["--config", "page.yaml"])
        elif language == "bash":
            for command in block.splitlines():
                before, program, words = command.partition("#")[0].partition("molf ")
                assert (before, program) in (("", "molf "), ("PYTHONPATH=src python -m ", "molf "))
                words = words.split()
                assert main([*words, *SHORTER.get(words[0], [])]) == 0, capsys.readouterr().err
        else:
            assert language == "text", "a block that no test runs"
    if name == "tuning":
        assert "warning: lora_r8: lora_lr 0.01 x scale 11.31" in capsys.readouterr().out


@pytest.mark.slow
def test_the_configuration_of_a_sweep_runs(folder: Path, facts: Path, monkeypatch, capsys) -> None:
    """docs/compare.md's, which the pages' own test parses alone: three runs, each a process."""
    monkeypatch.chdir(folder)
    (block,) = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs" / "compare.md").read_text(), re.DOTALL | re.MULTILINE)
    Path("sweep.yaml").write_text(block)
    Path("facts.json").symlink_to(facts)
    Path("my-model").symlink_to(BUNDLED_MODEL)
    shorter = "--learning_rates 1e-3 --seeds 0 --max_examples 8 --num_train_epochs 1 --use_cpu true".split()
    assert main(["compare", "--config", "sweep.yaml", *shorter, "--output_dir", "sweep"]) == 0, capsys.readouterr().err
    assert "| molf |" in Path("sweep", "comparison.md").read_text()


def test_what_the_pages_made(folder: Path) -> None:
    """After the blocks above: their outputs are where the pages say."""
    if not (folder / "runs" / "molf").exists():
        pytest.skip("the pages were not run")
    made = (
        "served/model.safetensors",
        "safe/metrics.json",
        "report.html",
        "molf/model.safetensors",
        "own/metrics.json",
        "routed/report.html",
        "figures/routed-won.png",
        "figures/score.png",
    )
    assert [name for name in made if not (folder / "runs" / name).exists()] == []
    assert not (folder / "runs" / "dry").exists()


def test_quoted_errors_are_those_of_the_code() -> None:
    """So that who looks for a message finds it."""
    code = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    quoted = re.findall(r'^\*\*"(.*?)"', (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quoted) == 5
    for words in quoted:
        pattern = ".*".join(map(re.escape, words.split("...")))  # what stands for "..." is in one line of the code
        assert re.search(pattern, code), words


def test_links_lead_somewhere() -> None:
    for name in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#:]*)(#[^)]*)?\)", (ROOT / "docs" / f"{name}.md").read_text()):
            path = ROOT / "docs" / target if target else ROOT / "docs" / f"{name}.md"
            assert path.exists(), f"{name}.md: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
                assert anchor[1:] in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], anchor


@pytest.mark.parametrize("script", ["api_page.py", "distributed_page.py"])
def test_generated_pages_are_what_their_scripts_write(script: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--check"])
    with pytest.raises(SystemExit) as status:
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    assert status.value.code == 0, f"run scripts/{script}"


@pytest.mark.parametrize("module", ["optim.config", "optim.factory", "optim.names", "optim.policy", "report.statistics",
                                    "report.routing_content", "plan.tracker", "cli.eval", "table",
                                    "train.evaluation"])  # fmt: skip
def test_examples_in_docstrings(module: str) -> None:
    found = importlib.import_module(f"molf.{module}")
    names = {"torch": importlib.import_module("torch"), "nn": importlib.import_module("torch.nn")}
    assert doctest.testmod(found, extraglobs=names).failed == 0
    assert doctest.testmod(found, extraglobs=names).attempted > 0
