"""Cached steps are those without a cache, to the bit; what is cached can never be stale; encoders stay on the disk."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from loraloom.configs.command import run_command
from loraloom.configs.errors import UserError
from loraloom.configs.loader import load_config
from loraloom.data.cache import Store
from loraloom.train.build import build_trainer
from loraloom.train.cache import main as cache
from loraloom.train.callback import Callback
from loraloom.train.plan import make_plan
from loraloom.train.preflight import preflight

pytestmark = pytest.mark.slow

SIZES = ((40, 40), (80, 40), (40, 80), (84, 44))


class Recorder(Callback):
    """Keeps the losses."""

    def __init__(self):
        self.losses = []

    def on_results(self, run, results):
        self.losses += [result.loss for result in results]


@pytest.fixture
def shapes(tmp_path) -> Path:
    """Four pictures of three shapes with tags; two have a mask."""
    folder = tmp_path / "shapes"
    folder.mkdir()
    for index, (width, height) in enumerate(SIZES):
        pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"sks, tag {index}, small, round\n")
        mask = np.zeros((height, width), dtype=np.uint8)
        mask[: height // 2] = 255
        Image.fromarray(mask).save(folder / f"{index}.mask.png")
    return folder


@pytest.fixture
def write(write_config, shapes, tmp_path):
    """A run on the shapes that trains the UNet alone, so that all can be cached, with a cache of its own."""

    def write(name="run", captions=None, cached="auto", **data):
        section = {
            "sources": [{"path": str(shapes), "mask": "file"}],
            "captions": {"shuffle": True, "keep_tokens": 1, "dropout": 0.3} if captions is None else captions,
            "variants": 2,
            "crop": "random",
            "flip": 0.5,
            "cache": {"dir": str(tmp_path / "cache"), "latents": cached, "prompts": cached},
        }
        return write_config(
            name,
            data=section | data,
            adapter={"parts": {"unet": "attention"}},
            loop={"steps": 6, "batch_size": 4, "micro_batch": 2},
        )

    return write


def losses(config_file, *overrides):
    trainer, recorder = build_trainer(load_config(config_file, overrides), overwrite=True), Recorder()
    trainer.callbacks = [recorder]
    trainer.fit()
    return recorder.losses, trainer.run


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.safetensors"))}


def test_cached_steps_are_those_without_a_cache_to_the_bit(write, tmp_path):
    plain, run = losses(write(cached=False))
    assert {"vae", "text_encoder"} <= run.parts.keys()
    assert not (tmp_path / "cache" / "latents").exists()
    cached, run = losses(write())
    assert cached == plain
    assert len(set(plain)) == 6
    assert {"vae", "text_encoder", "tokenizer"}.isdisjoint(run.parts), "encoders stay on the disk"
    again, _ = losses(write())
    assert again == plain


def test_workers_read_what_the_loop_would_have_read(write):
    alone, _ = losses(write(cached=False))
    with_workers, _ = losses(write(cached=False), "data.workers=2")
    assert with_workers == alone


def test_masks_and_windows_matter(write):
    masked, _ = losses(write())
    everywhere, _ = losses(write(), "data.sources.0.mask=none")
    longer, _ = losses(write(), "data.token_windows=2")
    assert len({masked[0], everywhere[0], longer[0]}) == 3


def test_the_draw_of_a_latent_may_be_made_once(write, tmp_path):
    each, _ = losses(write())
    once, _ = losses(write(), "data.cache.latent_draw=once")
    assert once != each
    stores = list((tmp_path / "cache" / "latents").iterdir())
    assert len(stores) == 2, "one kind of entry can never be read as the other"


def wanted(config_file, *overrides):
    """(missing latents, missing prompts) as the plan says."""
    config = load_config(config_file, overrides)
    caches = {found.name: found for found in make_plan(config, preflight(config)).caches}
    return tuple(caches[name].entries - caches[name].present for name in ("latents", "prompt embeddings"))


def test_only_what_changed_is_computed_again(write, shapes, tiny_base, tmp_path):
    config = write(captions={}, crop="center", flip=0.0)
    assert wanted(config) == (4, 6)  # four captions, the empty one and the one that verifies
    assert cache([str(config)]) == 0
    assert wanted(config) == (0, 0)
    (shapes / "0.txt").write_text("another caption\n")
    assert wanted(config) == (0, 1)
    os.utime(shapes / "1.png", (1, 1))
    assert wanted(config) == (0, 1), "the same picture at another time"
    Image.new("RGB", (40, 40), "red").save(shapes / "0.png")
    assert wanted(config) == (1, 1)
    (shapes / "2.png").rename(shapes / "9.png")
    (shapes / "2.txt").rename(shapes / "9.txt")
    (shapes / "2.mask.png").rename(shapes / "9.mask.png")
    assert wanted(config) == (1, 1), "a name is no content"
    Image.new("L", (84, 44), 255).save(shapes / "3.mask.png")
    assert wanted(config) == (2, 1), "a mask is kept beside the latents"


def test_other_encoders_other_caches(write, tiny_base, tmp_path):
    config = write(captions={}, crop="center", flip=0.0)
    assert cache([str(config)]) == 0
    other = tmp_path / "base"
    shutil.copytree(tiny_base, other)
    file = next((other / "vae").glob("*.safetensors"))
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] + 1e-3}, file)
    assert wanted(config, f"model.base={other}")[1] == 0
    assert wanted(config, f"model.base={other}")[0] == 4
    assert wanted(config, "model.dtype=bf16") == (0, 6), "images are encoded in fp32, captions in the base's type"
    assert wanted(config, "data.token_windows=2")[0] == 0
    assert wanted(config, "data.token_windows=2")[1] > 0
    assert wanted(config, "data.background=[0, 0, 0]")[0] == 4


def test_latents_that_are_not_finite_are_named_before_training(write, tiny_base, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    file = next((base / "vae").glob("*.safetensors"))
    save_file({name: tensor * float("nan") for name, tensor in load_file(file).items()}, file)
    assert run_command(cache, [str(write()), f"model.base={base}"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert ".png" in line
    assert "not finite" in line


def test_embeddings_that_are_not_finite_are_named_before_training(write, tiny_base, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    file = next((base / "text_encoder").glob("*.safetensors"))
    save_file({name: tensor * float("nan") for name, tensor in load_file(file).items()}, file)
    assert run_command(cache, [str(write(captions={})), f"model.base={base}"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "'sks, tag 0, small, round': the text encoders" in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cache": {"latents": True}, "crop": "random"}, ["crop: random", "variants: 8"]),
        ({"cache": {"prompts": True}, "captions": {"shuffle": True}}, ["random captions", "variants: 8"]),
    ],
)
def test_what_has_no_end_cannot_be_cached(write_config, shapes, options, words):
    with pytest.raises(UserError) as caught:
        load_config(write_config(data={"sources": [{"path": str(shapes)}]} | options))
    assert all(word in str(caught.value) for word in words)


def test_embeddings_of_an_encoder_that_trains_are_not_cached(write_config, shapes, capsys):
    data = {"sources": [{"path": str(shapes)}], "cache": {"prompts": True}}
    assert run_command(cache, [str(write_config(data=data))]) == 2
    assert "text_encoder trains" in capsys.readouterr().err


def test_the_plan_is_what_the_run_does(write):
    config = load_config(write())
    plan = make_plan(config, preflight(config)).data
    trainer = build_trainer(config, overwrite=True)
    trainer.callbacks, seen = [], []
    inner = trainer.batches
    trainer.batches = iter([seen.append(batch) or batch for batch in inner])
    trainer.fit()
    samples = [sample for batch in seen for sample in batch.samples]
    assert trainer.run.step == plan.steps == 6
    assert len(samples) == plan.samples == sum(source.samples for source in plan.sources) == 24
    done: dict[tuple[int, int], int] = {}
    for sample in samples:
        done[sample.geometry.target] = done.get(sample.geometry.target, 0) + 1
    assert done == {(b.width, b.height): b.samples for b in plan.buckets if b.samples}
    assert len({sample.image for sample in samples}) == plan.sources[0].images == 4
    assert all(len({sample.geometry.target for sample in batch.samples}) == 1 for batch in seen)


def test_an_image_that_comes_again_is_not_read_again(write, monkeypatch):
    read, get = [], Store.get
    monkeypatch.setattr(Store, "get", lambda store, key: read.append((store.folder, key)) or get(store, key))
    trainer = build_trainer(load_config(write()), overwrite=True)
    trainer.callbacks, seen = [], []
    trainer.batches = iter([seen.append(batch) or batch for batch in trainer.batches])
    trainer.fit()
    cuts = {(sample.image, sample.geometry) for batch in seen for sample in batch.samples}
    assert len(read) == len({*read})
    assert sum(folder.parent.name == "latents" for folder, _ in read) == len(cuts)
    assert len(cuts) < sum(len(batch.samples) for batch in seen)


def test_a_resumed_run_must_find_the_same_images(write, shapes, capsys):
    from loraloom.train.__main__ import main

    config = write()
    assert main([str(config)]) == 0
    folder = str(config.parent / "run")
    assert run_command(main, ["--resume", folder, "loop.steps=8", "loop.micro_batch=1"]) == 2
    assert "several buckets" in capsys.readouterr().err
    (shapes / "0.txt").write_text("sks, changed\n")
    assert run_command(main, ["--resume", folder, "loop.steps=8"]) == 2
    assert "captions were changed" in capsys.readouterr().err
    (shapes / "0.txt").write_text("sks, tag 0, small, round\n")
    assert run_command(main, ["--resume", folder, "loop.steps=8"]) == 0


def test_a_resumed_run_says_where_its_relative_paths_begin(write, shapes, tmp_path, monkeypatch, capsys):
    from loraloom.train.__main__ import main

    monkeypatch.chdir(tmp_path)
    config = write(sources=[{"path": shapes.name, "mask": "file"}])
    assert main([str(config), "loop.steps=1"]) == 0
    monkeypatch.chdir(tmp_path.parent)
    assert run_command(main, ["--resume", str(tmp_path / "run"), "loop.steps=2"]) == 2
    gone, hint = capsys.readouterr().err.splitlines()[-2:]
    assert "shapes: there is no such folder" in gone
    assert "resume it from where it was started" in hint


def test_a_shard_that_was_damaged_is_computed_anew(write, tmp_path, capsys):
    from loraloom.train.__main__ import main

    def cached() -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in (tmp_path / "cache" / "latents").rglob("*.safetensors")}

    assert main([str(write())]) == 0
    sound = cached()
    (shard,) = (tmp_path / "cache" / "latents").rglob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-8:] = bytes(8 - len(content[-8:])) + bytes(value ^ 1 for value in content[-8:])
    shard.write_bytes(content)
    assert main([str(write("mended"))]) == 0
    assert "damaged, an entry is not what was written; what it held is computed anew" in capsys.readouterr().err
    assert cached() == sound


def test_a_killed_build_goes_on_and_two_processes_write_what_one_writes(start, run_two, write, tmp_path):
    config, whole, pieces = write(), tmp_path / "whole", tmp_path / "pieces"
    assert cache([str(config), f"data.cache.dir={whole}", "loop.threads=1"]) == 0
    command = ["loraloom.train.cache", str(config), f"data.cache.dir={pieces}", "loop.threads=1"]
    killed = start(*command, own_group=True)
    deadline = time.monotonic() + 60
    while not files_of(pieces) and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    run_two(*command)
    assert files_of(pieces) == files_of(whole)
    assert json.dumps(sorted(files_of(whole))).count("latents") == 1
