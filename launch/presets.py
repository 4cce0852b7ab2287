"""The shipped presets: which one suits a base and a card, as far as that is known without torch."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from ..configs.bounded import read_json
from ..configs.choices import did_you_mean
from ..configs.errors import UserError
from ..configs.headers import safetensors_header
from ..configs.loader import SHIPPED, load_config
from ..configs.schema import RunConfig

USUAL = 12
"""GiB of a card that nobody told of."""
LARGE_NAMES = re.compile(r"xl(?![a-z])|pony|illustrious|noob|animagine")
OTHER_NAMES = re.compile(
    r"flux|stable-diffusion-3|(?<![a-z])sd-?3(?![0-9])|sd3\.|pixart|qwen|z-?image|hunyuan|kolors|auraflow|chroma|lumina"
    r"|cascade|kandinsky|deepfloyd|(?<![a-z])(wan|sana|ltx)(?![a-z])|cogview|hidream|omnigen"
)
"""Parts of names of models that are of no family here."""
UNKNOWN = "which is not here yet; bases are Stable Diffusion 1.x, 2.x and XL"
SECOND_NAMES = re.compile(r"stable-diffusion-2|sd-?v?2(?![0-9])|v2-1|768-v-ema")


class Family(NamedTuple):
    """What kind of model a base is."""

    name: str  # sd1, sd2 or sdxl
    resolution: int  # pixels that it was trained at
    guessed: bool  # by its name alone


class Preset(NamedTuple):
    """A shipped config, and why this one."""

    name: str
    config: RunConfig
    why: str


def names() -> list[str]:
    """`sdxl/lora-12gb` and the others, from the smallest card to the largest."""
    found = [file.relative_to(SHIPPED).with_suffix("").as_posix() for file in SHIPPED.glob("*/lora-*gb.yaml")]
    return sorted(found, key=lambda name: (name.partition("/")[0], gibibytes(name)))


def gibibytes(name: str) -> int:
    """Of the card that a preset is for."""
    return int(re.sub(r"\D", "", name.rpartition("-")[2]))


def preset_for(family: Family, asked: str | None) -> Preset:
    """The one that was asked for, else the largest one that fits the card. UserError with the names for another one."""
    if asked is not None:
        if asked not in names():
            raise UserError(
                f"--preset {asked}: is unknown{did_you_mean(asked, names())}; there are: {', '.join(names())}"
            )
        return Preset(asked, load_config(asked), "as asked")
    memory = card_memory()
    kind = "sdxl" if family.name == "sdxl" else "sd1"
    own = [name for name in names() if name.startswith(f"{kind}/")]
    fitting = [name for name in own if gibibytes(name) <= (memory or USUAL)]
    name = fitting[-1] if fitting else own[0]
    card = f"a card of {memory} GiB, as here" if memory else "a usual card"
    return Preset(name, load_config(name), f"for {card}; --preset takes another one of: {', '.join(own)}")


def card_memory() -> int | None:
    """GiB of the smallest graphics card of this machine, as its driver says; None where it says nothing."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    asked = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout
        return round(min(int(line) for line in said.split()) / 1024)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def family_of(base: str, any_name: bool = False) -> Family:
    """What a base's files say, else its name on the hub. UserError for a model that is of no family here,
    by its name too unless it may have `any_name`."""
    path = Path(base)
    if path.is_dir():
        return _of_folder(path)
    if path.is_file():
        return _of_file(path)
    return _of_name(base, any_name)


def _of_folder(path: Path) -> Family:
    index, unet = path / "model_index.json", path / "unet" / "config.json"
    kind = str(read_json(index).get("_class_name", "")) if index.is_file() else ""
    denoiser = read_json(unet) if unet.is_file() else {}
    latents, width = denoiser.get("sample_size"), denoiser.get("cross_attention_dim")
    if not kind and not denoiser:
        raise UserError(f"{path}: holds no pipeline (no model_index.json); give a pipeline folder, a file or a hub id")
    if kind and not re.match(r"StableDiffusion(XL)?(?![0-9X])", kind):
        raise UserError(f"{path}: is a {kind}, {UNKNOWN}")
    name = "sdxl" if "XL" in kind or width == 2048 else "sd2" if width == 1024 else "sd1"
    pixels = latents * 8 if isinstance(latents, int) and 8 <= latents <= 256 else _usual(name)
    return Family(name, pixels, guessed=False)


def _of_file(path: Path) -> Family:
    if path.suffix != ".safetensors":
        raise UserError(
            f"{path}: is no .safetensors file; pickles such as .ckpt are never opened, as they can run code"
        )
    keys = safetensors_header(path).tensors
    if any(key.startswith("conditioner.embedders.1.") for key in keys):
        return Family("sdxl", 1024, guessed=False)
    if any(
        "double_blocks." in key or "joint_blocks." in key or "transformer_blocks.0.attn.add_" in key for key in keys
    ):
        raise UserError(f"{path}: holds a diffusion transformer, {UNKNOWN}")
    second = any(key.startswith("cond_stage_model.model.") for key in keys)
    return Family("sd2", 768, guessed=False) if second else Family("sd1", 512, guessed=False)


def _of_name(base: str, any_name: bool) -> Family:
    plain = base.lower()
    if not any_name and (found := OTHER_NAMES.search(plain.rpartition("/")[2])):
        raise UserError(f"--base {base}: sounds like {found[0]}, {UNKNOWN} (--preset for a model that only sounds so)")
    name = "sdxl" if LARGE_NAMES.search(plain) else "sd2" if SECOND_NAMES.search(plain) else "sd1"
    known = name != "sd1" or "v1-" in plain or "sd1" in plain or "sd-1" in plain
    return Family(name, 512 if name == "sd2" and "base" in plain else _usual(name), guessed=not known)


def _usual(name: str) -> int:
    return {"sdxl": 1024, "sd2": 768}.get(name, 512)
