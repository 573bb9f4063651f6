"""The parser of the commands that are not ``molf train``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ..train.files import of_option


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are one line, like every other error of the command line."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        raise ValueError(message)


def read_settings(path: Path) -> dict[str, Any]:
    """The options in the YAML file of ``--config``.

    Raises:
        ValueError: If it is not YAML, or no mapping; names the file.
        OSError: If it cannot be read.
    """
    try:
        with of_option("config", path):
            settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not is_mapping(settings):
        raise ValueError(f"{path} must hold a mapping of option names to values")
    return settings


def is_mapping(value: Any) -> bool:
    """Whether it is a mapping from names."""
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)
