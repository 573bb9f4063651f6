"""An export takes its place in one step: what a kill, a failure, a second process and a strange folder leave behind."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

import molf.export.folder
from molf.export.folder import RECORD, replacing

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
    (stage / folder.RECORD).write_text("new")
"""


def name_of(descriptor: int) -> str:
    return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name


def write(target: Path, text: str) -> None:
    with replacing(target) as stage:
        (stage / "weights").write_text(text)
        (stage / RECORD).write_text(text)


@pytest.mark.parametrize(
    ("where", "left"),
    [("building", "old"), ("sync", "old"), ("before", "old"), ("after", "new"), ("cleaning", "new")],
)
def test_a_kill_leaves_the_old_export_or_the_new_one_whole(tmp_path, where: str, left: str) -> None:
    target = tmp_path / "export"
    write(target, "old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), where], timeout=120)
    assert done.returncode == -9
    assert (target / RECORD).read_text() == left
    weights = target / ("weights" if left == "old" else "part/weights")
    assert weights.read_text() == left
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
    assert {*order[1:4]} == {"weights", RECORD, ".export.part"}
    assert order[4:] == ["exchange export", tmp_path.name]


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


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"output_dir=.*/file/export: .*/file is a file; choose another folder"):
        write(tmp_path / "file" / "export", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
