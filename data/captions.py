"""From the captions of an image to the words that are trained on: pure functions of (captions, rules, stream).

Each rule draws from its own fork of the stream, so that switching one on leaves the numbers of the others alone.
"""

import re
from collections.abc import Callable, Sequence

from ..configs.choices import did_you_mean
from ..configs.data_sections import CaptionRules
from ..configs.errors import UserError
from .draws import Stream

CAPTION = "[caption]"  # where a template takes the caption
PLACEHOLDERS = {"trigger": "trigger", "class": "class_token"}  # what stands in a text: the rule with its word
PLACEHOLDER = re.compile(rf"\[({'|'.join(PLACEHOLDERS)})\]")


def final_caption(captions: Sequence[str], rules: CaptionRules, stream: Stream) -> str:
    """One of the captions with all rules but `dropout` applied; UserError for a placeholder that no rule fills."""
    caption = captions[stream.fork("choice").below(len(captions))]
    if rules.wildcards:
        draws = stream.fork("wildcards")
        caption = _expanded(caption, lambda alternatives: alternatives[draws.below(len(alternatives))])
    text = _filled(_placed(caption, rules), rules)
    tags = _tags(text, rules)
    if rules.shuffle or rules.tag_dropout:
        text = _joint(rules).join(_varied(tags, rules, stream))
    if rules.trigger and not _has_trigger(text, rules):
        joint = _joint(rules) if len(tags) > 1 else " "  # before any were dropped: the last of a list is still a tag
        text = joint.join([rules.trigger, text] if text.strip() else [rules.trigger])
    return rules.prefix + text + rules.suffix


def longest_caption(caption: str, rules: CaptionRules) -> str:
    """A caption with all of its tags and the longest of its alternatives, which no draw makes longer by much."""
    if rules.wildcards:
        caption = _expanded(caption, lambda alternatives: max(alternatives, key=len))
    fixed = rules.model_copy(update={"shuffle": False, "tag_dropout": 0.0, "wildcards": False})
    return final_caption([caption], fixed, Stream(0, "longest"))


def is_dropped(rules: CaptionRules, stream: Stream) -> bool:
    """Whether the whole caption is left empty this time; draws nothing that `final_caption` draws."""
    return stream.fork("dropout").uniform() < rules.dropout


def is_random(captions: Sequence[str], rules: CaptionRules) -> bool:
    """Whether two draws of `final_caption` can differ; where it says no they never do."""
    if not _takes_captions(rules):
        captions = [""]
    if len(set(captions)) > 1 or (rules.wildcards and any(map(_has_wildcards, captions))):
        return True
    if rules.tag_dropout == 1 or not (rules.shuffle or rules.tag_dropout):  # all free tags go, or none moves
        return False
    free = _tags(_filled(_placed(captions[0], rules), rules), rules)[rules.keep_tokens :]
    return len(free) > 0 if rules.tag_dropout else len(set(free)) > 1


def check_rules(rules: CaptionRules) -> list[str]:
    """What is wrong with the rules themselves, one line each; to be put after the place where they stand."""
    template = rules.template or ""
    known = ["caption", *PLACEHOLDERS]
    others = [name for name in re.findall(r"\[(\w+)\]", template) if name not in known]
    problems = [_unfilled("`template`", name) for name in _missing(template, rules)]
    problems += [
        f"`template` has [{name}], which stands for nothing{meant}; there are [caption], [trigger] and [class]"
        for name in others
        if (meant := did_you_mean(name.lower(), known))  # what resembles none of them, such as "[V]", is text
    ]
    if (rules.shuffle or rules.tag_dropout) and rules.separator in (rules.trigger or ""):
        problems.append(
            f"`trigger` {rules.trigger!r} holds the separator {rules.separator!r}, at which `shuffle` and "
            "`tag_dropout` would tear it apart; take another of the two"
        )
    return problems


def check_caption(caption: str, rules: CaptionRules) -> list[str]:
    """What is wrong with one caption, one line each; to be put after the place where it stands."""
    if not _takes_captions(rules):
        return []
    return [_unfilled("the caption", name) for name in _missing(caption, rules)]


def _expanded(text: str, choose: Callable[[list[str]], str]) -> str:
    """The text with one of the alternatives of each `{a|b}`, inner groups first; all other braces and bars are text."""
    groups: list[list[str]] = [[""]]  # alternatives so far of the groups that are open; the outermost is the text
    for piece in re.split(r"([{|}])", text):
        inside = len(groups) > 1
        if piece == "{":
            groups.append([""])
        elif piece == "|" and inside:
            groups[-1].append("")
        elif piece == "}" and inside:
            alternatives = groups.pop()
            groups[-1][-1] += choose(alternatives) if len(alternatives) > 1 else f"{{{alternatives[0]}}}"
        else:
            groups[-1][-1] += piece
    while len(groups) > 1:
        unclosed = "{" + "|".join(groups.pop())
        groups[-1][-1] += unclosed
    return groups[0][0]


def _has_wildcards(text: str) -> bool:
    return _expanded(text, lambda alternatives: alternatives[0]) != text


def _takes_captions(rules: CaptionRules) -> bool:
    """Whether the caption plays a part: a template without `[caption]` replaces it."""
    return rules.template is None or CAPTION in rules.template


def _placed(caption: str, rules: CaptionRules) -> str:
    return caption if rules.template is None else rules.template.replace(CAPTION, caption)


def _filled(text: str, rules: CaptionRules) -> str:
    """The text with words for its placeholders, in one pass: a word may itself look like a placeholder."""
    if missing := _missing(text, rules):
        raise UserError([f"{text!r}: {_unfilled('the caption', name)}" for name in missing])
    return PLACEHOLDER.sub(lambda match: getattr(rules, PLACEHOLDERS[match[1]]), text)


def _missing(text: str, rules: CaptionRules) -> list[str]:
    """Names of the placeholders in a text whose rule is not set, each once."""
    names = dict.fromkeys(PLACEHOLDER.findall(text))
    return [name for name in names if getattr(rules, PLACEHOLDERS[name]) is None]


def _unfilled(where: str, name: str) -> str:
    rule = PLACEHOLDERS[name]
    return f"{where} has [{name}], but no `{rule}` is set; set `{rule}` in the caption rules, or write the word itself"


def _tags(text: str, rules: CaptionRules) -> list[str]:
    return [tag for piece in text.split(rules.separator) if (tag := piece.strip())]


def _joint(rules: CaptionRules) -> str:
    """What is put between two tags."""
    return rules.separator if rules.separator[-1].isspace() else rules.separator + " "


def _varied(tags: list[str], rules: CaptionRules, stream: Stream) -> list[str]:
    """The first `keep_tokens` tags, then those of the others that are not dropped, shuffled."""
    kept, free = tags[: rules.keep_tokens], tags[rules.keep_tokens :]
    chances = stream.fork("tag_dropout")
    free = [tag for tag in free if chances.uniform() >= rules.tag_dropout]
    return kept + (stream.fork("shuffle").shuffled(free) if rules.shuffle else free)


def _has_trigger(text: str, rules: CaptionRules) -> bool:
    """Whether the trigger stands in the text as a whole word; separators are boundaries even where they are letters."""
    word = re.compile(rf"(?<!\w){re.escape(rules.trigger or '')}(?!\w)")
    return any(word.search(part) for part in (text, *text.split(rules.separator)))
