"""Line charts as HTML: the curves are SVG that stretches with the page, the labels are text that does not.

`tag` writes one element and escapes what goes into it; `line_chart` is made of nothing else. No file and no config
is read here.
"""

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from ...configs.plain import plain_lines
from .words import number

MAX_POINTS = 1000
"""A curve with more points is drawn by the lowest and the highest point of each stretch, which keeps its spikes."""
COLOURS = 6
"""Colours in STYLE; more curves start again with the first, dashed, and then dotted."""


class Markup(str):
    """Text that is HTML already. Any other text is escaped where `tag` puts it in."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Series:
    """One curve."""

    name: str
    steps: Sequence[int]  # (n,), rising
    values: Sequence[float]  # (n,); nan and inf are not drawn, but noted below the chart
    colour: int | None = None  # the same in all charts of a page; None: by its place among those that are drawn


@dataclass(frozen=True, slots=True)
class Axis:
    """Values from `low` to `high`, on a logarithmic scale if `log`."""

    low: float
    high: float
    log: bool = False

    def position(self, value: float) -> float:
        """0 at the low end, 1 at the high end; a value below a logarithmic axis lies on its low end."""
        if self.log:
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """A handful of round values, rising."""
        return log_ticks(self.low, self.high) if self.log else linear_ticks(self.low, self.high)


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """One HTML element; all in it is escaped unless it is Markup. `class_` and `data_x` name class and data-x.

    An attribute that is True has no value, one that is None or False is left out.
    """
    words = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(key)
        elif value is not None and value is not False:
            words.append(f'{key}="{html.escape(plain_lines(str(value)))}"')
    start = f"<{' '.join(words)}>"
    return Markup(start if name in ("img", "input", "meta", "wbr") else f"{start}{join(*children)}</{name}>")


def join(*children: object) -> Markup:
    """The children one after the other; None is nothing, text that is not Markup is escaped."""
    parts = (str(c) if isinstance(c, Markup) else html.escape(plain_lines(str(c))) for c in children if c is not None)
    return Markup("".join(parts))


def line_chart(title: str, series: Sequence[Series], smooth: bool = False) -> Markup:
    """A <figure> with all curves over the step; with `smooth` thin raw curves and thick smoothed ones.

    The vertical axis is logarithmic if the highest values of the curves lie a decade or more apart. Nothing to draw
    gives an empty Markup.
    """
    finite = _coloured([kept for kept in map(_finite, series) if kept.steps])
    if not finite:
        return Markup("")
    steps, values = _step_axis(finite), value_axis(finite)
    curves = [thin_out(curve, smoothed(curve.values) if smooth else curve.values) for curve in finite]
    drawing = tag(
        "svg",
        *(_line("grid", 0, 1000, y, y) for y in (1000 - 1000 * values.position(t) for t in values.ticks())),
        *(_curve("raw", raw, steps, values) for raw, _ in curves if smooth),
        *(_curve("main", main, steps, values) for _, main in curves),
        viewBox="0 0 1000 1000",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"{title} over steps {finite[0].steps[0]} to {finite[0].steps[-1]}",
    )
    return tag(
        "figure",
        tag("figcaption", tag("h3", title), *(_legend(main) for _, main in curves)),
        tag("div", *_labels(values, "bottom", values.ticks()), class_="y-axis"),
        tag("div", drawing, class_="plot", data_chart=_hover_data(curves, steps, smooth)),
        tag("div", *_labels(steps, "left", [t for t in steps.ticks() if t.is_integer()]), class_="x-axis"),
        *(tag("p", note, class_="note") for note in _notes(series, finite, values)),
        class_="chart",
    )


def smoothed(values: Sequence[float]) -> list[float]:
    """Weighted mean of the values around each, with a Gaussian of n / 50 values (at most 200): it does not lag."""
    sigma = min(len(values) / 50, 200)
    radius = int(3 * sigma)
    kernel = np.exp(-((np.arange(-radius, radius + 1) / max(sigma, 1e-9)) ** 2) / 2)
    total = np.convolve(np.asarray(values, np.float64), kernel, "same")
    return (total / np.convolve(np.ones(len(values)), kernel, "same")).tolist()


def thin_out(curve: Series, main: Sequence[float], limit: int = MAX_POINTS) -> tuple[Series, Series]:
    """The curve and its main line (n values as well) at the same, at most `limit`, steps."""
    count = len(curve.steps)
    keep = list(range(count))
    if count > limit:
        edges = np.linspace(0, count, limit // 2 + 1).astype(int).tolist()
        stretches = [range(start, end) for start, end in pairwise(edges)]
        value = curve.values.__getitem__
        keep = sorted({i for stretch in stretches for i in (min(stretch, key=value), max(stretch, key=value))})
    steps = [curve.steps[i] for i in keep]
    values, smooth = ([line[i] for i in keep] for line in (curve.values, main))
    return replace(curve, steps=steps, values=values), replace(curve, steps=steps, values=smooth)


def value_axis(series: Sequence[Series]) -> Axis:
    """The vertical axis for finite values: from 0 unless that would waste it, and a lone spike may leave at the top."""
    peaks = [peak for curve in series if (peak := max(curve.values)) > 0]
    if peaks and max(peaks) >= 10 * min(peaks):
        floor = min(peaks) / 100  # a schedule that ends near 0 must not take the axis with it
        low = min(v for curve in series for v in curve.values if v >= floor)
        return Axis(low / 1.5, max(peaks) * 1.5, log=True)
    values = np.concatenate([np.asarray(curve.values, np.float64) for curve in series])
    low, high, most = float(values.min()), float(values.max()), float(np.quantile(values, 0.99))
    if 0 < 4 * most < high:
        high = 2 * most
    low = low - 0.1 * (high - low) if 0.4 * high < low < high else min(0.0, low)
    return Axis(low, high + 0.06 * (high - low)) if low < high else Axis(low, low + 1)


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between low and high, about `count` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= 0.8 * rough)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between low and high (positive), with their multiples by 2 and 5 if these are few decades."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
    return [tick for decade in decades for factor in factors if low <= (tick := factor * 10.0**decade) <= high]


def _finite(curve: Series) -> Series:
    kept = [(step, value) for step, value in zip(curve.steps, curve.values, strict=True) if math.isfinite(value)]
    return replace(curve, steps=[step for step, _ in kept], values=[value for _, value in kept])


def _coloured(series: Sequence[Series]) -> list[Series]:
    return [replace(curve, colour=i) if curve.colour is None else curve for i, curve in enumerate(series)]


def _step_axis(series: Sequence[Series]) -> Axis:
    first, last = min(curve.steps[0] for curve in series), max(curve.steps[-1] for curve in series)
    return Axis(first, last) if first < last else Axis(first - 1, last + 1)


def _line(kind: str, x1: float, x2: float, y1: float, y2: float) -> Markup:
    return tag("path", class_=kind, d=f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}")


def _curve(kind: str, curve: Series, steps: Axis, values: Axis) -> Markup:
    points = [
        f"{1000 * steps.position(step):.1f} {1000 - 1000 * values.position(value):.1f}"
        for step, value in zip(curve.steps, curve.values, strict=True)
    ]
    return tag("path", class_=f"{kind} {_colour(curve.colour)}", d=f"M{'L'.join(points)}h0")  # h0: one point is a dot


def _labels(axis: Axis, edge: str, ticks: Sequence[float]) -> list[Markup]:
    return [tag("span", number(t, 6), style=f"{edge}:{100 * axis.position(t):.2f}%") for t in ticks]


def _legend(curve: Series) -> Markup:
    return key(curve.colour, curve.name, " ", tag("b", number(curve.values[-1])))


def key(colour: int | None, *words: object) -> Markup:
    """A dash of a curve's colour and what it stands for."""
    return tag("span", tag("i"), *words, class_=f"key {_colour(colour)}")


