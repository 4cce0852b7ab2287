"""The files of a base's parts, looked at before a library loads them: what they hold decides what it does. No torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..configs.bounded import RECORD, read_json, regular
from ..configs.errors import UserError
from ..configs.shapes import NUMBER, Shape, misfit

LARGEST_SIZE = 2_000_000
"""Of any whole number in a config: the largest vocabularies have 256,000 words."""
MOST_LAYERS = 512
CONFIGS = ("config.json", "scheduler_config.json", "tokenizer_config.json")
_LOADED = (".json", ".txt", ".model", ".safetensors")
_SIDES = (int, [int])
_SHAPES: dict[str, Shape] = {
    "unet": {
        "in_channels": int,
        "out_channels": int,
        "sample_size": _SIDES,
        "block_out_channels": [int],
        "cross_attention_dim": (int, [int]),
        "attention_head_dim": (int, [int]),
        "down_block_types": [str],
    },
    "vae": {
        "latent_channels": int,
        "block_out_channels": [int],
        "scaling_factor": NUMBER,
        "force_upcast": bool,
        "in_channels": int,
        "out_channels": int,
        "sample_size": _SIDES,
        "down_block_types": [str],
    },
    "scheduler": {
        "num_train_timesteps": int,
        "beta_start": NUMBER,
        "beta_end": NUMBER,
        "beta_schedule": str,
        "prediction_type": str,
        "rescale_betas_zero_snr": bool,
        "timestep_spacing": str,
        "steps_offset": int,
        "trained_betas": [NUMBER],
    },
    "text_encoder": {
        "hidden_size": int,
        "num_hidden_layers": int,
        "vocab_size": int,
        "max_position_embeddings": int,
        "eos_token_id": (int, [int]),
        "projection_dim": int,
        "num_attention_heads": int,
        "intermediate_size": int,
    },
    "tokenizer": {
        "model_max_length": int,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), (str, {"content": str})),
    },
}
INDEX_SHAPE: Shape = {"_class_name": str, "*": (str, bool, int, float, [(str, None)], {})}
"""Of model_index.json: the library and class of each part, and settings of the pipeline."""


def read_index(file: Path) -> dict[str, Any]:
    """model_index.json; UserError for what is none."""
    values = read_json(file)
    if found := misfit(values, INDEX_SHAPE):
        raise UserError(f"{file}: {found}; it should name the library and class of each part")
    return values


def read_config(file: Path, part: str) -> dict[str, Any]:
    """The config of a part; UserError for one that no model can have."""
    values = read_json(file)
    if problem := misfit(values, _SHAPES.get(part.removesuffix("_2"), {})) or next(_too_large(values), None):
        raise UserError(f"{file}: {problem}")
    return values


def check_part(folder: Path) -> None:
    """UserError for a part with a file that no library should open, or with a config that no model can have."""
    if not folder.is_dir():
        return
    for file in sorted(folder.iterdir()):
        if file.suffix in _LOADED and not file.is_dir():
            regular(file, RECORD if file.suffix != ".safetensors" else None)
        if file.name in CONFIGS:
            read_config(file, folder.name)


def _too_large(values: Any, name: str = "it") -> Iterator[str]:
    """Numbers that would take all memory, or all time."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _too_large(value, str(key)[:60])
    elif isinstance(values, list):
        for value in values:
            yield from _too_large(value, name)
    elif type(values) is int and name != "model_max_length":  # transformers says 10^30 where there is none
        most = MOST_LAYERS if "layers" in name else LARGEST_SIZE
        if not -LARGEST_SIZE <= values <= most:
            yield f"{name} cannot be {values}: more than {most:,}"
