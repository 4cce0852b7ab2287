"""One page about one run: `report.html`, made from the files of the run folder and from nothing else."""

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from ..contrast import collapsed
from ..facts import at
from ..footprint import RUN
from ..run_folder import Picture, RunFiles, read_pictures, read_run
from . import chart
from .chart import Markup, Series, join, tag
from .curves import curve, names_of
from .page import backdrop, data_uri, enlarging, page, write_page
from .told import adapter_of, batch_of, learning_rate_of, loss_of, progress_of, time_of
from .words import duration, in_words

MAX_VALIDATIONS = 12
"""Of more validations, this many are shown: the first, the last and some between."""
STATES = ("done", "running", "failed", "stopped")


def write_report(run_folder: Path) -> Path:
    """Make `report.html` from the files of a run folder and return its path.

    Files that do not exist leave their part of the page out. The same files give the same bytes.

    Raises:
        UserError: there is no such folder, or a file in it is damaged (a last line of `logs/history.jsonl` that was
            cut off is not damage).
    """
    report = run_folder / "report.html"
    write_page(report, page_of(read_run(run_folder)), run_folder, RUN)
    return report


def page_of(run: RunFiles) -> Markup:
    """The whole HTML page."""
    parts = (header(run), summary(run), curves(run), pictures(run), spent(run), verification(run), details(run))
    return page(f"{_name(run)}: {_state(run)}", *parts, style=STYLE + chart.STYLE, script=chart.SCRIPT)


def header(run: RunFiles) -> Markup:
    """Name, state, and what the run said last."""
    state, step, steps = _state(run), run.record.get("step"), run.record.get("steps")
    colour = state if state in STATES else "unknown"
    unfinished = state != "done" and step is not None and steps
    return tag(
        "header",
        tag("h1", _name(run), " ", tag("span", state, class_=f"state {colour}")),
        tag("p", f"Training run in {run.folder.resolve().name}", class_="soft"),
        tag("progress", value=step, max=steps, aria_label="steps done") if unfinished else None,
        tag("p", run.record["message"], class_=f"message {colour}") if run.record.get("message") else None,
    )


def summary(run: RunFiles) -> Markup | None:
    """The facts that a reader asks for first."""
    facts = {
        "Base": _base(run.config),
        "Adapter": adapter_of(run),
        "Trained parameters": _if_number(run.record.get("trainable_parameters")),
        "Steps": progress_of(run),
        "Batch": batch_of(run.config),
        "Learning rate": learning_rate_of(run.config),
        "Loss": loss_of(run),
        "Time": time_of(run),
        "Started": str(run.record.get("started") or "").replace("T", " ", 1),
        "Files": _files(run),
    }
    rows = [tag("div", tag("dt", name), tag("dd", fact)) for name, fact in facts.items() if fact]
    return tag("section", tag("dl", *rows, class_="facts"), class_="card") if rows else None


def spent(run: RunFiles) -> Markup | None:
    """Where the time went since the run was started last, as bars: parts of a step, then the callbacks."""
    seconds = run.record.get("seconds_of") or {}
    total = sum(seconds.values())
    shown = {what: each for what, each in seconds.items() if total and each / total >= 0.002}
    if not shown:
        return None
    rows = [
        tag(
            "div",
            tag("span", _spaced(what)),
            tag("span", tag("i", style=f"width: {each / max(shown.values()):.1%}"), class_="bar"),
            tag("span", f"{each / total:.1%}"),
            tag("span", duration(each), class_="soft"),
        )
        for what, each in shown.items()
    ]
    return tag("section", tag("h2", "Where the time went"), tag("div", *rows, class_="card spent"))


def curves(run: RunFiles) -> Markup | None:
    """Loss for each source, learning rate for each part, and the gradient norm, over the steps."""
    if not run.history:
        return None
    loss = chart.line_chart("Loss", _series(run.history, "loss"), smooth=True)
    rate = chart.line_chart("Learning rate", _series(run.history, "learning_rate"))
    norm = chart.line_chart("Gradient norm", _series(run.history, "grad_norm"), smooth=True)
    held_out = chart.line_chart("Held-out loss", _series(run.held_out, "held_out")) if run.held_out else None
    cards = [tag("div", figure, class_="card") for figure in (loss, held_out, rate, norm) if figure]
    return tag("section", *cards, class_="charts") if cards else None


def pictures(run: RunFiles) -> Markup | None:
    """A table of images for each prompt: one row for each validation, the newest first, one column for each seed."""
    found = read_pictures(run.validations, reversed(spread([*run.validations], MAX_VALIDATIONS)))
    if not found:
        return None
    by_prompt: dict[str, list[Picture]] = {}  # in the order of the newest validation
    for picture in found:
        by_prompt.setdefault(picture.prompt, []).append(picture)
    shown, numbers = len({picture.step for picture in found}), count(1)
    left_out = f" {shown} of {len(run.validations)} validations." if shown < len(run.validations) else ""
    return tag(
        "section",
        tag("h2", "Validation images"),
        tag("p", f"Newest first; select an image to enlarge it.{left_out}", class_="soft"),
        tag("p", flat[0].upper() + flat[1:], class_="message failed") if (flat := _collapsed(found)) else None,
        tag("div", *(_prompt_card(prompt, group, numbers) for prompt, group in by_prompt.items()), class_="prompts"),
        backdrop(),
    )


def _collapsed(found: list[Picture]) -> str | None:
    """What is said of the newest images where they are nearly one colour."""
    newest = max(picture.step for picture in found)
    base = [picture for picture in found if picture.step == 0]
    return collapsed([picture for picture in found if picture.step == newest], base) if newest else None


