"""Many pictures as files in one folder: streamed to disk, taken up again where they stopped, spread over processes.

What is made at one time is a forward pass, whole: so a picture has the same place in it, and the same bits, whoever
makes it and whatever was there already.
"""

import itertools
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from ...configs.errors import UserError
from ...configs.ownership import why_foreign
from ...configs.plain import plain
from ...configs.processes import launched
from ...configs.progress import Bar
from .png import REQUEST, request_in, save_png
from .request import MOST_PICTURES, PictureRequest
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
    if (total := sum(request.num_images for request in requests)) > MOST_PICTURES:
        raise UserError(f"{total:,} pictures are more than the {MOST_PICTURES:,} of one command: ask for some of them")
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
            files = [folder / file_of(number + k) for k in range(start, end)]
            found.append(Work(request.part(start, end - start, size), files))
        number += request.num_images
    return found


def behind(work: Sequence[Work], sampler: Sampler) -> list[Work]:
    """The same with numbers behind all pictures of the folder, or where some of these very pictures are already.

    So prompts are tried one after the other into one folder, and a batch that was interrupted is taken up again.
    """
    wanted = [_canonical(own) for each in work for own in _facts(each, sampler)]
    folder = work[0].files[0].parent
    said = {int(file.stem): _said(file) for file in folder.glob("*.png") if re.fullmatch(r"\d{4,9}", file.stem)}
    start = _begun(wanted, said)
    first = max(said, default=-1) + 1 if start is None else start
    moved = (folder / file_of(number) for number in itertools.count(first))
    return [Work(each.request, [next(moved) for _ in each.files]) for each in work]


def _begun(wanted: Sequence[str], said: Mapping[int, str]) -> int | None:
    """The number of the first wanted picture where some are there already, and no other one is in their way."""
    places = {words: k for k, words in reversed([*enumerate(wanted)])}
    starts = dict.fromkeys(number - places[words] for number, words in sorted(said.items()) if words in places)
    fitting = (
        start for start in starts if start >= 0 and all(said.get(start + k, own) == own for k, own in enumerate(wanted))
    )
    return next(fitting, None)


def file_of(number: int) -> str:
    """The name of a picture."""
    return f"{number:04d}.png"


def sheet_of(work: Sequence[Work]) -> str:
    """The name of the picture that shows all: those of several batches in one folder lie side by side."""
    first = work[0].files[0].stem
    return "grid.png" if not int(first) else f"grid-{first}.png"


def announce(words: str) -> None:
    """Says something once, whatever the number of processes."""
    if process()[0] == 0:
        print(plain(words), file=sys.stderr)


def make_together(work: Sequence[Work], sampler: Sampler, title: str, overwrite: bool = False) -> Made:
    """`make` in every process of a launcher, each its share; all of it is there when this returns.

    UserError, before anything is made, for pictures of other requests that would be replaced, unless `overwrite`; and
    for whatever else has their names, always.
    """
    rank, processes = process()
    _check_free(work, sampler, overwrite)
    try:
        done = make(work, sampler, title, rank, processes)
    except KeyboardInterrupt:
        print(f"what is done is in {work[0].files[0].parent}; the same command goes on from there", file=sys.stderr)
        raise
    if processes > 1:
        wait_for_all(sampler.device(work[0].request))
    return replace(done, processes=processes, is_main=rank == 0)


def make(work: Sequence[Work], sampler: Sampler, title: str, rank: int = 0, processes: int = 1) -> Made:
    """Makes what is not there yet: of several processes each its share. Files of other requests are replaced."""
    mine = work[rank::processes]
    left = [(each, facts) for each in mine for facts in [_facts(each, sampler)] if not _is_made(each, facts)]
    made, total = 0, sum(len(each.files) for each, _ in left)
    with Bar(total=total, desc=title, unit="picture", disable=True if rank else None, leave=False) as bar:
        for each, facts in left:
            for image, file, own in zip(sampler.pictures(each.request), each.files, facts, strict=True):
                save_png(image, file, marks={REQUEST: own}, prompt=each.request.prompt, software=versions())
                made += 1
                bar.update()
    return Made(made, sum(len(each.files) for each in mine) - total)


def _check_free(work: Sequence[Work], sampler: Sampler, overwrite: bool) -> None:
    """Nobody's picture is lost: what is there is what would be made, or may be replaced."""
    for each in work:
        for file, own in zip(each.files, _facts(each, sampler), strict=True):
            if not os.path.lexists(file) or (not file.is_symlink() and _says(file, own)):
                continue
            if why := why_foreign(file):
                raise UserError(f"{file}: {why}, so it is never replaced; give another --out, or move it away")
            if not overwrite:
                raise UserError(f"{file}: is the picture of another request; give another --out, or --overwrite")


def check_sheet(file: Path, verb: str, overwrite: bool) -> None:
    """UserError, before anything is made, where the picture of all would take the place of another one."""
    if why := why_foreign(file):
        raise UserError(f"{file}: {why}, so it is never replaced; give another --out, or move it away")
    if not overwrite and why_foreign(file, by=verb):
        raise UserError(f"{file}: was made by another verb than {verb}; give another --out, or --overwrite")


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
    return file.is_file() and _said(file) == _canonical(facts) and _is_picture(file)


def _said(file: Path) -> str:
    """What a picture says of itself; "" for one of others."""
    try:
        return _canonical(request_in(file))
    except UserError:
        return ""


def _canonical(facts: Mapping[str, object]) -> str:
    return json.dumps(facts, sort_keys=True)


def pictures_of(work: Sequence[Work]) -> Iterator[Image.Image]:
    """All of them, from their files."""
    for each in work:
        for file in each.files:
            with Image.open(file) as image:
                yield image.convert("RGB")


def process() -> tuple[int, int]:
    """(rank, processes) of `accelerate launch`, torchrun and the like; (0, 1) without them."""
    return launched()


def wait_for_all(device: str) -> None:
    """Until every process is here; they part afterwards."""
    from accelerate import PartialState

    together = PartialState(cpu=device == "cpu")
    together.wait_for_everyone()
    together.destroy_process_group()
