"""Single-file checkpoints (the names of CompVis, Stability and web UIs), unpacked once into a pipeline folder.

What a family's files say of themselves and CLIP's vocabulary come with loraloom, so nothing is fetched. Imports no
torch before there is something to unpack.
"""

import hashlib
import json
import lzma
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import yaml

from ..configs.errors import UserError
from ..configs.files import permit
from ..configs.machine import cache_folder
from .layout import original_clip_name

if TYPE_CHECKING:
    from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor name -> shape, as the file's header says."""

SHIPPED = Path(__file__).parent / "single_files"
SUFFIX = ".safetensors"
PICKLES = (".ckpt", ".pt", ".pth", ".bin")

_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_LAYER = "transformer.resblocks.0.ln_1.weight"
_KINDS = {  # a tensor that only files of this family have
    "sdxl": f"conditioner.embedders.1.model.{_LAYER}",
    "sd2": f"cond_stage_model.model.{_LAYER}",
    "sd1": "cond_stage_model.transformer.text_model.encoder.layers.0.layer_norm1.weight",
}
_REFINER = f"conditioner.embedders.0.model.{_LAYER}"
_CLIP = {  # family -> text encoder -> where it is in the file
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}


def is_single_file(base: str) -> bool:
    """Whether a base is named as a file."""
    return Path(base).suffix.lower() in (SUFFIX, *PICKLES)


def problems_of_file(base: str) -> list[str]:
    """Why a checkpoint cannot be used, as far as its header tells."""
    file = Path(base)
    if file.suffix.lower() in PICKLES:
        return [f"base {base!r}: a pickle can run code when it is opened, so it never is; give a .safetensors file"]
    if not file.is_file():
        return [f"base {base!r}: there is no such file"]
    try:
        shapes, header = read_header(file)
        kind = kind_of(file, shapes)
        prediction_of(file, kind, shapes, header)
    except UserError as error:
        return [f"base {base!r}: {problem}" for problem in error.problems]
    return []


def unpacked(file: Path) -> Path:
    """The pipeline folder of a checkpoint, made on first use in the folder of caches; UserError if it is not whole."""
    from filelock import FileLock

    status = file.stat()
    name = f"{file.resolve()}:{status.st_size}:{status.st_mtime_ns}:{_hash_of_shipped()}"
    folder = cache_folder(None) / "bases" / f"{file.stem}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            partial = folder.with_name(f"{folder.name}.tmp")
            shutil.rmtree(partial, ignore_errors=True)
            try:
                unpack(file, partial)
                os.replace(partial, folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return folder


def unpack(file: Path, folder: Path) -> None:
    """Writes the pipeline folder of a checkpoint. Every tensor of every part is there, or UserError."""
    from tqdm import tqdm

    shapes, header = read_header(file)
    kind = kind_of(file, shapes)
    contents = shipped_configs(kind)
    contents["scheduler/scheduler_config.json"] |= prediction_of(file, kind, shapes, header)
    contents["unet/config.json"]["in_channels"] = shapes[f"{_UNET}input_blocks.0.0.weight"][1]
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.startswith("tokenizer"):
            _write_tokenizer(folder / name, content)
        else:
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    parts = ("unet", "vae", *_CLIP[kind])
    for part in tqdm(parts, desc=f"unpacking {file.name}", unit="part", leave=False):
        _write_part(file, folder / part, part, kind, contents[f"{part}/config.json"])


def read_header(file: Path) -> tuple[Shapes, dict[str, str]]:
    """The shapes of all tensors, and the metadata, of a safetensors file; UserError if it is none."""
    try:
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        metadata = header.pop("__metadata__", {})
        return {name: tuple(entry["shape"]) for name, entry in header.items()}, metadata
    except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError) as error:
        raise UserError(f"is no safetensors file ({str(error)[:80] or type(error).__name__})") from error


def kind_of(file: Path, shapes: Shapes) -> str:
    """The family of a checkpoint, by its tensors."""
    if not any(name.startswith(_UNET) for name in shapes):
        what = "an adapter" if any("lora" in name for name in shapes) else f"{len(shapes)} tensors of something else"
        raise UserError(f"holds no UNet under {_UNET}… but {what}: it is no checkpoint of Stable Diffusion")
    for kind, name in _KINDS.items():
        if name in shapes:
            return kind
    if _REFINER in shapes:
        raise UserError("is the refiner of SDXL, which is no base to train adapters on")
    raise UserError("has a UNet but no text encoder that is known: give a checkpoint that is whole")


def prediction_of(file: Path, kind: str, shapes: Shapes, header: Mapping[str, str]) -> dict[str, Any]:
    """What the scheduler's config has to say of a checkpoint that predicts v; {} for one that predicts the noise.

    The file's metadata or marks tell, or the .yaml that web UIs want beside files of Stable Diffusion 2, where both
    kinds are usual and nothing in the tensors tells them apart.
    """
    velocity = {"prediction_type": "v_prediction"}
    if "v_pred" in shapes:
        return velocity | (
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if "ztsnr" in shapes else {}
        )
    if said := header.get("modelspec.prediction_type"):
        return velocity if said.startswith("v") else {}
    beside = file.with_suffix(".yaml")
    if beside.is_file():
        return velocity if _parameterization(beside) == "v" else {}
    if kind == "sd2":
        raise UserError(
            f"does not say whether it predicts the noise or v: put the model's own config beside it as {beside.name}, "
            "as web UIs want it (for v: model: {params: {parameterization: v}})"
        )
    return {}


