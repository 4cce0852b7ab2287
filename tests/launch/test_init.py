"""`loraloom init` writes a config that loads."""

from pathlib import Path

import pytest
from PIL import Image

from loraloom.configs.data_sections import FolderSource, PriorSource
from loraloom.configs.errors import UserError
from loraloom.configs.loader import load_config
from loraloom.launch.init import default_trigger, main


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = Path("my photos: #1")
    (folder / "more").mkdir(parents=True)
    for name in ("a.PNG", "more/b.png", "._a.png"):
        Image.new("RGB", (8, 8)).save(folder / name, format="png")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_a_folder_becomes_a_config(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(photos)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "my-photos-1.yaml: 2 images of my photos: #1 as 'a sks subject'",
        "",
        "next:",
        "  loraloom plan my-photos-1.yaml",
        "  loraloom train my-photos-1.yaml",
    ]
    assert Path("my-photos-1.yaml").read_text().startswith("# loraloom train my-photos-1.yaml\n")
    config = load_config("my-photos-1.yaml")
    assert config.data.sources == [FolderSource(path=str(photos), caption="a sks subject")]
    assert (config.data.resolution, config.optimizer.learning_rate, config.output.name) == (64, 2e-3, "my-photos-1")


def test_a_class_adds_a_prior_of_half_the_samples(photos: Path) -> None:
    arguments = ["--base", "org/model", "--class", "a dog", "--name", "my-dog", "--out", "dog one.yaml"]
    assert main(["--data", str(photos), *arguments]) == 0
    assert Path("dog one.yaml").read_text().startswith("# loraloom train 'dog one.yaml'\n")
    config = load_config("dog one.yaml")
    assert config.data.sources == [
        FolderSource(path=str(photos), caption="a sks dog", share=0.5),
        PriorSource(prior="a dog", count=200, share=0.5),
    ]
    assert (config.model.base, config.data.resolution, config.optimizer.learning_rate) == ("org/model", 512, 1e-4)
    assert (config.output.dir, config.output.name) == ("runs/my-dog", "my-dog")


@pytest.mark.parametrize("words", ['"quoted": {x}', "no", "# a", "ein süßer Hund 🐶", "1e5"])
def test_any_words_survive(photos: Path, words: str) -> None:
    assert main(["--data", str(photos), "--trigger", words, "--class", words, "--out", "x.yaml"]) == 0
    first, second = load_config("x.yaml").data.sources
    assert isinstance(first, FolderSource)
    assert isinstance(second, PriorSource)
    assert (first.caption, second.prior) == (words, words)


def test_a_file_is_not_lost(photos: Path) -> None:
    Path("x.yaml").write_text("precious")
    with pytest.raises(UserError, match=r"x\.yaml: is there already; --force"):
        main(["--data", str(photos), "--out", "x.yaml"])
    assert Path("x.yaml").read_text() == "precious"
    assert main(["--data", str(photos), "--out", "x.yaml", "--force"]) == 0
    assert load_config("x.yaml").model.base == "pocket"


def test_what_cannot_be_used_is_said(photos: Path) -> None:
    Path("empty").mkdir()
    for arguments, answer in [
        (["--data", "none"], "none: no such folder"),
        (["--data", "empty"], "empty: no images in it"),
        (["--data", str(photos / "notes.txt")], "not a folder"),
        (["--data", str(photos), "--name", "a b"], "such as a-b"),
        (["--data", str(photos), "--out", "none/x.yaml"], "cannot be written"),
    ]:
        with pytest.raises(UserError, match=answer):
            main(arguments)


@pytest.mark.parametrize(
    ("class_prompt", "trigger"),
    [("a dog", "a sks dog"), ("An old man", "a sks old man"), ("dog", "a sks dog"), (None, "a sks subject")],
)
def test_trigger_of_a_class(class_prompt: str | None, trigger: str) -> None:
    assert default_trigger(class_prompt) == trigger
