"""`loraloom init`: a small, commented config for a folder of images."""

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..configs.errors import UserError
from ..configs.loader import inline_yaml
from ..data.source import SUFFIXES
from ..data.sources.folder import image_files


class Start(NamedTuple):
    """Values that are a good beginning for a kind of base model."""

    resolution: int  # pixels
    learning_rate: float
    steps: int
    batch_size: int
    class_images: int


POCKET = Start(resolution=64, learning_rate=2e-3, steps=300, batch_size=8, class_images=64)
LARGE = Start(resolution=512, learning_rate=1e-4, steps=800, batch_size=2, class_images=200)

TEMPLATE = """\
# loraloom train {out}
# Every key and its meaning: loraloom schema. What this file would do: loraloom plan {out}

model:
  base: {base}  # `pocket` (comes with loraloom), a diffusers folder, or a hub id

data:
  resolution: {start.resolution}  # side of a square in pixels; other shapes get buckets of about that area
  sources:
{sources}
adapter:
  method: lora
  rank: 8  # more rank holds more detail, in a larger file
  alpha: 8  # the update is alpha / rank * B A
  parts: {{unet: attention}}  # add `text_encoder: attention` to train it too

optimizer:
  learning_rate: {start.learning_rate}

loop:
  steps: {start.steps}
  batch_size: {start.batch_size}  # samples of one optimiser step
  # micro_batch: 1  # samples of one forward pass: smaller needs less memory
  seed: 0

validation:  # images on the way, in the run folder
  every: 100
  prompts: [{prompt}]

output:
  dir: {folder}
  name: {name}
"""


def main(arguments: Sequence[str]) -> int:
    """Write the config and say what to do with it."""
    chosen = _parser().parse_args(arguments)
    data: Path = chosen.data
    count = count_images(data)
    name = _checked_name(chosen.name) if chosen.name else _name_of(data)
    out: Path = chosen.out or Path(f"{name}.yaml")
    class_prompt = (chosen.class_prompt or "").strip() or None
    trigger = chosen.trigger or default_trigger(class_prompt)
    _write(out, config_text(data, chosen.base, trigger, class_prompt, name, out), chosen.force)
    command = shlex.quote(str(out))
    print(f"{out}: {count} image{'s' * (count != 1)} of {data} as {trigger!r}\n\nnext:")
    print(f"  loraloom plan {command}\n  loraloom train {command}")
    return 0


def config_text(data: Path, base: str, trigger: str, class_prompt: str | None, name: str, out: Path) -> str:
    """The YAML file; with a class prompt half of the samples are class images."""
    start = POCKET if base == "pocket" else LARGE
    return TEMPLATE.format(
        out=shlex.quote(str(out)),
        base=inline_yaml(base),
        start=start,
        sources=_sources(data, trigger, class_prompt, start.class_images),
        prompt=inline_yaml(f"{trigger} on a blue background"),
        folder=inline_yaml(f"runs/{name}"),
        name=inline_yaml(name),
    )


def _sources(data: Path, trigger: str, class_prompt: str | None, class_images: int) -> str:
    share = "      share: 0.5  # of all samples\n" if class_prompt else ""
    instance = (
        f"    - path: {inline_yaml(str(data))}\n"
        f"      caption: {inline_yaml(trigger)}  # of every image: a rare word and what your subject is\n{share}"
    )
    if not class_prompt:
        return instance
    return instance + (
        f"    - prior: {inline_yaml(class_prompt)}  # class images, made by the base: it must not forget the others\n"
        f"      count: {class_images}\n{share}"
    )


def default_trigger(class_prompt: str | None) -> str:
    """'a sks dog' for 'a dog'."""
    words = (class_prompt or "a subject").split()
    noun = words[1:] if words[0].lower() in {"a", "an", "the"} else words
    return " ".join(["a", "sks", *noun])


def count_images(folder: Path) -> int:
    """Images in a folder and the folders in it, by their endings. UserError if there are none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}; --data is a folder")
    count = len(image_files(folder))
    if not count:
        raise UserError(f"{folder}: no images in it; the endings are: {' '.join(sorted(SUFFIXES))}")
    return count


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"--name {name!r}: may have letters, digits, '.', '-' and '_'; such as {_word(name)}")
    return name


def _name_of(folder: Path) -> str:
    return _word(folder.resolve().name)


def _word(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-") or "adapter"


def _write(out: Path, text: str, force: bool) -> None:
    try:
        with out.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise UserError(f"{out}: is there already; --force writes over it, --out names another file") from error
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("loraloom init", description="Write a small, commented config.")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="folder with images")
    parser.add_argument("--base", default="pocket", help="`pocket`, a diffusers folder, or a hub id (default: pocket)")
    parser.add_argument("--trigger", metavar="TEXT", help='caption of every image, such as "a sks dog"')
    parser.add_argument("--class", dest="class_prompt", metavar="TEXT", help='add class images of, say, "a dog"')
    parser.add_argument("--name", help="name of the adapter (default: the folder's)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the config file (default: NAME.yaml)")
    parser.add_argument("--force", action="store_true", help="write over the file if it exists")
    return parser