def _parameterization(file: Path) -> str:
    try:
        return str(yaml.safe_load(file.read_text())["model"]["params"].get("parameterization", "eps"))
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file.name} beside it cannot be read as a model's config ({type(error).__name__})") from error


def _write_part(file: Path, folder: Path, part: str, kind: str, config: dict[str, Any]) -> None:
    """Tensors under diffusers' names, in the file's own type."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(file, framework="pt") as opened:
        prefix = {"unet": _UNET, "vae": _VAE}.get(part) or _CLIP[kind][part]
        original = {name: opened.get_tensor(name) for name in opened.keys() if name.startswith(prefix)}  # noqa: SIM118
    tensors = _converted(part, kind, original, config)
    wanted = _expected(part, config)
    if problems := list(_differences(part, tensors, wanted)):
        raise UserError([f"{file}: {problem}" for problem in problems])
    name = "model.safetensors" if part.startswith("text") else "diffusion_pytorch_model.safetensors"
    save_file({n: tensors[n].contiguous() for n in wanted}, folder / name, metadata={"format": "pt"})
    permit(folder / name)


def _converted(part: str, kind: str, original: "dict[str, Tensor]", config: dict[str, Any]) -> "dict[str, Tensor]":
    """By diffusers' own tables, part by part; its loader as a whole is not used, as it asks the hub for configs."""
    from diffusers.loaders import single_file_utils as tables

    if part == "unet":
        return tables.convert_ldm_unet_checkpoint(original, config)
    if part == "vae":
        return tables.convert_ldm_vae_checkpoint(original, config)
    prefix = _CLIP[kind][part]
    if prefix.endswith("model."):
        text_model: Any = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
        return tables.convert_open_clip_checkpoint(text_model, original, prefix)
    return {name.removeprefix(prefix): tensor for name, tensor in original.items()}


def shipped_configs(kind: str) -> dict[str, Any]:
    """What the files of a family's pipeline folder say, by their paths in it."""
    return json.loads((SHIPPED / f"{kind}.json").read_text())


def meta_model(part: str, config: dict[str, Any]) -> Any:
    """The model that a part's config describes, with shapes and no numbers."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        if part == "unet":
            return UNet2DConditionModel.from_config(config)
        if part == "vae":
            return AutoencoderKL.from_config(config)
        kinds = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}
        return kinds[config["architectures"][0]](CLIPTextConfig(**config))


def _expected(part: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a part's tensors; a text encoder's with `text_model.`, as older libraries want them."""
    model = meta_model(part, config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if "position_ids" not in name}
    if not part.startswith("text"):
        return shapes
    kept = ("text_model.", "text_projection.")
    return {name if name.startswith(kept) else f"text_model.{name}": shape for name, shape in shapes.items()}


def _differences(part: str, tensors: "Mapping[str, Tensor]", wanted: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    if missing := wanted.keys() - tensors.keys():
        yield f"its {part} lacks {len(missing)} of {len(wanted)} tensors, first {min(missing)}"
    odd = [name for name in wanted.keys() & tensors.keys() if math.prod(wanted[name]) != tensors[name].numel()]
    if odd:
        name = min(odd)
        found = tuple(tensors[name].shape)
        yield f"its {part} has {len(odd)} tensors of another shape: {name} is {found}, not {wanted[name]}"


def _write_tokenizer(folder: Path, padding: str) -> None:
    """CLIP's (Radford et al. 2021), from its merges: 256 bytes, the same at a word's end, a token a merge, 2 marks."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    lines = lzma.decompress((SHIPPED / "clip_merges.txt.xz").read_bytes()).decode().splitlines()
    merges = [(first, second) for first, _, second in (line.partition(" ") for line in lines)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *(a + b for a, b in merges)]
    vocab = {token: number for number, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    own: Any = CLIPTokenizer
    own(vocab=vocab, merges=merges, pad_token=padding, model_max_length=77).save_pretrained(folder)


def _hash_of_shipped() -> str:
    """Other configs or another vocabulary make other folders."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(SHIPPED.iterdir()))).hexdigest()


def tensor_names(kind: str, component: str, path: str, original: Mapping[str, str]) -> tuple[str, int | None]:
    """The tensor of a checkpoint that has a layer's weight, and which third of it where three layers are in one.

    `original` are the names of the UNet's layers in the original code.
    """
    if component == "unet":
        return f"{_UNET}{original[path]}.weight", None
    prefix = _CLIP[kind][component]
    if not prefix.endswith("model."):
        return f"{prefix}{path}.weight", None
    name, third = original_clip_name(path)
    if name == "text_projection":
        raise UserError(
            "a changed text_projection cannot be written into a single file, which has it the other way round"
        )
    return f"{prefix}{name}{'_weight' if third is not None else '.weight'}", third
