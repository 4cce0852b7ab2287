"""Letters on pictures: each is drawn by a font that has it, or stands there as its escape; no box is ever seen."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from loraloom.images import lettering
from loraloom.images.lettering import Lettering


def drawn(font, text: str) -> bytes:
    page = Image.new("L", (80, 40))
    ImageDraw.Draw(page).text((8, 8), text, 255, font)
    return page.tobytes()


@pytest.fixture(scope="module", params=["fonts of the system", "no other font"])
def fonts(request):
    """With what this machine has, and as on one without any fonts."""
    patch = pytest.MonkeyPatch()
    if request.param == "no other font":
        patch.setattr(lettering, "font_files", lambda: ())
    lettering._font_of.cache_clear()
    yield
    patch.undo()
    lettering._font_of.cache_clear()


LETTERS = st.sampled_from("abc éöüßñŁЖяΩ犬猫한日…–\u0301🙂\U0010fffe")


@given(st.text(LETTERS, max_size=12))
@settings(deadline=None, max_examples=60)
def test_no_letter_is_a_box(fonts, text):
    words = Lettering(13)
    runs = [*words._runs(text)]
    for font, run in runs:
        box = drawn(font, "\U0010ffff")
        assert all(letter.isspace() or drawn(font, letter) != box for letter in run)
    shown = "".join(run for _, run in runs).encode("ascii", "backslashreplace").decode()
    assert shown == lettering.normalize("NFC", text).encode("ascii", "backslashreplace").decode()
    assert words.width(text) == pytest.approx(sum(font.getlength(run) for font, run in runs))


def test_plain_letters_are_as_pillow_draws_them(fonts):
    pages = [Image.new("RGB", (200, 40)) for _ in range(2)]
    Lettering(13).write(ImageDraw.Draw(pages[0]), (5, 6), "a red star, 0.8", "white")
    ImageDraw.Draw(pages[1]).text((5, 6), "a red star, 0.8", "white", lettering._own(13))
    assert pages[0].tobytes() == pages[1].tobytes()


def test_letters_of_two_fonts_stand_on_one_line(fonts):
    """The a of `aé` is where the a of `a` is."""
    pages = [Image.new("L", (200, 40)) for _ in range(2)]
    for page, text in zip(pages, ("a", "aé"), strict=True):
        Lettering(17).write(ImageDraw.Draw(page), (5, 6), text, "white")
    end = int(Lettering(17).width("a")) + 4
    assert pages[0].crop((0, 0, end, 40)).tobytes() == pages[1].crop((0, 0, end, 40)).tobytes()
