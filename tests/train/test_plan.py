"""The plan: what would happen, and nothing does."""

import json

import pytest
from PIL import Image

from loraloom.configs.command import run_command
from loraloom.train.plan import main


def test_the_plan_says_what_is_trained_and_written(write_config, photos, capsys):
    sources = [{"path": str(photos), "caption": "x", "share": 0.5}, {"prior": "a creature", "count": 4, "share": 0.5}]
    config = write_config(data={"sources": sources}, validation={"prompts": ["x"], "every": 5})
    assert main([str(config), "adapter.rank=2", "--all"]) == 0
    whole = capsys.readouterr().out
    assert "weight_decay: 0.01  # default" in whole
    assert main([str(config), "adapter.rank=2"]) == 0
    text = capsys.readouterr().out
    assert "rank: 2\n" in text
    assert "weight_decay" not in text  # what is set stands alone
    assert whole.partition("\nData\n")[2] == text.partition("\nData\n")[2]
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert f"{photos.name} 6 10 50% 1.7 times 1 0..10" in rows  # 10 steps of 2, half of 20 samples over 6 images
    assert "prior 4 10 50% 2.5 times 1 0..10" in rows
    assert "unet: 128 modules (attention)" in text  # 16 transformer blocks, as in SD 1.x, with 8 targets each
    assert "text_encoder: 8 modules (attention)" in text
    assert "10 optimiser steps of 2 samples = 20 samples" in text
    assert "4 validation images every 5 steps" in text
    assert "tiny.kohya.safetensors" in text
    assert not (config.parent / "run").exists()


@pytest.mark.parametrize("words", ["data.resolution=36", "adapter.parts={vae: attention}", "model.base=./nowhere"])
def test_a_plan_that_cannot_be_is_refused(write_config, words, capsys):
    assert run_command(main, [str(write_config()), words]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.fixture
def shapes(tmp_path):
    """A folder of three images for three buckets."""
    folder = tmp_path / "shapes"
    folder.mkdir()
    for index, size in enumerate([(40, 40), (80, 40), (40, 80)]):
        Image.new("RGB", size).save(folder / f"{index}.png")
    return folder


def test_a_share_that_a_short_run_misses_is_said(write_config, shapes, capsys):
    sources = [{"path": str(shapes), "caption": "x", "share": 0.5}, {"prior": "a creature", "count": 4, "share": 0.5}]
    config = str(write_config(data={"sources": sources, "resolution": 32}))
    assert main([config, "loop.steps=2"]) == 0
    said = capsys.readouterr().err
    assert "samples are 0%, its share is 50%" in said or "samples are 25%, its share is 50%" in said
    assert "more steps or fewer buckets" in said
    assert main([config, "loop.steps=100"]) == 0
    assert "its share is" not in capsys.readouterr().err


def test_shares_are_of_the_sources_that_take_part(write_config, photos, capsys):
    early = {"path": str(photos), "caption": "x", "share": 0.25, "end_step": 10, "name": "early"}
    late = {"path": str(photos), "caption": "x", "share": 0.75, "name": "late"}
    config = str(write_config(data={"sources": [early, late]}, loop={"steps": 40, "batch_size": 4}))
    assert main([config, "--json"]) == 0
    found, asked = capsys.readouterr(), {"early": 0.0625, "late": 0.9375}
    for source in json.loads(found.out)["data"]["sources"]:
        assert source["asked"] == asked[source["name"]]
        assert source["share"] == pytest.approx(asked[source["name"]], abs=0.01)
    assert found.err == ""


def test_sources_with_one_name_are_told_apart(write_config, photos, capsys):
    same = {"path": str(photos), "caption": "x"}
    config = str(write_config(data={"sources": [same, same, same | {"name": "mine"}]}))
    assert main([config, "--json"]) == 0
    names = [source["name"] for source in json.loads(capsys.readouterr().out)["data"]["sources"]]
    assert names == [photos.name, f"{photos.name} 2", "mine"]
    assert run_command(main, [str(write_config(data={"sources": [same | {"name": "a"}, same | {"name": "a"}]}))]) == 2
    assert "two sources have the `name` 'a'" in capsys.readouterr().err


def test_sizes_in_the_metadata_are_spot_checked(write_config, tmp_path, capsys):
    folder = tmp_path / "listed"
    folder.mkdir()
    lines = [{"file_name": f"{k}.png", "text": "x", "width": 40, "height": 40} for k in range(3)]
    for line in lines:
        Image.new("RGB", (40, 40)).save(folder / line["file_name"])
    config = str(write_config(data={"sources": [{"path": str(folder)}]}))

    def said(entries) -> str:
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, entries)))
        assert main([config]) == 0
        return capsys.readouterr().err

    assert said(lines) == ""
    assert "1 of 3 images that were opened" in (wrong := said([*lines[:2], lines[2] | {"width": 80}]))
    assert "2.png has 40 x 40 pixels, not 80 x 40" in wrong


def test_the_plan_of_several_processes_is_that_of_their_micro_batches(write_config, shapes, capsys):
    config = str(write_config(data={"sources": [{"path": str(shapes), "caption": "x"}]}, loop={"batch_size": 8}))

    def buckets(*arguments: str) -> list[int]:
        assert main([config, "--json", *arguments]) == 0
        return [bucket["samples"] for bucket in json.loads(capsys.readouterr().out)["data"]["buckets"]]

    alone, together = buckets("loop.steps=5"), buckets("loop.steps=5", "--processes", "2")
    assert sum(alone) == sum(together) == 40
    assert all(samples % 8 == 0 for samples in alone)
    assert together == buckets("loop.steps=5", "loop.micro_batch=4") != alone
