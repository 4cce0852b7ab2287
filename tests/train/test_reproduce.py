"""A run again from the header of its file: to the bit where all is there, and a line for whatever is not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loraloom.configs.command import run_command
from loraloom.configs.loader import load_config
from loraloom.launch import cli
from loraloom.train.__main__ import main as train

pytestmark = pytest.mark.slow

CAPTION, TRIGGER, CLASS = "kitten asleep", "qwx", "some kitten"
STEPS = {"steps": 3, "batch_size": 4, "seed": 5, "threads": torch.get_num_threads()}


@pytest.fixture(scope="module")
def folders(photos, tmp_path_factory) -> tuple[Path, Path]:
    """Two folders of different images."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    for number in range(4):
        shutil.copy(photos / f"{number}.png", one)
        Image.open(photos / f"{number}.png").rotate(180).save(two / f"{number}.png")
    return one, two


@pytest.fixture(scope="module")
def first(config_writer, folders, tmp_path_factory) -> Path:
    """The file of a run with two sources, class images, prompts and held-out images."""
    one, two = folders
    sources = [
        {"path": str(one), "caption": CAPTION, "name": "kitchen"},
        {"prior": CLASS, "count": 2, "steps": 1},
        {"path": str(two), "caption": CAPTION},
    ]
    config = config_writer(
        tmp_path_factory.mktemp("first"),
        "run",
        data={"sources": sources, "captions": {"trigger": TRIGGER, "dropout": 0.2}},
        loop=STEPS,
        validation={
            "prompts": ["qwx riding"],
            "num_images": 1,
            "steps": 1,
            "sources": [{"path": str(one), "caption": "unseen kitten"}],
        },
        output={"formats": ["diffusers", "kohya", "peft"]},
    )
    assert train([str(config)]) == 0
    return config.with_suffix("") / "tiny.safetensors"


@pytest.fixture(scope="module")
def words(folders, tiny_base) -> list[str]:
    """All that the first run needs."""
    one, two = map(str, folders)
    texts = [word for text in (CAPTION, TRIGGER, CLASS) for word in ("--caption", text)]
    return ["--data", one, "--data", two, "--base", str(tiny_base), *texts]