def _colour(number: int | None) -> str:
    """CSS classes."""
    turn, colour = divmod(number or 0, COLOURS)
    return f"colour-{colour}{f' turn-{min(turn, 2)}' if turn else ''}"


def _hover_data(curves: Sequence[tuple[Series, Series]], steps: Axis, smooth: bool) -> str:
    def rounded(values: Sequence[float]) -> list[float]:
        return [float(f"{value:.4g}") for value in values]

    rows = [
        {"name": raw.name, "key": _colour(raw.colour), "steps": raw.steps, "values": rounded(raw.values)}
        | ({"smooth": rounded(main.values)} if smooth else {})
        for raw, main in curves
    ]
    return json.dumps({"first": steps.low, "last": steps.high, "series": rows}, separators=(",", ":"))


def _notes(series: Sequence[Series], finite: Sequence[Series], values: Axis) -> list[str]:
    notes = []
    for curve in series:
        bad = [step for step, value in zip(curve.steps, curve.values, strict=True) if not math.isfinite(value)]
        if bad:
            notes.append(f"{curve.name}: {_count(len(bad), 'value')} not finite, first at step {bad[0]:,}.")
    above = [value for curve in finite for value in curve.values if value > values.high]
    if above:
        notes.append(f"{_count(len(above), 'value')} above the chart, up to {number(max(above))}.")
    return notes


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{' is' if count == 1 else 's are'}"


