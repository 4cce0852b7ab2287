"""Text of files and users made harmless, before it reaches a terminal, log, page, card, script or YAML."""

import re

STEERING = (
    "\x00-\x1f\x7f-\x9f"  # C0 and C1: newlines, ESC and CSI, which move the cursor, clear the screen, set the title
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # turn the direction of what follows (CVE-2021-42574)
    "\u2028\u2029"  # lines and paragraphs, for some readers
    "\ud800-\udfff"  # lone halves of a character, which no file can hold; of a name that is not UTF-8 each odd byte
)
"""Characters that do something instead of standing there, for a class of a regular expression."""
_STEERING = re.compile(f"[{STEERING}]")
_BUT_LINES = re.compile(f"(?![\n\t])[{STEERING}]")


def plain(text: object) -> str:
    """The text on one line: whatever steers or cannot be written stands there as its escape, such as `\\x1b`."""
    return _STEERING.sub(_escape, str(text))


def plain_lines(text: str) -> str:
    """The same of text whose lines are meant: newlines and tabs stay."""
    return _BUT_LINES.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")
