"""What is allowed and seldom meant is said before anything is loaded; a word that is said nowhere is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from loraloom.configs.errors import UserError
from loraloom.configs.schema import RunConfig
from loraloom.data.dataset import Images
from loraloom.data.source import open_source
from loraloom.train.doubts import doubts_of_config, doubts_of_words
from loraloom.train.preflight import preflight


def config(**sections) -> RunConfig:
    plain = {
        "model": {"base": "pocket"},
        "data": {"resolution": 32, "sources": [{"path": "photos", "caption": "a"}]},
        "loop": {"steps": 100},
        "output": {"dir": "runs/x", "name": "x"},
        "trackers": [],
    }
    return RunConfig.model_validate({**plain, **sections})


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"optimizer": {"name": "prodigy", "learning_rate": 1e-3}}, "optimizer.learning_rate 0.001: prodigy finds"),
        ({"optimizer": {"name": "dadaptation.DAdaptAdam", "learning_rate": 1e-4}}, "finds the step size itself"),
        (
            {"optimizer": {"name": "prodigy", "learning_rate": 1, "parts": {"unet": {"learning_rate": 0.01}}}},
            "optimizer.parts.unet.learning_rate 0.01",
        ),
        ({"optimizer": {"name": "prodigy", "learning_rate": 1}}, None),
        ({"optimizer": {"learning_rate": 1}}, "optimizer.learning_rate 1: weights move by about that"),
        ({"optimizer": {"name": "torch.optim.SGD", "learning_rate": 1}}, None),
        ({"optimizer": {"learning_rate": 1e-4}}, None),
        ({"optimizer": {"learning_rate": 1e-4, "warmup_steps": 49}}, None),
        ({"optimizer": {"learning_rate": 1e-4, "warmup_steps": 50}}, "is reached late in loop.steps 100"),
        ({"optimizer": {"learning_rate": 1e-4, "warmup_steps": 1000}}, "is never reached in loop.steps 100"),
        (
            {"validation": {"prompts": ["a star", {"prompt": "(red:1.4) <lora:x:1>"}]}},
            "<lora:x:1>, (red:1.4) is taken",
        ),
    ],
)
def test_settings_that_are_seldom_meant(sections, words):
    found = [*doubts_of_config(config(**sections))]
    assert len(found) == (words is not None)
    assert all(words in doubt for doubt in found)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Photos in folders, in the folder that one is in."""
    monkeypatch.chdir(tmp_path)

    def photos(folder: str, captions: list[str], seed: int = 0) -> None:
        (tmp_path / folder).mkdir(exist_ok=True)
        for number, caption in enumerate(captions):
            pixels = np.random.default_rng((seed, number)).integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{number}.png")
            (tmp_path / folder / f"{number}.txt").write_text(caption)

    return photos


TOKEN = st.sampled_from(["<dog>", "sks", "<Dog>"])


@given(st.data())
@settings(deadline=None, max_examples=40)
def test_a_word_that_stands_in_no_caption_is_refused_and_in_some_is_told(photos_of, data):
    token = data.draw(TOKEN)
    says = data.draw(st.lists(st.booleans(), min_size=1, max_size=4))
    by = data.draw(st.sampled_from(["captions", "trigger", "template", "prefix", "wildcards"]))
    case = data.draw(st.sampled_from([str.lower, str.upper, str]))
    dropout = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    said = f"{{{case(token)}|a long alternative}}" if by == "wildcards" else case(token)
    missed = "a <cat> xsksx" if token == "sks" else "a <cat>"  # a word is no part of another
    captions = [f"a {said} x" if own and by in ("captions", "wildcards") else missed for own in says]
    rules = {
        "trigger": {"trigger": token},
        "template": {"template": f"a {token} [caption]"},
        "prefix": {"prefix": f"{token} "},
        "wildcards": {"wildcards": True},
    }.get(by, {})
    section = config(
        data={
            "resolution": 32,
            "sources": [{"path": photos_of(captions)}],
            "captions": rules | {"dropout": dropout},
            "cache": {"dir": "cache"},
        },
        adapter={"method": "textual_inversion", "tokens": [{"token": token, "init": "a"}]},
    )
    source = open_source(section.data.sources[0])
    number = len(source)
    images = [Images(section.data.sources[0], source, np.arange(number), np.full((number, 2), 40), None)]
    problems, notes = doubts_of_words(section, images)
    count = 0 if dropout == 1 else len(says) if by in ("trigger", "template", "prefix") else sum(says)
    assert len(problems) == (count == 0)
    assert len(notes) == (0 < count < len(says))
    if problems:
        assert f"the word {token!r} stands in no caption" in problems[0]
        assert ("they say <cat>" in problems[0]) == (dropout < 1 and missed in captions)
    if notes:
        assert f"in {count} of {len(says)} captions" in notes[0]


@pytest.fixture(scope="module")
def photos_of(tmp_path_factory):
    """A folder for captions; the same pictures each time."""

    def photos_of(captions: list[str]) -> str:
        folder = tmp_path_factory.mktemp("photos")
        for number, caption in enumerate(captions):
            Image.new("RGB", (40, 40), (number, 0, 0)).save(folder / f"{number}.png")
            (folder / f"{number}.txt").write_text(caption)
        return str(folder)

    return photos_of


def test_the_preflight_says_all_of_it(photos, capsys):
    photos("photos", ["a <dog>", "a cat", "a <dog>"])
    photos("apart", ["a <dog>", "a"], seed=0)
    photos("others", ["a <dog>"], seed=1)
    section = config(
        data={"resolution": 32, "sources": [{"path": "photos"}], "cache": {"dir": "cache"}},
        adapter={"method": "textual_inversion", "tokens": [{"token": "<dog>", "init": "a"}]},
        validation={"sources": [{"path": "apart"}, {"path": "others"}]},
    )
    preflight(section, progress=False)
    lines = capsys.readouterr().err.splitlines()
    assert any("word '<dog>' stands in 2 of 3 captions (not in that of photos/1.png)" in each for each in lines)
    assert any("2 of 3 held-out images are trained on (apart/0.png, apart/1.png)" in line for line in lines)
    other = section.model_copy(
        update={"adapter": config(adapter={"method": "textual_inversion", "tokens": [{"token": "<kat>"}]}).adapter}
    )
    with pytest.raises(UserError, match="'<kat>' stands in no caption"):
        preflight(other, progress=False)
