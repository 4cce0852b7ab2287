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
        if message.startswith("unrecognized arguments: "):
            message += self._nearest(message.partition(": ")[2].split())
        print(f"error: {plain(message)} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(BAD_INPUT)

    def _nearest(self, words: list[str]) -> str:
        """What the first option that is not here is called here."""
        from .choices import did_you_mean  # difflib, which --help can do without

        word = next((word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")), "")
        ours = OF_OTHERS.get(word, word)
        if ours.partition(" ")[0] in self._option_string_actions:
            return f"; here it is {ours}"
        near = did_you_mean(word, [option for option in self._option_string_actions if option != "--help"])
        settings = any(action.dest == "overrides" for action in self._actions)
        return near or ("; settings are written key=value, such as loop.steps=500" if settings and word else "")


OF_OTHERS = {
    **dict.fromkeys(("--width", "--height", "--size"), "--resolution WIDTHxHEIGHT"),
    **dict.fromkeys(("--cfg-scale", "--cfg", "--guidance-scale", "--scale"), "--guidance"),
    **dict.fromkeys(("--sampler", "--sampling-method", "--sampler-name"), "--scheduler"),
    **dict.fromkeys(("--lora", "--loras", "--network-weights", "--lora-path"), "--adapter FILE:WEIGHT"),
    **dict.fromkeys(("--model", "--ckpt", "--checkpoint", "--pretrained-model-name-or-path"), "--base"),
    **dict.fromkeys(("--batch-size", "--images", "--n-samples", "--num-images-per-prompt"), "--num-images"),
    **dict.fromkeys(("--num-inference-steps", "--sampling-steps"), "--steps"),
    **dict.fromkeys(("--output", "--output-dir", "--outdir"), "--out"),
    **dict.fromkeys(("--instance-data-dir", "--train-data-dir", "--images-dir"), "--data"),
    "--mixed-precision": "--dtype",
}
"""What other programs call options of ours."""


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
