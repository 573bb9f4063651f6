"""``molf train``: one run by one method."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Sequence
from enum import EnumMeta
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from trl import TrlParser

from ..plan.dry_run import compared, dry_run
from ..train.arguments import MethodArguments, TrainArguments
from ..train.checks import check_training
from ..train.run import train
from .parser import read_settings


class _Parser(TrlParser):
    """TrlParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage of three hundred options."""
        raise ValueError(message)

    def set_defaults_with_config(self, **settings: Any) -> list[str]:
        """Refuse a YAML value of another type than its option's: TrlParser takes what is not a string as it is."""
        kinds = {name: kind for arguments in self.dataclass_types for name, kind in get_type_hints(arguments).items()}
        for name, value in settings.items():
            kind = kinds.get(name, Any)
            if isinstance(value, (bool, int, float)) and str in _parts(kind) and type(value) not in _parts(kind):
                word = value is False and any(isinstance(part, EnumMeta) for part in _parts(kind))
                settings[name] = "no" if word else str(value)  # save_strategy: no; such as a folder called 2026
            elif not fits(value, kind):
                raise ValueError(
                    f"{name}={value!r} in the configuration file has the wrong type: give {type_name(kind)}"
                )
        return super().set_defaults_with_config(**settings)

    def parse_known_args(self, *arguments: Any, **options: Any) -> tuple[Any, list[str]]:
        """Refuse what is unknown before the known options are checked, so that the error names the typo."""
        known, unknown = super().parse_known_args(*arguments, **options)
        if unknown:
            raise ValueError(f"unknown option: {' '.join(unknown)}; molf train takes SFTConfig's names and its own")
        return known, unknown


def fits(value: Any, kind: Any) -> bool:
    """Whether a value from YAML is of an option's type; a string is converted, or refused, where options are parsed.

    One value may stand for a list of one.
    """
    if isinstance(value, str) or kind is Any:
        return True
    if len(_parts(kind)) > 1:
        return any(fits(value, part) for part in _parts(kind))
    if get_origin(kind) is list:
        return all(fits(item, get_args(kind)[0]) for item in (value if isinstance(value, list) else [value]))
    if kind is float:
        return type(value) is float or (type(value) is int and abs(value) < 2**63)
    return type(value) is (get_origin(kind) or kind)


def _parts(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if isinstance(kind, UnionType) or get_origin(kind) is Union else (kind,)


def type_name(kind: Any) -> str:
    """A type as a user would write it."""
    return str(kind).removeprefix("<class '").removesuffix("'>")


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
    if "--config" in words:
        read_settings(Path(words[words.index("--config") + 1]))  # for what TrlParser does not say
    try:
        method, args = parser.parse_args_and_config(words)
    except (TypeError, OverflowError) as error:  # a number that is infinite or too large
        raise ValueError(f"an option has a value of the wrong type or size: {error}") from error
    check_training(method, args)
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
    with contextlib.ExitStack() as silent:
        if args.process_index > 0:  # the first process speaks for all; an error is told after this
            nowhere = silent.enter_context(open(os.devnull, "w"))
            silent.enter_context(contextlib.redirect_stdout(nowhere))
            silent.enter_context(contextlib.redirect_stderr(nowhere))
        metrics = train(method, args)
        print(json.dumps(metrics, indent=2))
        print(f"saved to {args.output_dir}")
