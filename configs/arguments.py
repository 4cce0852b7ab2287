"""Arguments that several commands have."""

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from .errors import BAD_INPUT, UserError
from .plain import plain


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments on one line, as every other error; `--help` has the rest."""

    def error(self, message: str) -> NoReturn:
        message = message.replace("required: config, key=value", "required: config")  # that may be left out
        print(f"error: {plain(message)} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(BAD_INPUT)


def path_text(text: str) -> str:
    """The type of a file or folder, or of a base, which may be one: `~` and `$NAME` are replaced."""
    from .paths import expanded  # brings pydantic, which --help can do without

    try:
        return expanded(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def a_path(text: str) -> Path:
    """The same as a Path."""
    return Path(path_text(text))


def add_config(parser: argparse.ArgumentParser, config: str = "YAML file", example: str = "adapter.rank=16") -> None:
    """CONFIG and [key=value ...], for `load_config`."""
    parser.add_argument("config", type=path_text, help=config)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"settings such as {example}")


def positive(text: str) -> int:
    """The type of a number that is at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def file_and_weight(text: str) -> tuple[str, float]:
    """`path.safetensors` or `path.safetensors:0.8`; a colon that no number follows belongs to the path.

    UserError where what stands before the colon is a file, and so the rest was meant as its weight.
    """
    path, colon, weight = text.rpartition(":")
    try:
        return (path, float(weight)) if colon else (text, 1.0)
    except ValueError:
        if (path.endswith(".safetensors") or os.path.exists(path)) and not os.path.lexists(text):
            raise UserError(f"{text}: weight {weight!r} is no number") from None
        return text, 1.0
