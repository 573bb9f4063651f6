"""The parser of the commands that are not ``molf train``."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are one line, like every other error of the command line."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        raise ValueError(message)
