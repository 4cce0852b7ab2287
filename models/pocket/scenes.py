"""The little world that pocket knows: scenes of coloured shapes and creatures, drawn and captioned.

Everything here is a pure function of a numpy generator; nothing imports torch.
Captions name colours, shapes, bodies, heads, eyes, backgrounds and styles. They never name the
belly: bellies are variety that words do not reach, which is what DreamBooth is for.
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64  # pixels, both ways
_ZOOM = 4  # drawn larger, then reduced: smooth edges
_INK = (24, 22, 28)

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 36, 40),
    "orange": (246, 134, 30),
    "yellow": (250, 214, 50),
    "green": (44, 156, 62),
    "teal": (18, 176, 176),
    "blue": (40, 90, 230),
    "purple": (134, 56, 176),
    "pink": (255, 128, 184),
    "brown": (122, 78, 46),
    "gray": (142, 142, 146),
    "black": (26, 24, 28),
    "white": (246, 246, 244),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "moon", "cross", "diamond")
BODIES = ("round", "tall", "wide", "square")
HEADS = ("horns", "ears", "antennae")
EYES = ("one eye", "two eyes", "three eyes")
STYLES = ("flat", "outlined")
BODY_COLOURS = tuple(name for name in COLOURS if name not in ("black", "white"))
_HALF_SIZES = {"round": (17.0, 16.5), "tall": (13.5, 20.0), "wide": (21.5, 14.0), "square": (16.0, 15.5)}


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture in words. `shape` is one of SHAPES or "creature"; creature-only fields are ignored otherwise."""

    shape: str
    colour: str
    background: str
    style: str = "flat"
    body: str = "round"
    head: str = "horns"
    num_eyes: int = 2
    belly: str | None = None
    centre: tuple[float, float] = (32.0, 34.0)  # pixels
    scale: float = 1.0
    angle: float = 0.0  # degrees, shapes only


SUBJECT = Scene("creature", "pink", "blue", body="round", head="antennae", num_eyes=1, belly="teal")
"""The creature of the DreamBooth demo. `is_held_out` keeps its combination out of the base's training."""


def is_held_out(scene: Scene) -> bool:
    """True for every creature that has the subject's body colour together with its belly colour."""
    return scene.shape == "creature" and (scene.colour, scene.belly) == (SUBJECT.colour, SUBJECT.belly)


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene for training: half shapes, half creatures, never one that `is_held_out`."""
    scene = _any_scene(rng)
    while is_held_out(scene):
        scene = _any_scene(rng)
    return scene


def _any_scene(rng: np.random.Generator) -> Scene:
    creature = bool(rng.random() < 0.5)
    colour = _pick(rng, BODY_COLOURS if creature else tuple(COLOURS))
    scene = Scene(
        shape="creature" if creature else _pick(rng, SHAPES),
        colour=colour,
        background=_pick(rng, tuple(name for name in COLOURS if name != colour)),
        style="outlined" if rng.random() < 0.4 else "flat",
        body=_pick(rng, BODIES),
        head=_pick(rng, HEADS),
        num_eyes=int(rng.integers(1, 4)),
        belly=_pick(rng, tuple(name for name in COLOURS if name != colour)) if rng.random() < 0.5 else None,
    )
    return jittered(scene, rng)


def jittered(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same scene at another place, size and (for shapes) angle."""
    x, y = rng.uniform(-6, 6), rng.uniform(-4, 4)
    return replace(
        scene,
        centre=(32.0 + x, (35.0 if scene.shape == "creature" else 32.0) + y),
        scale=float(rng.uniform(0.85, 1.1)),
        angle=float(rng.uniform(-12, 12)),
    )


def _pick(rng: np.random.Generator, names: tuple[str, ...]) -> str:
    return names[int(rng.integers(len(names)))]


# ---------------------------------------------------------------------------- captions


