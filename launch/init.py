"""`loraloom init`: a small, commented config for a folder of images, or from another trainer's file."""

import argparse
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from ..configs.arguments import Parser, a_path, path_text, positive
from ..configs.errors import UserError
from ..configs.loader import SHIPPED, accepted, inline_yaml
from ..configs.ownership import why_foreign, write_file
from ..configs.schema import checked_name
from ..configs.words import not_on_path
from .translation.values import file_word

FROM = "TOML of kohya's sd-scripts, JSON of kohya_ss, or a script that starts sd-scripts or diffusers' examples"

NO_ROOM = "decoding an image takes more than such a card has"
ENV = "take this variable from the environment, where a script uses it and does not set it; again for more"

POCKET_IS = (
    "pocket is a toy of 64 px that knows coloured shapes only: photographs do not become recognisable on it. For these "
    "give --base, such as stable-diffusion-v1-5/stable-diffusion-v1-5 or stabilityai/stable-diffusion-xl-base-1.0"
)
CLASS_IMAGES = {"pocket": 64}
"""Class images that are made for a base, where that is not USUAL_CLASS_IMAGES."""
USUAL_CLASS_IMAGES = 200

HEAD = """\
# loraloom train {out}
# yaml-language-server: $schema={schema}
# Every key and its meaning: loraloom schema. What this file would do: loraloom plan {out}
"""
POCKET = """
model:
  base: pocket  # comes with loraloom, knows coloured shapes; for photos a diffusers folder, .safetensors file or hub id

data:
  resolution: 64  # side of a square in pixels; other shapes get buckets of about that area
  sources:
{sources}
adapter:
  method: lora
  rank: 8  # more rank holds more detail, in a larger file
  alpha: rank  # the update is alpha / rank * B A: as strong at any rank
  parts: {{unet: attention}}  # add `text_encoder: attention` to train it too

optimizer:
  learning_rate: 5.0e-4  # for a small model and few steps: at 2.0e-3 photographs make it forget what it knew
  schedule: cosine
  warmup_steps: 10

loop:
  steps: 300
  batch_size: 8  # samples of one optimiser step
  # micro_batch: 1  # samples of one forward pass: smaller needs less memory
  seed: 0

validation:  # images on the way, in the run folder
  every: 100
  prompts: [{prompt}]
"""
LARGE = """# The values are those of {preset.name} ({family.name}), {preset.why}

model:
  base: {base}
  dtype: {config.model.dtype}  # of the frozen weights; the adapter trains in fp32

data:
  resolution: {resolution}  # side of a square in pixels; other shapes get buckets of about that area
  sources:
{sources}  cache: {{latents: true, prompts: true}}  # what encodes leaves the memory before training begins

adapter:
  method: lora
  rank: {config.adapter.rank}  # more rank holds more detail, in a larger file
  alpha: rank  # the update is alpha / rank * B A: as strong at any rank
  parts: {parts}  # add `text_encoder: attention` to train it too, and take `prompts` out of `cache`

optimizer:
  learning_rate: {rate}
  schedule: {config.optimizer.schedule}
  warmup_steps: {config.optimizer.warmup_steps}

loop:
  steps: {config.loop.steps}
  batch_size: {config.loop.batch_size}  # samples of one optimiser step
  micro_batch: {config.loop.micro_batch}  # samples of one forward pass: smaller needs less memory
  precision: {precision}
  gradient_checkpointing: {checkpointing}  # less memory, a third more time
  seed: 0

checkpoint:
  every: {config.checkpoint.every}

validation:  # images on the way, in the run folder
  every: {config.validation.every}
  prompts: {prompts}
"""
TAIL = """
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
    from .photos import look, sources_text

    data: Path = chosen.data
    found = look(data, chosen.class_prompt, chosen.trigger)
    name = _checked_name(chosen.name) if chosen.name else _name_of(data)
    out: Path = chosen.out or Path(f"{name}.yaml")
    base = chosen.base or "pocket"
    sources = sources_text(found, CLASS_IMAGES.get(base, USUAL_CLASS_IMAGES))
    prompt = f"{found.trigger} on a blue background"
    text, said = (
        _pocket(sources, prompt, chosen.preset) if base == "pocket" else _large(base, sources, prompt, chosen.preset)
    )
    head = HEAD.format(out=shlex.quote(str(out)), schema=SHIPPED / "schema.json")
    tail = TAIL.format(folder=inline_yaml(f"runs/{name}"), name=inline_yaml(name))
    _write(out, head + text + tail, chosen.force)
    print("\n".join([f"{out}: {found.words[0]}", *found.words[1:], said]))
    _print_next(out)
    return 0


def _pocket(sources: str, prompt: str, preset: str | None) -> tuple[str, str]:
    if preset is not None:
        raise UserError(f"--preset {preset}: is for real bases; give --base too")
    return POCKET.format(sources=sources, prompt=inline_yaml(prompt)), POCKET_IS


def _large(base: str, sources: str, prompt: str, asked: str | None) -> tuple[str, str]:
    """The values of a preset in full, so that the file can be read and changed without another one."""
    from .presets import Family, family_of, preset_for

    family = family_of(base, any_name=asked is not None)
    preset = preset_for(family, asked)
    config = preset.config
    if family.guessed and asked is not None:
        family = Family(asked.partition("/")[0], config.data.resolutions[0], guessed=False)
    text = LARGE.format(
        base=inline_yaml(base),
        family=family,
        preset=preset,
        config=config,
        sources=sources,
        resolution=family.resolution,
        parts=inline_yaml(config.adapter.parts),
        rate=inline_yaml(config.optimizer.learning_rate),
        precision=inline_yaml(config.loop.precision),
        checkpointing=inline_yaml(config.loop.gradient_checkpointing),
        prompts=inline_yaml([prompt]) if config.validation.prompts else f"[]  # {NO_ROOM}",
    )
    guess = "taken for Stable Diffusion 1 by its name (--preset says otherwise): " if family.guessed else ""
    return text, f"{base}: {guess}{family.resolution} px and the values of {preset.name}, {preset.why}"


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
    print("\nnext:")
    for verb, what in (("preview", "what the model will see"), ("plan", "what a run would do"), ("train", "")):
        print(f"  loraloom {verb} {command}" + (f"  # {what}" if what else ""))
    if where := not_on_path():
        print(where)


def _check_together(chosen: argparse.Namespace) -> None:
    """Arguments that make no sense with the others."""
    if chosen.source is None and chosen.data is None:
        raise UserError("which images? --data FOLDER, or --from FILE of another trainer")
    theirs = {"--trigger": chosen.trigger, "--class": chosen.class_prompt, "--preset": chosen.preset}
    ours = {"--steps": chosen.steps, "--strict": chosen.strict, "--verbose": chosen.verbose, "--env": chosen.env}
    for name, value in (theirs if chosen.source else ours).items():
        if value:
            raise UserError(f"{name}: {'not with' if chosen.source else 'only with'} --from")
    if chosen.source and chosen.data:
        from .photos import images_in

        images_in(chosen.data)


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"--name {name!r}: may have letters, digits, '.', '-' and '_'; such as {file_word(name)}")
    try:
        return checked_name(name)
    except ValueError as error:
        raise UserError(f"--name: {error}") from error


def _name_of(folder: Path) -> str:
    name = file_word(folder.resolve().name)
    try:
        return checked_name(name)
    except ValueError:  # a folder called samples
        return f"my-{name}"


def _write(out: Path, text: str, force: bool) -> None:
    if os.path.lexists(out):
        if not force:
            raise UserError(
                f"{out}: is there already; --force writes over what loraloom wrote and nobody changed, "
                "--out names another file"
            )
        if why := why_foreign(out):
            raise UserError(f"{out}: is there already, and {why}: it is never written over; --out names another file")
    try:
        write_file(out, text, by="init")
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from error


def _parser() -> argparse.ArgumentParser:
    from .presets import names

    parser = Parser("loraloom init", description="Write a small, commented config.")
    parser.add_argument("--data", type=a_path, metavar="FOLDER", help="folder with images")
    bases = "pocket, a diffusers folder, a .safetensors file, or a hub id (pocket, or that of --from)"
    parser.add_argument("--base", type=path_text, help=bases)
    presets = f"values for a kind of base and a card: {', '.join(names())} (what suits the base and the card here)"
    parser.add_argument("--preset", metavar="NAME", help=presets)
    parser.add_argument("--trigger", metavar="TEXT", help='caption of every image, such as "a sks dog"')
    parser.add_argument("--class", dest="class_prompt", metavar="TEXT", help='add class images of, say, "a dog"')
    parser.add_argument("--name", help="name of the adapter (the folder's)")
    parser.add_argument("--out", type=a_path, metavar="FILE", help="the config file (NAME.yaml)")
    parser.add_argument("--force", "--overwrite", action="store_true", help="write over the file if it exists")
    group = parser.add_argument_group("from another trainer")
    group.add_argument("--from", dest="source", type=a_path, metavar="FILE", help=FROM)
    group.add_argument("--steps", type=positive, metavar="N", help="steps, where FILE counts epochs of absent images")
    group.add_argument("--env", action="append", default=[], metavar="NAME", help=ENV)
    group.add_argument("--strict", action="store_true", help="write nothing if a setting has no counterpart here")
    group.add_argument("--verbose", action="store_true", help="also list what is carried over")
    return parser
