"""What prompts of web UIs ask for beside their words: adapters by name, and marks that nobody here would read."""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ...configs.choices import did_you_mean
from ...configs.errors import UserError
from ...configs.plain import plain
from ...models.web_ui_prompts import ADAPTER, advice_on
from .request import AdapterChoice, PictureRequest

SUFFIX = ".safetensors"


def with_named_adapters(requests: Sequence[PictureRequest], folders: Sequence[str]) -> list[PictureRequest]:
    """Requests with `<lora:NAME:WEIGHT>` in their prompts as adapters, of NAME.safetensors in or below these folders.

    Without folders they stay as they are. UserError for names that are not there, or there twice.
    """
    if not folders:
        return list(requests)
    files = _files(folders)
    return [_with_adapters(request, files, folders) for request in requests]


def _with_adapters(request: PictureRequest, files: dict[str, list[Path]], folders: Sequence[str]) -> PictureRequest:
    found = [_choice(tag, files, folders) for tag in ADAPTER.finditer(request.prompt)]
    if not found:
        return request
    prompt = re.sub(r"  +", " ", ADAPTER.sub("", request.prompt)).strip()
    return request.model_copy(update={"prompt": prompt, "adapters": [*request.adapters, *found]})


def _choice(tag: re.Match[str], files: dict[str, list[Path]], folders: Sequence[str]) -> AdapterChoice:
    name, asked = tag["name"].strip(), plain(tag[0])
    there = files.get(name.lower(), [])
    exact = [file for file in there if file.name == name + SUFFIX] or there
    if not exact:
        raise UserError(
            f"{asked}: there is no {plain(name)}{SUFFIX} in {' or '.join(folders)}{did_you_mean(name, files)}"
        )
    if len(exact) > 1:
        raise UserError(f"{asked}: there are several: {', '.join(map(str, exact[:3]))}; give --adapter FILE")
    try:
        weights = {float(text) for text in tag["weights"].split(":")[1:]} or {1.0}
    except ValueError as error:
        raise UserError(f"{asked}: its weight is no number") from error
    if len(weights) > 1:
        raise UserError(
            f"{asked}: has several weights; in a file of requests they are `weight: {{unet: 0.5, text_encoder: 0.8}}`"
        )
    return AdapterChoice(file=str(exact[0]), weight=weights.pop())


def _files(folders: Sequence[str]) -> dict[str, list[Path]]:
    """Name in small letters -> files of adapters; checkpoints of runs and hidden folders are left out."""
    found: dict[str, list[Path]] = {}
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(f"--adapter-folder {folder}: there is no such folder")
        for place, inner, names in os.walk(folder):
            inner[:] = sorted(name for name in inner if not name.startswith(".") and name != "checkpoints")
            for name in sorted(names):
                if name.lower().endswith(SUFFIX):
                    found.setdefault(name[: -len(SUFFIX)].lower(), []).append(Path(place) / name)
    return found


def advise(requests: Sequence[PictureRequest]) -> None:
    """Says on stderr, once each, what in the prompts is taken as words though it looks like more."""
    if int(os.environ.get("RANK", "0")):
        return
    for line in dict.fromkeys(
        line
        for request in requests
        for prompt in (request.prompt, request.negative_prompt)
        for line in advice_on(prompt, request.weighted)
    ):
        print(f"warning: {plain(line)}", file=sys.stderr)
