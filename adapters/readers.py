"""Which tools read a file of ours as what it is, in words for people. Imports no torch."""

_READERS = {
    "diffusers": "diffusers; ComfyUI and web UIs would leave its attention out",
    "kohya": "ComfyUI, web UIs, sd-scripts, LyCORIS",
    "peft": "PEFT",
    "embedding": "web UIs, ComfyUI, diffusers",
    "loraloom": "loraloom alone",
}
BAKE = "loraloom adapter convert FILE --base BASE --bake-dora --rank 32 --to kohya"
_OF_KIND = {
    ("kohya", "dora"): f"LyCORIS, SD.Next and loraloom; ComfyUI, Forge and A1111 compute DoRA otherwise: `{BAKE}`",
    ("kohya", "dora over inputs"): f"ComfyUI, OneTrainer and loraloom; for others: `{BAKE}`",
    ("kohya", "loha"): "ComfyUI, web UIs, LyCORIS",
    ("kohya", "lokr"): "ComfyUI, web UIs, LyCORIS",
}
"""Measured with their own code on trained adapters: docs/adapters.md."""


def read_by(format_name: str, kind: str = "lora") -> str:
    """For a method, or `dora`."""
    return _OF_KIND.get((format_name, kind), _READERS[format_name])


def note(format_name: str, kind: str) -> str | None:
    """What whoever has just got such a file should know, if it is not for every reader of its format."""
    return f"for {read_by(format_name, kind)}" if (format_name, kind) in _OF_KIND and kind.startswith("dora") else None
