"""Single-file checkpoints (the names of CompVis, Stability and web UIs), unpacked once into a pipeline folder.

What a family's files say of themselves and CLIP's vocabulary come with loraloom, so nothing is fetched. Imports no
torch before there is something to unpack.
"""

import hashlib
import json
import lzma
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..configs.bounded import CONFIG, parse_yaml, read_text
from ..configs.errors import UserError
from ..configs.files import permit
from ..configs.headers import safetensors_header
from ..configs.machine import cache_folder
from ..configs.ownership import building
from ..configs.paths import looked_in
from .original_names import UNET, Original, Shape, by_standard_name, standard_name
from .part_tensors import cast, differences, pixels_of_a_latent, tensors_of, weights_name

if TYPE_CHECKING:
    from torch import dtype as DType

Shapes = Mapping[str, Shape]
"""Tensor name -> shape, as the file's header says."""

SHIPPED = Path(__file__).parent / "single_files"
SUFFIX = ".safetensors"
PICKLES = (".ckpt", ".pt", ".pth", ".bin")

_LAYER = "transformer.resblocks.0.ln_1.weight"
_KINDS = {  # a tensor that only files of this family have
    "sdxl": f"conditioner.embedders.1.model.{_LAYER}",
    "sd2": f"cond_stage_model.model.{_LAYER}",
    "sd1": "cond_stage_model.transformer.text_model.encoder.layers.0.layer_norm1.weight",
}
_OTHER_MEANING = {
    r"^edm_vpred\.": "is sampled by EDM's noise levels, as CosXL is",
    r"^edm_(mean|std)$": "has EDM's latents, as Playground 2.5 has",
    r"(^|\.)scaled_fp8$|\.(scale_weight|scale_input|weight_scale|input_scale|comfy_quant)$": (
        "has weights in 8 bits with scales beside them"
    ),
}
"""Names of tensors that are marks, and what they say of the model."""
_REFINER = f"conditioner.embedders.0.model.{_LAYER}"


def is_single_file(base: str) -> bool:
    """Whether a base is named as a file."""
    return Path(base).suffix.lower() in (SUFFIX, *PICKLES)


def problems_of_file(base: str) -> list[str]:
    """Why a checkpoint cannot be used, as far as its header tells."""
    file = Path(base)
    if file.suffix.lower() in PICKLES:
        return [f"base {base!r}: a pickle can run code when it is opened, so it never is; give a .safetensors file"]
    if not file.exists():
        return [f"base {base!r}: there is no such file{looked_in(base)}"]
    try:
        shapes, header = read_header(file)
        kind = kind_of(shapes)
        check_marks(shapes)
        prediction_of(file, kind, shapes, header)
        input_channels(shapes)
        by_standard_name(shapes)
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
            with building(folder) as partial:
                unpack(file, partial)
    return folder


def unpack(file: Path, folder: Path, dtype: "DType | None" = None) -> None:
    """Writes the pipeline folder of a checkpoint, in a type or in the file's own; one part is in memory at a time.

    Every tensor of every part is there, or UserError. Tensors that no part has are left out.
    """
    from ..configs.progress import Bar

    shapes, header = read_header(file)
    kind = kind_of(shapes)
    check_marks(shapes)
    contents = _contents(file, kind, shapes, header)
    own = by_standard_name(shapes)
    tensors = tensors_of(kind, contents)
    standard = {name: shapes[each] for name, each in own.items()}
    if problems := [problem for part in tensors for problem in differences(part, tensors[part], standard)]:
        raise UserError([f"{file}: {problem}" for problem in problems])
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_config(content, folder / name)
    for part in Bar(tensors, desc=f"unpacking {file.name}", unit="part", leave=False):
        _write_part(file, own, folder / part, tensors[part], dtype)


def _contents(file: Path, kind: str, shapes: Shapes, header: Mapping[str, str]) -> dict[str, Any]:
    """The configs of its pipeline folder: those of the family, with what this file says of itself."""
    contents = shipped_configs(kind)
    contents["scheduler/scheduler_config.json"] |= prediction_of(file, kind, shapes, header)
    if (channels := input_channels(shapes)) is not None:
        contents["unet/config.json"]["in_channels"] = channels
    width, _, height = header.get("modelspec.resolution", "").partition("x")
    if width == height and re.fullmatch("[0-9]{1,5}", width):  # in pixels, of the square that it was trained on
        factor = pixels_of_a_latent(contents["vae/config.json"])
        contents["unet/config.json"]["sample_size"] = int(width) // factor
    return contents


