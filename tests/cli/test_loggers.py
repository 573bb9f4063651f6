"""What ``--report_to wandb`` and ``--report_to trackio`` keep on the disk, where these are installed; no network."""

import contextlib
import importlib.util
import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from molf.assets import BUNDLED_MODEL

TRAIN = [
    "--model_name_or_path", str(BUNDLED_MODEL), "--task", "world-fact", "--max_examples", "16", "--max_steps", "4",
    "--logging_steps", "2", "--eval_strategy", "steps", "--eval_steps", "2", "--expert_ranks", "2", "--use_cpu", "true",
    "--dtype", "bfloat16", "--gradient_checkpointing", "false", "--save_strategy", "no", "--eval_at_end", "false",
]  # fmt: skip
NAMES = {
    "molf/dense_share", "molf/share/q_proj", "molf/share/down_proj", "molf/margin", "molf/switch_rate",
    "molf/lost_update_fraction", "loss", "tokens_per_second", "peak_memory_mib", "seconds",
}  # fmt: skip


def wandb_history(folder: Path) -> Iterator[dict[str, float]]:
    """The entries of an offline run: protobuf records in LevelDB's log format, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record, whole = Record.FromString(whole), b""
            if record.WhichOneof("record_type") == "history":
                yield {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }


def trackio_history(folder: Path) -> Iterator[dict[str, float]]:
    (path,) = folder.glob("*.db")
    with contextlib.closing(sqlite3.connect(path)) as base:
        for (metrics,) in base.execute("select metrics from metrics order by id"):
            yield json.loads(metrics)


@pytest.mark.parametrize(
    ("logger", "settings", "history"),
    [
        ("wandb", {"WANDB_MODE": "offline", "WANDB_DIR": "{}"}, wandb_history),
        ("trackio", {"TRACKIO_DIR": "{}"}, trackio_history),
    ],
)
def test_routing_speed_and_memory_arrive(tmp_path: Path, logger: str, settings: dict[str, str], history: Any) -> None:
    """The numbers of the run's own log, under the names that transformers gives them there: train/... and eval/..."""
    if importlib.util.find_spec(logger) is None:
        pytest.skip(f"{logger} is not installed")
    folder = tmp_path / "kept"
    folder.mkdir()
    environment = {**os.environ, **{key: value.format(folder) for key, value in settings.items()}}
    command = [sys.executable, "-m", "molf", "train", *TRAIN, "--report_to", logger]
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "run")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    own = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    kept = list(history(folder))
    for place, first in (("train", "loss"), ("eval", "eval_loss")):
        entries = [entry for entry in own if first in entry]
        arrived = [entry for entry in kept if f"{place}/loss" in entry]
        assert len(entries) == len(arrived) == 2
        for entry, other in zip(entries, arrived, strict=True):
            names = {name for name in entry if name.startswith("eval_")} if place == "eval" else NAMES
            assert names <= entry.keys()
            found = {name: other[f"{place}/{name.removeprefix('eval_')}"] for name in names}
            assert found == pytest.approx({name: entry[name] for name in names})
