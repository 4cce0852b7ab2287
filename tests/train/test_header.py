"""What stands in the headers of a run's files: the truth, nothing private, the same bytes each time."""

import getpass
import json
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
import torch
import yaml
from pydantic import BaseModel

from loraloom.adapters import format
from loraloom.configs.command import run_command
from loraloom.configs.errors import UserError
from loraloom.configs.loader import load_config
from loraloom.configs.schema import RunConfig
from loraloom.inference.adapter_file import format_names
from loraloom.models.families.sd1 import FAMILY
from loraloom.models.single_file import read_header
from loraloom.train.__main__ import main
from loraloom.train.build import build_trainer
from loraloom.train.header import run_header
from loraloom.train.record import ENTRIES, hashed, hidden, is_hashed, read_record, texts_of
from loraloom.train.run_folder import LIBRARIES, STATE, checkpoints, installed

pytestmark = pytest.mark.slow

FILES = ("tiny.safetensors", "tiny.kohya.safetensors", "tiny.loraloom.safetensors", "tiny.peft")
WORDS = {
    *("qwx kitten asleep", "kitchen", "kennel", "some kitten", "qwx", "kitten", "veryzoe ", "hush now", "uglyzoe"),
    *("qwx riding", "plain kitten", "unseen kitten", "zoe/kittens"),
}
"""All texts of the run below that tell of its data, beside paths."""
HUB = "stabilityai/stable-diffusion-xl-base-1.0"


