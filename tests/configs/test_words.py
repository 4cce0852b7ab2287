"""Counts and their nouns agree."""

import pytest

from loraloom.configs.words import agreeing, counted


@pytest.mark.parametrize(
    ("count", "noun", "words"),
    [
        (1, "image", "1 image"),
        (0, "image", "0 images"),
        (1200, "step", "1,200 steps"),
        (2, "batch", "2 batches"),
        (2, "entry", "2 entries"),
        (2, "array", "2 arrays"),
        (2, ".heic file", "2 .heic files"),
    ],
)
def test_a_count_and_its_noun(count: int, noun: str, words: str) -> None:
    assert counted(count, noun) == words


@pytest.mark.parametrize(
    ("what", "one"),
    [
        ("ignored .heic files", "1 ignored .heic file"),
        ("caption files without an image", "1 caption file without an image"),
        ("images with several captions", "1 image with several captions"),
        ("masks without an image", "1 mask without an image"),
    ],
)
def test_one_of_many(what: str, one: str) -> None:
    assert (agreeing(1, what), agreeing(1000, what)) == (one, f"1,000 {what}")
