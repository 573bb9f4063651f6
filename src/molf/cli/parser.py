"""The parser of the commands that are not ``molf train``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ..files import of_option


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are one line, like every other error of the command line.

    An option's name is whole: one that begins like another may be an option of its own, of ``molf train``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        raise ValueError(message)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice; YAML would take the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice: keep one", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return node


def read_settings(path: Path) -> dict[str, Any]:
    """The options in the YAML file of ``--config``.

    Raises:
        ValueError: If it is not YAML, has a key twice or one of the command line's, or is no mapping; names the file.
        OSError: If it cannot be read.
    """
    try:
        with of_option("config", path), path.open(encoding="utf-8") as file:
            settings = yaml.load(file, _Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none, or no UTF-8
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not is_mapping(settings):
        raise ValueError(f"{path} must hold a mapping of option names to values")
    for name in settings.keys() & {"config", "help"}:
        raise ValueError(f"{path}: {name}={settings[name]!r} is for the command line; leave it out")
    return settings


def is_mapping(value: Any) -> bool:
    """Whether it is a mapping from names."""
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def check_threads(threads: int) -> None:
    """See that the machine has as many cores.

    Raises:
        ValueError: If it has fewer.
    """
    if threads > (cores := os.cpu_count() or 1):
        raise ValueError(f"--threads {threads}: this machine has {cores} cores, give at most as many")
