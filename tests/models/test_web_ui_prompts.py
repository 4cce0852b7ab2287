"""Prompts of web UIs: brackets multiply as they say, compel reads the translation, other prompts stay as they are."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom.models.web_ui_prompts import advice_on, is_of_web_ui, marks_in, translated, weighed
from loraloom.models.weighted import _parsed, plain_text

SOME = ["a", "red", "star", "close-up", "Löwe", "猫", "x2"]
WORDS = st.lists(st.sampled_from(SOME), min_size=1, max_size=3).map(" ".join)
WEIGHTS = st.integers(1, 200).map(lambda number: number / 100)


def tree(depth: int) -> st.SearchStrategy:
    """(text, [(word, weight), …]) of prompts with brackets in brackets."""
    leaf = WORDS.map(lambda words: (words, [(word, 1.0) for word in words.split()]))
    if not depth:
        return leaf
    inner = st.lists(tree(depth - 1), min_size=1, max_size=3).map(_together)
    return leaf | st.one_of(
        inner.map(lambda found: (f"({found[0]})", _times(found[1], 1.1))),
        inner.map(lambda found: (f"[{found[0]}]", _times(found[1], 1 / 1.1))),
        st.tuples(inner, WEIGHTS).map(lambda pair: (f"({pair[0][0]}:{pair[1]:g})", _times(pair[0][1], pair[1]))),
    )


def _together(parts):
    return " ".join(text for text, _ in parts), [pair for _, pairs in parts for pair in pairs]


def _times(pairs, factor):
    return [(word, weight * factor) for word, weight in pairs]


@given(st.lists(tree(3), min_size=1, max_size=4).map(_together))
@settings(deadline=None, max_examples=100)
def test_every_word_has_the_product_of_its_brackets(prompt):
    text, expected = prompt
    found = [(word, piece.weight) for piece in weighed(text) for word in piece.text.split()]
    assert [word for word, _ in found] == [word for word, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])
    assert is_of_web_ui(text) or translated(text) == text


@given(st.lists(tree(2), min_size=1, max_size=2).map(_together))
@settings(deadline=None, max_examples=20)
def test_compel_reads_them_with_these_weights(prompt):
    text, expected = prompt
    if not is_of_web_ui(text):
        return
    (part,) = _parsed(text).prompts
    read = [(word, piece.weight) for piece in part.children for word in piece.text.split()]
    assert [word for word, _ in read] == [word for word, _ in expected]
    assert [weight for _, weight in read] == pytest.approx([weight for _, weight in expected], abs=1e-4)


@pytest.mark.parametrize(
    "prompt",
    [
        "a red star",
        "a (red)1.4 star",
        "a red++ (star)-",
        '("a star", "a cat").blend(1, 1)',
        "a photo (close up), 12:30",
        "(red)1.2 (blue:1.3)",  # in two ways: compel's stay
        "",
    ],
)
def test_what_is_not_of_a_web_ui_stays(prompt):
    assert translated(prompt) == prompt


def test_break_makes_windows_and_brackets_can_be_words():
    assert [part.children[0].text for part in _parsed('a "star" BREAK (b:1.2)').prompts] == ['a "star"', "b"]
    assert plain_text(r"a \(close\) [b]") == "a (close) b"
    assert weighed("(a [b")[-1].weight == pytest.approx(1.1 / 1.1)  # what is never closed goes to the end


ADVICE = {
    "a (red:1.4) star": "(red:1.4) in a prompt is taken as words; with --weighted",
    "((red)) star": "((red))",
    "a [red] star": "[red]",
    "a BREAK b": "--token-windows 2",
    "a AND b": ".blend(1, 1)",
    "<lora:sks:0.8> a": "--adapter FILE:0.8, or --adapter-folder FOLDER with sks.safetensors",
    "<lora:sks> a": "--adapter FILE:1,",
    "<hypernet:x:1> a": "no such networks",
    "a [b:c:0.5] d": "while it samples",
}


@pytest.mark.parametrize("prompt", ADVICE)
def test_each_mark_is_answered_in_one_line(prompt):
    (line,) = advice_on(prompt)
    assert ADVICE[prompt] in line
    assert len(marks_in(prompt)) == 1
    understood = "BREAK" in prompt or ((":" in prompt or "[" in prompt or "((" in prompt) and "<" not in prompt)
    assert len([*advice_on(prompt, weighted=True)]) == (0 if understood and "0.5" not in prompt else 1)


@pytest.mark.parametrize("prompt", ["a red star", "a photo (close up), 12:30", "HANDS AND feet".lower(), "a <sks> dog"])
def test_words_are_words(prompt):
    assert [*advice_on(prompt)] == marks_in(prompt) == []


def test_what_compel_would_pass_over_is_told():
    assert "write (red:1.1)" in next(advice_on("a (red) star", weighted=True))
    assert "in one of the two" in next(advice_on("a red++ (star:1.3)", weighted=True))
    assert [*advice_on('("a star", "a cat").blend(1, 1)', weighted=True)] == []
