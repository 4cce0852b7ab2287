"""Paths as users write them: replaced or refused, and never a folder that is called `~` or `$HOME`."""

import os
import string
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from loraloom.configs.data_sections import DatasetSource, FolderSource, ShardSource
from loraloom.configs.errors import UserError
from loraloom.configs.loader import dump_yaml, load_config
from loraloom.configs.machine import cache_folder
from loraloom.configs.paths import expanded, sounds_secret

LETTERS = st.text(string.ascii_letters + string.digits + "._-@+ äß犬", min_size=1, max_size=12)
HONEST = st.lists(LETTERS, min_size=1, max_size=5).map("/".join)
HOPELESS = {
    "a\0b": "control character \\x00",
    "a\nb": "control character \\n; backslashes of a path stand in single quotes",
    "a\x1b[2Jb": "control character \\x1b",
    "x" * 5_000: "5000 bytes",
    "犬" * 86: "a name of 258 bytes",
    "/".join(["abc"] * 2_000): "a path of 7999 bytes",
    "a\ud800b": "not UTF-8",
    os.fsdecode(b"L\xe4ufe"): "not UTF-8",
    "~nobody-of-this-name/x": "no user 'nobody-of-this-name'",
    "$LORALOOM_UNSET/x": "$LORALOOM_UNSET is not set",
    "a/${LORALOOM_UNSET}b": "$LORALOOM_UNSET is not set",
    "${HOME:-x}/y": "${HOME:-x} is no variable",
    "runs/$HF_TOKEN": "sounds like a secret",
    "${MY_API_KEY}": "sounds like a secret",
}


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"HOME": "/home/me", "SCRATCH": "/scratch", "HF_TOKEN": "hf_x", "MY_API_KEY": "k"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)


@given(HONEST)
def test_an_honest_path_stays(path: str) -> None:
    assert expanded(path) == path


@given(HONEST)
def test_what_a_shell_replaces_is_replaced(path: str) -> None:
    assert expanded(f"~/{path}") == expanded(f"$HOME/{path}") == expanded(f"${{HOME}}/{path}") == f"/home/me/{path}"
    assert expanded(f"{path}/$SCRATCH/$HOME") == f"{path}//scratch//home/me"
    assert expanded(f"~root/{path}") == os.path.expanduser(f"~root/{path}")


@pytest.mark.parametrize("path", HOPELESS)
def test_what_no_path_can_be_is_one_line(path: str) -> None:
    with pytest.raises(UserError) as refused:
        expanded(path)
    (line,) = str(refused.value).splitlines()
    assert HOPELESS[path] in line
    assert len(line) < 300
    line.encode()


def test_a_file_that_is_called_so_is_meant() -> None:
    for name in ("$recycle", "~bak"):
        Path(name).touch()
        assert expanded(name) == name
        assert expanded("5$") == "5$"


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "GITHUB_PAT", "Key"]
)
def test_secrets_by_their_names(name: str) -> None:
    assert sounds_secret(name)


@pytest.mark.parametrize("name", ["HOME", "USER", "SCRATCH", "SLURM_JOB_ID", "MONKEY", "KEYBOARD", "PATH", "AUTHOR"])
def test_no_secrets_by_their_names(name: str) -> None:
    assert not sounds_secret(name)


def config_with(key: str, path: str) -> dict:
    values: dict = {
        "model": {"base": "pocket"},
        "data": {"sources": [{"path": "photos"}]},
        "loop": {"steps": 1},
        "output": {"dir": "runs/x"},
    }
    *sections, last = key.split(".")
    at = values
    for name in sections:
        at = at[0] if isinstance(at, list) else at.setdefault(name, [{}] if name == "sources" else {})
    at = at[0] if isinstance(at, list) else at
    if last in ("dataset", "shards"):
        at.pop("path", None)
    at[last] = [path] if last == "adapters" else path
    return values


KEYS = {
    "model.base": lambda config: config.model.base,
    "model.adapters": lambda config: config.model.adapters[0],
    "adapter.start_from": lambda config: config.adapter.start_from,
    "data.sources.path": lambda config: config.data.sources[0].path,
    "data.sources.dataset": lambda config: config.data.sources[0].dataset,
    "data.sources.shards": lambda config: config.data.sources[0].shards,
    "validation.sources.path": lambda config: config.validation.sources[0].path,
    "data.cache.dir": lambda config: config.data.cache.dir,
    "output.dir": lambda config: config.output.dir,
}
"""Every path of a config, and where it is found in the object."""


@pytest.mark.parametrize("key", KEYS)
def test_every_path_of_a_config(key: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    for path in ("~/runs/dog", "$HOME/runs/dog"):
        file.write_text(yaml.dump(config_with(key, path)))
        config = load_config(file)
        assert KEYS[key](config) == "/home/me/runs/dog"
        file.write_text(dump_yaml(config))
        assert load_config(file) == config
    for path, words in HOPELESS.items():
        file.write_text(yaml.dump(config_with(key, path)))
        with pytest.raises(UserError) as refused:
            load_config(file)
        if words != "not UTF-8" and "\0" not in path:  # which no text of a config may hold
            assert any(words in problem and problem.startswith(f"{file}:") for problem in refused.value.problems)
        assert all(len(problem.splitlines()) == 1 for problem in refused.value.problems)


def test_no_source_has_another_path() -> None:
    own = {key for kind in (FolderSource, DatasetSource, ShardSource) for key in kind.model_fields}
    assert {"path", "dataset", "shards"} <= own
    assert not {key for key in own if key.endswith(("_path", "_dir", "_file"))}


def test_the_folder_of_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORALOOM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder(None) == Path("/home/me/.cache/loraloom")
    monkeypatch.setenv("LORALOOM_CACHE", "$SCRATCH/c")
    assert cache_folder(None) == Path("/scratch/c")
    monkeypatch.setenv("LORALOOM_CACHE", "~/c")
    assert cache_folder(None) == Path("/home/me/c")
