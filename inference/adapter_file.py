"""What the file formats have to know of a base to read an adapter file."""

from collections.abc import Collection, Mapping
from importlib.metadata import version
from typing import Any

from ..adapters.artifact import base_modules
from ..adapters.format import FormatNames
from ..adapters.token_embeddings import text_model
from ..configs.choices import find
from ..models.base import EMBEDDED, PipelineFiles
from ..models.family import ModelFamily, Parts
from ..models.layout import clip_layers, original_names, unet_layers
from ..models.single_file import shipped_configs

ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2",
    "sdxl": "stable-diffusion-xl-v1-base",
}
"""ModelSpec's names of the families whose layers are known without a base."""


def format_names(family: ModelFamily, parts: Parts) -> FormatNames:
    """What the file formats have to know of a base: its module paths and its family's words."""
    paths = {part: base_modules(part, parts[part]) for part in family.kohya_prefixes if part in parts}
    flat = [part for part in family.text_encoders if part in parts and _is_flat(parts[part])]
    widths = {part: word_width(parts[part]) for part in family.embedding_keys if part in parts}
    return _names(family, paths, family.architecture(parts), flat, widths)


def word_width(text_encoder: Any) -> int:
    """How many numbers the vector of a word has."""
    return text_model(text_encoder).embeddings.token_embedding.weight.shape[1]


def _names(
    family: ModelFamily,
    paths: Mapping[str, Collection[str]],
    architecture: str,
    flat: Collection[str],
    widths: Mapping[str, int] | None = None,
) -> FormatNames:
    return FormatNames(
        module_paths=paths,
        kohya_prefixes=family.kohya_prefixes,
        architecture=architecture,
        kohya_version=family.kohya_version,
        embedding_keys=family.embedding_keys,
        denoiser=family.denoiser,
        original=original_names(paths.get(family.denoiser, ())),
        kohya_original=family.kohya_original,
        word_widths=widths or {},
        flat=flat,
    )


def _is_flat(text_encoder: Any) -> bool:
    """Whether transformers has taken `text_model.` out of its module names."""
    return not hasattr(text_encoder, "text_model")


def names_of(kind: str) -> FormatNames:
    """The same of bases that are not loaded: `sd1`, `sd2` and `sdxl` in their usual size, and `pocket`."""
    if kind in EMBEDDED:
        files = PipelineFiles(EMBEDDED[kind])
        return _names_by_configs("sd1", {part: files.config(part) for part in ("unet", "text_encoder")})
    configs = shipped_configs(kind)
    return _names_by_configs(kind, {name.removesuffix("/config.json"): each for name, each in configs.items()})


def _names_by_configs(kind: str, configs: Mapping[str, Mapping[str, Any]]) -> FormatNames:
    family: ModelFamily = find("models.families", kind).FAMILY
    paths = {"unet": unet_layers(configs["unet"])}
    paths |= {part: clip_layers(configs[part]) for part in family.text_encoders}
    return _names(
        family, paths, ARCHITECTURES[kind], _flat_here({part: configs[part] for part in family.text_encoders})
    )


def _flat_here(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Those that the transformers installed here has taken `text_model.` out of, since 5.6."""
    if tuple(map(int, version("transformers").split(".")[:2])) < (5, 6):
        return []
    return [part for part, config in configs.items() if config["architectures"] == ["CLIPTextModel"]]
