"""The files of a preview: a page, and a contact sheet for each bucket."""

import re
from collections.abc import Sequence
from pathlib import Path

from ..configs.errors import UserError
from ..configs.ownership import check_file, remove_recorded, why_foreign, writing
from ..configs.plain import plain
from ..configs.progress import Bar
from ..configs.schema import RunConfig
from ..configs.words import counted
from ..data.dataset import Dataset, Images
from ..images.decoding import Size
from .choice import Choice, Place, choose
from .gather import Say, warn
from .outlook import BucketOutlook, dataset_ahead, look_ahead, missed_shares
from .pages.contact_sheet import Tile, contact_sheet, scaled, shown_size
from .pages.page import write_page
from .pages.preview_page import Bucket, Preview, preview_page
from .preflight import check_output, preflight
from .view import changed, cuts_of, find_uses, look, reddened

PREVIEW = "preview"
"""What wrote a file, in the record of its folder."""
SHEET = re.compile(r"sheet-\d+x\d+\.png")


def write_preview(config: RunConfig, folder: Path, num_images: int) -> Preview:
    """Writes them into the folder, with so many images on the page; UserError if the run could not start."""
    notes: list[str] = []

    def note(line: str) -> None:
        warn(line)
        notes.append(line)

    dataset = _dataset(config, _images(config, folder, note), note)
    _make_empty(folder)
    preview = _draw(config, dataset, folder, num_images, notes)
    write_page(folder / "preview.html", preview_page(preview), by=PREVIEW)
    return preview


def _images(config: RunConfig, folder: Path, say: Say) -> list[Images | None]:
    """The images of each source as training will have them."""
    problems, images = check_output(folder, config, "--out"), []
    if why := why_foreign(folder / "preview.html", by=PREVIEW):
        problems.append(f"--out {plain(folder)}: preview.html {why}: it stays as it is; give another --out")
    try:
        images = preflight(config, say=say)
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(problems)
    return images


def _dataset(config: RunConfig, images: Sequence[Images | None], say: Say) -> Dataset:
    dataset, base = dataset_ahead(config, images, say)
    if base is None:
        say("the base is on the hub: buckets are shown as for the common families, and captions are not counted")
        return dataset
    from .captions import find_long_captions

    for line in find_long_captions(config, base.family, base.load, dataset):
        say(line)
    return dataset


def _make_empty(folder: Path) -> None:
    """The folder of the preview, without the sheets of an older one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be made ({error.strerror})") from error
    remove_recorded(folder, lambda path, by: by == PREVIEW and SHEET.fullmatch(path) is not None)


def _draw(config: RunConfig, dataset: Dataset, folder: Path, num_images: int, notes: list[str]) -> Preview:
    """All views; the sheets are written on the way."""
    outlook, choices = look_ahead(config, dataset), choose(dataset, num_images)
    for found in outlook.buckets:
        check_file(folder / f"sheet-{found.width}x{found.height}.png", by=PREVIEW)
    notes = [*notes, *missed_shares(outlook)]
    uses = find_uses(config, dataset, [place for choice in choices for place in (*choice.page, *choice.sheet)])
    buckets, total = [], sum(len(choice.page) + len(choice.sheet) for choice in choices)
    with Bar(desc="drawing", total=total, unit="image", disable=None) as bar:
        for choice, found in zip(choices, outlook.buckets, strict=True):
            views, tiles = [], []
            for place in choice.page:
                views.append(look(config, dataset, place, uses[place]))
                bar.update()
            for place in choice.sheet:
                tiles.append(_tile(dataset, place, uses[place], shown_size((found.width, found.height))))
                bar.update()
            tiles += [
                Tile(None, [words.prompt, f"{counted(words.count, 'class image')}, not made yet"])
                for words in choice.planned
            ]
            sheet = f"sheet-{found.width}x{found.height}.png"
            drawn = contact_sheet(_title(found, choice), tiles, (found.width, found.height))
            with writing(folder / sheet, by=PREVIEW) as new:
                drawn.save(new, format="PNG")
            buckets.append(Bucket(found, views, choice.planned, sheet))
    return Preview(config, outlook, buckets, sum(choice.images for choice in choices), notes)


def _tile(dataset: Dataset, place: Place, uses: Sequence[int], size: Size) -> Tile:
    row, cut = int(dataset.item_images[place[0]][place[1]]), cuts_of(dataset, place, uses)[0]
    picture, mask = dataset.pixels(place[0], row, cut)
    if mask is not None:
        picture = reddened(picture, mask)
    cropped, _ = changed(cut)
    (width, height), name = cut.original, dataset.location(place[0], row)
    return Tile(scaled(picture, size), [name, f"{width} x {height}, {cropped:.0%} cut away"])


def _title(found: BucketOutlook, choice: Choice) -> str:
    images = counted(sum(found.images.values()), "image")
    shown = f", {len(choice.sheet)} of them here" if len(choice.sheet) < choice.images else ""
    return f"{found.width} x {found.height}: {images}{shown}, {counted(found.samples, 'sample')} in the run"
