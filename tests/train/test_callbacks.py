"""What stands around the loop: curves, pictures, class images."""

import json
import shutil
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from loraloom.configs.loader import load_config
from loraloom.train.__main__ import main
from loraloom.train.build import build_trainer
from loraloom.train.callback import Callback
from loraloom.train.callbacks import tracking
from loraloom.train.callbacks.validation import slug

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dreambooth(config_writer, photos, tmp_path_factory):
    """A finished DreamBooth run with everything on."""
    sources = [
        {"path": str(photos), "caption": "a sks creature", "share": 0.5},
        {"prior": "a creature", "count": 6, "share": 0.5, "steps": 2, "loss_weight": 0.5},
    ]
    config = config_writer(
        tmp_path_factory.mktemp("dreambooth"),
        "run",
        data={"sources": sources},
        loop={"steps": 6, "batch_size": 4},
        validation={"every": 3, "prompts": ["a sks creature", "a creature", "星", "月"], "num_images": 2, "steps": 2},
        trackers=["tensorboard"],
    )
    assert main([str(config)]) == 0
    return config.parent / "run"


def test_the_history_has_a_line_for_each_step_with_each_source(dreambooth, photos):
    lines = [json.loads(line) for line in (dreambooth / "logs/history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 7))
    for line in lines:
        mean = (line[f"loss/{photos.name}"] + 0.5 * line["loss/prior"]) / 2  # two samples of each in a step of four
        assert line["loss"] == pytest.approx(mean, rel=1e-5)
        assert line["learning_rate/unet"] == 0.01


def test_tensorboard_reads_the_same_losses(dreambooth):
    events = EventAccumulator(str(dreambooth / "logs/loraloom"))
    events.Reload()
    lines = [json.loads(line) for line in (dreambooth / "logs/history.jsonl").read_text().splitlines()]
    logged = {event.step: event.value for event in events.Scalars("loss")}
    assert logged == pytest.approx({line["step"]: line["loss"] for line in lines}, rel=1e-6)


def test_tensorboard_can_be_read_while_a_run_goes_on(write_config, monkeypatch):
    trainer = build_trainer(load_config(write_config(trackers=["tensorboard"], loop={"steps": 3})))
    seen = []

    class Look(Callback):
        def on_step(self, run):
            events = EventAccumulator(str(run.folder / "logs/loraloom"))
            events.Reload()
            seen.append([event.step for event in events.Scalars("loss")])

    monkeypatch.setattr(tracking, "EVERY", 0.0)
    trainer.callbacks = [tracking.Tracking(), Look()]
    trainer.fit()
    assert seen == [[1], [1, 2], [1, 2, 3]]


def test_wandb_offline_has_the_same_losses(write_config, monkeypatch):
    """With the real package: what it will upload holds what the history holds, when its own process has written it."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = write_config(trackers=["wandb"], loop={"steps": 3})
    assert main([str(config)]) == 0
    folder = config.parent / "run"
    (file,) = (folder / "logs" / "wandb").glob("offline-run-*/*.wandb")
    lines = [json.loads(line) for line in (folder / "logs/history.jsonl").read_text().splitlines()]
    deadline = time.monotonic() + 60
    while len(losses_in(file)) < len(lines) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert losses_in(file) == [line["loss"] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("metadata", ["minimal", "full"])
def test_wandb_gets_what_the_metadata_may_tell(write_config, photos, monkeypatch, capsys, metadata):
    """All bytes that the real package keeps for its upload, when its own process has ended."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    rules = {"trigger": "qwxtrigger", "class_token": "kittenclass"}
    sources = []
    for name in ({}, {"name": "my-name"}):
        folder = photos.parent / f"kennelfolder{len(name)}"
        shutil.copytree(photos, folder, dirs_exist_ok=True)
        sources.append({"path": str(folder), "caption": "qwxtrigger asleep", **name})
    data = {"sources": sources, "captions": rules}
    prompts = {"prompts": ["qwxtrigger riding"], "steps": 1, "num_images": 1, "at_start": False}
    config = write_config(
        trackers=["wandb"], loop={"steps": 4}, data=data, validation=prompts, output={"metadata": metadata}
    )
    monkeypatch.setattr(sys, "argv", ["loraloom", "train", str(config), "output.name=tiny"])
    assert main([str(config)]) == 0
    folder = config.parent / "run" / "logs" / "wandb"
    (upload,) = folder.glob("offline-run-*/*.wandb")
    deadline = time.monotonic() + 60
    while len(losses_in(upload)) < 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    files = [file for file in folder.glob("offline-run-*/**/*") if file.is_file() and file.suffix != ".log"]
    kept = b"".join(file.read_bytes() for file in files)
    assert b"adamw" in kept and b"my-name" in kept, "the config and the curves are there"
    assert (b"qwxtrigger" in kept) == (metadata == "full")
    for private in ("kennelfolder", config.parent):
        assert str(private).encode() not in kept
    assert not any(file.name in ("wandb-metadata.json", "output.log") for file in files)


def losses_in(file: Path) -> list[float]:
    from wandb.proto import wandb_internal_pb2

    logged = []
    for data in leveldb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        values = {(item.key or "/".join(item.nested_key)): item.value_json for item in record.history.item}
        if "loss" in values:
            logged.append(float(values["loss"]))
    return logged


def leveldb_records(content: bytes):
    """https://github.com/google/leveldb/blob/main/doc/log_format.md, behind seven bytes of W&B's own."""
    place, record = 7, b""
    while place + 7 <= len(content):
        if (left := -place % 32768) < 7 and left:  # a block is filled up with zeros
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        if place + 7 + length > len(content):  # on its way
            return
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last piece
            yield record
            record = b""


@pytest.mark.parametrize("moment", ["start", "log", "finish"])
def test_a_tracker_that_fails_does_not_stop_a_run(write_config, monkeypatch, capsys, moment):
    """Its service is down from the beginning, or goes away."""
    import wandb
    from accelerate.tracking import WandBTracker

    def down(*arguments, **settings):
        raise wandb.errors.CommError("the server cannot be reached")

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(WandBTracker, moment, down)
    config = write_config(trackers=["wandb", "tensorboard"], loop={"steps": 3})
    assert main([str(config)]) == 0
    said = capsys.readouterr().out
    assert said.count("the server cannot be reached") == 1
    assert ("wandb could not finish" if moment == "finish" else "training goes on") in said
    events = EventAccumulator(str(config.parent / "run/logs/loraloom"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]


def test_the_record_says_where_the_time_went(dreambooth):
    record = json.loads((dreambooth / "run.json").read_text())
    assert {"data", "forward", "backward", "optimiser", "Validation", "Checkpoints"} <= record["seconds_of"].keys()
    assert "Where the time went" in (dreambooth / "report.html").read_text()


def test_class_images_are_made_once_and_kept(dreambooth):
    (folder,) = dreambooth.glob("prior-*")
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [f"{index:05d}.png" for index in range(6)]
    assert len({file.read_bytes() for file in files}) == 6
    times = [file.stat().st_mtime_ns for file in files]
    files[2].unlink()
    assert main(["--resume", str(dreambooth)]) == 0
    again = [file.stat().st_mtime_ns for file in files]
    assert [old == new for old, new in zip(times, again, strict=True)] == [True, True, False, True, True, True]


def test_validation_pictures_of_prompts_with_the_same_slug_do_not_collide(dreambooth):
    assert slug("星") == slug("月")
    for step in (3, 6):
        folder = dreambooth / f"samples/step-{step:06d}"
        listed = json.loads((folder / "samples.json").read_text())
        assert len({entry["file"] for entry in listed}) == 8
        assert [entry["seed"] for entry in listed] == [0, 1] * 4
        assert all(Image.open(folder / entry["file"]).size == (32, 32) for entry in listed)
        assert Image.open(folder / "grid.png").size == (64, 128)


def test_the_report_is_there_and_holds_the_pictures(dreambooth):
    page = (dreambooth / "report.html").read_text()
    assert page.count("data:image/") >= 16
    assert "http://" not in page.replace("http://www.w3.org/", "")


def test_run_json_tells_how_it_went(dreambooth):
    facts = json.loads((dreambooth / "run.json").read_text())
    assert (facts["state"], facts["exit_code"], facts["step"]) == ("done", 0, 6)
    assert facts["modules"]["text_encoder"] == 8
    assert facts["verify"]["kohya"]["delta_difference"] == 0.0
