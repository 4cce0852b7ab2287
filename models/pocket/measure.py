"""What a picture of the little world shows, measured in its pixels: colours, shape, and the demo's subject.

Pure functions of uint8 arrays (64, 64, 3). Every pixel is compared with the palette in CIELAB, where
distances follow the eye: samples of a diffusion model come a little lighter, darker or softer than drawn.
"""

from functools import cache

import numpy as np
from PIL import Image, ImageFilter

from .scenes import COLOURS, SHAPES, STYLES, SUBJECT, Scene, draw

_NAMES = tuple(COLOURS)
_BLACK, _WHITE = _NAMES.index("black"), _NAMES.index("white")
_BODY, _BELLY = _NAMES.index(SUBJECT.colour), _NAMES.index(str(SUBJECT.belly))
_BORDER = 3  # pixels; no drawn object reaches them
_MIN_OBJECT = 40  # pixels; less is a speck, not an object
_MIN_CONTRAST = 16.0  # CIELAB distance from the background; half of what parts the two closest colours, blue and purple
_MIN_EVENNESS = 0.85  # of an object's core: drawn shapes are above 0.98, 49 of 50 drawn creatures below 0.85
_MIN_OVERLAP = 0.72  # IoU under which a mask is none of the shapes
_DARK = 45.0  # CIELAB lightness; a pupil is darker, even where it is soft
_GRID = 32  # masks are compared at this size


# ---------------------------------------------------------------------------- colours


def background_colour(picture: np.ndarray) -> str:
    """The palette's name nearest to the median of the border."""
    return _NAMES[int(_nearest(to_lab(_border_median(picture))))]


def object_colour(picture: np.ndarray) -> str | None:
    """The colour that most of the object has, or None where there is no object.

    The vote is among the pixels away from the object's edge; those of ink (lines, pupils) do not count
    unless nearly all are black. Eyes and belly are always fewer than the rest of the body.
    """
    mask = object_mask(picture)
    if not mask.any():
        return None
    votes = np.bincount(colour_map(picture)[_core(mask)], minlength=len(_NAMES))
    if votes[_BLACK] < 0.6 * votes.sum():
        votes[_BLACK] = 0
    return _NAMES[int(votes.argmax())]


