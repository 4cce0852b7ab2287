"""Images that a program hands over: the same bytes in, the same samples out, and what is no image is one line."""

import io

import datasets
import numpy as np
import pytest
from PIL import Image

from loraloom.configs.data_sections import DataSection
from loraloom.configs.errors import UserError
from loraloom.train.gather import gather

PICTURES = {
    "RGB": Image.new("RGB", (96, 80), (200, 40, 10)),
    "RGBA": Image.new("RGBA", (96, 80), (200, 40, 10, 100)),
    "L": Image.new("L", (96, 80), 90),
    "P": Image.new("RGB", (96, 80), (10, 200, 30)).convert("P"),
    "I;16": Image.fromarray(np.full((80, 96), 30_000, np.uint16)),
}


def section(**more) -> DataSection:
    return DataSection.model_validate({"resolution": 64, "sources": [{"given": "mine"} | more]})


def told(images, **more) -> str:
    with pytest.raises(UserError) as caught:
        gather(section(**more), progress=False, given={"mine": images})
    return str(caught.value)


def test_pictures_in_memory_files_and_rows_of_a_dataset_are_one_and_the_same(tmp_path):
    image = PICTURES["RGB"]
    image.save(tmp_path / "a.png", compress_level=1)
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": (tmp_path / "a.png").read_bytes(), "path": None}], "text": ["red"]}
    )
    rows = rows.cast_column("image", datasets.Image())
    prints = set()
    for given in ([(image, "red")], [(tmp_path / "a.png", ["red"])], rows):
        (found,) = gather(section(), progress=False, given={"mine": given})
        assert found is not None and found.captions(0) == ["red"]
        prints.add(found.fingerprint())
    assert len(prints) == 1


@pytest.mark.parametrize("mode", PICTURES)
def test_a_picture_of_every_mode_keeps_its_pixels(mode):
    (found,) = gather(section(caption="x"), progress=False, given={"mine": [PICTURES[mode]]})
    assert found is not None and found.captions(0) == ["x"]
    back = Image.open(io.BytesIO(found.source.read(0)))
    assert np.array_equal(np.array(back), np.array(PICTURES[mode])) and back.size == (96, 80)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ([], "holds no images"),
        ("photos", "found str"),
        ({"a": 1}, "found dict"),
        ([5], "mine[0]: should be a PIL image or the path of one, found int"),
        ([(PICTURES["RGB"], 5)], "a caption is no text"),
        ([PICTURES["RGB"]], "mine[0]: has no caption"),
        ([(PICTURES["RGB"].convert("CMYK"), "x")], "mode CMYK"),
        ([("nowhere.png", "x")], "nowhere.png"),
    ],
)
def test_what_is_no_image_is_one_line(images, words):
    assert words in told(images)


def test_a_command_cannot_hand_them_over():
    with pytest.raises(UserError, match=r"build_trainer\(config, given="):
        gather(section(), progress=False)
    with pytest.raises(UserError, match='did you mean "mime"'):
        gather(section(), progress=False, given={"mime": [PICTURES["RGB"]]})
