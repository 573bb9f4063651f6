"""An export takes its place in one step: what a kill, a failure, a second process and a strange folder leave behind."""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import molf.export.folder
from molf.export.folder import RECORD, record, replacing

KILLED = """
import os, signal, sys
from pathlib import Path
import molf.export.folder as folder

exchange, sync, rmtree = folder._exchange, folder._sync, folder.shutil.rmtree
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
where = sys.argv[2]
if where == "sync":
    folder._sync = lambda *_: die()
if where == "before":
    folder._exchange = lambda one, other: die() if one.name.endswith(".part") else exchange(one, other)
if where == "after":
    folder._exchange = lambda *pair: (exchange(*pair), die() if pair[0].name.endswith(".part") else None)
if where == "cleaning":
    folder.shutil.rmtree = lambda path, **_: (path / folder.RECORD).unlink() or die() if _ else rmtree(path)
with folder.replacing(Path(sys.argv[1])) as stage:
    (stage / "part").mkdir()
    (stage / "part" / "weights").write_text("new")
    if where == "building":
        die()
    folder.record(stage, {})
"""


def name_of(descriptor: int) -> str:
    return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name


def write(target: Path, text: str, meanwhile: Callable[[], object] = lambda: None) -> None:
    with replacing(target) as stage:
        meanwhile()
        (stage / "weights").write_text(text)
        record(stage, {})


@pytest.mark.parametrize(
    ("where", "left"),
    [("building", "old"), ("sync", "old"), ("before", "old"), ("after", "new"), ("cleaning", "new")],
)
def test_a_kill_leaves_the_old_export_or_the_new_one_whole(tmp_path, where: str, left: str) -> None:
    target = tmp_path / "export"
    write(target, "old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), where], timeout=120)
    assert done.returncode == -9
    weights = target / ("weights" if left == "old" else "part/weights")
    assert weights.read_text() == left
    assert json.loads((target / RECORD).read_text())["files"] == [str(weights.relative_to(target)), RECORD]
    assert {path.name for path in target.iterdir()} == {RECORD, weights.relative_to(target).parts[0]}
    assert (tmp_path / ".export.part").exists()  # what the kill left is named, and removed by the next export
    write(target, "newer")
    assert (target / "weights").read_text() == "newer"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_failure_leaves_the_old_export(tmp_path, monkeypatch) -> None:
    target = tmp_path / "deep" / "export"
    with pytest.raises(IsADirectoryError), replacing(target) as stage:
        stage.write_text("half")
    assert list(target.parent.iterdir()) == []
    write(target, "old")
    exchange = molf.export.folder._exchange

    def fails(one: Path, other: Path) -> None:
        if other == target:
            raise OSError(5, "Input/output error")
        exchange(one, other)

    monkeypatch.setattr(molf.export.folder, "_exchange", fails)
    with pytest.raises(OSError, match="Input/output error"):
        write(target, "new")
    assert (target / "weights").read_text() == "old"
    assert [path.name for path in target.parent.iterdir()] == ["export"]


def test_everything_is_on_the_disk_before_the_exchange(tmp_path, monkeypatch) -> None:
    target, order = tmp_path / "export", []
    write(target, "old")
    exchange, sync = molf.export.folder._exchange, os.fsync
    monkeypatch.setattr(molf.export.folder.os, "fsync", lambda fd: order.append(name_of(fd)) or sync(fd))
    monkeypatch.setattr(
        molf.export.folder, "_exchange", lambda *pair: order.append(f"exchange {pair[1].name}") or exchange(*pair)
    )
    write(target, "new")
    assert order[0] == "exchange other"  # the probe
    assert {*order[-5:-2]} == {"weights", RECORD, ".export.part"}
    assert order[-2:] == ["exchange export", tmp_path.name]


def test_strange_folders_and_a_second_process(tmp_path, monkeypatch) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="mine is there and no export of molf: choose another folder"):
        write(tmp_path / "mine", "new")
    target = tmp_path / "export"
    write(target, "old")
    (tmp_path / ".export.part").mkdir()
    other = os.open(tmp_path / ".export.part", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another export to the same output_dir is running"):
        write(target, "new")
    os.close(other)
    link = tmp_path / "link"
    link.symlink_to(target)
    write(link, "new")
    assert link.is_symlink()
    assert (target / "weights").read_text() == "new"

    def unsupported(one: Path, other: Path) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(molf.export.folder, "_exchange", unsupported)
    with pytest.raises(ValueError, match=r"cannot exchange two folders .* remove the older export, or choose another"):
        write(target, "newer")
    assert (target / "weights").read_text() == "new"
    write(tmp_path / "first", "new")  # needs no exchange


@pytest.mark.parametrize("name", ["model.gguf", "sub/notes.txt", "run.json", "checkpoint-2/model.safetensors"])
def test_an_export_with_files_of_others_is_not_replaced(tmp_path, name: str) -> None:
    target = tmp_path / "export"
    write(target, "old")
    mine = target / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    message = f"holds {name}, which its export.json does not list .*: move them away, or choose another folder"
    with pytest.raises(ValueError, match=message):
        write(target, "new")
    assert (mine.read_text(), (target / "weights").read_text()) == ("mine", "old")
    mine.unlink()
    with pytest.raises(ValueError, match=message):
        write(target, "new", lambda: mine.write_text("while it is made"))
    assert mine.read_text() == "while it is made"
    mine.unlink()
    write(target, "new")
    assert (target / "weights").read_text() == "new"


@pytest.mark.parametrize("files", ["", ', "files": 3'])
def test_an_export_that_does_not_list_its_files_is_not_replaced(tmp_path, files: str) -> None:
    target = tmp_path / "export"
    write(target, "old")
    (target / RECORD).write_text('{"to": "merged"' + files + "}")
    with pytest.raises(ValueError, match=r"holds export\.json, weights, which its export\.json does not list"):
        write(target, "new")


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"output_dir=.*/file/export: .*/file is a file; choose another folder"):
        write(tmp_path / "file" / "export", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