@pytest.fixture
def reproduce(tmp_path, capsys) -> Callable[..., tuple[int, str, str]]:
    """Exit code, stdout and stderr of the verb, as a person runs it; the config is `again.yaml`."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run_command(cli.run, ["reproduce", *arguments, "--out", str(tmp_path / "again.yaml")])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def without(words: list[str], option: str, value: str) -> list[str]:
    """Without one option."""
    places = [place for place, word in enumerate(words) if (word, *words[place + 1 : place + 2]) == (option, value)]
    return words[: places[0]] + words[places[0] + 2 :]


def same_weights(one: Path, two: Path) -> bool:
    then, now = load_file(one), load_file(two)
    return then.keys() == now.keys() and all(torch.equal(then[name], now[name]) for name in then)


def test_a_run_again_ends_with_the_same_weights(first, words, folders, reproduce, tmp_path):
    elsewhere = [tmp_path / "here", tmp_path / "there"]
    for folder, copy in zip(folders, elsewhere, strict=True):
        shutil.copytree(folder, copy)
    moved = [{str(f): str(c) for f, c in zip(folders, elsewhere, strict=True)}.get(word, word) for word in words]
    code, said, warned = reproduce(str(first), *moved)
    assert (code, warned) == (0, "")
    assert "same     data.sources.0: 4 images and their captions" in said
    assert "unknown  data.sources.1: class images, which the run makes" in said
    assert "same     model.base: the weights of text_encoder, unet, vae" in said
    assert "left out validation.prompts: 1 of 1" in said
    assert "left out validation.sources" in said
    config = tmp_path / "again.yaml"
    assert said.endswith(f"wrote {config}\n")
    assert train([str(config), f"output.dir={tmp_path / 'again'}"]) == 0
    assert same_weights(first, tmp_path / "again" / "tiny.safetensors")


@pytest.mark.parametrize("name", ["tiny.kohya.safetensors", "tiny.peft"])
def test_every_format_has_the_same_record(first, name, words, reproduce, tmp_path):
    assert reproduce(str(first), *words)[0] == 0
    wanted = (tmp_path / "again.yaml").read_text()
    (tmp_path / "again.yaml").unlink()
    assert reproduce(str(first.with_name(name)), *words)[0] == 0
    assert (tmp_path / "again.yaml").read_text() == wanted


def test_another_seed_would_not(first, words, reproduce, tmp_path):
    assert reproduce(str(first), *words)[0] == 0
    assert train([str(tmp_path / "again.yaml"), "loop.seed=6", f"output.dir={tmp_path / 'again'}"]) == 0
    assert not same_weights(first, tmp_path / "again" / "tiny.safetensors")


def test_what_is_given_beyond_the_needed_comes_back_too(first, words, folders, reproduce, tmp_path):
    more = ["--data", str(folders[0])]
    more += [word for text in ("kitchen", "qwx riding", "unseen kitten") for word in ("--caption", text)]
    code, said, _ = reproduce(str(first), *words, *more)
    assert code == 0 and "left out" not in said
    config, then = load_config(tmp_path / "again.yaml"), load_config(first.parent / "config.yaml")
    assert config.output.dir == "runs/tiny"
    assert config.data.sources == then.data.sources and config.validation == then.validation
    assert config.model == then.model and config.loop == then.loop and config.optimizer == then.optimizer


def test_one_answer_names_all_that_is_missing(first, folders, reproduce, tmp_path):
    code, _, said = reproduce(str(first), "--data", str(folders[0]), "--caption", "another kitten")
    assert code == 2
    for line in (
        "model.base was a base on that machine, whose path is not told: give it with --base",
        "2 sources have images and 1 held out, which may stay away, and 1 of --data was given: give 2, in their order",
        "data.sources.0.caption is known by its hash alone (sha256:",
        "data.sources.1.prior is known by its hash alone",
        "data.captions.trigger is known by its hash alone",
        "'another kitten' is no text of its config",
    ):
        assert f"error: {first}: {line}" in said
    assert "validation" not in said, "what may be left out is not asked for"
    assert not (tmp_path / "again.yaml").exists()


@pytest.mark.parametrize("text", [CAPTION, TRIGGER, CLASS])
def test_each_text_that_decides_is_asked_for(first, words, text, reproduce):
    code, _, said = reproduce(str(first), *without(words, "--caption", text))
    assert code == 2
    assert "give its text with --caption" in said


def test_other_images_are_refused_unless_forced(first, words, folders, reproduce, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(folders[1], changed)
    (changed / "0.png").unlink()
    given = [*without(words, "--data", str(folders[1])), "--data", str(changed)]
    code, said, warned = reproduce(str(first), *given)
    assert code == 2
    assert "differs  data.sources.2: 3 images here, 4 in the run" in said
    assert "same     data.sources.0" in said
    assert "error: data.sources.2: not as in the run, so" in warned and "--force" in warned
    assert not (tmp_path / "again.yaml").exists()
    assert reproduce(str(first), *given, "--force")[0] == 0
    assert load_config(tmp_path / "again.yaml").data.sources[2].model_dump()["path"] == str(changed)


def test_folders_in_another_order_are_other_data(first, words, folders, reproduce):
    one, two = map(str, folders)
    swapped = [{one: two, two: one}.get(word, word) for word in words]
    code, said, _ = reproduce(str(first), *swapped)
    assert code == 2
    assert said.count("differs") == 2 and "with other bytes or captions" in said


def test_captions_in_files_are_part_of_the_data(first, words, folders, reproduce, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(folders[0], changed)
    (changed / "0.txt").write_text("something else")
    code, said, _ = reproduce(str(first), *without(words, "--data", str(folders[0])), "--data", str(changed))
    assert code == 2 and "differs" in said


def test_another_base_is_refused_unless_forced(first, words, tiny_base, reproduce, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    file = next((other / "unet").glob("*.safetensors"))
    tensors = load_file(file)
    tensors["conv_in.bias"] += 1
    save_file(tensors, file, {"format": "pt"})
    given = [*without(words, "--base", str(tiny_base)), "--base", str(other)]
    code, said, warned = reproduce(str(first), *given)
    assert code == 2
    assert "differs  model.base: other weights of unet\n" in said
    assert "error: model.base: not as in the run" in warned
    assert reproduce(str(first), *given, "--force")[0] == 0


def test_a_base_that_is_not_there_is_refused(first, words, tiny_base, reproduce):
    code, _, said = reproduce(str(first), *without(words, "--base", str(tiny_base)), "--base", "/nowhere")
    assert code == 2 and "error: base '/nowhere': there is no such folder" in said


def test_a_base_of_the_hub_that_is_not_here_is_not_compared(first, words, tiny_base, reproduce, monkeypatch):
    given = [*without(words, "--base", str(tiny_base)), "--base", "owner/name"]
    code, said, _ = reproduce(str(first), *given)
    assert code == 0
    assert "unknown  model.base: owner/name is not on this machine yet" in said


def test_other_versions_are_a_warning_each(first, words, reproduce, monkeypatch):
    from loraloom.train import reproduce as verb

    monkeypatch.setattr(verb, "installed", lambda: {**verb_versions(first), "torch": "1.0"})
    code, _, warned = reproduce(str(first), *words)
    then = verb_versions(first)["torch"]
    assert (code, warned) == (0, f"warning: torch was {then} in the run and is 1.0 here: bits may differ\n")


def verb_versions(file: Path) -> dict[str, str]:
    with safe_open(file, framework="np") as opened:
        return json.loads(opened.metadata()["loraloom.versions"])


def test_a_file_without_a_record_is_one_line(first, words, reproduce, tmp_path):
    save_file(load_file(first), tmp_path / "bare.safetensors")
    code, _, said = reproduce(str(tmp_path / "bare.safetensors"), *words)
    assert code == 2
    assert said.count("\n") == 1 and "its header has no record of a run" in said


def test_a_config_that_is_there_is_not_written_over(first, words, reproduce, tmp_path):
    (tmp_path / "again.yaml").write_text("mine")
    code, _, said = reproduce(str(first), *words, "--force")
    assert code == 2 and "there is such a file already" in said
    assert (tmp_path / "again.yaml").read_text() == "mine"


def test_held_out_images_that_decide_are_asked_for(config_writer, folders, tiny_base, reproduce, tmp_path):
    held_out = {"sources": [{"path": str(folders[1]), "caption": ""}], "every": 1, "timesteps": 1}
    config = config_writer(tmp_path, "best", loop=STEPS, validation=held_out, output={"weights": "best"})
    assert train([str(config)]) == 0
    file = str(tmp_path / "best" / "tiny.safetensors")
    photos = load_config(config).data.sources[0].model_dump()["path"]
    given = ["--base", str(tiny_base), "--caption", "a sks creature", "--data", photos]
    code, _, said = reproduce(file, *given)
    assert code == 2
    assert "1 source has images and 1 held out, and 1 of --data was given: give 2, in their order" in said
    code, said, _ = reproduce(file, *given, "--data", str(folders[1]))
    assert code == 0
    assert "unknown  validation.sources.0: held-out images, of which the record has no hash" in said


def test_words_and_full_metadata(config_writer, photos, tiny_base, reproduce, tmp_path):
    """Tokens are asked for by their own option; `full` tells them, so that nothing has to be given but the folders."""
    adapter = {"tokens": [{"token": "<sks>", "init": "creature"}]}
    data = {"sources": [{"path": str(photos), "caption": "a <sks> creature"}]}
    shared = {"adapter": adapter, "data": data, "loop": STEPS}
    for kind in ("minimal", "full"):
        output = {"metadata": kind, "formats": ["loraloom"]}
        assert train([str(config_writer(tmp_path, kind, **shared, output=output))]) == 0
    files = {kind: str(tmp_path / kind / "tiny.loraloom.safetensors") for kind in ("minimal", "full")}
    given = ["--base", str(tiny_base), "--data", str(photos)]
    code, _, said = reproduce(files["minimal"], *given, "--caption", "a <sks> creature")
    assert code == 2
    assert "adapter.tokens.0.token is known by its hash alone" in said and "give its text with --token" in said
    assert reproduce(files["full"], *given)[0] == 0
    (tmp_path / "again.yaml").unlink()
    tokens = ["--token", "<sks>", "--token", "creature"]
    assert reproduce(files["minimal"], *given, "--caption", "a <sks> creature", *tokens)[0] == 0
    assert train([str(tmp_path / "again.yaml"), f"output.dir={tmp_path / 'again'}"]) == 0
    assert same_weights(Path(files["full"]), tmp_path / "again" / "tiny.loraloom.safetensors")


def test_adapters_that_a_run_began_with(config_writer, first, photos, tiny_base, reproduce, tmp_path):
    """One in the base and one to begin with: asked for, and compared by their bytes."""
    file = config_writer(
        tmp_path,
        "second",
        model={"adapters": [f"{first}:0.5"]},
        adapter={"start_from": str(first)},
        loop=STEPS,
    )
    assert train([str(file)]) == 0
    made = tmp_path / "second" / "tiny.safetensors"
    given = ["--base", str(tiny_base), "--data", str(photos), "--caption", "a sks creature"]
    code, _, said = reproduce(str(made), *given)
    assert code == 2 and "2 of --adapter are needed, 0 given" in said
    code, said, _ = reproduce(str(made), *given, "--adapter", str(made), "--adapter", str(made))
    assert code == 2
    assert "differs  model.base: other weights of adapter 0" in said and "differs  adapter.start_from" in said
    code, said, _ = reproduce(str(made), *given, "--adapter", str(first), "--adapter", str(first))
    assert code == 0 and "differs" not in said
    assert train([str(tmp_path / "again.yaml"), f"output.dir={tmp_path / 'again'}"]) == 0
    assert same_weights(made, tmp_path / "again" / "tiny.safetensors")


def test_help_shows_how(capsys):
    with pytest.raises(SystemExit):
        cli.run(["reproduce", "--help"])
    assert "loraloom reproduce my-dog.safetensors --data photos/ --caption" in capsys.readouterr().out