def read_header(file: Path) -> tuple[Shapes, dict[str, str]]:
    """The shapes of all tensors, and the metadata, of a safetensors file; UserError if it is none."""
    try:
        header = safetensors_header(file)
    except UserError as error:
        raise UserError(str(error).removeprefix(f"{file}: ")) from error
    return {name: entry.shape for name, entry in header.tensors.items()}, header.metadata


def input_channels(shapes: Shapes) -> int | None:
    """Of a checkpoint's UNet; None where it has none. UserError where its first convolution is none."""
    first = shapes.get(f"{UNET}input_blocks.0.0.weight")
    if first is not None and len(first) != 4:
        raise UserError(f"has a UNet whose first convolution is {list(first)}, which is none")
    return None if first is None else first[1]


def kind_of(shapes: Shapes) -> str:
    """The family of a checkpoint, by its tensors."""
    if not any(name.startswith(UNET) for name in shapes):
        what = "an adapter" if any("lora" in name for name in shapes) else f"{len(shapes)} tensors of something else"
        raise UserError(f"holds no UNet under {UNET}… but {what}: it is no checkpoint of Stable Diffusion")
    names = set(map(standard_name, shapes))
    for kind, name in _KINDS.items():
        if name in names:
            return kind
    if _REFINER in shapes:
        raise UserError("is the refiner of SDXL, which is no base to train adapters on")
    raise UserError("has a UNet but no text encoder that is known: give a checkpoint that is whole")


def check_marks(shapes: Shapes) -> None:
    """UserError for tensors which say that the others mean something else than in files of this family."""
    for name in shapes:
        if what := next((words for mark, words in _OTHER_MEANING.items() if re.search(mark, name)), None):
            raise UserError(f"{what} ({name}), which is not understood here: its pictures would be noise")


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
        values = parse_yaml(read_text(file, CONFIG), str(file))
        return str(values["model"]["params"].get("parameterization", "eps"))
    except (UserError, KeyError, TypeError, AttributeError) as error:
        reason = str(error) if isinstance(error, UserError) else "it has no model.params"
        raise UserError(f"{file.name} beside it cannot be read as a model's config ({reason})") from error


def _write_part(
    file: Path,
    own: Mapping[str, str],
    folder: Path,
    tensors: Mapping[str, tuple[Original, Shape]],
    dtype: "DType | None",
) -> None:
    """Tensors under diffusers' names; `own` are the names that the file gives to those of the table."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(file, framework="pt") as opened:
        found = {
            name: original.part_of(opened.get_tensor(own[original.name]), shape)
            for name, (original, shape) in tensors.items()
        }
        cast_all = {name: cast(name, tensor, dtype).contiguous() for name, tensor in found.items()}
        save_file(cast_all, weights := folder / weights_name(folder.name), metadata={"format": "pt"})
    permit(weights)


def shipped_configs(kind: str) -> dict[str, Any]:
    """What the files of a family's pipeline folder say, by their paths in it."""
    return json.loads((SHIPPED / f"{kind}.json").read_text())


def write_config(content: Any, path: Path) -> None:
    """A file of a pipeline folder as JSON; of a tokenizer, whose content is its padding, the folder."""
    if isinstance(content, str):
        tokenizer = clip_tokenizer(content)
        tokenizer.save_pretrained(path)
        write_legacy_tokenizer(path, tokenizer)
    else:
        path.write_text(json.dumps(content, indent=2) + "\n")


def clip_tokenizer(padding: str) -> Any:
    """CLIP's (Radford et al. 2021), from its merges: 256 bytes, the same at a word's end, a token a merge, 2 marks."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    lines = lzma.decompress((SHIPPED / "clip_merges.txt.xz").read_bytes()).decode().splitlines()
    merges = [(first, second) for first, _, second in (line.partition(" ") for line in lines)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *(a + b for a, b in merges)]
    vocab = {token: number for number, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    own: Any = CLIPTokenizer
    return own(vocab=vocab, merges=merges, pad_token=padding, model_max_length=77)


def write_legacy_tokenizer(folder: Path, tokenizer: Any) -> None:
    """vocab.json and merges.txt beside tokenizer.json, for readers that know only these."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    lines = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n")


def _hash_of_shipped() -> str:
    """Other configs or another vocabulary make other folders."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(SHIPPED.iterdir()))).hexdigest()
