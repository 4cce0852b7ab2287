"""Heat maps: the attention of the layers, word by word, and pictures that are the same to the bit."""

import numpy as np
import pytest
import torch
from PIL import Image

from loraloom.configs.errors import UserError
from loraloom.inference import attention_recorder
from loraloom.inference.attention_recorder import AttentionRecorder, split_words
from loraloom.inference.callback import Callback
from loraloom.inference.engine import Engine, Request
from loraloom.models.family import PromptOptions
from loraloom.models.pocket.measure import object_mask

PROMPT = "a red star on a blue starling"
REQUEST = Request([PROMPT, "a heart"], [0, 1], steps=2, negative_prompt="a moon")


@pytest.fixture(scope="module")
def sd1(base_of, make_adapter) -> Engine:
    """With an adapter on its queries and keys."""
    engine = Engine.load(str(base_of("sd1")))
    engine.adapters.load_adapter(make_adapter(base_of("sd1")), "a")
    return engine


@pytest.fixture(scope="module")
def recorded(sd1) -> AttentionRecorder:
    with AttentionRecorder(sd1) as recorder:
        sd1.generate(REQUEST)
    return recorder


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_pictures_are_the_same_to_the_bit_and_the_processors_come_back(sd1, base_of, family):
    engine = sd1 if family == "sd1" else Engine.load(str(base_of(family)))
    unet, request = engine.parts["unet"], Request([PROMPT], [0], steps=1)
    before = unet.attn_processors
    plain = engine.generate(request)
    with AttentionRecorder(engine) as recorder:
        (image,) = engine.generate(request)
    assert image.tobytes() == plain[0].tobytes()
    after = unet.attn_processors
    assert after.keys() == before.keys() and all(after[name] is each for name, each in before.items())
    assert engine.around == []
    shares = recorder.attention(0).sum(dim=-1)
    torch.testing.assert_close(shares, torch.ones_like(shares), rtol=0, atol=1e-5)


class Fails(Callback):
    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        raise RuntimeError("in the middle")


def test_the_processors_come_back_after_an_exception(sd1):
    before = sd1.parts["unet"].attn_processors
    with pytest.raises(RuntimeError, match="in the middle"), AttentionRecorder(sd1) as recorder:
        sd1.generate(REQUEST, callbacks=[Fails()])
    assert all(each is before[name] for name, each in sd1.parts["unet"].attn_processors.items())
    assert sd1.around == []
    with pytest.raises(UserError, match="no picture 0 was recorded; there are 0"):
        recorder.heat_map(0, "star")


def test_a_map_is_the_mean_of_the_layers_softmax(sd1):
    """Of what goes into `to_q` and `to_k` of all layers, adapters and all, by a formula of its own."""
    given, layers = [], [m for name, m in sd1.parts["unet"].named_modules() if name.endswith("attn2")]
    handles = [
        layer.register_forward_pre_hook(
            lambda layer, args, kwargs: given.append((layer, args[0], kwargs["encoder_hidden_states"])),
            with_kwargs=True,
        )
        for layer in layers
    ]
    with AttentionRecorder(sd1) as recorder:
        sd1.generate(REQUEST)
    for handle in handles:
        handle.remove()
    assert len(given) == 2 * len(layers)
    maps = []
    with torch.no_grad():
        for layer, hidden, words in given:
            query, key = layer.to_q(hidden[5]), layer.to_k(words[5])  # picture 1: the negative half has 4 rows
            scores = torch.einsum("phd,thd->hpt", query.unflatten(-1, (2, -1)), key.unflatten(-1, (2, -1)))
            shares = (scores / (query.shape[-1] / 2) ** 0.5).softmax(-1).mean(0)
            side = int(len(shares) ** 0.5)
            square = shares.T.reshape(1, 77, side, side)
            maps.append(torch.nn.functional.interpolate(square, (4, 4), mode="bilinear")[0])
    expected = torch.stack(maps).mean(0).permute(1, 2, 0)
    torch.testing.assert_close(recorder.attention(1), expected, rtol=0, atol=1e-6)


