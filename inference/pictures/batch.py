"""Many pictures as files in one folder: streamed to disk, taken up again where they stopped, spread over processes.

What is made at one time is a forward pass, whole: so a picture has the same place in it, and the same bits, whoever
makes it and whatever was there already.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ...configs.errors import UserError
from .png import REQUEST, request_in, save_png
from .request import PictureRequest
from .sampler import Sampler, versions


@dataclass(frozen=True, slots=True)
class Work:
    """The pictures of one forward pass."""

    request: PictureRequest
    files: Sequence[Path]  # one for each


@dataclass(frozen=True, slots=True)
class Made:
    """How a batch ended in this process."""

    made: int
    found: int  # were there already
    processes: int = 1
    is_main: bool = True  # whether it has the last word


def work_of(requests: Sequence[PictureRequest], sampler: Sampler, folder: Path) -> list[Work]:
    """What there is to make. The files are numbered over all requests: `0000.png`, …

    UserError, before anything is made, for what cannot be.
    """
    for request in requests:
        request.check()
    for base in dict.fromkeys(sampler.key(request) for request in requests):  # each is loaded once for all checks
        for request in requests:
            if sampler.key(request) == base:
                sampler.check(request)
    found, number = [], 0
    for request in requests:
        size = sampler.micro_batch(request)
        starts = [0, *range(size - request.place % size, request.num_images, size)]
        for start, end in zip(starts, [*starts[1:], request.num_images], strict=True):
            files = [folder / f"{number + k:04d}.png" for k in range(start, end)]
            found.append(Work(request.part(start, end - start, size), files))
        number += request.num_images
    return found


def make_together(work: Sequence[Work], sampler: Sampler, title: str, overwrite: bool = False) -> Made:
    """`make` in every process of a launcher, each its share; all of it is there when this returns.

    UserError, before anything is made, for pictures of other requests that would be replaced, unless `overwrite`.
    """
    rank, processes = process()
    if not overwrite:
        _check_free(work, sampler)
    try:
        done = make(work, sampler, title, rank, processes)
    except KeyboardInterrupt:
        print(f"what is done is in {work[0].files[0].parent}; the same command goes on from there", file=sys.stderr)
        raise
    if processes > 1:
        wait_for_all(sampler.device)
    return replace(done, processes=processes, is_main=rank == 0)


def make(work: Sequence[Work], sampler: Sampler, title: str, rank: int = 0, processes: int = 1) -> Made:
    """Makes what is not there yet: of several processes each its share. Files of other requests are replaced."""
    mine = work[rank::processes]
    left = [(each, facts) for each in mine for facts in [_facts(each, sampler)] if not _is_made(each, facts)]
    made, total = 0, sum(len(each.files) for each, _ in left)
    with tqdm(total=total, desc=title, unit="picture", disable=rank > 0, leave=False) as bar:
        for each, facts in left:
            for image, file, own in zip(sampler.pictures(each.request), each.files, facts, strict=True):
                save_png(image, file, **{REQUEST: own}, prompt=each.request.prompt, software=versions())
                made += 1
                bar.update()
    return Made(made, sum(len(each.files) for each in mine) - total)


def _check_free(work: Sequence[Work], sampler: Sampler) -> None:
    """Nobody's picture is lost: what is there is what would be made, or no picture at all."""
    for each in work:
        for file, own in zip(each.files, _facts(each, sampler), strict=True):
            if file.is_file() and _is_picture(file) and not _says(file, own):
                raise UserError(f"{file}: is the picture of another request; give another --out, or --overwrite")


def _is_picture(file: Path) -> bool:
    try:
        with Image.open(file) as image:
            image.load()
    except OSError:  # unfinished
        return False
    return True


def _facts(work: Work, sampler: Sampler) -> list[dict[str, object]]:
    """What each picture says of itself."""
    facts, request = sampler.facts(work.request), work.request
    return [request.part(k, 1, facts["micro_batch"]).pinned(**facts) for k in range(len(work.files))]


def _is_made(work: Work, facts: Sequence[dict[str, object]]) -> bool:
    return all(_says(file, own) for file, own in zip(work.files, facts, strict=True))


def _says(file: Path, facts: dict[str, object]) -> bool:
    if not file.is_file():
        return False
    try:
        return request_in(file) == json.loads(json.dumps(facts)) and _is_picture(file)
    except UserError:
        return False


def pictures_of(work: Sequence[Work]) -> Iterator[Image.Image]:
    """All of them, from their files."""
    for each in work:
        for file in each.files:
            with Image.open(file) as image:
                yield image.convert("RGB")


def process() -> tuple[int, int]:
    """(rank, processes) of `accelerate launch`, torchrun and the like; (0, 1) without them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def wait_for_all(device: str) -> None:
    """Until every process is here; they part afterwards."""
    from accelerate import PartialState

    together = PartialState(cpu=device == "cpu")
    together.wait_for_everyone()
    together.destroy_process_group()
