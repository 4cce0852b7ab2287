"""Class images as a source like any other."""

from loraloom.configs.data_sections import PriorSource
from loraloom.data.sources.prior import PriorImages


def test_class_images_have_the_prompt_as_their_caption(tmp_path, encode):
    files = [tmp_path / "00000.png", tmp_path / "00001.png"]
    for file, colour in zip(files, ("red", "blue"), strict=True):
        file.write_bytes(encode(colour))
    source = PriorImages(PriorSource(prior="a creature", count=2), files)
    assert [source.read(index) for index in range(len(source))] == [encode("red"), encode("blue")]
    assert (source.captions(1), source.path(1), source.location(1)) == (["a creature"], files[1], str(files[1]))
    assert (source.name, source.counts, source.problems) == ("prior", {"class images": 2}, [])
    assert (source.read_mask(0), source.declared_sizes) == (None, None)


def test_fewer_class_images_than_asked_for_are_a_problem(tmp_path):
    source = PriorImages(PriorSource(prior="a creature", count=3), [tmp_path / "00000.png"])
    assert source.problems == ["prior 'a creature': 1 class images, `count` wants 3; make the others or ask for fewer"]