def test_without_guidance_the_maps_are_those_of_the_words(sd1, recorded):
    with AttentionRecorder(sd1) as recorder:
        sd1.generate(Request(REQUEST.prompts, REQUEST.seeds, steps=1, guidance=1.0))
        sd1.generate(Request(REQUEST.prompts, REQUEST.seeds, steps=1, negative_prompt="a moon"))
    torch.testing.assert_close(recorder.attention(0), recorder.attention(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(recorder.attention(1), recorder.attention(3), rtol=0, atol=1e-6)


def expected_map(recorder: AttentionRecorder, image_index: int, places: list[int]) -> np.ndarray:
    found = recorder.attention(image_index)[..., places].mean(-1)
    found = torch.nn.functional.interpolate(found[None, None], (32, 32), mode="bilinear")[0, 0]
    return (found / found.max()).numpy()


def test_a_word_is_the_mean_of_its_tokens_wherever_it_stands(sd1, recorded):
    """begin 0, a 1, red 2, star 3, on 4, a 5, blue 6, and starling, which the tokenizer does not know as a whole."""
    tokens = sd1.parts["tokenizer"](PROMPT).input_ids
    assert tokens[3] != tokens[7] and len(tokens) > 9
    for word, places in {
        "star": [3],
        "a": [1, 5],
        "red star": [2, 3],
        "starling": [*range(7, len(tokens) - 1)],
    }.items():
        found = recorded.heat_map(0, word)
        assert found.shape == (32, 32) and found.dtype == np.float32 and found.min() > 0 and found.max() == 1
        np.testing.assert_allclose(found, expected_map(recorded, 0, places), atol=1e-6)
    np.testing.assert_allclose(recorded.heat_map(1, "heart"), expected_map(recorded, 1, [2]), atol=1e-6)


def test_every_word_has_its_tokens(sd1):
    words = split_words(sd1.parts["tokenizer"], PROMPT)
    assert [word for word, _ in words] == PROMPT.split()
    assert [token for _, own in words for token in own] == sd1.parts["tokenizer"](PROMPT).input_ids[1:-1]


def test_words_of_later_windows_and_words_that_were_cut(sd1):
    prompt = "a " * 80 + "star"
    request = {"prompts": [prompt], "seeds": [0], "steps": 1}
    with AttentionRecorder(sd1) as recorder:
        sd1.generate(Request(**request, prompt_options=PromptOptions(windows=2)))
        sd1.generate(Request(**request))
    assert recorder.attention(0).shape == (4, 4, 2 * 75 + 2)
    np.testing.assert_allclose(recorder.heat_map(0, "star"), expected_map(recorder, 0, [81]), atol=1e-6)
    np.testing.assert_allclose(recorder.heat_map(1, "a"), expected_map(recorder, 1, [*range(1, 76)]), atol=1e-6)
    with pytest.raises(UserError, match="behind the 75 tokens that were read"):
        recorder.heat_map(1, "star")


@pytest.mark.parametrize("word", ["sta", "ling", "stars", "", "star red"])
def test_an_unknown_word_is_answered_with_those_of_the_prompt(recorded, word):
    with pytest.raises(UserError, match="its words: a, red, star, on, blue, starling"):
        recorded.heat_map(0, word)


def test_pictures_are_counted_over_micro_batches(sd1):
    request = Request(["a star", "a heart", "a moon", "a ring", "a red ring"], range(5), steps=1)
    with AttentionRecorder(sd1) as recorder:
        sd1.generate(request)
    with AttentionRecorder(sd1) as alone:
        sd1.generate(Request(["a red ring"], [4], steps=1))
    np.testing.assert_allclose(recorder.heat_map(4, "red"), alone.heat_map(0, "red"), atol=1e-5)
    with pytest.raises(UserError, match="no picture 5 was recorded; there are 5"):
        recorder.heat_map(5, "red")


def test_large_layers_are_left_out(sd1, monkeypatch):
    monkeypatch.setattr(attention_recorder, "MAX_POSITIONS", 4)
    with AttentionRecorder(sd1) as recorder:
        sd1.generate(Request(["a star"], [0], steps=1))
    assert recorder.attention(0).shape == (2, 2, 77)


def test_an_overlay_is_grey_with_the_map_in_colour(recorded):
    heat = recorded.heat_map(0, "star")
    overlay = np.asarray(recorded.overlay(Image.new("RGB", (32, 32), "red"), "star"))
    assert overlay.shape == (32, 32, 3)
    grey = Image.new("RGB", (1, 1), "red").convert("L").getpixel((0, 0))
    hottest = overlay[np.unravel_index(heat.argmax(), heat.shape)]
    np.testing.assert_allclose(hottest, (np.array([255, 0, 0]) + grey) / 2, atol=1)


def test_a_colour_lies_on_its_shape():
    """On the embedded base, and more than on the shape's mirror image along the diagonal."""
    engine = Engine.load("pocket")
    with AttentionRecorder(engine) as recorder:
        images = engine.generate(Request.repeat(["a red star on a blue background"], 4, seed=0, steps=8))
    right, mirrored = [], []
    for index, image in enumerate(images):
        mask, heat = object_mask(np.asarray(image)), recorder.heat_map(index, "red")
        right.append(heat[mask].mean() / heat[~mask].mean())
        mirrored.append(heat[mask.T].mean() / heat[~mask.T].mean())
    assert np.mean(right) > 1.5
    assert np.mean(right) > np.mean(mirrored)
