"""`loraloom init` writes a config that loads."""

import json
from pathlib import Path

import pytest
from PIL import Image

from loraloom.configs.command import run_command
from loraloom.configs.data_sections import FolderSource, PriorSource
from loraloom.configs.errors import UserError
from loraloom.configs.loader import load_config
from loraloom.launch import presets
from loraloom.launch.init import main
from loraloom.launch.photos import default_trigger


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
    said, toy, *rest = capsys.readouterr().out.splitlines()
    assert said == "my-photos-1.yaml: 2 images of my photos: #1 as 'a sks subject'"
    assert toy.startswith("pocket is a toy of 64 px that knows coloured shapes only")
    assert rest[:2] == ["", "next:"]
    assert [line.split()[:3] for line in rest[2:5]] == [
        ["loraloom", verb, "my-photos-1.yaml"] for verb in ("preview", "plan", "train")
    ]
    assert Path("my-photos-1.yaml").read_text().startswith("# loraloom train my-photos-1.yaml\n")
    config = load_config("my-photos-1.yaml")
    assert config.data.sources == [FolderSource(path=str(photos), caption="a sks subject")]
    assert (config.data.resolution, config.optimizer.schedule, config.output.name) == (64, "cosine", "my-photos-1")
    assert load_config("my-photos-1.yaml", ["adapter.rank=16"]).adapter.alpha == 16


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
    with pytest.raises(UserError, match=r"x\.yaml: is there already, and was not written by loraloom"):
        main(["--data", str(photos), "--out", "x.yaml", "--force"])
    assert Path("x.yaml").read_text() == "precious"
    assert main(["--data", str(photos), "--out", "y.yaml"]) == 0
    assert main(["--data", str(photos), "--out", "y.yaml", "--force"]) == 0
    assert load_config("y.yaml").model.base == "pocket"


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


def folders(*images: str) -> None:
    for name in images:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(name)


