"""The little world keeps its promises: same seed same scene, nothing held out, and words that the tokenizer knows."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from loraloom.models.pocket.scenes import SUBJECT, Scene, caption, describe, draw, is_held_out, random_scene
from loraloom.models.pocket.tokenizer import build_tokenizer, caption_words

NUM_SCENES = 20_000


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = np.random.default_rng(0)
    return [random_scene(rng) for _ in range(NUM_SCENES)]


@pytest.fixture(scope="module")
def captions(scenes: list[Scene]) -> list[str]:
    rng = np.random.default_rng(1)
    return [caption(scene, rng) for scene in scenes]


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return build_tokenizer()


def tokens_of(tokenizer: CLIPTokenizer, text: str) -> list[int]:
    """The ids between begin and end."""
    return tokenizer(text)["input_ids"][1:-1]


def test_the_same_seed_gives_the_same_scene_caption_and_pixels():
    def everything(seed: int) -> tuple[Scene, str, bytes]:
        rng = np.random.default_rng(seed)
        scene = random_scene(rng)
        return scene, caption(scene, rng), draw(scene).tobytes()

    assert [everything(seed) for seed in range(20)] == [everything(seed) for seed in range(20)]
    assert len({everything(seed)[2] for seed in range(20)}) == 20


def test_pictures_are_64_pixels_with_the_background_around():
    picture = np.asarray(draw(replace(SUBJECT, background="green")))
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    assert {tuple(pixel) for pixel in picture[[0, -1]].reshape(-1, 3)} == {(44, 156, 62)}


def test_the_subject_is_held_out_and_its_neighbours_are_not():
    assert is_held_out(SUBJECT)
    assert is_held_out(replace(SUBJECT, background="gray", body="tall", num_eyes=3))
    assert not is_held_out(replace(SUBJECT, belly="green"))
    assert not is_held_out(replace(SUBJECT, colour="red"))


def test_no_random_scene_is_held_out_though_each_half_of_the_combination_occurs(scenes: list[Scene]):
    creatures = [scene for scene in scenes if scene.shape == "creature"]
    assert not any(is_held_out(scene) for scene in scenes)
    assert sum(scene.colour == "pink" for scene in creatures) > 500
    assert sum(scene.belly == "teal" for scene in creatures) > 200
    assert 0.45 < len(creatures) / NUM_SCENES < 0.55


def test_captions_never_name_the_belly(scenes: list[Scene], captions: list[str]):
    assert "belly" not in " ".join(captions)
    bellied = [scene for scene in scenes[:2_000] if scene.shape == "creature" and scene.belly]
    assert bellied
    for scene in bellied:
        assert describe(scene) == describe(replace(scene, belly=None))


def test_every_caption_word_is_one_token(captions: list[str], tokenizer: CLIPTokenizer):
    words = {word for text in captions for word in text.split()}
    assert words >= set(caption_words()), "20,000 captions use the whole vocabulary"
    unlisted = words - set(caption_words())
    assert all(re.fullmatch("[bdfghjlmnpqrtvwxz]{3}", word) for word in unlisted), (
        "only random identifiers are unlisted"
    )
    assert {word: len(tokens_of(tokenizer, word)) for word in caption_words()} == dict.fromkeys(caption_words(), 1)


def test_captions_survive_the_tokenizer(captions: list[str], tokenizer: CLIPTokenizer):
    some = sorted(set(captions[:3_000]))
    ids = tokenizer(some)["input_ids"]
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == some
    assert max(map(len, ids)) <= tokenizer.model_max_length == 77


def test_the_vocabulary_is_small_and_the_same_each_time(tokenizer: CLIPTokenizer):
    assert len(tokenizer) <= 2_000
    assert build_tokenizer().get_vocab() == tokenizer.get_vocab()


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=60))
@example("naïve 漢字 🦄 a red star")
def test_no_text_has_an_unknown_token(tokenizer: CLIPTokenizer, text: str):
    assert tokenizer.unk_token_id not in tokens_of(tokenizer, text)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=12), min_size=1, max_size=8))
def test_any_words_survive_the_tokenizer(tokenizer: CLIPTokenizer, words: list[str]):
    text = " ".join(words)
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