def colour_map(picture: np.ndarray) -> np.ndarray:
    """For each pixel the index of the nearest palette colour, (h, w) int."""
    return _nearest(to_lab(picture))


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB in 0..255, (..., 3), to CIELAB under D65 (IEC 61966-2-1, CIE 15): L 0..100, a and b about -100..100."""
    value = np.asarray(rgb, np.float64) / 255.0
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / (0.9505, 1.0, 1.089)
    root = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    x, y, z = np.moveaxis(root, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


_PALETTE = to_lab(np.array(list(COLOURS.values())))


def _nearest(lab: np.ndarray) -> np.ndarray:
    return ((_PALETTE**2).sum(-1) - 2 * lab @ _PALETTE.T).argmin(-1)  # |x - p|^2 less |x|^2, the same for every p


def _border_median(picture: np.ndarray) -> np.ndarray:
    inside = np.zeros(picture.shape[:2], bool)
    inside[_BORDER:-_BORDER, _BORDER:-_BORDER] = True
    return np.median(picture[~inside], axis=0)


# ---------------------------------------------------------------------------- masks


def object_mask(picture: np.ndarray) -> np.ndarray:
    """True where the largest connected thing in front of the background is, (h, w); empty where there is none."""
    distance = np.linalg.norm(to_lab(_without_specks(picture)) - to_lab(_border_median(picture)), axis=-1)
    mask = largest_part(distance > _MIN_CONTRAST)
    return mask if mask.sum() >= _MIN_OBJECT else np.zeros_like(mask)


def _without_specks(picture: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.MedianFilter(3)))


def largest_part(mask: np.ndarray) -> np.ndarray:
    """The largest 4-connected part of a mask; an empty mask stays empty."""
    best, rest = np.zeros_like(mask), mask.copy()
    while np.count_nonzero(rest) > np.count_nonzero(best):
        part = _part_at(rest, int(rest.argmax()))
        best = part if np.count_nonzero(part) > np.count_nonzero(best) else best
        rest &= ~part
    return best


def _part_at(mask: np.ndarray, start: int) -> np.ndarray:
    """The connected part of `mask` that holds the flat index `start`: a flood that grows until it stops."""
    part, size = np.zeros_like(mask), 0
    part.flat[start] = True
    while (count := np.count_nonzero(part)) > size:
        size = count
        grown = part.copy()
        grown[1:] |= part[:-1]
        grown[:-1] |= part[1:]
        grown[:, 1:] |= part[:, :-1]
        grown[:, :-1] |= part[:, 1:]
        part = grown & mask
    return part


def _core(mask: np.ndarray) -> np.ndarray:
    """The mask with its holes, shrunk; the mask itself where that would leave too little."""
    holes = ~mask & ~_part_at(~mask, 0)  # not connected to the picture's corner
    core = _shrunk(mask | holes)
    return core if core.sum() >= _MIN_OBJECT else mask


def _shrunk(mask: np.ndarray) -> np.ndarray:
    """The mask less two pixels all around: no ink line, no blending with what is behind."""
    return np.asarray(Image.fromarray(mask.astype(np.uint8)).filter(ImageFilter.MinFilter(5))).astype(bool)


# ---------------------------------------------------------------------------- shapes


def shape_of(picture: np.ndarray) -> str | None:
    """The shape whose drawn template overlaps the object best (IoU).

    None where there is no object, where it has parts of other colours (a creature), or fits no template.
    """
    mask = object_mask(picture)
    if not mask.any() or _evenness(picture, mask) < _MIN_EVENNESS:
        return None
    grid, (names, templates) = _on_grid(mask), _templates()
    overlap = (grid & templates).sum((1, 2)) / (grid | templates).sum((1, 2))
    best = int(overlap.argmax())
    return names[best] if overlap[best] >= _MIN_OVERLAP else None


def _evenness(picture: np.ndarray, mask: np.ndarray) -> float:
    """The share of the object's core that has about the core's median colour."""
    lab = to_lab(_without_specks(picture)[_core(mask)])
    return float((np.linalg.norm(lab - np.median(lab, axis=0), axis=-1) < 25.0).mean())


@cache
def _templates() -> tuple[tuple[str, ...], np.ndarray]:
    """Shape names and their masks on the grid, (n, 32, 32) bool: every shape, both styles, several angles."""
    scenes = [
        Scene(shape, "yellow", "blue", style, centre=(32.0, 32.0), angle=angle)
        for shape in SHAPES
        for style in STYLES
        for angle in (-12.0, -8.0, -4.0, 0.0, 4.0, 8.0, 12.0)
    ]
    masks = [_on_grid(object_mask(np.asarray(draw(scene)))) for scene in scenes]
    return tuple(scene.shape for scene in scenes), np.stack(masks)


def _on_grid(mask: np.ndarray) -> np.ndarray:
    """The mask's bounding box stretched to 32 x 32: place and size no longer matter."""
    left, top, right, bottom = _box(mask)
    crop = Image.fromarray(mask[top:bottom, left:right].astype(np.uint8) * 255)
    return np.asarray(crop.resize((_GRID, _GRID), Image.Resampling.BILINEAR)) > 127


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the true pixels, right and bottom exclusive."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


# ---------------------------------------------------------------------------- the subject


def subject_score(picture: np.ndarray) -> float:
    """How much the picture shows the demo's subject, 0..1: the product of `subject_features`.

    On a background of the body's own colour the body cannot be told from it, and the score is 0.
    """
    return float(np.prod(list(subject_features(picture).values())))


def subject_features(picture: np.ndarray) -> dict[str, float]:
    """Body, belly colour, belly size, belly place and one eye, each 0 (absent) .. 1 (as drawn).

    The head is not measured: antennae are two pixels wide, the first thing that a soft sample loses.
    """
    smooth = _without_specks(picture)
    colours = colour_map(smooth)
    pink, teal = colours == _BODY, _is_belly_colour(smooth)
    joined = teal & object_mask(picture) if background_colour(picture) != SUBJECT.belly else np.zeros_like(teal)
    body = _hull(largest_part(pink | _grown(joined)))
    inside = _shrunk(body)
    lower, upper = inside & ~_upper_half(body), inside & _upper_half(body)
    belly = lower & teal
    return {
        "body": _body(pink & body, body),
        "belly_colour": _belly_colour(lower & (colours != _BODY), belly),
        "belly_size": _belly_size(body, belly),
        "belly_place": _belly_place(body, belly),
        "one_eye": _one_eye(picture, upper & (colours == _WHITE), body),
    }