def describe(scene: Scene, *, style: bool = False, background: bool = True) -> str:
    """The full verbal description, as far as the base's captions go (no belly)."""
    words = [scene.colour, scene.shape]
    if scene.shape == "creature":
        words = [scene.colour, scene.body, "creature", "with", scene.head, "and", EYES[scene.num_eyes - 1]]
    if background:
        words += ["on", _article(scene.background), scene.background, "background"]
    text = " ".join([_article(words[0]), *words])
    return f"{_article(scene.style)} {scene.style} drawing of {text}" if style else text


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A training caption: each attribute is named most of the time, 1 in 10 is empty.

    In 1 of 8 a meaningless identifier stands before the noun ("a zwx creature"), so that an
    unknown identifier alone does not change the picture.
    """
    if rng.random() < 0.1:
        return ""
    words: list[str] = []
    if rng.random() < 0.125:
        words.append("".join(_pick(rng, tuple("bdfghjlmnpqrtvwxz")) for _ in range(3)))
    if rng.random() < 0.85:
        words.append(scene.colour)
    if scene.shape == "creature":
        if rng.random() < 0.65:
            words.append(scene.body)
        words.append("creature")
        parts = [scene.head] * (rng.random() < 0.65) + [EYES[scene.num_eyes - 1]] * (rng.random() < 0.65)
        words += ["with", " and ".join(parts)] if parts else []
    else:
        words.append(scene.shape)
    if rng.random() < 0.85:
        words += ["on", _article(scene.background), scene.background, "background"]
    text = " ".join([_article(words[0]), *words])
    if rng.random() < (0.85 if scene.style == "outlined" else 0.5):
        text = f"{_article(scene.style)} {scene.style} drawing of {text}"
    return text


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


# ---------------------------------------------------------------------------- drawing


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of SIZE x SIZE pixels."""
    canvas = Image.new("RGB", (SIZE * _ZOOM, SIZE * _ZOOM), COLOURS[scene.background])
    pen = _Pen(ImageDraw.Draw(canvas), outlined=scene.style == "outlined")
    if scene.shape == "creature":
        _draw_creature(pen, scene)
    else:
        pen.polygon(shape_outline(scene), COLOURS[scene.colour])
    return canvas.resize((SIZE, SIZE), Image.Resampling.BOX)


def shape_outline(scene: Scene) -> np.ndarray:
    """The outline of a shape, (n, 2) in pixels, turned by `angle` about `centre`."""
    turn = np.deg2rad(scene.angle)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    return _UNIT_OUTLINES[scene.shape] * 19.0 * scene.scale @ rotation + np.asarray(scene.centre)


def _ring(radius: float, num: int, start: float = -90.0) -> np.ndarray:
    angles = np.deg2rad(start + np.arange(num) * 360.0 / num)
    return np.stack([np.cos(angles), np.sin(angles)], 1) * radius


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y - 2.5], 1) / 16


def _moon() -> np.ndarray:
    angles = np.deg2rad(np.linspace(55, 305, 50))  # a crescent, open towards the right
    outer = np.stack([np.cos(angles), np.sin(angles)], 1)
    t = np.linspace(0, 1, 30)[:, None]
    inner = outer[-1] * (1 - t) + outer[0] * t + np.array([-1.0, 0.0]) * (4 * t * (1 - t))
    return np.concatenate([outer, inner]) + (0.2, 0.0)


def _star() -> np.ndarray:
    points = np.empty((10, 2))
    points[0::2], points[1::2] = _ring(1.1, 5), _ring(0.46, 5, start=-54.0)
    return points


_ARM = 0.34
_UNIT_OUTLINES: dict[str, np.ndarray] = {
    "circle": _ring(0.95, 60),
    "square": np.array([[-0.85, -0.85], [0.85, -0.85], [0.85, 0.85], [-0.85, 0.85]]),
    "triangle": np.array([[0.0, -1.0], [1.02, 0.85], [-1.02, 0.85]]),
    "star": _star(),
    "heart": _heart(),
    "moon": _moon() * 1.05,
    "cross": np.array(
        [[-_ARM, -1], [_ARM, -1], [_ARM, -_ARM], [1, -_ARM], [1, _ARM], [_ARM, _ARM]]
        + [[_ARM, 1], [-_ARM, 1], [-_ARM, _ARM], [-1, _ARM], [-1, -_ARM], [-_ARM, -_ARM]]
    ),
    "diamond": np.array([[0.0, -1.15], [0.75, 0.0], [0.0, 1.15], [-0.75, 0.0]]),
}


