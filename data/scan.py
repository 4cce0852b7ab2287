"""The look at every image before any model is loaded: all problems at once, nothing decoded twice. Imports no torch.

Each file is read once, hashed, and decoded to its end in threads; what an earlier run has found of it is taken from
`findings`.
"""

import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from ..configs.data_sections import DataSection
from ..configs.machine import cores
from ..configs.progress import Bar
from ..images.colour import CONVERTED, UNUSABLE
from ..images.decoding import BadImage, PixelRules, Size, decode, decode_mask, header
from .buckets import why_too_long
from .findings import Finding, Findings, remembered, sha256

if TYPE_CHECKING:
    from .source import ImageSource

VERY_LARGE = 100_000_000
"""Pixels: larger images are worth a warning, and are decoded one at a time, as each takes half a gigabyte or more."""

_AHEAD = 16  # images that wait for each thread: enough that none idles, and no million of them
_NAMED = 3  # images that a message with a count names
_one_very_large = Lock()


@dataclass(frozen=True, slots=True)
class Scan:
    """What the images of one source are, as columns over their N indices."""

    sizes: np.ndarray  # (N, 2) int32, width and height as shown; 0, 0 for images with a problem
    digests: np.ndarray  # (N,) "S64", sha256 of the encoded file in hex; b"" where it could not be read
    modes: np.ndarray  # (N,) "U8", Pillow's name of the pixel format in the file; "" where there is none
    orientations: np.ndarray  # (N,) uint8, EXIF orientation 1..8
    problems: dict[int, str]  # index -> "location: reason; what to do"
    warnings: list[str]
    mask_digests: np.ndarray  # (N,) "S64", as `digests`, of the mask files; b"" where there is none
    converted: np.ndarray  # (N,) bool, whether a colour profile changes the pixels


def scan(source: "ImageSource", data: DataSection, *, progress: bool = True, cache: Path | None = None) -> Scan:
    """Looks at every image of a source, with a bar on stderr where that is a terminal.

    What is known from an earlier scan is kept in the folder `cache`, also when this one is interrupted. A second
    process waits for the first and takes what that has found. Images that are no files are looked at every time.
    """
    rules = PixelRules(background=data.background, animated=data.animated, alpha_mask=False)
    findings, notes = Findings.none(len(source)), []
    with _quiet_pillow(), remembered(findings, source, rules, cache, notes):
        unknown = np.flatnonzero(~findings.known)
        found, shown = _in_turn(source, rules, unknown), None if progress else True
        for index, finding in Bar(found, f"reading {source.name}", len(unknown), unit="image", disable=shown):
            findings.add(index, finding)
    return _result(source, data, findings, notes)


def apply_policy(found: Scan, data: DataSection) -> tuple[np.ndarray, list[str], list[str]]:
    """(indices of the images that are used, problems that forbid to train, notes) by `data.on_bad_image`."""
    kept = np.setdiff1d(np.arange(len(found.sizes)), np.fromiter(found.problems, dtype=np.int64))
    reasons = [found.problems[index] for index in sorted(found.problems)]
    if data.on_bad_image == "error" or not reasons:
        return kept, reasons, []
    count = f"{len(reasons)} of {len(found.sizes)} images cannot be used"
    if len(kept) and len(reasons) <= data.max_skipped * len(found.sizes):
        return kept, [], [f"{count} and are left out:", *reasons]
    allowed = f"`data.max_skipped: {data.max_skipped:g}` allows" if len(kept) else "can be left out"
    return kept, [f"{count}, more than {allowed}: {_first(reasons, '; ')}"], []


