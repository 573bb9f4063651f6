"""``molf train``: one run by one method."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from ..train.arguments import MethodArguments, TrainArguments
from ..train.dry_run import compared, dry_run
from ..train.run import train


class _Parser(TrlParser):
    """TrlParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage of three hundred options."""
        raise ValueError(message)

    def parse_known_args(self, *arguments: Any, **options: Any) -> tuple[Any, list[str]]:
        """Refuse what is unknown before the known options are checked, so that the error names the typo."""
        known, unknown = super().parse_known_args(*arguments, **options)
        if unknown:
            raise ValueError(f"unknown option: {' '.join(unknown)}; molf train takes SFTConfig's names and its own")
        return known, unknown


def parse(argv: Sequence[str], kind: type[MethodArguments] = MethodArguments) -> tuple[Any, TrainArguments]:
    """The arguments of ``--config FILE.yaml --key value ...``, looked at as far as they can be without a model.

    Args:
        argv: The words.
        kind: The arguments beside SFTConfig's.

    Raises:
        ValueError: For unknown or bad options.
    """
    parser = _Parser((kind, TrainArguments), prog="molf train", allow_abbrev=False)
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if words and words[-1] == "--config":
        raise ValueError("--config: name a YAML file")
    try:
        method, args = parser.parse_args_and_config(words)
    except yaml.YAMLError as error:
        raise ValueError(f"the configuration file is not YAML: {error}") from error
    except TypeError as error:  # YAML gives an option a list or a key that is no name
        raise ValueError(f"an option has a value of the wrong type: {error}") from error
    method.check_training(args)
    method.molf_config(args)
    return method, args


def run(argv: Sequence[str]) -> None:
    """Parse ``--config FILE.yaml --key value ...`` and train.

    Raises:
        ValueError: For unknown or bad options.
    """
    method, args = parse(argv)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if method.dry_run:
        print(compared(dry_run(method, args)))
        return
    metrics = train(method, args)
    print(json.dumps(metrics, indent=2))
    print(f"saved to {args.output_dir}")
