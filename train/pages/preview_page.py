"""The page of a preview: sources, notes, and bucket by bucket each image beside what the model gets of it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from ...configs.data_sections import PriorSource, Source
from ...configs.schema import RunConfig
from ...configs.words import agreeing, counted
from ...images.decoding import Size
from ..choice import Planned
from ..outlook import BucketOutlook, Changed, Outlook, SourceOutlook
from ..view import Encoded, View, box_of
from .chart import Markup, join, tag
from .page import backdrop, enlarging, page, picture_uri

SHOWN_CAPTIONS = 6
ALMOST_ALL = 0.95  # of the pixels, not looked at: nothing is left to learn
TINY = 256  # pixels; the pixels of smaller pictures are drawn as squares
MUCH = 0.1  # of an image, cut away: enough for a head


@dataclass(frozen=True, slots=True)
class Bucket:
    """One bucket on the page."""

    outlook: BucketOutlook
    views: list[View]
    planned: list[Planned]
    sheet: str  # name of its contact sheet


@dataclass(frozen=True, slots=True)
class Preview:
    """All that the page shows."""

    config: RunConfig
    outlook: Outlook
    buckets: list[Bucket]
    num_images: int  # that could be shown: those of each bucket, without class images that are not made
    notes: list[str]


def preview_page(preview: Preview) -> Markup:
    """The whole HTML page."""
    name, numbers = preview.config.output.name, count(1)
    parts = [
        header(preview),
        facts(preview),
        sources(preview),
        changed(preview.outlook),
        *(bucket(found, numbers, preview.config) for found in preview.buckets),
        backdrop(),
    ]
    return page(f"{name}: preview", *parts, style=STYLE)


def header(preview: Preview) -> Markup:
    """Name, how to read the page, and the notes."""
    shown = sum(len(found.views) for found in preview.buckets)
    words = (
        "Left each image as it is, with what is cut away darkened; right the pixels that the model gets. "
        "Select a picture to enlarge it."
    )
    return tag(
        "header",
        tag("h1", preview.config.output.name, " ", tag("span", "preview", class_="what")),
        tag("p", tag("b", f"{shown:,} of {counted(preview.num_images, 'image')}"), " shown. ", words, class_="soft"),
        tag("p", "\n".join(preview.notes), class_="message notes") if preview.notes else None,
    )


def facts(preview: Preview) -> Markup:
    """What the config says of images."""
    config, data, outlook = preview.config, preview.config.data, preview.outlook
    samples = f"{outlook.samples:,} · {outlook.steps:,} steps of {config.loop.batch_size}"
    values = {
        "Base": config.model.base,
        "Resolution": ", ".join(map(str, data.resolutions)),
        "Buckets": f"{len(outlook.buckets)}" if data.buckets.enabled else "off: squares only",
        "Cut": _cut_words(config),
        "Mirrored": f"{data.flip:.0%} of the samples" if data.flip else "never",
        "Samples in the run": samples,
    }
    rows = [tag("div", tag("dt", name), tag("dd", value)) for name, value in values.items()]
    return tag("section", tag("dl", *rows, class_="facts"), class_="card")


def sources(preview: Preview) -> Markup:
    """The table of sources."""
    titles = ("source", "images", "samples", "share", "each seen", "loss weight", "steps")
    sections = zip(preview.outlook.sources, preview.config.data.sources, strict=True)
    rows = [
        tag(
            "tr",
            tag("th", source.name, tag("div", _contents(source, section), class_="soft"), scope="row"),
            tag("td", f"{source.images:,}"),
            tag("td", f"{source.samples:,}"),
            tag("td", f"{source.share:.0%}"),
            tag("td", f"{source.passes:,.1f} times"),
            tag("td", f"{source.loss_weight:g}"),
            tag("td", f"{source.first_step:,} to {source.end_step:,}"),
        )
        for source, section in sections
    ]
    head = tag("thead", tag("tr", *(tag("th", title, scope="col") for title in titles)))
    table = tag("table", head, tag("tbody", *rows))
    return tag("section", tag("h2", "Sources"), tag("div", table, class_="card scroll"))


def changed(outlook: Outlook) -> Markup | None:
    """The images that lose most and those that are enlarged most, shown below or not."""
    folds = []
    if cut := outlook.most_cropped:
        folds.append(_fold(f"Cut most: {cut[0].cropped:.0%} of an image", cut))
    if enlarged := outlook.most_enlarged:
        folds.append(_fold(f"Enlarged most: {enlarged[0].scale:.2g} times", enlarged))
    return tag("section", tag("h2", "Worth a look"), *folds) if folds else None


def bucket(found: Bucket, numbers: Iterator[int], config: RunConfig) -> Markup:
    """All images of one bucket that are shown; `numbers` gives each picture its own."""
    outlook = found.outlook
    images = sum(outlook.images.values())
    shown = f", {len(found.views) or 'none'} shown" if len(found.views) < images else ""
    words = f"{counted(images, 'image')}{shown} · {counted(outlook.samples, 'sample')} in the run · {found.sheet}"
    cards = [_card(view, numbers, config) for view in found.views]
    cards += [_planned_card(planned, (outlook.width, outlook.height)) for planned in found.planned]
    return tag(
        "section",
        tag("h2", _size((outlook.width, outlook.height))),
        tag("p", words, class_="soft"),
        tag("div", *cards, class_="views"),
        class_="bucket",
    )


def _card(view: View, numbers: Iterator[int], config: RunConfig) -> Markup:
    number, (width, height), right = next(numbers), view.cuts[0].original, box_of(view.cuts[0])[2]
    original = join(_image(view.original, f"{view.name} as it is"), _boxes(view, f"uncut-{number}"))
    pixels = _image(view.pixels, f"{view.name} as the model gets it")
    if view.unseen is not None:
        pixels = join(pixels, _image(view.unseen, "where it is not looked at", "unseen"))
    pair = tag(
        "div",
        enlarging(number, original, view.name, "as it is"),
        enlarging(next(numbers), pixels, view.name, "for the model"),
        class_="pair",  # both at one scale
        style=f"--columns:minmax(0,{width}fr) minmax(0,{right:g}fr);--aspect:{(width + right) / height:g}",
    )
    folder, name = view.name.rpartition("/")[::2]
    where = tag("span", f"{folder}/", class_="soft") if folder else None
    title = tag("h3", where, tag("span", name, class_="name"), title=view.name, dir="auto")
    return tag("article", pair, tag("div", title, _how(view, config), *_words(view), class_="words"), class_="card")


def _planned_card(planned: Planned, size: Size) -> Markup:
    words = f"{counted(planned.count, 'class image')}, made with the base before it is trained"
    tile = tag("div", words, class_="tile", style=f"--aspect:{size[0] / size[1]:g}")
    prompt = tag("ul", tag("li", planned.prompt, dir="auto"), class_="captions")
    return tag("article", tile, tag("div", prompt, class_="words"), class_="card")


def _boxes(view: View, name: str) -> Markup:
    """All cuts over the image as it is: what no cut holds is dark, the first is drawn thick."""
    width, height = view.cuts[0].original
    boxes = list(dict.fromkeys(map(box_of, view.cuts)))
    return tag(
        "svg",
        tag("mask", _rect((0, 0, width, height), fill="#fff"), *(_rect(box, fill="#000") for box in boxes), id=name),
        _rect((0, 0, width, height), class_="away", mask=f"url(#{name})"),
        *(_rect(box, class_="cut") for box in reversed(boxes)),  # the first over the others
        viewBox=f"0 0 {width} {height}",
        aria_hidden="true",
    )


def _rect(box: tuple[float, float, float, float], **attributes: object) -> Markup:
    x, y, width, height = (f"{value:g}" for value in box)
    return tag("rect", x=x, y=y, width=width, height=height, **attributes)


def _how(view: View, config: RunConfig) -> Markup:
    """From the file to the bucket."""
    first, places = view.cuts[0], len({cut.corner for cut in view.cuts})
    scale = f"scaled by {view.scale:.2g}" if view.scale <= 1 else _badge(f"enlarged {view.scale:.2g} times")
    away = f"{view.cropped:.0%} cut away" if view.cropped >= 0.005 else "nothing cut away"
    words = [f"{_size(first.original)} to {_size(first.target)}", scale, _badge(away) if view.cropped >= MUCH else away]
    if view.random_cuts and first.scaled != first.target:
        steps = f"here as in {'steps' if len(view.steps) > 1 else 'step'} {_listed(view.steps)}" if view.steps else ""
        words.append(f"cut anew each time, {steps or f'{places} examples'}")
    elif places > 1:
        words.append(f"cut in one of {places} places")
    if mirrored := _mirrored(first.flip, config.data.flip):
        words.append(mirrored)
    if view.unseen is not None:
        red = f"{view.unseen_part:.0%} not looked at (red)"
        words.append(_badge(red) if view.unseen_part >= ALMOST_ALL else red)
    return tag("p", words[0], *(part for word in words[1:] for part in (" · ", word)), class_="soft")


def _words(view: View) -> list[Markup]:
    """Its captions, and in words what is not among them."""
    captions = view.captions[1:] if view.dropout and view.captions[:1] == [""] else view.captions
    lines = [
        tag("li", caption, dir="auto") if caption.strip() else tag("li", "empty", class_="soft") for caption in captions
    ]
    notes = []
    if len(lines) > SHOWN_CAPTIONS:
        notes.append(f"and {len(lines) - SHOWN_CAPTIONS:,} more")
    if view.random_captions:
        notes.append(f"made anew each time, {'these are examples' if len(lines) > 1 else 'this is an example'}")
    if view.dropout:
        notes.append("always empty" if view.dropout == 1 else f"{100 * view.dropout:.3g}% of the time: empty")
    return [
        *([tag("ul", *lines[:SHOWN_CAPTIONS], class_="captions")] if lines else []),
        *([tag("p", " · ".join(notes), class_="soft")] if notes else []),
    ]


def _image(picture: Encoded, words: str, kind: str | None = None) -> Markup:
    classes = " ".join(word for word in (kind, "tiny" if max(picture.size) < TINY else None) if word)
    return tag("img", src=picture_uri(picture.content, picture.kind), alt=words, class_=classes or None)


def _badge(words: str) -> Markup:
    return tag("span", words, class_="badge")


def _contents(source: SourceOutlook, section: Source) -> str:
    if isinstance(section, PriorSource):
        return f"class images of “{section.prior}”"
    return _listed(agreeing(number, what) for what, number in source.counts.items())


def _fold(title: str, found: Sequence[Changed]) -> Markup:
    lines = []
    for image in found:
        how = (
            f"{_size(image.size)} to {_size(image.bucket)} · {image.cropped:.0%} cut away · scaled by {image.scale:.2g}"
        )
        lines.append(tag("li", image.image, " ", tag("span", how, class_="soft")))
    return tag("details", tag("summary", title), tag("ul", *lines), class_="card")


def _size(size: Size) -> str:
    return f"{size[0]:,} × {size[1]:,}".replace(",", "")


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def _mirrored(here: bool, chance: float) -> str | None:
    if chance in (0, 1):
        return "mirrored" if chance else None
    return f"mirrored {chance:.0%} of the time, {'as here' if here else 'not here'}"


def _cut_words(config: RunConfig) -> str:
    if config.data.crop == "center":
        return "in the middle"
    variants = config.data.variants
    return (
        "at random, anew each time" if variants is None else f"at random, {counted(variants, 'place')} for each image"
    )


STYLE = """
main { max-width: 1240px; }
.notes { --tone: var(--warn); font-size: .9rem; }
.bucket > h2 { margin-top: 2.8rem; font-variant-numeric: tabular-nums; }
.views { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)); gap: 0 .9rem; }
.views .card { display: flex; flex-wrap: wrap; align-content: start; gap: .7rem 1.2rem; }
.views h3 { overflow-wrap: anywhere; }
.name { display: inline-block; }
.words { flex: 1 1 13rem; display: flex; flex-direction: column; gap: .45rem; min-width: 0; }
.pair, .tile { flex: 0 1 calc(15rem * var(--aspect) + 1rem); } /* beside the words where there is room */
.pair { display: grid; grid-template-columns: var(--columns); align-items: start; gap: 1rem; }
.pair label { position: relative; }
.pair img { border-radius: 0; }
.pair svg, .pair .unseen { position: absolute; inset: 0; width: 100%; height: 100%; }
.pair svg { overflow: visible; }
.pair label:hover .unseen { visibility: hidden; }
.tiny { image-rendering: pixelated; }
.away { fill: #0c0e12; opacity: .66; }
.cut { fill: none; stroke: #ffb300; stroke-width: 1; vector-effect: non-scaling-stroke; }
.cut:last-child { stroke-width: 2.5; }
.badge { padding: .05rem .5rem; border-radius: 1rem; font-weight: 600; color: var(--warn);
  background: color-mix(in srgb, var(--warn) 14%, transparent); }
.captions { margin: .1rem 0 0; padding: 0; list-style: none; font-size: .9rem; overflow-wrap: anywhere; }
.captions li { padding: .28rem 0; border-top: 1px solid var(--line); white-space: pre-wrap; }
.tile { display: grid; place-content: center; aspect-ratio: var(--aspect); padding: 1rem; text-align: center;
  color: var(--soft); border: 2px dashed var(--line); border-radius: .4rem; }
th .soft, h3 .soft { font-weight: 400; }
details ul { margin: 0; padding-left: 1.1rem; overflow-wrap: anywhere; }
"""
