"""Arguments that several commands have."""

import argparse


def add_config(parser: argparse.ArgumentParser, config: str = "YAML file", example: str = "adapter.rank=16") -> None:
    """CONFIG and [key=value ...], for `load_config`."""
    parser.add_argument("config", help=config)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"settings such as {example}")


def positive(text: str) -> int:
    """The type of a number that is at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def file_and_weight(text: str) -> tuple[str, float]:
    """`path.safetensors` or `path.safetensors:0.8`; a colon that no number follows belongs to the path."""
    path, colon, weight = text.rpartition(":")
    try:
        return (path, float(weight)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0