STYLE = """
.charts { display: grid; grid-template-columns: 1fr 1fr; gap: 0 .9rem; }
.charts > :first-child { grid-column: 1 / -1; }
@media (max-width: 700px) { .charts { grid-template-columns: minmax(0, 1fr); } }
.chart { display: grid; grid-template: auto 13rem 1.4rem auto / 3.1rem 1fr; margin: 0; }
.chart > figcaption, .chart > .note { grid-column: 1 / -1; }
.chart > figcaption { display: flex; flex-wrap: wrap; gap: .2rem 1rem; align-items: baseline; margin-bottom: .7rem; }
.chart h3 { margin: 0 auto 0 0; }
.key { color: var(--soft); font-size: .82rem; overflow-wrap: anywhere; }
.key i { display: inline-block; width: .85em; height: .22em; margin-right: .45em; border-radius: 1em;
  vertical-align: .25em; background: var(--colour); }
.turn-1 > i { background: linear-gradient(90deg, var(--colour) 38%, #0000 0 62%, var(--colour) 0); }
.turn-2 > i { background: repeating-linear-gradient(90deg, var(--colour) 0 .2em, #0000 0 .4em); }
.key b { color: var(--text); font-variant-numeric: tabular-nums; }
.plot { grid-column: 2; position: relative; cursor: crosshair; touch-action: pan-y; }
.plot svg { display: block; width: 100%; height: 100%; overflow: hidden; }
.plot path { fill: none; vector-effect: non-scaling-stroke; stroke-linecap: round; stroke-linejoin: round; }
.plot .grid { stroke: var(--line); stroke-width: 1; }
.plot .raw { stroke: var(--colour); stroke-width: 1; opacity: .35; }
.plot .main { stroke: var(--colour); stroke-width: 2.25; }
.plot .turn-1 { stroke-dasharray: 9 6; } .plot .turn-2 { stroke-dasharray: 1 6; }
.y-axis, .x-axis { position: relative; color: var(--soft); font-size: .75rem; font-variant-numeric: tabular-nums; }
.y-axis span { position: absolute; right: .6rem; transform: translateY(50%); line-height: 1; }
.x-axis { grid-column: 2; }
.x-axis span { position: absolute; top: .35rem; transform: translateX(-50%); line-height: 1; }
.x-axis::after { content: "step"; position: absolute; right: calc(100% + .6rem); top: .35rem; line-height: 1; }
.cursor { position: absolute; top: 0; bottom: 0; width: 1px; background: var(--soft); pointer-events: none; }
.tip { position: absolute; z-index: 1; top: .3rem; padding: .4rem .6rem; border-radius: .5rem; pointer-events: none;
  background: var(--tip); box-shadow: 0 2px 12px #0004; font-size: .78rem; line-height: 1.45; width: max-content;
  max-width: 75%; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.colour-0 { --colour: #2563eb; } .colour-1 { --colour: #d97706; } .colour-2 { --colour: #0d9467; }
.colour-3 { --colour: #9333ea; } .colour-4 { --colour: #db2777; } .colour-5 { --colour: #52616f; }
@media (prefers-color-scheme: dark) {
  .colour-0 { --colour: #6ea8fe; } .colour-1 { --colour: #f2b155; } .colour-2 { --colour: #4fd1a1; }
  .colour-3 { --colour: #c49bff; } .colour-4 { --colour: #f58ac0; } .colour-5 { --colour: #a7b4c2; }
}
"""
"""CSS of the charts, and of the `.charts` that they stand in, the first across all of it; the page around them defines
--text, --soft, --line and --tip."""

SCRIPT = """
for (const plot of document.querySelectorAll(".plot")) {
  const { first, last, series } = JSON.parse(plot.dataset.chart);
  const add = (parent, name, text = "") => {
    const element = parent.appendChild(document.createElement("div"));
    element.className = name;
    element.textContent = text;
    return element;
  };
  const cursor = add(plot, "cursor"), tip = add(plot, "tip");
  const show = (visible) => { cursor.hidden = tip.hidden = !visible; };
  const nearest = (steps, step) => {
    let low = 0, high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle; else high = middle;
    }
    return step - steps[low] < steps[high] - step ? low : high;
  };
  const move = (event) => {
    const box = plot.getBoundingClientRect();
    const wanted = first + (last - first) * (event.clientX - box.left) / box.width;
    const found = series.map((s) => nearest(s.steps, wanted));
    const steps = series.map((s, i) => s.steps[found[i]]);
    const step = steps.reduce((best, s) => Math.abs(s - wanted) < Math.abs(best - wanted) ? s : best);
    const share = (step - first) / (last - first);
    tip.replaceChildren();
    add(tip, "", `step ${step.toLocaleString("en")}`);
    series.forEach((s, i) => {
      const mean = s.smooth ? `, smoothed ${s.smooth[found[i]]}` : "";
      const other = steps[i] === step ? "" : ` (step ${steps[i].toLocaleString("en")})`;
      const row = add(tip, `key ${s.key}`);
      row.append(document.createElement("i"), `${s.name} `);
      row.appendChild(document.createElement("b")).textContent = `${s.values[found[i]]}`;
      row.append(mean + other);
    });
    cursor.style.left = `${100 * share}%`;
    tip.style.left = share < .5 ? `calc(${100 * share}% + .7rem)` : "auto";
    tip.style.right = share < .5 ? "auto" : `calc(${100 - 100 * share}% + .7rem)`;
    show(true);
  };
  plot.addEventListener("pointermove", move);
  plot.addEventListener("pointerdown", move);
  plot.addEventListener("pointerleave", () => show(false));
  show(false);
}
"""
"""JavaScript that shows step and values under the pointer; the charts are whole without it."""
