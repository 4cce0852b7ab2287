"""Names, captions, headers and records of strangers, through every verb that tells them: none steers the terminal."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loraloom.configs.command import run_command
from loraloom.configs.plain import STEERING
from loraloom.launch.cli import run as loraloom
from loraloom.train.__main__ import main as train

pytestmark = pytest.mark.slow

EVIL = "x\x1b]0;owned\x07\x1b[2J\nerror: all is fine\r\x9b31m\u202egnp"
"""Sets a title, clears the screen, is a line of ours, and turns the rest around."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, config_writer, photos: Path) -> Path:
    """A folder with a run, its adapter and its images, all of them with EVIL wherever a text can stand."""
    folder = tmp_path_factory.mktemp("hostile")
    config = config_writer(folder, "run", loop={"steps": 1}, adapter={"parts": {"unet": "attention"}})
    assert train([str(config)]) == 0
    evil = folder / "evil"
    shutil.copytree(folder / "run", evil)
    record = json.loads((evil / "run.json").read_text())
    record |= {"state": EVIL, "message": EVIL, "started": EVIL, "files": [EVIL], "versions": {EVIL: EVIL}}
    (evil / "run.json").write_text(json.dumps(record))
    text = (evil / "config.yaml").read_text()
    (evil / "config.yaml").write_text(re.sub("(?m)^  base: .*$", lambda _: f"  base: {json.dumps(EVIL)}", text))
    named = folder / "run" / "tiny.safetensors"
    with safe_open(named, "pt") as file:
        header = file.metadata()
    tensors = load_file(named)
    header |= {EVIL: "1", "modelspec.title": EVIL, "modelspec.architecture": EVIL}
    save_file(tensors, folder / "header.safetensors", header)
    save_file({**tensors, EVIL: torch.zeros(1)}, folder / "tensor.safetensors", header)
    images = folder / "images"
    images.mkdir()
    for file in photos.glob("*.png"):
        shutil.copy(file, images)
    caption = {"0.png": EVIL, "1.png": "fine"}
    lines = [json.dumps({"file_name": name, "text": words}) for name, words in caption.items()]
    (images / "metadata.jsonl").write_text("\n".join(lines))
    bad = folder / "bad"
    bad.mkdir()
    (bad / f"{EVIL}.png").write_bytes(b"no picture")
    Image.new("RGB", (40, 40)).save(bad / f"{EVIL}2.png")
    Image.new("RGB", (4000, 40)).save(bad / f"{EVIL}3.png")
    nested = folder / "runs" / EVIL
    shutil.copytree(evil, nested)
    return folder


VERBS = {
    "plan of bad images": ["plan", "{run}.yaml", "data.sources.0.path={place}/bad"],
    "train on bad images": ["train", "{run}.yaml", "data.sources.0.path={place}/bad", "output.dir={place}/other"],
    "plan of captions": ["plan", "{run}.yaml", "data.sources.0.path={place}/images", "data.sources.0.caption=null"],
    "preview": ["preview", "{run}.yaml", "data.sources.0.path={place}/images", "--out", "{place}/preview"],
    "inspect a header": ["adapter", "inspect", "{place}/header.safetensors"],
    "inspect as JSON": ["adapter", "inspect", "{place}/header.safetensors", "--json"],
    "inspect a tensor": ["adapter", "inspect", "{place}/tensor.safetensors"],
    "diff": ["adapter", "diff", "{place}/header.safetensors", "{run}/tiny.safetensors"],
    "convert": ["adapter", "convert", "{place}/tensor.safetensors", "--to", "kohya", "--out", "{place}/k.safetensors"],
    "runs": ["runs", "{place}"],
    "runs as JSON": ["runs", "{place}", "--json"],
    "compare": ["runs", "--compare", "{run}", "{place}/evil", "--out", "{place}/compare.html"],
    "push": ["push", "{place}/evil", "--dry-run"],
    "resume": ["resume", "{place}/evil"],
    "replay": ["replay", "{place}/evil", "--step", "1"],
    "reproduce": ["reproduce", "{place}/header.safetensors", "--out", "{place}/again.yaml"],
    "an override": ["plan", "{run}.yaml", "adapter.method={evil}"],
    "a key": ["plan", "{run}.yaml", "{evil}=1"],
    "a file": ["plan", "{place}/{evil}.yaml"],
    "a verb": ["{evil}"],
    "an argument": ["runs", "--{evil}"],
    "a folder": ["runs", "{place}/{evil}"],
    "a base": ["plan", "{run}.yaml", 'model.base="a/\\e[31mred"'],
}


@pytest.mark.parametrize("what", VERBS)
def test_no_text_steers_the_terminal(place: Path, what: str, capfd: pytest.CaptureFixture[str]) -> None:
    words = {"run": str(place / "run"), "place": str(place), "evil": EVIL}
    try:
        code = run_command(loraloom, [word.format(**words) for word in VERBS[what]])
    except SystemExit as ended:
        code = ended.code
    said = capfd.readouterr()
    assert code in (0, 2, 3)
    assert not re.search(f"(?![\n\t])[{STEERING}]", said.out + said.err.replace("\r", ""))
    assert not any(line.startswith("error: all is fine") for line in (said.out + said.err).splitlines())
    if "JSON" in what:
        json.loads(said.out)


def test_nor_a_page_a_card_or_a_config(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = {"run": str(place / "run"), "place": str(place)}
    for verb in ("preview", "compare", "reproduce"):
        run_command(loraloom, [word.format(**words) for word in VERBS[verb]])
    files = [*place.glob("*.html"), *place.glob("preview/*.html"), *place.glob("again.yaml")]
    assert len(files) >= 2
    for file in files:
        assert not re.search(f"(?![\n\t])[{STEERING}]", file.read_text()), file
        assert os.access(file, os.R_OK)