def examine(source: "ImageSource", index: int, rules: PixelRules) -> Finding:
    """One image and its mask, read and decoded to the end."""
    try:
        data, mask = source.read(index), source.read_mask(index)
    except (OSError, ValueError) as error:
        detail = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        return Finding(reason=f"cannot be read ({detail.splitlines()[0]}); restore it, or take it out")
    digests = sha256(data), sha256(mask)
    try:
        found = header(data, rules)
    except BadImage as error:
        return Finding(*digests, error.size, reason=str(error))
    width, height = found.size
    try:
        with _one_very_large if width * height > VERY_LARGE else nullcontext():
            opacity = decode(data, replace(rules, alpha_mask=True))[1]
        reason = None if mask is None else _problem_of_mask(mask, found.size)
        if opacity is not None and not opacity.getbbox():
            reason = "is transparent everywhere, so there is nothing to see; take it out"
    except BadImage as error:
        reason = str(error)
    return Finding(*digests, found.size, found.mode, found.orientation, found.profile, reason)


def _problem_of_mask(mask: bytes, size: Size) -> str | None:
    try:
        picture = decode_mask(mask)
    except BadImage as error:
        return f"its mask cannot be used: {error}"
    width, height = picture.size
    if (width, height) != size:
        return f"its mask has {width} x {height} pixels, the image {size[0]} x {size[1]}; give both one size"
    if not picture.getbbox():
        return "its mask is black everywhere, so nothing of it would be trained; correct the mask, or take both out"
    return None


def _in_turn(source: "ImageSource", rules: PixelRules, indices: Iterable[int]) -> Iterator[tuple[int, Finding]]:
    """Findings in the order of the indices, which are taken up little by little. Pillow and hashlib free the GIL."""
    threads = cores()
    waiting: deque[tuple[int, Future[Finding]]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for index in map(int, indices):
            waiting.append((index, pool.submit(examine, source, index, rules)))
            if len(waiting) == _AHEAD * threads:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """What Pillow's plugins warn of (odd EXIF, a broken animation) is no news to a person; what cannot be used is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def _result(source: "ImageSource", data: DataSection, findings: Findings, notes: list[str]) -> Scan:
    rows, reasons = findings.rows, findings.reasons | _too_long(findings.rows, data.buckets.max_aspect)
    problems = {index: f"{source.location(index)}: {reason}" for index, reason in sorted(reasons.items())}
    sizes = np.stack([rows["width"], rows["height"]], axis=1)
    sizes[list(problems)] = 0
    modes = rows["mode"].astype("U8")
    return Scan(
        sizes=sizes,
        digests=rows["digest"].copy(),
        modes=modes,
        orientations=rows["orientation"].copy(),
        problems=problems,
        warnings=[*notes, *_warnings(source, sizes, modes, rows["profile"])],
        mask_digests=rows["mask"].copy(),
        converted=rows["profile"] == CONVERTED,
    )


def _too_long(rows: np.ndarray, max_aspect: float) -> dict[int, str]:
    """Not kept with the other findings, as another `max_aspect` changes nothing else."""
    long, short = np.maximum(rows["width"], rows["height"]), np.minimum(rows["width"], rows["height"])
    reasons = {}
    for index in np.flatnonzero(long > max_aspect * short).tolist():
        if reason := why_too_long(int(rows["width"][index]), int(rows["height"][index]), max_aspect):
            reasons[index] = reason
    return reasons


def _warnings(source: "ImageSource", sizes: np.ndarray, modes: np.ndarray, profiles: np.ndarray) -> list[str]:
    usable = sizes[:, 0] > 0
    cmyk = np.flatnonzero(usable & (modes == "CMYK"))
    unusable = np.flatnonzero(usable & (profiles == UNUSABLE))
    large = np.flatnonzero(sizes.astype(np.int64).prod(axis=1) > VERY_LARGE)
    return [
        f"{source.name}: {len(found)} {'image' if len(found) == 1 else 'images'} {what} "
        f"({_first([source.location(int(index)) for index in found[: _NAMED + 1]])})"
        for found, what in [
            (cmyk, "in CMYK, converted to RGB without a colour profile"),
            (unusable, "with a colour profile that cannot be used (damaged, or not of RGB), read as sRGB"),
            (large, f"of more than {VERY_LARGE // 10**6} million pixels, slow to read"),
        ]
        if len(found)
    ]


def _first(names: Sequence[str], separator: str = ", ") -> str:
    return separator.join([*names[:_NAMED], *(["…"] if len(names) > _NAMED else [])])
