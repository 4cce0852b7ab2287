"""Pushing a run: what goes to the hub, what stays here, one line when it cannot; against a hub of the test's own."""

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from loraloom.configs.command import run_command
from loraloom.configs.errors import UserError
from loraloom.launch import cli
from loraloom.train.__main__ import main as train
from loraloom.train.push import main as push

pytestmark = pytest.mark.slow

TOKEN = "hf_thetokenofthistest"
CARD = """\
---
tags: [lora]
widget:
- text: a
  output: {url: samples/step-000002/one.png}
---
load("OWNER/NAME") ![grid](samples/step-000002/grid.png) ![outside](../outside.png) ![no](config.yaml)
![web](https://example.invalid/x.png)
"""


class Hub(BaseHTTPRequestHandler):
    """The few calls of the hub that a push makes (huggingface_hub: create_repo, create_branch, create_commit)."""

    server: "HubServer"

    def do_GET(self) -> None:
        self._answer({"id": "me/mine", "private": not self.server.public})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, body))
        if self.server.refuse:
            status, words = self.server.refuse
            self._answer({"error": words}, status)
        elif self.path.endswith("/repos/create"):
            self._answer({"url": f"{self.server.url}/me/mine"})
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self._answer({"files": [file | {"shouldIgnore": False} for file in files]})
        elif "/commit/" in self.path:
            self._answer({"commitUrl": f"{self.server.url}/me/mine/commit/1", "commitOid": "1", "success": True})
        else:
            self._answer({"errors": [], "warnings": []})

    def _answer(self, content: dict, status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        if status != 200:
            self.send_header("X-Error-Message", content["error"])
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class HubServer(HTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Hub)
        self.asked: list[tuple[str, bytes]] = []
        self.refuse: tuple[int, str] | None = None
        self.public = False
        self.url = f"http://127.0.0.1:{self.server_port}"

    @property
    def made_private(self) -> bool:
        """Whether the repository was asked to be private, in the words of this or of older clients."""
        made = json.loads(next(body for path, body in self.asked if path.endswith("/repos/create")))
        return made.get("private") is True or made.get("visibility") == "private"

    @property
    def files(self) -> dict[str, bytes]:
        """What the commit held."""
        lines = [json.loads(line) for path, body in self.asked if "/commit/" in path for line in body.splitlines()]
        entries = [line["value"] for line in lines if line["key"] == "file"]
        return {entry["path"]: base64.b64decode(entry["content"]) for entry in entries}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub that takes whatever it gets, and a token for it."""
    server = HubServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token, and nobody who listens."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished run with a card, and much that is nobody's business."""
    run = tmp_path / "run"
    (run / "samples/step-000002").mkdir(parents=True)
    for name in ("one", "two", "grid"):
        Image.new("RGB", (8, 8)).save(run / f"samples/step-000002/{name}.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    (run / "checkpoints").mkdir()
    (run / "checkpoints/state").write_text("large")
    (run / "config.yaml").write_text("output: {name: tiny}\n")
    record = {"state": "done", "step": 2, "files": ["tiny.safetensors"], "verify": {"diffusers": {}}}
    (run / "run.json").write_text(json.dumps(record))
    (run / "tiny.safetensors").write_bytes(bytes(1_234_000))
    (run / "README.md").write_text(CARD)
    return run


BELONGS = ["README.md", "samples/step-000002/grid.png", "samples/step-000002/one.png", "tiny.safetensors"]


def test_what_belongs_on_the_hub_gets_there_and_nothing_else(folder, hub, capsys):
    assert cli.run(["push", str(folder), "--repo", "me/mine"]) == 0
    assert sorted(hub.files) == BELONGS
    assert hub.files["tiny.safetensors"] == (folder / "tiny.safetensors").read_bytes()
    assert 'load("me/mine")' in hub.files["README.md"].decode()
    assert (folder / "README.md").read_text() == CARD
    assert not hub.made_private
    assert capsys.readouterr().out.endswith(f"pushed: {hub.url}/me/mine/commit/1\n")


def test_a_dry_run_lists_and_asks_nobody(folder, hub, capsys):
    assert push([str(folder), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[-1] for line in lines[:-1]) == BELONGS
    assert lines[0].split() == ["1.234", "MB", "tiny.safetensors"]
    assert lines[-1].split()[-3:] == ["in", "4", "files"]
    assert hub.asked == []


def test_a_branch_is_made_and_used(folder, hub):
    assert push([str(folder), "--repo", "me/mine", "--revision", "try/2"]) == 0
    paths = [path for path, _ in hub.asked]
    assert "/api/models/me/mine/branch/try%2F2" in paths
    assert "/api/models/me/mine/commit/try%2F2" in paths


def test_private_means_private(folder, hub):
    assert push([str(folder), "--repo", "me/mine", "--private"]) == 0
    assert hub.made_private
    hub.asked.clear()
    hub.public = True
    with pytest.raises(UserError, match="me/mine is there already and is public"):
        push([str(folder), "--repo", "me/mine", "--private"])
    assert hub.files == {}


@pytest.mark.parametrize(
    ("refuse", "words"),
    [
        ((401, f"Invalid token {TOKEN}"), "does not know the token that is used here (Invalid token (token)"),
        ((403, "no rights"), "may not write to me/mine (no rights"),
        ((500, "broken"), "the hub refused it (status 500: broken"),
    ],
)
def test_a_refusal_is_one_line_without_the_token(folder, hub, refuse, words, capsys):
    hub.refuse = refuse
    assert run_command(push, [str(folder), "--repo", "me/mine"]) == 6
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert words in told
    assert told.count("\n") == 1
    assert TOKEN not in told


def test_without_network_or_token_or_when_switched_off(folder, no_network, monkeypatch, capsys):
    def answer() -> str:
        assert run_command(push, [str(folder), "--repo", "me/mine"]) == 6
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        return told

    assert "the hub cannot be reached" in answer()
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True)
    assert "unset HF_HUB_OFFLINE" in answer()
    monkeypatch.setattr("loraloom.train.push.token", lambda: None)
    assert "run `hf auth login`, or set HF_TOKEN" in answer()


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        ({}, [], "--repo: which repository"),
        ({}, ["--repo", "no repository"], "--repo no repository: Repo id must use alphanumeric"),
        ({"state": "failed"}, ["--repo", "me/mine"], "its state is failed"),
        ({"files": ["gone.safetensors"]}, ["--repo", "me/mine"], "gone.safetensors: is not there"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before(folder, no_network, change, arguments, words, capsys):
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | change))
    assert run_command(push, [str(folder), *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_cannot_be_pushed_has_everything_here(write_config, no_network, capsys):
    """And is pushed later: by its config, to a repository that is made private."""
    config = write_config(loop={"steps": 2}, output={"push_to": "me/mine"})
    assert run_command(train, [str(config)]) == 6
    told = capsys.readouterr().err
    assert "error: trained, verified and written, but not pushed: the hub cannot be reached" in told
    folder = config.parent / "run"
    record = json.loads((folder / "run.json").read_text())
    assert (record["state"], record["exit_code"]) == ("done", 6)
    assert record["push"].startswith("failed: the hub cannot be reached")
    assert {"tiny.safetensors", "tiny.kohya.safetensors", "README.md", "report.html"} <= {
        file.name for file in folder.iterdir()
    }
    assert "me/mine" in ModelCard.load(folder / "README.md").text
    assert not [file for file in folder.rglob("*") if file.is_file() and TOKEN.encode() in file.read_bytes()]


@pytest.mark.slow
def test_a_run_is_pushed_at_its_end(write_config, hub):
    config = write_config(loop={"steps": 2}, output={"push_to": "me/mine"})
    assert train([str(config)]) == 0
    record = json.loads((config.parent / "run/run.json").read_text())
    assert (record["state"], record["exit_code"], record["push"]) == ("done", 0, f"{hub.url}/me/mine/commit/1")
    assert sorted(hub.files) == ["README.md", "tiny.kohya.safetensors", "tiny.safetensors"]
    assert hub.made_private


@pytest.mark.slow
def test_a_pipeline_is_the_root_of_its_repository(write_config, hub, tiny_base, tmp_path):
    """Its configs may say where the base came from, which is no business of the hub's."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    index = base / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_name_or_path": str(tiny_base)}))
    config = write_config(loop={"steps": 1}, model={"base": str(base)})
    content = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(content | {"adapter": {"method": "full"}}, sort_keys=False))
    assert train([str(config)]) == 0
    assert push([str(tmp_path / "run"), "--repo", "me/mine"]) == 0
    assert {"model_index.json", "unet/config.json", "README.md"} <= set(hub.files)
    private = [str(tiny_base).encode(), str(tmp_path).encode(), b"a sks creature"]
    assert [name for name, content in hub.files.items() for word in private if word in content] == []
