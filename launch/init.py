"""`loraloom init`: a small, commented config for a folder of images, or from another trainer's file."""

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..configs.arguments import Parser, a_path, path_text, positive
from ..configs.errors import UserError
from ..configs.loader import accepted, inline_yaml
from .translation.values import file_word


class Start(NamedTuple):
    """Values that are a good beginning for a kind of base model."""

    resolution: int  # pixels
    learning_rate: float
    steps: int
    batch_size: int
    class_images: int


POCKET = Start(resolution=64, learning_rate=2e-3, steps=300, batch_size=8, class_images=64)
LARGE = Start(resolution=512, learning_rate=1e-4, steps=800, batch_size=2, class_images=200)

FROM = "TOML of kohya's sd-scripts, or a shell script with a command of sd-scripts or of diffusers' examples"

ENV = "take this variable from the environment, where a script uses it and does not set it; again for more"

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
    _check_together(chosen)
    return _translate(chosen) if chosen.source else _begin(chosen)


def _begin(chosen: argparse.Namespace) -> int:
    """A config for a folder of images."""
    data: Path = chosen.data
    count = count_images(data)
    name = _checked_name(chosen.name) if chosen.name else _name_of(data)
    out: Path = chosen.out or Path(f"{name}.yaml")
    class_prompt = (chosen.class_prompt or "").strip() or None
    trigger = chosen.trigger or default_trigger(class_prompt)
    _write(out, config_text(data, chosen.base or "pocket", trigger, class_prompt, name, out), chosen.force)
    print(f"{out}: {count} image{'s' * (count != 1)} of {data} as {trigger!r}")
    _print_next(out)
    return 0


def _translate(chosen: argparse.Namespace) -> int:
    """A config from another trainer's file, and what is not the same in it."""
    from .translation import translated
    from .translation.peer import Asked, translate
    from .translation.variables import taken_from_environment

    file: Path = chosen.source
    taken = taken_from_environment(chosen.env)
    translation = translate(file, Asked(chosen.base, chosen.data, chosen.steps, chosen.name, taken))
    name = translation.named(_checked_name(chosen.name) if chosen.name else file_word(file.stem))
    if "model.base" not in translation.values:
        raise UserError(f"{file}: names no base model; give --base")
    accepted(translated.document_of(translation), str(file))
    if chosen.strict and translation.lost:
        raise UserError([f"{translated.said(line)} (--strict)" for line in translation.lost])
    out: Path = chosen.out or Path(f"{name}.yaml")
    _write(out, translated.config_text(translation, file, out), chosen.force)
    print(f"{out}: from {file} ({translation.tool})")
    print("\n".join(translated.summary(translation, chosen.verbose)))
    _print_next(out)
    return 0


def _print_next(out: Path) -> None:
    command = shlex.quote(str(out))
    print(f"\nnext:\n  loraloom plan {command}\n  loraloom train {command}")


def _check_together(chosen: argparse.Namespace) -> None:
    """Arguments that make no sense with the others."""
    if chosen.source is None and chosen.data is None:
        raise UserError("which images? --data FOLDER, or --from FILE of another trainer")
    theirs = {"--trigger": chosen.trigger, "--class": chosen.class_prompt}
    ours = {"--steps": chosen.steps, "--strict": chosen.strict, "--verbose": chosen.verbose, "--env": chosen.env}
    for name, value in (theirs if chosen.source else ours).items():
        if value:
            raise UserError(f"{name}: {'not with' if chosen.source else 'only with'} --from")
    if chosen.source and chosen.data:
        count_images(chosen.data)


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
    from ..data.sources.folder import image_files
    from ..images.endings import SUFFIXES

    if not folder.is_dir():
        raise UserError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}; --data is a folder")
    count = len(image_files(folder))
    if not count:
        raise UserError(f"{folder}: no images in it; the endings are: {' '.join(sorted(SUFFIXES))}")
    return count


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"--name {name!r}: may have letters, digits, '.', '-' and '_'; such as {file_word(name)}")
    return name


def _name_of(folder: Path) -> str:
    return file_word(folder.resolve().name)


def _write(out: Path, text: str, force: bool) -> None:
    try:
        with out.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise UserError(f"{out}: is there already; --force writes over it, --out names another file") from error
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from error


def _parser() -> argparse.ArgumentParser:
    parser = Parser("loraloom init", description="Write a small, commented config.")
    parser.add_argument("--data", type=a_path, metavar="FOLDER", help="folder with images")
    parser.add_argument(
        "--base", type=path_text, help="`pocket`, a diffusers folder, or a hub id (default: pocket, or that of --from)"
    )
    parser.add_argument("--trigger", metavar="TEXT", help='caption of every image, such as "a sks dog"')
    parser.add_argument("--class", dest="class_prompt", metavar="TEXT", help='add class images of, say, "a dog"')
    parser.add_argument("--name", help="name of the adapter (default: the folder's)")
    parser.add_argument("--out", type=a_path, metavar="FILE", help="the config file (default: NAME.yaml)")
    parser.add_argument("--force", action="store_true", help="write over the file if it exists")
    group = parser.add_argument_group("from another trainer")
    group.add_argument("--from", dest="source", type=a_path, metavar="FILE", help=FROM)
    group.add_argument("--steps", type=positive, metavar="N", help="steps, where FILE counts epochs of absent images")
    group.add_argument("--env", action="append", default=[], metavar="NAME", help=ENV)
    group.add_argument("--strict", action="store_true", help="write nothing if a setting has no counterpart here")
    group.add_argument("--verbose", action="store_true", help="also list what is carried over")
    return parser
