"""Caption rules: each does what it says, in its order, with numbers of its own."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom.configs.data_sections import CaptionRules
from loraloom.configs.errors import UserError
from loraloom.data.captions import check_caption, check_rules, final_caption, is_dropped, is_random
from loraloom.data.draws import Stream

LETTERS = "a, b, c, d, e, f, g, h"
tag = st.text("abcxyz", min_size=1, max_size=4)
tag_lists = st.lists(tag, min_size=1, max_size=8)


def final(captions: str | list[str], place: int = 0, **rules) -> str:
    captions = [captions] if isinstance(captions, str) else captions
    return final_caption(captions, CaptionRules(**rules), Stream(0, "caption", place))


def seen(captions: str | list[str], draws: int = 200, **rules) -> Counter[str]:
    return Counter(final(captions, place, **rules) for place in range(draws))


@given(st.text(), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_without_rules_a_caption_stays_as_written(caption, place):
    assert final(caption, place) == caption


@given(st.text("{}|ab, []", max_size=40), st.integers(0, 100))
@settings(max_examples=200, deadline=None)
def test_the_same_key_gives_the_same_caption(caption, place):
    rules = {"wildcards": True, "shuffle": True, "tag_dropout": 0.3, "trigger": "sks"}
    assert final([caption, "other"], place, **rules) == final([caption, "other"], place, **rules)


def test_each_of_several_captions_is_as_likely():
    counts = seen(["one", "two", "three"], 3000)
    assert sorted(counts) == ["one", "three", "two"]
    assert all(abs(count - 1000) < 130 for count in counts.values())


@pytest.mark.parametrize(
    ("caption", "possible"),
    [
        ("a {red|blue} {ball|cube}", {"a red ball", "a red cube", "a blue ball", "a blue cube"}),
        ("{a|{b|c}|}x", {"ax", "bx", "cx", "x"}),
        ("{{a|b}|{c|d}}", set("abcd")),
        ("{a|{b}}", {"a", "{b}"}),
        ("{a|a}", {"a"}),
        ("{|}", {""}),
        ("{}", {"{}"}),
        ("a {word}", {"a {word}"}),  # nothing to choose from: NovelAI's emphasis, an emoticon
        ("{{a|b}}", {"{a}", "{b}"}),
        ("a|b", {"a|b"}),
        ("a { b | c", {"a { b | c"}),
        ("a } b | c", {"a } b | c"}),
        ("{a|{b|c}", {"{a|b", "{a|c"}),
        ("{a|b}}|{", {"a}|{", "b}|{"}),
        ("}{", {"}{"}),
    ],
)
def test_wildcards(caption, possible):
    assert set(seen(caption, wildcards=True)) == possible
    assert set(seen(caption)) == {caption}


def test_alternatives_are_equally_likely_and_groups_are_independent():
    counts = seen("{a|b}{c|d}", 4000, wildcards=True)
    assert all(abs(count - 1000) < 140 for count in counts.values())


def test_a_thousand_nested_groups_are_no_problem():
    assert final("{" * 1000 + "x" + "|x}" * 1000, wildcards=True) == "x"
    assert final("{" * 1000, wildcards=True) == "{" * 1000


@pytest.mark.parametrize(
    ("caption", "rules", "expected"),
    [
        ("running", {"template": "photo of [caption], outside"}, "photo of running, outside"),
        ("running", {"template": "a painting"}, "a painting"),
        ("[caption]", {"template": "x [caption]"}, "x [caption]"),
        ("[caption]", {}, "[caption]"),
        ("a [trigger] [class]", {"trigger": "sks", "class_token": "dog"}, "a sks dog"),
        ("it", {"trigger": "sks", "class_token": "dog", "template": "a [trigger] [class]: [caption]"}, "a sks dog: it"),
        ("a [trigger]", {"trigger": "[class]", "class_token": "dog"}, "a [class]"),
        ("a [V] [Trigger]", {}, "a [V] [Trigger]"),
        ("{[trigger]|[trigger]}", {"trigger": "sks", "wildcards": True}, "sks"),
        ("x", {"template": "{a|b}[caption]", "wildcards": True}, "{a|b}x"),  # wildcards belong to captions
        ("a, b", {"prefix": "art: ", "suffix": " ."}, "art: a, b ."),
        ("a", {"prefix": "[trigger]", "suffix": "{x|y}", "trigger": "sks", "wildcards": True}, "[trigger]sks a{x|y}"),
    ],
)
def test_templates_and_placeholders(caption, rules, expected):
    assert final(caption, **rules) == expected


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a dog", "sks a dog"),
        ("a dog, running", "sks, a dog, running"),
        ("a sks dog", "a sks dog"),
        ("dog, sks", "dog, sks"),
        ("dog,sks,cat", "dog,sks,cat"),
        ("sks's dog", "sks's dog"),
        ("a Sks dog", "sks a Sks dog"),
        ("sksdog", "sks sksdog"),
        ("two desks", "sks two desks"),
        ("sks_dog, x", "sks, sks_dog, x"),
        ("dog,", "sks dog,"),
        ("", "sks"),
    ],
)
def test_the_trigger_is_put_first_where_it_is_missing(caption, expected):
    assert final(caption, trigger="sks") == expected
    assert final(expected, trigger="sks") == expected


def test_triggers_are_compared_as_they_are_written():
    assert final("a <s.s> dog", trigger="<s.s>") == "a <s.s> dog"
    assert final("a <sxs> dog", trigger="<s.s>") == "<s.s> a <sxs> dog"
    assert final("a sks dog", trigger="sks dog") == "a sks dog"
    assert final("dog_sks", trigger="sks", separator="_") == "dog_sks"
    assert final("dog_sksy", trigger="sks", separator="_") == "sks_ dog_sksy"
    assert final("a, sks dog, b", trigger="sks dog, b") == "a, sks dog, b"


def test_a_dropped_trigger_comes_back():
    assert final("a, sks, b", trigger="sks", tag_dropout=1) == "sks"
    captions = seen("a, sks, b", trigger="sks", tag_dropout=0.5, draws=300)
    assert all("sks" in caption.split(", ") for caption in captions)
    assert "sks, a" in captions  # as a tag, though the caption has one left


@pytest.mark.parametrize(
    ("separator", "joined"), [(",", "a, b c"), (";", "a; b c"), (", ", "a, b c"), (" ", "a b c"), ("\n", "a\nb c")]
)
def test_tags_are_joined_as_they_are_separated(separator, joined):
    assert final(f"a{separator}b c", separator=separator, shuffle=True, keep_tokens=9) == joined


def test_empty_tags_go_only_where_tags_are_rearranged():
    assert final(" a ,, b, ") == " a ,, b, "
    assert final(" a ,, b, ", trigger="b") == " a ,, b, "
    assert final(" a ,, b, ", shuffle=True, keep_tokens=2) == "a, b"
    assert final(" a ,, b, ", tag_dropout=1e-9) == "a, b"


@given(tag_lists, st.integers(0, 9), st.integers(0, 1000), st.booleans(), st.sampled_from([0.0, 0.4, 1.0]))
@settings(max_examples=200, deadline=None)
def test_kept_tags_stay_and_the_others_are_shuffled_or_dropped(tags, keep, place, shuffle, dropout):
    caption = ", ".join(tags)
    text = final(caption, place, keep_tokens=keep, shuffle=shuffle, tag_dropout=dropout)
    rest = text.split(", ") if text else []
    assert rest[:keep] == tags[:keep]
    left = Counter(rest[keep:])
    assert left <= Counter(tags[keep:])
    if dropout == 0:
        assert left == Counter(tags[keep:])
    if dropout == 1:
        assert not left
    if not shuffle:
        remaining = iter(tags)
        assert all(tag in remaining for tag in rest)  # in their order


def test_each_tag_is_dropped_by_its_own_chance():
    counts = Counter(tag for place in range(2000) for tag in final(LETTERS, place, tag_dropout=0.3).split(", "))
    assert all(abs(counts[letter] - 1400) < 110 for letter in LETTERS.split(", "))
    pairs = [final("a, b", place, tag_dropout=0.5) for place in range(2000)]
    assert all(abs(pairs.count(pair) - 500) < 100 for pair in ("", "a", "b", "a, b"))


def test_each_tag_comes_first_as_often():
    firsts = Counter(final(LETTERS, place, shuffle=True, keep_tokens=4).split(", ")[4] for place in range(2000))
    assert sorted(firsts) == list("efgh")
    assert all(abs(count - 500) < 100 for count in firsts.values())


@given(st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_a_rule_leaves_the_numbers_of_the_others_alone(place):
    dropped = final(LETTERS, place, tag_dropout=0.5)
    shuffled = final(LETTERS, place, shuffle=True)
    assert sorted(final(LETTERS, place, tag_dropout=0.5, shuffle=True)) == sorted(dropped)
    assert final(LETTERS, place, shuffle=True, wildcards=True, tag_dropout=1e-12) == shuffled
    wild = final("{x|y} {x|y}", place, wildcards=True)
    assert final(["{x|y} {x|y}"] * 3, place, wildcards=True, shuffle=True, tag_dropout=1e-12) == wild
    which = final(["1", "2", "3"], place)
    assert final(["1{a|b}, c", "2", "3"], place, wildcards=True, shuffle=True)[-1] == which or which == "1"


def test_what_a_stream_has_given_before_does_not_matter():
    rules = CaptionRules(wildcards=True, shuffle=True, tag_dropout=0.3, dropout=0.5)
    for place in range(30):
        fresh, used = Stream(0, "caption", place), Stream(0, "caption", place)
        used.uniform()
        captions = ["{a|b}, c, d, e", "f, {g|h}, i, j"]
        assert final_caption(captions, rules, used) == final_caption(captions, rules, fresh)
        assert is_dropped(rules, used) == is_dropped(rules, fresh)


def test_rules_draw_independently():
    counts = seen("{a|b}", 2000, wildcards=True, tag_dropout=0.5)
    assert all(abs(counts[caption] - 1000 * part) < 120 for caption, part in {"": 1, "a": 0.5, "b": 0.5}.items())
    counts = seen(["{a|b}", "{c|d}"], 2000, wildcards=True)
    assert all(abs(counts[caption] - 500) < 100 for caption in "abcd")


def test_caption_dropout_is_a_draw_of_its_own():
    rules = CaptionRules(dropout=0.25, tag_dropout=0.25)
    dropped = [is_dropped(rules, Stream(0, "caption", place)) for place in range(4000)]
    assert abs(sum(dropped) - 1000) < 140
    alone = [final("a", place, tag_dropout=0.25) == "" for place in range(4000)]
    assert abs(sum(a and b for a, b in zip(dropped, alone, strict=True)) - 250) < 80  # independent: a sixteenth
    assert not any(is_dropped(CaptionRules(), Stream(0, "caption", place)) for place in range(100))
    assert all(is_dropped(CaptionRules(dropout=1), Stream(0, "caption", place)) for place in range(100))


@pytest.mark.parametrize(
    ("captions", "rules", "random"),
    [
        (["a"], {}, False),
        (["a", "b"], {}, True),
        (["a", "a"], {}, False),
        (["a", "b"], {"template": "same"}, False),
        (["a", "b"], {"template": "a [caption]"}, True),
        (["{a|b}"], {}, False),
        (["{a|b}"], {"wildcards": True}, True),
        (["{a}, |"], {"wildcards": True}, False),
        (["{a|b}"], {"wildcards": True, "template": "same"}, False),
        (["a, b"], {"shuffle": True}, True),
        (["a, a"], {"shuffle": True}, False),
        (["a, , "], {"shuffle": True}, False),
        (["a, b"], {"shuffle": True, "keep_tokens": 1}, False),
        (["a, b, c"], {"shuffle": True, "keep_tokens": 1}, True),
        (["a"], {"template": "x, [caption]", "shuffle": True}, True),
        (["[trigger]"], {"trigger": "x, y", "shuffle": True}, True),
        (["a"], {"tag_dropout": 0.5}, True),
        (["a"], {"tag_dropout": 0.5, "keep_tokens": 1}, False),
        (["a, b"], {"tag_dropout": 1, "shuffle": True}, False),
        ([""], {"tag_dropout": 0.5, "shuffle": True}, False),
        (["a"], {"dropout": 0.5}, False),
    ],
)
def test_what_is_random(captions, rules, random):
    assert is_random(captions, CaptionRules(**rules)) is random
    assert (len(seen(captions, **rules)) > 1) is random


@given(
    st.lists(st.text("{|}ab, ", max_size=12), min_size=1, max_size=2),
    st.fixed_dictionaries(
        {
            "shuffle": st.booleans(),
            "wildcards": st.booleans(),
            "tag_dropout": st.sampled_from([0, 0.5, 1]),
            "keep_tokens": st.integers(0, 3),
            "template": st.sampled_from([None, "x", "x, y", "x, [caption]"]),
            "trigger": st.sampled_from([None, "a"]),
        }
    ),
)
@settings(max_examples=200, deadline=None)
def test_what_is_not_random_never_differs(captions, rules):
    if not is_random(captions, CaptionRules(**rules)):
        assert len(seen(captions, 12, **rules)) == 1


def test_a_placeholder_without_its_rule_is_refused():
    for caption in ("a [class]", "a [{class|class}]"):
        with pytest.raises(UserError, match=r"\[class\].*`class_token`"):
            final(caption, trigger="sks", wildcards=True)
    with pytest.raises(UserError) as caught:
        final("it", template="[trigger] [class] [trigger] [caption]")
    assert len(caught.value.problems) == 2


def test_the_check_of_a_caption_says_what_is_missing():
    assert check_caption("a [trigger] [class]", CaptionRules(trigger="sks", class_token="dog")) == []
    assert check_caption("a [V]", CaptionRules()) == []
    (problem,) = check_caption("a [trigger], [trigger] [class]", CaptionRules(class_token="dog"))
    assert "[trigger]" in problem
    assert "set `trigger`" in problem
    assert check_caption("a [trigger]", CaptionRules(template="no caption")) == []
    assert len(check_caption("a [trigger]", CaptionRules(template="its [caption]"))) == 1


def test_the_check_of_rules_is_about_the_template():
    assert check_rules(CaptionRules()) == []
    assert check_rules(CaptionRules(template="a [V] [trigger] [caption]", trigger="sks")) == []
    (problem,) = check_rules(CaptionRules(template="a [trigger] [caption]"))
    assert "`template` has [trigger]" in problem
    (problem,) = check_rules(CaptionRules(template="a [captions]"))
    assert 'did you mean "caption"' in problem
    (problem,) = check_rules(CaptionRules(template="a [CLASS]"))
    assert 'did you mean "class"' in problem
    assert check_rules(CaptionRules(trigger="sks, dog")) == []
    (problem,) = check_rules(CaptionRules(trigger="sks, dog", shuffle=True))
    assert "tear it apart" in problem


@given(st.text("[]{|}, triggerclass", max_size=30), st.sampled_from([None, "sks"]), st.sampled_from([None, "dog"]))
@settings(max_examples=200, deadline=None)
def test_what_the_checks_accept_can_be_trained_on(caption, trigger, class_token):
    for text in (caption, f"[trigger]{caption}", f"{caption}[class]"):
        rules = CaptionRules(trigger=trigger, class_token=class_token)
        if check_caption(text, rules):
            with pytest.raises(UserError):
                final_caption([text], rules, Stream(0, "caption"))
        else:
            final_caption([text], rules, Stream(0, "caption"))
