"""The schema is documented, strict, and the same in the file that editors read."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

import loraloom.configs
from loraloom.configs.loader import json_schema, load_config
from loraloom.configs.problems import known_keys
from loraloom.configs.schema import AdapterSection, RunConfig, checked_name
from loraloom.launch.schema import main, schema_text

FOLDER = Path(loraloom.configs.__file__).parent
RECIPES = sorted(FOLDER.glob("*/*.yaml"))


def test_every_key_has_a_help_text() -> None:
    undocumented = [key for key, field in known_keys().items() if not (field.description or "").endswith(".")]
    assert undocumented == []
    assert ("data", "sources", "*", "prior") in known_keys()


def test_sections_are_strict_and_frozen() -> None:
    section = AdapterSection()
    with pytest.raises(ValidationError, match="frozen"):
        section.rank = 4  # type: ignore[misc]
    with pytest.raises(ValidationError, match="forbidden"):
        AdapterSection.model_validate({"rnak": 4})


@pytest.mark.parametrize("text", ["inf", "nan", "0", "-1", "x"])
def test_rates_are_positive_numbers(text: str) -> None:
    tree = {
        "model": {"base": "pocket"},
        "data": {"sources": [{"path": "x", "caption": "y"}]},
        "loop": {"steps": 1},
        "output": {"dir": "z"},
    }
    assert RunConfig.model_validate(tree | {"optimizer": {"learning_rate": "1e-4"}}).optimizer.learning_rate == 1e-4
    with pytest.raises(ValidationError, match="learning_rate"):
        RunConfig.model_validate(tree | {"optimizer": {"learning_rate": text}})


def test_shipped_schema_is_the_code_s() -> None:
    shipped = (FOLDER / "schema.json").read_text(encoding="utf-8")
    assert shipped == schema_text(), "run: loraloom schema > configs/schema.json"


def test_schema_knows_extends_names_and_options() -> None:
    schema = json_schema()
    assert schema["properties"]["extends"]["type"] == "string"
    assert {"required": ["extends"]} in schema["anyOf"]
    assert "required" not in schema["$defs"]["LoopSection"]  # may come from the extended file
    assert schema["$defs"]["FolderSource"]["required"] == ["path"]  # lists are not merged
    adapter = schema["$defs"]["AdapterSection"]
    assert "lora" in adapter["properties"]["method"]["enum"]
    lora = next(rule for rule in adapter["allOf"] if rule["if"]["properties"]["method"]["const"] == "lora")
    assert lora["then"]["properties"]["options"]["properties"]["dropout"]["exclusiveMaximum"] == 1
    assert "kohya" in schema["$defs"]["OutputSection"]["properties"]["formats"]["items"]["enum"]


def test_schema_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert main(["--out", str(tmp_path / "schema.json")]) == 0
    assert json.loads(printed) == json.loads((tmp_path / "schema.json").read_text()) == json_schema()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.parent.name}/{recipe.stem}")
def test_every_recipe_loads_and_names_the_schema(recipe: Path) -> None:
    load_config(recipe)
    assert "# yaml-language-server: $schema=../schema.json" in recipe.read_text().splitlines()[:3]


@pytest.mark.parametrize("name", ["-x", "--help", ".", "..", "samples", "Run.json", "prior-0123456789ab"])
def test_a_name_that_is_taken_for_something_else_is_none(name: str) -> None:
    with pytest.raises(ValueError, match="take another"):
        checked_name(name)
    assert checked_name("my-dog") == "my-dog"