def spread(steps: list[int], limit: int) -> list[int]:
    """At most `limit` (2 or more) of the steps, evenly spread, with the first and the last."""
    if len(steps) <= limit:
        return steps
    return [steps[round(i * (len(steps) - 1) / (limit - 1))] for i in range(limit)]


def verification(run: RunFiles) -> Markup | None:
    """What reloading the written files gave."""
    checks = run.record.get("verify")
    if not checks:
        return None
    results = {form: found if isinstance(found, dict) else {"result": found} for form, found in checks.items()}
    columns = list(dict.fromkeys(column for found in results.values() for column in found))
    rows = [
        tag("tr", tag("th", form, scope="row"), *(tag("td", in_words(found.get(column))) for column in columns))
        for form, found in results.items()
    ]
    titles = [tag("th", column.replace("_", " "), scope="col") for column in ("format", *columns)]
    table = tag("table", tag("thead", tag("tr", *titles)), tag("tbody", *rows))
    words = "Each file was loaded again and compared with the adapter in memory."
    return tag("section", tag("h2", "Verification"), tag("p", words, class_="soft"), _card(table))


def details(run: RunFiles) -> Markup | None:
    """The resolved config and the versions, folded away."""
    versions = run.record.get("versions") or {}
    listed = tag("dl", *(tag("div", tag("dt", n), tag("dd", v)) for n, v in versions.items()), class_="facts")
    folds = [
        tag("details", tag("summary", title), content, class_="card")
        for title, content in (
            ("Config", tag("pre", tag("code", run.config_text)) if run.config_text.strip() else None),
            ("Versions", listed if versions else None),
        )
        if content
    ]
    return tag("section", tag("h2", "Details"), *folds) if folds else None


def _series(history: list[dict[str, Any]], group: str) -> list[Series]:
    """A curve for each `group/<name>` of the history, or one for `group` if it is not divided."""
    parts = names_of(history, group)
    return [curve(history, f"{group}/{part}", part) for part in parts] or [curve(history, group, _spoken(group))]


def _spoken(key: str) -> str:
    return key.replace("_", " ")


def _name(run: RunFiles) -> str:
    return str(at(run.config, "output.name") or run.folder.resolve().name)


def _state(run: RunFiles) -> str:
    return str(run.record.get("state") or "state unknown")


def _base(config: Mapping[str, Any]) -> str | None:
    base, *extra = (at(config, f"model.{key}") for key in ("base", "family", "revision"))
    return " · ".join(str(word) for word in (base, *extra) if word) or None


def _if_number(value: Any) -> str | None:
    return None if value is None else f"{value:,}"


def _spaced(name: str) -> str:
    """`HeldOutLoss` in words."""
    return re.sub(r"(?<!^)(?=[A-Z])", " ", name).lower()


def _files(run: RunFiles) -> Markup | None:
    lines = []
    for name in run.record.get("files") or []:
        file = run.folder / name
        size = f" {file.stat().st_size / 1e6:,.2f} MB" if file.is_file() else ""
        lines.append(tag("div", tag("code", name), tag("span", size, class_="soft")))
    return join(*lines) if lines else None


def _prompt_card(prompt: str, found: Iterable[Picture], numbers: Iterator[int]) -> Markup:
    rows: dict[int, list[Picture]] = {}
    for picture in found:
        rows.setdefault(picture.step, []).append(picture)
    columns = max(len(row) for row in rows.values())
    lines = [
        tag("div", tag("span", f"step {step:,}", class_="row"), *map(_image, row, numbers), class_="at")
        for step, row in rows.items()
    ]
    return tag("div", tag("h3", prompt, dir="auto", title=prompt), *lines, class_="card", style=f"--columns:{columns}")


def _image(picture: Picture, number: int) -> Markup:
    seed = None if picture.seed is None else f"seed {picture.seed}"
    where = " · ".join(word for word in (f"step {picture.step:,}", seed, picture.prompt) if word)
    return enlarging(number, tag("img", src=data_uri(picture.file), alt=where), where, seed)


def _card(content: Markup) -> Markup:
    return tag("div", content, class_="card scroll")


STYLE = """
.state { display: inline-block; vertical-align: .22em; padding: .1rem .65rem; border-radius: 2rem; font-size: .8rem;
  font-weight: 600; letter-spacing: 0; color: var(--tone);
  background: color-mix(in srgb, var(--tone) 14%, transparent); }
.done { --tone: var(--good); } .failed { --tone: var(--bad); } .stopped { --tone: var(--warn); }
.running { --tone: var(--busy); } .unknown { --tone: var(--soft); }
progress { width: 100%; height: .5rem; margin-top: .9rem; accent-color: var(--busy); }
.spent > div { display: grid; grid-template-columns: 9rem 1fr 4rem 7rem; gap: .8rem; align-items: center; }
.spent .bar { height: .55rem; border-radius: .3rem; background: color-mix(in srgb, var(--busy) 14%, transparent); }
.spent .bar i { display: block; height: 100%; min-width: 1px; border-radius: .3rem; background: var(--busy); }
.spent span:nth-child(n+3) { text-align: right; font-variant-numeric: tabular-nums; }
.prompts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 0 .9rem; }
.prompts h3 { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; overflow: hidden;
  overflow-wrap: anywhere; margin-bottom: auto; }
.prompts .card { display: flex; flex-direction: column; }
.at { display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 12rem)); gap: .1rem .5rem; }
.at .row { grid-column: 1 / -1; margin-top: .6rem; color: var(--soft); font-size: .8rem; }
@media (max-width: 700px) { /* a bar has a line of its own */
  .spent > div { grid-template-columns: 1fr auto auto; gap: .1rem .8rem; margin-top: .5rem; }
  .spent .bar { grid-area: 2 / 1 / 3 / -1; }
}
"""