@pytest.fixture(scope="module", autouse=True)
def no_time() -> Iterator[None]:
    """Whatever the environment of the tests says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SOURCE_DATE_EPOCH", raising=False)
        yield


@pytest.fixture(scope="module")
def kittens(photos, tmp_path_factory) -> Path:
    """Folders whose names and captions nobody should hear of."""
    home = tmp_path_factory.mktemp("home") / "zoe"
    for name in ("kittens", "heldout"):
        shutil.copytree(photos, home / name)
    (home / "kittens" / "0.txt").write_text("hush now")
    return home


@pytest.fixture(scope="module")
def config_for(config_writer, kittens) -> Callable[..., Path]:
    """A config with a private text wherever there can be one."""

    def write(folder: Path, name: str = "secretplace", **output: Any) -> Path:
        return config_writer(
            folder,
            name,
            data={
                "sources": [
                    {"path": str(kittens / "kittens"), "caption": "qwx kitten asleep", "name": "kitchen", "repeats": 2},
                    {"prior": "some kitten", "name": "kennel", "count": 2, "steps": 1},
                ],
                "captions": {"trigger": "qwx", "class_token": "kitten", "prefix": "veryzoe "},
                "cache": {"dir": str(kittens / "cached")},
            },
            loop={"steps": 2, "seed": 7, "threads": torch.get_num_threads()},
            validation={
                "prompts": ["qwx riding", {"prompt": "plain kitten", "negative_prompt": "uglyzoe"}],
                "num_images": 1,
                "steps": 1,
                "sources": [{"path": str(kittens / "heldout"), "caption": "unseen kitten"}],
            },
            output={"formats": ["diffusers", "kohya", "loraloom", "peft"], **output},
        )

    return write


@pytest.fixture(scope="module")
def done(config_for, tmp_path_factory) -> Path:
    """A finished run."""
    config = config_for(tmp_path_factory.mktemp("done"))
    assert main([str(config)]) == 0
    return config.with_suffix("")


@pytest.fixture
def header_for(config_for, tmp_path) -> Callable[..., dict[str, str]]:
    """The header that a run would give, without training; keywords replace keys of sections."""

    def make(**sections: dict) -> dict[str, str]:
        file = config_for(tmp_path)
        values = yaml.safe_load(file.read_text())
        for name, section in sections.items():
            values[name] = values.get(name, {}) | section
        file.write_text(yaml.safe_dump(values, sort_keys=False))
        return run_header(build_trainer(load_config(file), overwrite=True).run)

    return make


def header_of(file: Path) -> dict[str, str]:
    """Of a file, or of one in a folder."""
    return read_header(next(file.glob("unet/*.safetensors")) if file.is_dir() else file)[1]


def bytes_of(file: Path) -> bytes:
    """All of a file, or of the files in a folder."""
    files = sorted(path for path in file.rglob("*") if path.is_file()) if file.is_dir() else [file]
    return b"".join(path.read_bytes() for path in files)


@pytest.mark.parametrize("name", FILES)
def test_nothing_private_is_in_the_files(done, name, kittens, tiny_base):
    """Every text of the config that is not about how it was trained, each longer word of those, and where it ran."""
    texts = [text for _, text in texts_of(yaml.safe_load((done.parent / "secretplace.yaml").read_text()))]
    paths = {str(kittens / "kittens"), str(kittens / "heldout"), str(kittens / "cached"), str(done), str(tiny_base)}
    assert paths <= {*texts}
    content = bytes_of(done / name)
    private = paths | WORDS | {*texts} - {"tiny", "attention", "diffusers", "kohya", "loraloom", "peft"}
    assert [text for text in private if len(text) > 4 and text.encode() in content] == []
    words = {word for text in WORDS for word in re.findall(r"[a-z]{3,}", text)} - {"now", "some", "plain"}
    words |= {"heldout", "cached", "secretplace", "/home", str(tiny_base.parent.name), socket.gethostname()}
    words |= {getpass.getuser()} - {"root"}  # a word of the formats as well
    header = json.dumps(header_of(done / name)).lower()
    assert {"qwx", "kitten", "zoe", "hush", "uglyzoe", "unseen"} <= words
    assert [word for word in words if word.lower() in header] == []


def test_the_same_run_gives_the_same_bytes(done, config_for, tmp_path):
    config = config_for(tmp_path, "elsewhere")
    assert main([str(config)]) == 0
    for name in FILES:
        assert bytes_of(config.with_suffix("") / name) == bytes_of(done / name), name


@pytest.mark.parametrize("name", FILES)
def test_every_format_has_the_same_entries(done, name):
    header, first = header_of(done / name), header_of(done / FILES[0])
    said = {entry for entry in first if entry.startswith(("ss_", "modelspec.", "loraloom."))}
    assert {f"loraloom.{entry}" for entry in ENTRIES} <= said
    assert {entry: header[entry] for entry in said} == {entry: first[entry] for entry in said}


def test_what_web_uis_read(done):
    header = header_of(done / "tiny.kohya.safetensors")
    assert {name: value for name, value in header.items() if name.startswith("ss_")} == {
        "ss_v2": "False",
        "ss_base_model_version": "sd_v1",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "4.0",
        "ss_network_args": header["ss_network_args"],
        "ss_output_name": "tiny",
        "ss_resolution": "(32, 32)",
        "ss_clip_skip": "None",
        "ss_seed": "7",
        "ss_learning_rate": "0.01",
        "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.01)",
        "ss_num_train_images": "12",
    }
    assert {name: value for name, value in header.items() if name.startswith("modelspec.")} == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "tiny",
        "modelspec.resolution": "32x32",
        "modelspec.prediction_type": "epsilon",
    }


def test_clip_skip_and_options_are_told(header_for):
    options = {"name": "torch.optim.RAdam", "weight_decay": 0.0, "options": {"eps": 1e-6}}
    header = header_for(model={"clip_skip": 1}, optimizer=options)
    assert (header["ss_clip_skip"], header["modelspec.encoder_layer"]) == ("2", "2")
    assert header["ss_optimizer"] == "torch.optim.radam.RAdam(weight_decay=0.0,eps=1e-06)"


def test_a_base_that_predicts_v(header_for, base_of):
    assert header_for(model={"base": str(base_of("sd2"))})["modelspec.prediction_type"] == "v"


def test_the_time_is_that_of_the_environment(header_for, monkeypatch):
    without = header_for()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    header = header_for()
    times = {"modelspec.date": "2023-11-14T22:13:20+00:00", "ss_training_started_at": "1700000000.0"}
    assert header == without | times
    assert not times.keys() & without.keys()


@pytest.mark.parametrize("text", ["yesterday", "1e9", "9" * 30])
def test_a_time_that_is_none_is_refused_before_training(config_for, tmp_path, monkeypatch, capsys, text):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", text)
    file = config_for(tmp_path)
    assert run_command(main, [str(file)]) == 2
    assert f"error: SOURCE_DATE_EPOCH is {text!r}: give seconds since 1970" in capsys.readouterr().err


def test_full_metadata_tells_words_and_no_path(header_for, kittens, tiny_base):
    header = header_for(output={"metadata": "full"})
    assert header["modelspec.trigger_phrase"] == "qwx"
    said = json.loads(header["loraloom.config"])
    assert {"qwx kitten asleep", "some kitten", "veryzoe ", "qwx riding", "uglyzoe", "unseen kitten"} <= {
        text for _, text in texts_of(said)
    }
    everything = json.dumps(header)
    for path in (str(kittens), str(tiny_base), "kitchen", "kennel", "heldout", "secretplace"):
        assert path not in everything


def test_minimal_metadata_has_no_trigger_phrase(header_for):
    assert "modelspec.trigger_phrase" not in header_for()


def test_the_record_says_what_was_trained(done, kittens, tiny_base):
    record, run = read_record(done / FILES[0]), yaml.safe_load((done / "config.yaml").read_text())
    assert record.seed == 7
    assert record.versions == installed() and record.versions.keys() == {*LIBRARIES}
    assert record.config["model"]["base"] == hashed(str(tiny_base))
    assert record.config["data"]["sources"][0]["path"] == hashed(str(kittens / "kittens"))
    assert record.config["loop"] == run["loop"]
    assert record.config["optimizer"]["learning_rate"] == 0.01
    assert "dir" not in record.config["output"] and "dir" not in record.config["data"]["cache"]
    state = json.loads((checkpoints(done)[-1] / STATE).read_text())["data"]
    assert record.base == {"weights": state["base"]}
    names = [{"name": hashed(source["name"])} for source in state["sources"]]
    assert record.data["sources"] == [source | name for source, name in zip(state["sources"], names, strict=True)]


def test_a_base_of_the_hub_is_named(config_for, tmp_path):
    config = load_config(config_for(tmp_path))

    def base(name: str, revision: str | None) -> str:
        model = config.model.model_copy(update={"base": name, "revision": revision, "adapters": ["/a/b.st:0.5"]})
        said = hidden(config.model_copy(update={"model": model}))["model"]
        assert said["adapters"] == [f"{hashed('/a/b.st')}:0.5"]
        return said["base"]

    assert base(HUB, "ab" * 20) == HUB
    assert base("pocket", None) == "pocket"
    assert base("zoe/base", None) == hashed("zoe/base")


def test_a_text_is_told_only_where_that_was_decided(config_for, tmp_path):
    """Each field of text in the schema that is not a choice among words: hidden, but for those listed here."""
    told = {
        *("model.family", "model.revision", "adapter.method", "loss.kind", "optimizer.name"),
        "optimizer.schedule_rules",
        *("output.name", "data.captions.separator", "data.sources.0.captions.separator", "data.sources.0.split"),
        *("data.sources.0.image_column", "data.sources.0.caption_column", "data.sources.0.revision"),
    }
    values = load_config(config_for(tmp_path)).model_dump()
    source = {"dataset": "?", "captions": {}}
    values |= {"trackers": [], "validation": {"prompts": [{"prompt": "?"}]}, "model": {"base": "?"}}
    values["adapter"] |= {"tokens": [{"token": "?"}], "parts": None}
    values["data"] |= {"sources": [source, {"path": "?"}, {"shards": "?"}, {"prior": "?"}]}
    config = marked(RunConfig.model_validate(values))
    places = {place: text for place, text in texts_of(hidden(config)) if config_text(config, place) == MARK}
    assert len(places) > 40
    assert {re.sub(r"[0-9]+", "0", place) for place, text in places.items() if not is_hashed(text)} == told


MARK = "zoe's own"


def marked(section: BaseModel) -> Any:
    """A copy in which every text that may be any text is MARK."""
    changes: dict[str, Any] = {}
    for key, entry in type(section).model_fields.items():
        value = getattr(section, key)
        if isinstance(value, BaseModel):
            changes[key] = marked(value)
        elif isinstance(value, list) and any(isinstance(item, BaseModel) for item in value):
            changes[key] = [marked(item) for item in value]
        elif is_text(entry.annotation):
            changes[key] = MARK
    return section.model_copy(update=changes)


def is_text(kind: Any) -> bool:
    """Whether a field takes any text, checked or not, or none."""
    if get_origin(kind) is Annotated:
        return is_text(get_args(kind)[0])
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else [kind]
    return str in kinds if len(kinds) == 1 else all(each is NoneType or is_text(each) for each in kinds)


def config_text(config: RunConfig, place: str) -> Any:
    value: Any = config
    for key in place.split("."):
        value = (
            value[int(key)]
            if isinstance(value, list)
            else value[key]
            if isinstance(value, dict)
            else getattr(value, key)
        )
    return value


def test_the_record_goes_from_format_to_format(done, tmp_path, base_of):
    """diffusers -> kohya -> peft -> loraloom, and back to the bytes of the first."""
    names = format_names(FAMILY, FAMILY.load(base_of("sd1"), torch.float32, only=["unet", "text_encoder"]))
    file = done / "tiny.safetensors"
    for step, kind in enumerate(("kohya", "peft", "loraloom", "diffusers")):
        target = tmp_path / format.file_name(f"step{step}", kind)
        format.write(format.read(file, names), target, kind, names)
        assert read_record(target) == read_record(done / "tiny.safetensors")
        file = target
    assert header_of(file) == header_of(done / "tiny.safetensors")


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({}, "has no record of a run"),
        ({"loraloom.config": "{}"}, "is damaged"),
        ({f"loraloom.{name}": "{" for name in ENTRIES}, "is damaged"),
        ({f"loraloom.{name}": "{}" for name in ENTRIES}, "is damaged"),
    ],
)
def test_a_file_without_a_sound_record_is_one_line(tmp_path, entries, words):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", entries or None)
    with pytest.raises(UserError, match=words) as error:
        read_record(tmp_path / "x.safetensors")
    assert len(error.value.problems) == 1


def test_what_is_no_adapter_file_is_one_line(tmp_path):
    (tmp_path / "x").write_text("hello")
    for file in (tmp_path / "x", tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match=str(file)):
            read_record(file)
