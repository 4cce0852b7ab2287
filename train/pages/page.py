"""The frame of our one-file HTML pages: head, policy, style, pictures that enlarge. What a page says is elsewhere.

A page is whole in itself (pictures as data URIs, CSS and JavaScript inline) and its security policy forbids it to ask
for anything. Every text on it is escaped by `chart.tag`: prompts, captions and paths come from strangers.
"""

import base64
import io
from pathlib import Path

from PIL import Image

from ...configs.ownership import write_file
from .chart import Markup, join, tag

LARGEST_PNG = 120_000
"""Bytes; a larger picture is shown as a JPEG of at most PICTURE_SIZE pixels, so that the page stays small."""
PICTURE_SIZE = 768
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(title: str, *content: object, style: str = "", script: str = "") -> Markup:
    """The whole HTML page; `style` and `script` are added to those of every page."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(STYLE + style)),
    )
    body = tag("body", tag("main", *content), tag("script", Markup(script + SCRIPT)))
    return join(Markup("<!doctype html>\n"), tag("html", head, body, lang="en"), Markup("\n"))


def write_page(file: Path, content: Markup, owner: Path | None = None, by: str = "") -> None:
    """The page appears at once or not at all, so it may be written again and again while someone looks at it."""
    write_file(file, content.encode("utf-8", "replace"), owner, by)  # a lone surrogate in a prompt becomes "?"


def picture_uri(content: bytes, kind: str) -> str:
    """An encoded picture as a data URI; `kind` is "png" or "jpeg"."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def data_uri(file: Path) -> str:
    """The picture as a data URI: a small PNG as it is, a large one smaller and as a JPEG."""
    content, kind = file.read_bytes(), "png"
    if len(content) > LARGEST_PNG:
        with Image.open(io.BytesIO(content)) as image:
            reduced = image.convert("RGB")
        reduced.thumbnail((PICTURE_SIZE, PICTURE_SIZE))
        buffer = io.BytesIO()
        reduced.save(buffer, "JPEG", quality=88)
        content, kind = buffer.getvalue(), "jpeg"
    return picture_uri(content, kind)


def enlarging(number: int, picture: Markup, words: str, caption: object) -> Markup:
    """A picture that a click enlarges, with `words` about it then; `number`, from 1, is its own on the page.

    A radio button and its label: checked means enlarged, so CSS alone does it and the arrow keys leaf through. The page
    needs one `backdrop`.
    """
    name = f"image-{number}"
    return tag(
        "figure",
        tag("input", type="radio", name="enlarged", id=name, autocomplete="off", aria_label=words),
        tag("label", picture, for_=name, title=words),
        tag("figcaption", caption, tag("span", words, class_="long", dir="auto")),
        class_="picture",
    )


def backdrop() -> Markup:
    """What is behind an enlarged picture; a click on it closes that."""
    return join(
        tag("input", type="radio", name="enlarged", id="image-0", checked=True, autocomplete="off", aria_label="none"),
        tag("label", for_="image-0", class_="backdrop", title="close"),
    )


STYLE = """
:root { --page: #f5f6f8; --card: #fff; --text: #17191e; --soft: #626a76; --line: #e4e7ec; --tip: #fff;
  --good: #0d8050; --bad: #c62828; --warn: #a85b00; --busy: #2563eb; color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --page: #0f1115; --card: #181b21; --text: #e9ebef; --soft: #98a1ae; --line: #2b3038; --tip: #262b34;
    --good: #4fd1a1; --bad: #ff8a80; --warn: #f2b155; --busy: #6ea8fe; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 2.2rem 1.2rem 4rem; }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.25; letter-spacing: -.02em; overflow-wrap: anywhere; }
.what { font-weight: 400; color: var(--soft); }
h2 { margin: 2.4rem 0 .1rem; font-size: 1.2rem; letter-spacing: -.01em; }
h3 { margin: 0; font-size: .95rem; font-weight: 600; }
p { margin: 0; }
[hidden] { display: none !important; }
code, pre { font: .86em/1.55 ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.soft, .note { color: var(--soft); font-size: .87rem; }
.note { margin-top: .5rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .8rem; padding: 1.1rem 1.2rem;
  margin-top: .9rem; min-width: 0; }
.scroll { overflow-x: auto; } /* with shadows at the sides where more of it is */
@supports (background-attachment: local) { .scroll { background:
  linear-gradient(to right, var(--card) 30%, transparent) 0 0 / 2rem 100% no-repeat local,
  linear-gradient(to left, var(--card) 30%, transparent) 100% 0 / 2rem 100% no-repeat local,
  linear-gradient(to right, #0003, transparent) 0 0 / .7rem 100% no-repeat scroll,
  linear-gradient(to left, #0003, transparent) 100% 0 / .7rem 100% no-repeat scroll; background-color: var(--card); } }
.message { margin-top: .9rem; padding: .7rem 1rem; border-left: 3px solid var(--tone); border-radius: .3rem;
  background: color-mix(in srgb, var(--tone) 8%, transparent); white-space: pre-wrap; overflow-wrap: anywhere; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); gap: .9rem 1.6rem;
  margin: 0; }
dt { color: var(--soft); font-size: .8rem; }
dd { margin: 0; overflow-wrap: anywhere; }
.picture { margin: 0; }
.picture label { display: block; cursor: zoom-in; }
.picture img { display: block; width: 100%; border-radius: .4rem; outline: 1px solid #8883; outline-offset: -1px; }
.picture figcaption { color: var(--soft); font-size: .72rem; }
.picture input, [id=image-0] { position: absolute; opacity: 0; pointer-events: none; }
[id=image-0] { position: fixed; top: 0; } /* so that choosing it does not scroll the page */
.picture input:focus-visible + label { outline: 3px solid var(--busy); outline-offset: 2px; border-radius: .4rem; }
.long, .backdrop { display: none; }
main:has(.picture input:checked) .backdrop { display: block; position: fixed; z-index: 2; inset: 0; cursor: zoom-out;
  background: #0c0e12f6; }
.picture input:checked + label { position: fixed; z-index: 3; inset: 1.5rem 1.5rem 5.5rem; outline: 0;
  pointer-events: none; }
.picture input:checked + label img { width: 100%; height: 100%; object-fit: contain; border-radius: 0; outline: 0; }
.picture input:checked ~ figcaption .long { display: block; position: fixed; z-index: 3; inset: auto 1.5rem 1.5rem;
  max-height: 4em; overflow: auto; text-align: center; color: #e9ebef; font-size: .9rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem 1.4rem .45rem 0; text-align: left; border-bottom: 1px solid var(--line); }
tr:last-child > * { border-bottom-color: transparent; }
thead th { color: var(--soft); font-size: .8rem; font-weight: 400; }
tbody tr:last-child > * { border: 0; padding-bottom: 0; }
thead th { padding-top: 0; }
details summary { cursor: pointer; font-weight: 600; }
details[open] summary { margin-bottom: .8rem; }
pre { margin: 0; overflow-x: auto; }
@media (max-width: 700px) {
  main { padding: 1.4rem .8rem 3rem; }
  .card { padding: .9rem; }
  .facts { grid-template-columns: 1fr 1fr; }
  th, td { padding-right: .7rem; font-size: .87rem; }
  .scroll tbody th { min-width: 8.5rem; }
}
@media (max-width: 430px) { .facts { grid-template-columns: 1fr; } }
"""

SCRIPT = """
addEventListener("keydown", (event) => {
  if (event.key === "Escape") document.getElementById("image-0")?.click();
});
"""
"""Escape closes the enlarged picture; everything else about pictures is CSS."""
