"""What an adapter is called after its file: dots are its own, the endings of formats are not. Imports no torch."""

from pathlib import Path

ENDINGS = (".embedding", ".kohya", ".loraloom", ".peft")
"""Of files before `.safetensors`, and of folders: the `SUFFIX` of each format."""


def title_of(path: str | Path) -> str:
    """`style-v1.5` of `style-v1.5.kohya.safetensors`, `dog` of `dog.peft/`."""
    name = Path(path).name
    if name.lower().endswith(".safetensors"):
        name = name[: -len(".safetensors")]
    return next((name[: -len(ending)] for ending in ENDINGS if name.endswith(ending) and name != ending), name)
