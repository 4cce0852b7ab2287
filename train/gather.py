"""From the sources of a config to its images: opened, looked at, and all problems at once. Imports no torch."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow

from ..configs.data_sections import CaptionRules, DataSection, PriorSource, Source
from ..configs.errors import UserError
from ..configs.machine import cache_folder
from ..configs.plain import plain
from ..configs.processes import launched
from ..configs.schema import ValidationSection
from ..configs.words import agreeing
from ..data.captions import check_caption, check_rules
from ..data.dataset import Dataset, Images
from ..data.scan import apply_policy, scan
from ..data.source import Given, ImageSource, Problems, first_line, named, open_source
from ..data.sources.prior import PriorImages
from ..images.decoding import PixelRules, header

SPOTS = 50  # images that a plan opens of those whose sizes are known

Say = Callable[[str], None]  # what becomes of a note, such as which images are left out


def warn(note: str) -> None:
    """A note for the person who started the command, who reads it once however many processes there are."""
    if launched()[0] == 0:
        print(f"warning: {plain(note)}", file=sys.stderr)


def gather(
    data: DataSection, *, progress: bool, trust_sizes: bool = False, say: Say = warn, given: Given | None = None
) -> list[Images | None]:
    """The sound images of each source; None for class images, which are not made yet.

    `given` are those that a program hands over, by name. With `trust_sizes` no image is opened where the metadata gives
    its size. UserError with all problems.
    """
    problems = _problems_of_rules(data)
    found: list[Images | None] = []
    for section in data.sources:
        if isinstance(section, PriorSource):
            found.append(None)
            continue
        try:
            source = open_source(section, _folder(data), _lines(data, section), given)
        except UserError as error:
            problems += error.problems
            continue
        pyarrow.default_memory_pool().release_unused()  # what reading a long list took, as much again as the list
        problems += source.problems
        for note in source.notes:
            say(note)
        images, wrong = look_at(data, section, source, progress=progress, trust_sizes=trust_sizes, say=say)
        problems += wrong
        found.append(images)
    if problems:
        raise UserError(problems)
    for note in _copies([images for images in found if images is not None]):
        say(note)
    return found


def _lines(data: DataSection, section: Source) -> str | None:
    """What the lines of its caption files are; None where the config does not say it."""
    rules = data.rules(section)
    return rules.lines if "lines" in rules.model_fields_set else None


def _copies(images: Sequence[Images]) -> list[str]:
    """Images with the content of others, which count twice though nobody may have meant it."""
    known = [each for each in images if each.digests is not None and len(each.kept)]
    if not known:
        return []
    digests = np.concatenate([each.digests for each in known if each.digests is not None])
    _, first, groups = np.unique(digests, return_index=True, return_inverse=True)
    ends = np.cumsum([len(each.kept) for each in known])

    def location(place: int) -> str:
        source = int(np.searchsorted(ends, place, side="right"))
        return known[source].source.location(int(known[source].kept[place - ends[source]]))

    again = np.flatnonzero(first[groups] != np.arange(len(digests))).tolist()
    pairs = [(location(place), location(int(first[groups[place]]))) for place in again]
    # a file may be in two sources
    copies = list(dict.fromkeys(f"{copy} of {original}" for copy, original in pairs if copy != original))
    if not copies:
        return []
    what = agreeing(len(copies), "copies among the images")
    return [f"{what} ({named(copies, len(copies))}); each counts as an image of its own"]


def look_at(
    data: DataSection,
    section: Source,
    source: ImageSource,
    *,
    progress: bool = False,
    trust_sizes: bool = False,
    say: Say = warn,
) -> tuple[Images, list[str]]:
    """The sound images of an open source, and what is wrong with the others."""
    if trust_sizes and source.declared_sizes is not None and source.declared_sizes.all():
        for note in spot_check(source, data):
            say(note)
        return Images.declared(section, source), []
    found = scan(source, data, progress=progress, cache=_folder(data))
    kept, problems, notes = apply_policy(found, data)
    for note in [*found.warnings, *notes]:
        say(note)
    images = Images.scanned(section, source, found, kept)
    if not problems and not len(kept):
        problems = [f"{source.name}: no image is left to train on"]
    return images, problems + _problems_of_captions(data, images)


def held_out_data(data: DataSection, validation: ValidationSection) -> DataSection:
    """The rules by which held-out images are read: those of training without chance."""
    calm = {"shuffle": False, "tag_dropout": 0.0, "dropout": 0.0}

    def calmed(rules: CaptionRules | None) -> CaptionRules | None:
        return rules and rules.model_copy(update=calm)

    sources = [each.model_copy(update={"captions": calmed(each.captions)}) for each in validation.sources]
    plain = {"crop": "center", "flip": 0.0, "variants": None}
    return data.model_copy(update=plain | {"sources": sources, "captions": calmed(data.captions)})


def spot_check(source: ImageSource, data: DataSection) -> list[str]:
    """What is wrong with some images whose sizes the metadata gives: those that cannot be opened, or have others."""
    assert source.declared_sizes is not None
    if not len(source):  # none of the metadata's images is there, which is told already
        return []
    chosen = np.unique(np.linspace(0, len(source) - 1, SPOTS).round().astype(int))
    wrong = [problem for index in chosen if (problem := _problem_of_size(source, int(index), data))]
    if not wrong:
        return []
    what = f"{len(wrong)} of {len(chosen)} images that were opened are not as its metadata says"
    return [f"{source.name}: {what}: {wrong[0]}; training will look at every image"]


def _problem_of_size(source: ImageSource, index: int, data: DataSection) -> str | None:
    assert source.declared_sizes is not None
    try:
        found = header(source.read(index), PixelRules(data.background, data.animated, alpha_mask=False)).size
    except (OSError, ValueError) as error:
        return f"{source.location(index)}: {getattr(error, 'strerror', None) or first_line(error)}"
    declared = tuple(source.declared_sizes[index].tolist())
    if found == declared:
        return None
    return f"{source.location(index)} has {found[0]} x {found[1]} pixels, not {declared[0]} x {declared[1]}"


def class_images(data: DataSection, section: PriorSource, files: Sequence[Path], say: Say = warn) -> Images:
    """Those that the run has made; they may be looked at as any others."""
    images, problems = look_at(data, section, PriorImages(section, files), say=say)
    if problems:
        raise UserError(problems)
    return images


def make_dataset(data: DataSection, images: Sequence[Images], multiple: int, seed: int, say: Say = warn) -> Dataset:
    """Images in their buckets; UserError where some fit none and may not be left out."""
    dataset = Dataset(data, images, multiple, seed)
    problems: list[str] = []
    for number, found in enumerate(dataset.images):
        wrong, count = dataset.problems(number), len(dataset.unusable[number])
        if data.on_bad_image == "skip" and count <= data.max_skipped * len(found.kept) and count < len(found.kept):
            for problem in wrong:
                say(f"left out {problem}")
        else:
            problems += wrong
    if problems:
        raise UserError(problems)
    return dataset


def _problems_of_rules(data: DataSection) -> list[str]:
    problems = [f"data.captions: {problem}" for problem in check_rules(data.captions)]
    for number, section in enumerate(data.sources):
        if section.captions is not None:
            problems += [f"data.sources.{number}.captions: {problem}" for problem in check_rules(section.captions)]
    return problems


def _problems_of_captions(data: DataSection, images: Images) -> list[str]:
    """Placeholders that no rule fills."""
    rules, problems = data.rules(images.section), Problems()
    if rules.template is not None and "[caption]" not in rules.template:
        return []
    for number in images.kept:
        for caption in images.source.captions(int(number)):
            if "[" in caption:
                where = images.source.location(int(number))
                for problem in check_caption(caption, rules):
                    problems.add("captions like these", f"{where}: {problem}")
    return problems.lines()


def _folder(data: DataSection) -> Path:
    return cache_folder(data.cache.dir)
