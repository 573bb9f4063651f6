"""A sweep: methods x learning rates x seeds, each run one ``molf train``, each result one JSON file.

A result is named by a hash of the options given and of the data, so a sweep that was interrupted goes on where it
stopped, a finished run is never run again, and several processes may share one folder: a run is claimed by a file lock,
which the system releases when the sweep and the run that it started have ended, however they end.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml
from tqdm import tqdm

from ..files import sha256, write_json

WEIGHTS = ("*.safetensors", "tokenizer*", "training_args.bin")
OWN = {"method", "learning_rate", "seed", "output_dir", "dry_run", "eval_at_end"}
"""Options of ``molf train`` that the sweep decides."""
DATA = {"task", "dataset_path", "max_examples", "validation_size", "test_size", "split_seed"}
"""Options that all methods share: scores of other records are not compared."""


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        method: Of ``molf train``.
        learning_rate: Peak learning rate of every expert.
        seed: Of training; the splits do not depend on it.
        options: Every other option of ``molf train``.
    """

    method: str
    learning_rate: float
    seed: int
    options: tuple[tuple[str, Any], ...]

    @property
    def arguments(self) -> dict[str, Any]:
        """The options of ``molf train`` for this run."""
        own = {"method": self.method, "learning_rate": self.learning_rate, "seed": self.seed}
        return {**dict(self.options), **own}

    @property
    def key(self) -> str:
        """Sixteen hex digits of the hash of the options given and of the data that they name."""
        text = json.dumps(
            [self.arguments, _fingerprint(dict(self.options).get("dataset_path"))], sort_keys=True, default=str
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _fingerprint(path: Any) -> list[Any] | None:
    """Size and hash of a data file, or of every file of a folder, so that changed data are other runs."""
    if path is None or not Path(path).exists():
        return None
    if Path(path).is_file():
        return [Path(path).stat().st_size, sha256(Path(path))]
    files = sorted(file for file in Path(path).rglob("*") if file.is_file())
    return [[str(file.relative_to(path)), file.stat().st_size, sha256(file)] for file in files]


def plan(
    methods: Sequence[str],
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    common: dict[str, Any],
    per_method: dict[str, dict[str, Any]],
) -> list[Run]:
    """Every run, seeds outermost, so that an unfinished sweep has whole seeds to compare.

    Raises:
        ValueError: If a list is empty, has an entry twice, ``per_method`` names no method of the sweep, or an option is
            not to be given.
    """
    for name, values in (("methods", methods), ("learning_rates", learning_rates), ("seeds", seeds)):
        if not values:
            raise ValueError(f"{name} is empty: give at least one")
        if len(set(values)) != len(values):
            raise ValueError(f"{name}={list(values)} has an entry twice: list each once")
    if not all(0 <= seed < 2**32 for seed in seeds):
        raise ValueError(f"seeds={list(seeds)}: a seed is from 0 to 2**32 - 1")
    unknown = sorted(per_method.keys() - set(methods))
    if unknown:
        raise ValueError(f"options are given for {', '.join(unknown)}, which is not in methods={list(methods)}")
    for where, options, refused in (
        ("for all methods", common, OWN),
        *((f"for {method} alone", own, OWN | DATA) for method, own in per_method.items()),
    ):
        if wrong := sorted(options.keys() & refused):
            raise ValueError(
                f"{', '.join(wrong)} given {where}: a sweep sets methods, learning_rates, seeds and output_dir, trains "
                "and scores every run, and all methods have the same data; leave it out"
            )
    return [
        Run(method, float(rate), seed, tuple(sorted({**common, **per_method.get(method, {})}.items())))
        for seed in seeds
        for method in methods
        for rate in learning_rates
    ]


def run_sweep(runs: Sequence[Run], folder: Path, *, workers: int, threads: int, keep_models: bool = False) -> None:
    """Run what has no result yet; a run that fails is recorded as such and does not stop the rest.

    Args:
        runs: The sweep.
        folder: Holds ``results/KEY.json`` and, for each run, ``runs/KEY/`` with its log and routing.
        workers: Runs at a time.
        threads: CPU threads in all, divided among the workers.
        keep_models: Keep the trained weights; otherwise they are deleted once scored.
    """
    (folder / "results").mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(runs), desc="sweep", unit="run", smoothing=0) as progress:

        def work(run: Run) -> None:
            while not _result(folder, run).exists():
                with _claim(folder, run) as lock:
                    if lock is not None and not _result(folder, run).exists():
                        _execute(run, folder, max(1, threads // workers), keep_models, lock)
                if lock is None:
                    time.sleep(1)  # another process has it
            progress.update()

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(work, runs))


def read_results(runs: Sequence[Run], folder: Path) -> list[dict[str, Any]]:
    """The results of the runs that have one, in their order.

    Raises:
        ValueError: If a result is damaged; names its file.
    """
    return [_read(_result(folder, run), run.key) for run in runs if _result(folder, run).exists()]


def _read(path: Path, key: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        if found["key"] != key:
            raise ValueError(f"it is of {found['key']}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): remove it, and its run is made again") from error
    return found


def _result(folder: Path, run: Run) -> Path:
    return folder / "results" / f"{run.key}.json"


@contextmanager
def _claim(folder: Path, run: Run) -> Iterator[IO[str] | None]:
    """The run's lock, held until it is closed here and in every process that has it; None if someone else has it."""
    with (folder / "results" / f"{run.key}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield lock


def _execute(run: Run, folder: Path, threads: int, keep_models: bool, lock: IO[str]) -> None:
    """Train in a process of its own, which holds the lock as well: it may live on where this one is killed.

    Raises:
        KeyboardInterrupt: If the run was interrupted, which is no result.
        ValueError: If the data changed meanwhile: the result would be of others.
    """
    key = run.key
    out = folder / "runs" / key
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    config = out / "train.yaml"
    config.write_text(yaml.safe_dump({**run.arguments, "output_dir": str(out)}, sort_keys=False))
    command = [sys.executable, "-m", "molf", "train", "--config", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    start = time.time()
    with (out / "log.txt").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, pass_fds=[lock.fileno()])
    if done.returncode in (130, -signal.SIGINT):  # Ctrl-C reaches every process of the terminal
        raise KeyboardInterrupt
    if run.key != key:
        raise ValueError(
            f"dataset_path={dict(run.options)['dataset_path']} changed while {run.method} trained on it: its result is "
            "not kept; leave the data alone and start the sweep again"
        )
    result: dict[str, Any] = {"key": run.key, "arguments": run.arguments, "wall_seconds": time.time() - start}
    if done.returncode == 0:
        result |= {"status": "done", "metrics": json.loads((out / "metrics.json").read_text())}
        result["versions"] = json.loads((out / "run.json").read_text())["versions"]
    else:
        last = [line for line in (out / "log.txt").read_text().splitlines() if line.strip()][-1:]
        error = last[0].removeprefix("molf: error: ") if last else f"exit status {done.returncode}"
        if done.returncode < 0:  # whatever it said last is no reason
            error = f"ended by {signal.Signals(-done.returncode).name}"
        result |= {"status": "diverged" if "not finite" in error else "failed", "error": error}
    if not keep_models:
        for pattern in WEIGHTS:
            for path in out.glob(pattern):
                path.unlink()
        for path in out.glob("checkpoint-*"):
            shutil.rmtree(path)
    write_json(_result(folder, run), result)
