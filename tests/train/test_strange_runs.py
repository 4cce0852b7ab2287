"""Run folders of strangers: whatever their files hold, each page about them is made or refused in one line."""

import copy
import json
import random
from pathlib import Path

import pytest
import yaml

from loraloom.benchmarks.hostile_files import ODD, odd_value
from loraloom.configs.errors import UserError
from loraloom.configs.loader import dump_yaml
from loraloom.configs.schema import RunConfig
from loraloom.configs.shapes import misfit
from loraloom.train.comparison import compare
from loraloom.train.pages.card import card_of
from loraloom.train.pages.report import page_of
from loraloom.train.run_folder import read_run
from loraloom.train.shapes import CONFIG, RECORD, RUN_FILE, STATE

CONFIG_VALUES = {
    "model": {"base": "pocket"},
    "data": {"resolution": 64, "sources": [{"path": "photos", "caption": "a sks dog"}, {"prior": "a dog"}]},
    "adapter": {"rank": 4, "parts": {"unet": "attention"}, "tokens": [{"token": "<a>"}]},
    "optimizer": {"parts": {"unet": {"learning_rate": 1e-4}}},
    "loop": {"steps": 3},
    "validation": {"prompts": ["a <a>", {"prompt": "b", "steps": 3}], "num_images": 1},
    "output": {"dir": "run", "name": "dog", "metadata": "full"},
}
RECORD_VALUES = {
    "state": "done",
    "exit_code": 0,
    "step": 3,
    "steps": 3,
    "train_seconds": 1.5,
    "threads": 2,
    "processes": 1,
    "seconds_of": {"data": 0.5},
    "versions": {"torch": "2"},
    "trainable_parameters": 100,
    "adapter": ["lora", "rank 4"],
    "family": "sd1",
    "modules": {"unet": 8},
    "started": "2026-01-01T00:00:00",
    "files": ["dog.safetensors"],
    "verify": {"diffusers": {"modules": 8, "delta_difference": 0.0}},
    "best": {"step": 2, "held_out": 0.5},
    "weights": "of step 2",
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("strange")
    for name in ("a", "b"):
        (folder / name / "logs").mkdir(parents=True)
        (folder / name / "config.yaml").write_text(dump_yaml(RunConfig.model_validate(CONFIG_VALUES)))
        (folder / name / "run.json").write_text(json.dumps(RECORD_VALUES))
        (folder / name / "logs/history.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n')
    return folder


def pages(folder: Path) -> None:
    compare([folder / "a", folder / "b"])
    run = read_run(folder / "a")
    card_of(run)
    page_of(run)


def test_what_a_run_writes_has_the_shapes(sound):
    run = read_run(sound / "a")
    assert run.record == RECORD_VALUES and run.config["adapter"]["rank"] == 4
    pages(sound)


def refused(folder: Path) -> list[str]:
    try:
        pages(folder)
    except UserError as error:
        return error.problems
    return []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.yaml", "run.json", "logs/history.jsonl"])
def test_a_file_with_other_values_is_shown_or_refused_in_one_line(sound, name):
    file = sound / "a" / name
    text = file.read_text()
    load, dump = (yaml.safe_load, yaml.safe_dump) if name == "config.yaml" else (json.loads, json.dumps)
    first, end, rest = text.partition("\n") if name == "logs/history.jsonl" else (text, "", "")
    found = []
    for number in range(60):
        values = load(first)
        odd_value(values, random.Random(number))
        file.write_bytes((dump(values) + end + rest).encode("utf-8", "surrogatepass"))
        found.append(refused(sound))
    file.write_text(text)
    assert 8 < sum(map(bool, found)) < 60
    assert not [problem for problems in found for problem in problems if "\n" in problem]


@pytest.mark.parametrize(("shape", "values"), [(CONFIG, CONFIG_VALUES), (RUN_FILE, RECORD_VALUES)])
def test_a_value_of_another_type_is_named(shape, values):
    assert misfit(values, shape) is None
    for key, value in values.items():
        for odd in ODD:
            if type(odd) is not type(value) and odd is not None and not isinstance(value, int | float):
                assert (misfit(copy.deepcopy(values) | {key: odd}, shape) or "").startswith(key)


def test_records_and_states_lack_nothing():
    sources = [{"name": "a", "images": 1, "sha256": "x"}]
    state = {"step": 1, "seconds": 0.5, "skipped": 0, "best": None, "data": {"sources": sources, "micro_batch": None}}
    record = {
        "config": CONFIG_VALUES,
        "base": {"weights": {"unet": "x"}},
        "data": {"sources": sources},
        "versions": {},
        "seed": 0,
    }
    for values, shape in ((state, STATE), (record, RECORD)):
        assert misfit(values, shape) is None
        for key in values:
            lacking = {name: value for name, value in values.items() if name != key}
            assert key == "best" or misfit(lacking, shape) == f"{key} is missing"
