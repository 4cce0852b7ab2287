"""The page of a comparison: differences, results, the curves of all runs together, their images side by side."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import count

from ...configs.words import counted
from ..comparison import Comparison, Table, spelled
from ..run_folder import Picture, RunFiles, read_pictures
from . import chart
from .chart import Markup, Series, join, key, line_chart, tag
from .curves import Entries, curve, names_of
from .page import backdrop, data_uri, enlarging, page

Runs = Mapping[str, RunFiles]
Shown = tuple[str, int | None, int]
"""Prompt, seed, and which of those with the same prompt and seed: what images of several runs have in common."""
Column = dict[Shown, Picture]
"""The images of one run."""


def comparison_page(comparison: Comparison) -> Markup:
    """The whole HTML page."""
    runs = comparison.runs
    tables = (
        _section("Results", comparison.results, runs),
        _section("Differences", spelled(comparison.differences), runs),
    )
    parts = (header(comparison), *tables, curves(runs), pictures(runs))
    return page(f"{', '.join(runs)}: comparison", *parts, style=chart.STYLE + STYLE, script=chart.SCRIPT)


def header(comparison: Comparison) -> Markup:
    """The runs, and how much they differ."""
    found = len(comparison.differences)
    words = counted(found, "difference") if found else "No differences found"
    return tag(
        "header",
        tag("h1", ", ".join(comparison.runs), " ", tag("span", "comparison", class_="what")),
        tag("p", f"{words}; a run has one colour on the whole page.", class_="soft"),
    )


def _section(title: str, table: Table, runs: Runs) -> Markup | None:
    """A row for each key, a column for each run."""
    if not table:
        return None
    heads = [tag("th", key(colour, name), scope="col") for colour, name in enumerate(runs)]
    rows = [
        tag("tr", tag("th", _breakable(row), scope="row"), *(_cell(values, name) for name in runs))
        for row, values in table.items()
    ]
    content = tag("table", tag("thead", tag("tr", tag("td"), *heads)), tag("tbody", *rows))
    card = tag("div", content, class_="card scroll")
    return tag("section", tag("h2", title), card, class_="compared", style=f"--columns:{len(runs)}")


def _breakable(dotted: str) -> Markup:
    """A key, which a narrow column breaks behind its dots."""
    first, *others = dotted.split(".")
    return join(first, *(join(".", tag("wbr"), other) for other in others))


def _cell(values: Mapping[str, object], name: str) -> Markup:
    if name not in values:
        return tag("td", "–", class_="soft", title="not given")
    return tag("td", values[name], dir="auto")


def curves(runs: Runs) -> Markup | None:
    """One chart for each thing that has a curve, with all runs in it."""
    histories = {name: run.history for name, run in runs.items()}
    parts = dict.fromkeys(part for history in histories.values() for part in names_of(history, "learning_rate"))
    figures = [
        line_chart("Loss", _together(histories, "loss"), smooth=True),
        line_chart("Held-out loss", _together({name: run.held_out for name, run in runs.items()}, "held_out")),
        *(line_chart(f"Learning rate of {part}", _together(histories, f"learning_rate/{part}")) for part in parts),
        line_chart("Gradient norm", _together(histories, "grad_norm"), smooth=True),
    ]
    cards = [tag("div", figure, class_="card") for figure in figures if figure]
    return tag("section", tag("h2", "Curves"), tag("div", *cards, class_="charts")) if cards else None


def _together(histories: Mapping[str, Entries], what: str) -> list[Series]:
    return [curve(entries, what, name, colour) for colour, (name, entries) in enumerate(histories.items())]


def pictures(runs: Runs) -> Markup | None:
    """A card for each prompt with a row for each seed and a column for each run."""
    steps = shown_steps(runs)
    columns = {name: _by_prompt(read_pictures(runs[name].validations, [step])) for name, step in steps.items()}
    prompts: dict[str, list[Shown]] = {}
    for shown in dict.fromkeys(shown for column in columns.values() for shown in column):
        prompts.setdefault(shown[0], []).append(shown)
    if not prompts:
        return None
    heads, numbers = (
        [key(k, f"{name} · step {steps[name]:,}") for k, name in enumerate(runs) if name in steps],
        count(1),
    )
    grids = {prompt: (*heads, *_images(rows, columns, numbers)) for prompt, rows in prompts.items()}
    cards = [
        tag("div", tag("h3", prompt, dir="auto"), tag("div", *grid, class_="grid"), class_="card")
        for prompt, grid in grids.items()
    ]
    return tag(
        "section",
        tag("h2", "Validation images"),
        tag("p", _which(steps, runs), class_="soft"),
        tag("div", *cards, class_="prompts", style=f"--columns:{len(steps)}"),
        backdrop(),
    )


def shown_steps(runs: Runs) -> dict[str, int]:
    """Of each run that has images: the last validation that all of them have, else its own last one.

    Step 0 does not count: there the base has no adapter, or one that does nothing yet.
    """
    trained = {name: {step for step in run.validations if step} for name, run in runs.items()}
    trained = {name: steps for name, steps in trained.items() if steps}
    common = set.intersection(*trained.values()) if trained else set()
    return {name: max(common or steps) for name, steps in trained.items()}


def _which(steps: Mapping[str, int], runs: Runs) -> str:
    """Which validation is shown, and why."""
    without = [name for name in runs if name not in steps]
    all_of_them = "that all of them have" if len(steps) > 1 else f"of {next(iter(steps))}"
    words = (
        f"Of step {next(iter(steps.values())):,}, the last validation {all_of_them}"
        if len(set(steps.values())) == 1
        else "No validation step is common to all of them: of each run its last one"
    )
    lacking = f" No images of {', '.join(without)}." if without else ""
    return f"{words}; select an image to enlarge it.{lacking}"


def _by_prompt(found: Sequence[Picture]) -> Column:
    images: Column = {}
    for picture in found:
        shown = (picture.prompt, picture.seed)
        images[(*shown, next(k for k in count() if (*shown, k) not in images))] = picture
    return images


def _images(rows: Sequence[Shown], columns: Mapping[str, Column], numbers: Iterator[int]) -> Iterator[Markup]:
    for shown in rows:
        for name, column in columns.items():
            if shown in column:
                yield _image(name, column[shown], next(numbers))
            else:
                yield tag("span", "no image", class_="soft")


def _image(name: str, picture: Picture, number: int) -> Markup:
    seed = None if picture.seed is None else f"seed {picture.seed}"
    where = " · ".join(word for word in (name, f"step {picture.step:,}", seed, picture.prompt) if word)
    return enlarging(number, tag("img", src=data_uri(picture.file), alt=where), where, seed)


STYLE = """
.compared table { --first: 13rem; table-layout: fixed; min-width: calc(var(--first) + 6rem * var(--columns)); }
.compared :is(th, td) { overflow-wrap: anywhere; vertical-align: top; }
.compared tbody th { font-weight: 400; }
.compared thead td { width: var(--first); }
.prompts { display: grid; gap: 0 .9rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 9.5rem * var(--columns)), 1fr)); }
.grid { display: grid; grid-template-columns: repeat(var(--columns), minmax(5.5rem, 12rem)); gap: .5rem; }
.prompts .card { overflow-x: auto; }
@media (max-width: 700px) { .compared table { --first: 8.5rem; } }
"""
