"""What is installed: the wheel's contents, what an import costs, and who imports whom."""

import graphlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_wheel(tmp_path: Path) -> None:
    """The wheel holds the package, its assets and py.typed, and nothing of the tests."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    sources = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src" / "molf").rglob("*.py")}
    assets = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src" / "molf" / "assets").rglob("*.*")}
    assets = {name for name in assets if "__pycache__" not in name and not name.endswith("world-qwen2-1m")}
    assert sources | assets | {"molf/py.typed"} <= names
    assert "molf/assets/world-qwen2-1m/model.safetensors" in names
    assert not [name for name in names if name.startswith("tests")]
    assert any(name.endswith("entry_points.txt") for name in names)


def test_import_needs_torch_alone_and_takes_no_longer() -> None:
    """Best of three fresh interpreters, because the machine is shared."""
    code = "import time, torch; start = time.perf_counter(); import molf; print(time.perf_counter() - start)"
    assert min(float(python(code)) for _ in range(3)) <= 0.3
    assert python("import sys, molf; print({'transformers', 'peft', 'trl', 'datasets'} & set(sys.modules))") == "set()"


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("command", [["molf"], [sys.executable, "-m", "molf"]])
def test_entry_points(command: list[str]) -> None:
    command = [str(Path(sys.executable).parent / command[0]), *command[1:]] if command == ["molf"] else command
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout == "molf 0.1.0\n"


def test_no_package_imports_one_that_imports_it() -> None:
    imports: dict[str, set[str]] = {}
    for path in (ROOT / "src" / "molf").glob("*/*.py"):
        found = re.findall(r"^\s*from \.\.(\w+)", path.read_text(), re.MULTILINE)
        imports.setdefault(path.parent.name, set()).update(found)
    assert imports["cli"] > {"optim", "train", "plan"}
    assert list(graphlib.TopologicalSorter(imports).static_order())