@dataclass(frozen=True, slots=True)
class _Pen:
    """Fills outlines given in picture pixels, with an ink line around them in the outlined style."""

    canvas: ImageDraw.ImageDraw
    outlined: bool

    def polygon(self, points: np.ndarray, fill: tuple[int, int, int], line: float = 1.6) -> None:
        corners = [(float(x), float(y)) for x, y in points * _ZOOM]
        self.canvas.polygon(corners, fill=fill)
        if self.outlined:
            self.canvas.line([*corners, *corners[:2]], fill=_INK, width=round(line * _ZOOM), joint="curve")

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: tuple[int, int, int], line: float = 1.6) -> None:
        self.polygon(_ring(1.0, 48) * (rx, ry) + (x, y), fill, line)


def _darker(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = (round(value * 0.55) for value in colour)
    return red, green, blue


def _draw_creature(pen: _Pen, scene: Scene) -> None:
    (x, y), (w, h) = scene.centre, _HALF_SIZES[scene.body]
    w, h = w * scene.scale, h * scene.scale
    body, dark = COLOURS[scene.colour], _darker(COLOURS[scene.colour])
    for side in (-1, 1):
        pen.ellipse(x + side * 0.5 * w, y + h * 0.97, 0.26 * w, 2.6, dark, line=1.2)
    _draw_head(pen, scene.head, x, y, w, h, dark)
    if scene.body == "square":
        corner = _superellipse(5.0)
        pen.polygon(corner * (w, h) + (x, y), body)
    else:
        pen.ellipse(x, y, w, h, body)
    if scene.belly is not None:
        pen.ellipse(x, y + 0.45 * h, 0.54 * w, 0.42 * h, COLOURS[scene.belly], line=1.0)
    _draw_eyes(pen, scene.num_eyes, x, y - 0.38 * h, scene.scale)


def _superellipse(power: float) -> np.ndarray:
    ring = _ring(1.0, 64)
    return ring / (np.abs(ring) ** power).sum(1, keepdims=True) ** (1 / power)


def _draw_head(pen: _Pen, head: str, x: float, y: float, w: float, h: float, dark: tuple[int, int, int]) -> None:
    top = y - h
    for side in (-1, 1):
        if head == "horns":
            root = x + side * 0.58 * w
            horn = [[root - 4.6, top + 7.0], [root + 4.6, top + 7.0], [root + side * 3.4, top - 5.5]]
            pen.polygon(np.array(horn), dark, line=1.2)
        elif head == "ears":
            pen.ellipse(x + side * 0.72 * w, top + 2.8, 5.6, 5.6, dark, line=1.2)
        else:
            tip = np.array([x + side * 0.55 * w, top - 6.0])
            foot = np.array([x + side * 0.25 * w, top + 3.0])
            across = np.array([1.1, 0.0])
            pen.polygon(np.array([foot - across, foot + across, tip + across, tip - across]), dark, line=0.8)
            pen.ellipse(tip[0], tip[1], 2.8, 2.8, dark, line=0.8)


def _draw_eyes(pen: _Pen, num_eyes: int, x: float, y: float, scale: float) -> None:
    radius = (6.2, 4.7, 3.7)[num_eyes - 1] * scale
    gap = (0.0, 11.0, 8.2)[num_eyes - 1] * scale
    for k in range(num_eyes):
        cx = x + (k - (num_eyes - 1) / 2) * gap
        pen.ellipse(cx, y, radius, radius, COLOURS["white"], line=1.0)
        pen.ellipse(cx, y, 0.48 * radius, 0.48 * radius, _INK, line=0.0)
