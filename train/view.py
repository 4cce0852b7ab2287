"""What the model sees of one image: its cuts, pixels, mask and words, and the image as it is beside them."""

import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..configs.schema import RunConfig
from ..data.captions import is_random
from ..data.dataset import Dataset
from ..data.transforms import Geometry
from ..images.decoding import Size
from .choice import Place
from .outlook import changes

FEW = 3  # cuts or captions that stand for endlessly many
USES = 8  # samples of an image that are looked for: where captions are dropped, some of them have no words to show
SEARCHED = 20_000  # positions of the run in which they are looked for
ORIGINAL_SIDE = 640  # pixels, the longest side of the image as it is
MASKED, OPACITY = "#e5262b", 0.5  # over what is not looked at
LARGEST_PNG = 120_000  # bytes


@dataclass(frozen=True, slots=True)
class Encoded:
    """A picture as a file, so that many of them fit into memory."""

    content: bytes
    kind: str  # "png" or "jpeg"
    size: Size

    @classmethod
    def of(cls, picture: Image.Image) -> "Encoded":
        """As a PNG; an opaque picture that would be larger than LARGEST_PNG as a JPEG."""
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        if buffer.tell() <= LARGEST_PNG or picture.mode != "RGB":
            return cls(buffer.getvalue(), "png", picture.size)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=90, subsampling=0)
        return cls(buffer.getvalue(), "jpeg", picture.size)


@dataclass(frozen=True, slots=True)
class View:
    """One image in one bucket."""

    name: str  # what messages call it
    cuts: list[Geometry]  # all that it has, or those of its first samples; `pixels` are of the first
    captions: list[str]  # all, or those of its first samples without the dropped ones
    random_cuts: bool  # whether `cuts` are of samples
    random_captions: bool  # whether `captions` are
    steps: list[int]  # counted from 1, of the samples of the cuts; none where it is not met soon
    dropout: float  # chance of the caption to be empty
    cropped: float  # fraction that is cut away
    scale: float
    original: Encoded  # all of it as shown, small
    pixels: Encoded  # of the bucket's size, as the model gets them
    unseen: Encoded | None  # red layer over them where the mask is not white
    unseen_part: float  # fraction of them


def look(config: RunConfig, dataset: Dataset, place: Place, uses: Sequence[int]) -> View:
    """The view of an item; `uses` are positions of samples of it."""
    source, item = place
    row, rules, cuts = int(dataset.item_images[source][item]), dataset.rules[source], cuts_of(dataset, place, uses)
    endless = dataset.data.variants is None and is_random(dataset.captions(source, row), rules) and rules.dropout < 1
    drawn = [dataset.sample(position, source, item).caption for position in uses] if endless else []
    examples = dict.fromkeys(caption for caption in drawn if caption or not rules.dropout)
    pixels, mask = dataset.pixels(source, row, cuts[0])
    cropped, scale = changed(cuts[0])
    total = config.loop.steps * config.loop.batch_size
    return View(
        name=dataset.location(source, row),
        cuts=cuts,
        captions=list(examples)[:FEW] if endless else dataset.caption_variants(source, row),
        random_cuts=dataset.data.has_endless_crops,
        random_captions=endless,
        steps=sorted({position // config.loop.batch_size + 1 for position in uses[:FEW] if position < total}),
        dropout=rules.dropout,
        cropped=cropped,
        scale=scale,
        original=Encoded.of(dataset.pixels(source, row, whole(cuts[0].original))[0]),
        pixels=Encoded.of(pixels),
        unseen=mask and Encoded.of(unseen(mask)),
        unseen_part=0.0 if mask is None else float(1 - np.asarray(mask).mean() / 255),
    )


def cuts_of(dataset: Dataset, place: Place, uses: Sequence[int]) -> list[Geometry]:
    """Every cut of an item, or those of its first samples where there is no end of them."""
    if dataset.data.has_endless_crops:
        return [dataset.sample(position, *place).geometry for position in uses[:FEW]]
    return dataset.geometries(*place)


def changed(cut: Geometry) -> tuple[float, float]:
    """The fraction of the image that is cut away, and the scale."""
    cropped, scale = changes(np.array([cut.original]), np.array([cut.target]))
    return float(cropped[0]), float(scale[0])


def whole(size: Size) -> Geometry:
    """The "cut" that is all of an image, not larger than ORIGINAL_SIDE."""
    factor = min(1.0, ORIGINAL_SIDE / max(size))
    small = round(size[0] * factor), round(size[1] * factor)
    return Geometry(size, small, (0, 0), small, flip=False)


def box_of(cut: Geometry) -> tuple[float, float, float, float]:
    """Left, top, width and height of a cut, in pixels of the image as shown."""
    across, down = (original / scaled for original, scaled in zip(cut.original, cut.scaled, strict=True))
    return cut.corner[0] * across, cut.corner[1] * down, cut.target[0] * across, cut.target[1] * down


def unseen(mask: Image.Image) -> Image.Image:
    """A red layer (RGBA), as strong as the mask (mode L) is dark."""
    layer = Image.new("RGBA", mask.size, MASKED)
    layer.putalpha(mask.point([round((255 - value) * OPACITY) for value in range(256)]))
    return layer


def reddened(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture with that layer on it."""
    return Image.alpha_composite(picture.convert("RGBA"), unseen(mask)).convert("RGB")


def find_uses(config: RunConfig, dataset: Dataset, places: Collection[Place]) -> dict[Place, list[int]]:
    """Of each item the first positions in the run at which it stands; what is not met soon gets some of its own
    behind the end of the run, so that no two items share their draws."""
    loop = config.loop
    total = loop.steps * loop.batch_size
    order = dataset.order(loop.steps, loop.batch_size, loop.samples_at_once())
    uses: dict[Place, list[int]] = {place: [] for place in places}
    for position in range(min(total, SEARCHED)):
        found = uses.get(order[position])
        if found is not None and len(found) < USES:
            found.append(position)
    for number, found in enumerate(uses.values()):
        if not found:
            found += range(total + number * USES, total + (number + 1) * USES)
    return uses