def _is_belly_colour(picture: np.ndarray) -> np.ndarray:
    """True where no palette colour is nearer in RGB than the belly's, (h, w).

    Guidance saturates samples: it drives the red of teal to 0 and its green up, which CIELAB calls green, not teal.
    """
    palette = np.array(list(COLOURS.values()), np.float64)
    distances = ((picture[..., None, :].astype(np.float64) - palette) ** 2).sum(-1)
    return distances.argmin(-1) == _BELLY


def _grown(mask: np.ndarray) -> np.ndarray:
    """The mask with two pixels more all around: across the blend of body and belly, which is neither colour."""
    return np.asarray(Image.fromarray(mask.astype(np.uint8)).filter(ImageFilter.MaxFilter(5))).astype(bool)


def _hull(mask: np.ndarray) -> np.ndarray:
    """The mask with what lies between its pixels, left to right or top to bottom: eyes and belly join the body."""
    rows, columns = (
        np.maximum.accumulate(mask, axis) & np.flip(np.maximum.accumulate(np.flip(mask, axis), axis), axis)
        for axis in (1, 0)
    )
    return rows | columns


def _body(pink: np.ndarray, body: np.ndarray) -> float:
    """The body's colour: as drawn 0.1 to 0.2 of the picture, and 0.6 of the body (the rest is eye and belly)."""
    area, share = pink.mean(), pink.sum() / max(body.sum(), 1)
    return _ramp(area, 0.04, 0.08) * _ramp(area, 0.5, 0.4) * _ramp(share, 0.3, 0.42)


def _belly_colour(patch: np.ndarray, belly: np.ndarray) -> float:
    """Of all that is not body-coloured in the body's lower half, the share that has the belly's colour."""
    return _ramp(belly.sum() / max(patch.sum(), 1), 0.3, 0.6)


def _belly_size(body: np.ndarray, belly: np.ndarray) -> float:
    """The belly's share of the body; 0.22 as drawn."""
    share = belly.sum() / max(body.sum(), 1)
    return _ramp(share, 0.06, 0.13) * _ramp(share, 0.45, 0.35)


def _belly_place(body: np.ndarray, belly: np.ndarray) -> float:
    """The belly's centre in the body's box; as drawn half across and 0.72 of the way down."""
    if not belly.any():
        return 0.0
    left, top, right, bottom = _box(body)
    rows, columns = np.nonzero(belly)
    across = abs((columns.mean() + 0.5 - left) / (right - left) - 0.5)
    down = abs((rows.mean() + 0.5 - top) / (bottom - top) - 0.72)
    return _ramp(across, 0.25, 0.12) * _ramp(down, 0.2, 0.1)


def _one_eye(picture: np.ndarray, white: np.ndarray, body: np.ndarray) -> float:
    """One round white blob with a dark pupil in the body's upper half.

    Two or three eyes side by side spread 2.5 to 3.7 times as far across as down, one eye as far.
    """
    if white.sum() < 5:
        return 0.0
    left, top, right, bottom = _box(white)
    pupil = np.zeros_like(white)
    pupil[top:bottom, left:right] = to_lab(picture[top:bottom, left:right])[..., 0] < _DARK
    rows, columns = np.nonzero(white | pupil)
    spread = (columns.std() + 0.1) / (rows.std() + 0.1)
    share = white.sum() / body.sum()  # 0.1 as drawn
    size = _ramp(share, 0.025, 0.05) * _ramp(share, 0.3, 0.2)
    return size * _ramp(pupil.sum() / white.sum(), 0.05, 0.14) * _ramp(max(spread, 1 / spread), 1.8, 1.35)


def _upper_half(body: np.ndarray) -> np.ndarray:
    """True in the rows above the middle of the body's box, (h, w)."""
    rows = np.flatnonzero(body.any(1))
    middle = rows.mean() if len(rows) else 0.0
    return np.broadcast_to((np.arange(body.shape[0]) <= middle)[:, None], body.shape)


def _ramp(value: float, none: float, full: float) -> float:
    """0 at `none`, 1 at `full`, straight between and held beyond; `none` may be the larger one."""
    return float(np.clip((value - none) / (full - none), 0.0, 1.0))
