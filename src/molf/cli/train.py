"""``molf train``: one run by one method."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import NoReturn

import yaml
from trl import TrlParser

from ..train.arguments import MethodArguments, TrainArguments
from ..train.run import train


class _Parser(TrlParser):
    """TrlParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage of three hundred options."""
        raise ValueError(message)


def run(argv: Sequence[str]) -> None:
    """Parse ``--config FILE.yaml --key value ...`` and train.

    Raises:
        ValueError: For unknown or bad options.
    """
    parser = _Parser((MethodArguments, TrainArguments), prog="molf train", allow_abbrev=False)
    try:
        method, args = parser.parse_args_and_config(list(argv))
    except yaml.YAMLError as error:
        raise ValueError(f"the configuration file is not YAML: {error}") from error
    logging.getLogger("transformers").setLevel(logging.ERROR)
    metrics = train(method, args)
    print(json.dumps(metrics, indent=2))
    print(f"saved to {args.output_dir}")