def test_folders_of_sd_scripts_keep_their_meaning(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders("img/10_sks cat/0.png", "img/10_sks cat/1.png", "img/3_my hat/0.png", "img/1_cat/0.png", "img/out.png")
    Path("img/10_sks cat/0.txt").write_text("a cat that sleeps")
    Path("img/0.HEIC").touch()
    assert main(["--data", "img", "--class", "a cat", "--out", "a.yaml"]) == 0
    config = load_config("a.yaml")
    assert [(each.path, each.caption, each.share) for each in config.data.sources] == [  # type: ignore[union-attr]
        ("img/10_sks cat", "sks cat", pytest.approx(0.4348, abs=1e-3)),  # 20 to 3 of a half
        ("img/1_cat", "cat", 0.5),  # the class: none has to be made
        ("img/3_my hat", "my hat", pytest.approx(0.0652, abs=1e-3)),
    ]
    assert sum(each.share for each in config.data.sources if each.share) == pytest.approx(1)
    assert config.validation.prompts == ["sks cat on a blue background"]
    said = capsys.readouterr().out
    for words in (
        "2 images as 'sks cat'; 1 of them has a caption of its own; 10 times each",
        "1 image as 'cat'; class",
    ):
        assert words in said
    assert "1 image outside of these folders" in said
    assert "1 .heic file left out: save them as JPEG" in said


def test_without_a_class_repeats_are_repeats(photos: Path) -> None:
    folders("set/img/5_sks dog/0.png", "set/img/2_sks hat/0.png")
    assert main(["--data", "set", "--out", "a.yaml"]) == 0
    found = [(each.path, each.repeats) for each in load_config("a.yaml").data.sources]  # type: ignore[union-attr]
    assert found == [("set/img/2_sks hat", 2), ("set/img/5_sks dog", 5)]


def test_photos_that_are_not_read_are_named(photos: Path) -> None:
    Path("phone").mkdir()
    for name in ("a.HEIC", "b.heic", "c.MOV"):
        Path("phone", name).touch()
    with pytest.raises(UserError, match=r"no images in it but 2 \.heic files left out: save them as JPEG"):
        main(["--data", "phone"])


BASES = {
    "stabilityai/stable-diffusion-xl-base-1.0": ("sdxl", 1024),
    "cagliostrolab/animagine-xl-4.0": ("sdxl", 1024),
    "stabilityai/stable-diffusion-2-1": ("sd2", 768),
    "stabilityai/stable-diffusion-2-1-base": ("sd2", 512),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": ("sd1", 512),
    "owner/unknown": ("sd1", 512),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("memory", [None, 6, 16, 80])
def test_a_real_base_gets_the_values_of_a_preset(
    photos: Path, monkeypatch: pytest.MonkeyPatch, base: str, memory: int | None
) -> None:
    """By the base's family and the card: no 512 px and fp32 for SDXL."""
    monkeypatch.setattr(presets, "card_memory", lambda: memory)
    family, pixels = BASES[base]
    assert main(["--data", str(photos), "--base", base, "--out", "x.yaml"]) == 0
    config = load_config("x.yaml")
    size = {None: 12, 6: 8, 16: 16, 80: 24}[memory]
    preset = load_config(f"{'sdxl' if family == 'sdxl' else 'sd1'}/lora-{size}gb")
    assert (config.model.base, config.data.resolution) == (base, pixels)
    for key in ("model.dtype", "data.cache", "adapter", "loop.precision", "loop.micro_batch", "loop.batch_size"):
        ours, theirs = config, preset
        for step in key.split("."):
            ours, theirs = getattr(ours, step), getattr(theirs, step)
        assert ours == theirs
    assert config.loop.gradient_checkpointing == preset.loop.gradient_checkpointing
    assert bool(config.validation.prompts) == bool(preset.validation.prompts)


def test_a_preset_by_name(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(photos), "--base", "a/b", "--preset", "sdxl/lora-8gb", "--out", "x.yaml"]) == 0
    assert load_config("x.yaml").data.resolution == 1024
    for arguments, answer in (
        (["--base", "a/b", "--preset", "sdxl/lora-9gb"], r"did you mean \"sdxl/lora-8gb\"\?.*there are: sd1/lora-8gb"),
        (["--preset", "sd1/lora-8gb"], "is for real bases; give --base"),
    ):
        with pytest.raises(UserError, match=answer):
            main(["--data", str(photos), "--out", "y.yaml", *arguments])


@pytest.mark.parametrize(("kind", "width", "sample"), [("sdxl", 2048, 128), ("sd2", 1024, 96), ("sd1", 768, 64)])
def test_files_of_a_base_tell_its_family(tmp_path: Path, kind: str, width: int, sample: int) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (tmp_path / "unet/config.json").write_text(f'{{"cross_attention_dim": {width}, "sample_size": {sample}}}')
    assert presets.family_of(str(tmp_path)) == presets.Family(kind, sample * 8, guessed=False)


@pytest.mark.parametrize(
    "name",
    ["black-forest-labs/FLUX.1-dev", "stabilityai/stable-diffusion-3.5-large", "Tongyi-MAI/Z-Image-Turbo", "x/sd3.5"],
)
def test_a_model_of_no_family_here_is_not_taken_for_another(photos, tmp_path, capsys, name):
    asked = ["--data", str(photos), "--base", name, "--name", "x", "--out", str(tmp_path / "x.yaml")]
    assert run_command(main, asked) == 2
    assert "which is not here yet" in capsys.readouterr().err
    assert run_command(main, [*asked, "--preset", "sd1/lora-8gb"]) == 0


def test_a_folder_of_another_pipeline_is_not_taken_for_ours(photos, tmp_path, capsys):
    for kind, code in (("FluxPipeline", 2), ("StableDiffusion3Pipeline", 2), ("StableDiffusionPipeline", 0)):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
        out = str(tmp_path / f"{kind}.yaml")
        assert run_command(main, ["--data", str(photos), "--base", str(folder), "--name", "x", "--out", out]) == code
    assert "is a FluxPipeline" in capsys.readouterr().err
