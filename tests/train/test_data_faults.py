"""Bad images and captions as a user meets them: all at once, with paths, before anything is loaded."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from loraloom.configs.command import run_command
from loraloom.train.__main__ import main


def png(size=(40, 40), mode="RGB", **options) -> bytes:
    content = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(content, options.pop("format", "PNG"), **options)
    return content.getvalue()


def animation() -> bytes:
    content = io.BytesIO()
    frames = [Image.new("L", (40, 40), shade) for shade in (0, 255)]
    frames[0].save(content, "GIF", save_all=True, append_images=frames[1:])
    return content.getvalue()


BAD = {
    "truncated.png": (png()[:900], "decoded"),
    "truncated.jpg": (png(format="JPEG")[:500], "decoded"),
    "empty.png": (b"", "empty"),
    "page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "HTML"),
    "text.png": (b"no picture at all", "not an image"),
    "dot.png": (png((1, 1)), "too small"),
    "thread.png": (png((2000, 20)), "4"),
    "moving.gif": (animation(), "animation"),
}


@pytest.fixture
def bad(tmp_path, photos):
    """A folder of two good images, all kinds of bad ones, and files that are no images."""
    folder = tmp_path / "bad"
    folder.mkdir()
    for name in ("good.png", "also good.png"):
        (folder / name).write_bytes(png())
    for name, (content, _) in BAD.items():
        (folder / name).write_bytes(content)
    for name in (".DS_Store", "Thumbs.db", "._good.png", "notes.json"):
        (folder / name).write_bytes(b"\0\1\2")
    return folder


def errors(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]


def run_of(write_config, *overrides, **data):
    return run_command(main, [str(write_config(data=data, loop={"steps": 1})), *overrides])


def test_all_bad_images_are_listed_at_once(write_config, bad, capsys):
    assert run_of(write_config, sources=[{"path": str(bad), "caption": "x"}]) == 2
    lines = errors(capsys)
    assert len(lines) == len(BAD)
    for name, (_, word) in BAD.items():
        (line,) = [line for line in lines if f"/{name}:" in line]
        assert word in line, line
    assert not (bad.parent / "run").exists()


def test_bad_images_can_be_left_out_up_to_a_limit(write_config, bad, capsys):
    sources = [{"path": str(bad), "caption": "x"}]
    assert run_of(write_config, sources=sources, on_bad_image="skip", max_skipped=0.5) == 2
    (line,) = errors(capsys)
    assert "8" in line
    assert run_of(write_config, sources=sources, on_bad_image="skip", max_skipped=0.9) == 0
    said = capsys.readouterr().err
    assert all(name in said for name in BAD)


def test_no_sound_image_is_no_run(write_config, tmp_path, capsys):
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "a.png").write_bytes(b"")
    sources = [{"path": str(tmp_path / "only"), "caption": "x"}]
    assert run_of(write_config, sources=sources, on_bad_image="skip", max_skipped=1.0) == 2
    (line,) = errors(capsys)
    assert "a.png" in line
    assert "left" in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("caf\xe9".encode("cp1252"), ["0xe9", "offset 3", "UTF-8"]),
        ("sks".encode("utf-16"), ["offset 0", "UTF-16"]),
        (b"", ["empty"]),
        (None, ["caption"]),
        (b"a photo of [trigger]", ["[trigger]", "trigger"]),
    ],
)
def test_bad_captions_are_refused_with_their_place(write_config, tmp_path, capsys, content, words):
    folder = tmp_path / "captioned"
    folder.mkdir()
    (folder / "a.png").write_bytes(png())
    if content is not None:
        (folder / "a.txt").write_bytes(content)
    assert run_of(write_config, sources=[{"path": str(folder)}]) == 2
    (line,) = errors(capsys)
    assert "captioned/a." in line
    assert all(word in line for word in words), line


def test_a_byte_order_mark_is_no_part_of_a_caption(write_config, tmp_path):
    from loraloom.configs.loader import load_config
    from loraloom.train.gather import gather

    folder = tmp_path / "captioned"
    folder.mkdir()
    (folder / "a.png").write_bytes(png())
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfa sks dog\n")
    (images,) = gather(load_config(write_config(data={"sources": [{"path": str(folder)}]})).data, progress=False)
    assert images is not None
    assert images.source.captions(0) == ["a sks dog"]


def test_bad_lines_of_a_list_are_named(write_config, tmp_path, capsys):
    folder = tmp_path / "listed"
    folder.mkdir()
    (folder / "a.png").write_bytes(png())
    (tmp_path / "outside.png").write_bytes(png())
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    rows = [
        json.dumps({"file_name": "a.png", "text": "x"}),
        '{"file_name": "b.png", ',
        json.dumps({"file_name": "../outside.png", "text": "x"}),
        json.dumps({"file_name": str(tmp_path / "outside.png"), "text": "x"}),
        json.dumps({"file_name": "link.png", "text": "x"}),
    ]
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    assert run_of(write_config, sources=[{"path": str(folder)}]) == 2
    lines = errors(capsys)
    for place in ("2", "3", "4", "5"):
        assert any(f"line {place}" in line or f":{place}" in line for line in lines), (place, lines)


def test_long_captions_are_counted_cut_or_refused(write_config, photos, capsys):
    long = [{"path": str(photos), "caption": "red star, " * 60}]
    assert run_of(write_config, sources=long, long_captions="error") == 2
    assert "only the first 75" in errors(capsys)[0]
    assert run_of(write_config, sources=long, token_windows=8, long_captions="error") == 0
    assert "only the first" not in capsys.readouterr().err


def test_one_image_fills_a_batch_of_four(write_config, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.png").write_bytes(png())
    data = {"sources": [{"path": str(tmp_path / "one"), "caption": "x"}]}
    assert run_command(main, [str(write_config(data=data, loop={"steps": 1, "batch_size": 4}))]) == 0


def test_class_images_that_may_not_be_made_must_be_there(write_config, photos, capsys):
    sources = [{"path": str(photos), "caption": "x"}, {"prior": "a creature", "count": 4, "generate": False}]
    assert run_of(write_config, sources=sources) == 2
    assert "0 of 4 class images" in errors(capsys)[0]


def test_a_truncated_shard_is_refused(write_config, tmp_path, capsys):
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as tar:
        for name, content in (("0.png", png()), ("0.txt", b"x"), ("1.png", png()), ("1.txt", b"x")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    shard.write_bytes(shard.read_bytes()[:6000])
    assert run_of(write_config, sources=[{"shards": str(tmp_path / "*.tar")}]) == 2
    assert any("a.tar" in line for line in errors(capsys))


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ([{"start_step": 2}], "no source takes part in steps 0 to 1 of 4"),
        ([{"end_step": 2}], "no source takes part in steps 2 to 3 of 4"),
        ([{}, {"start_step": 9}], "start_step 9 is not before the run's end"),
    ],
)
def test_steps_without_a_source_are_refused(write_config, photos, capsys, spans, words):
    sources = [{"path": str(photos), "caption": "x"} | span for span in spans]
    assert run_of(write_config, "loop.steps=4", sources=sources) == 2
    (line,) = errors(capsys)
    assert words in line


def test_class_images_that_are_not_made_can_be_planned(write_config, photos, capsys):
    from loraloom.train.plan import main as plan

    sources = [{"path": str(photos), "caption": "x"}, {"prior": "a creature", "count": 4}]
    config = write_config(data={"sources": sources}, adapter={"parts": {"unet": "attention"}})
    assert plan([str(config)]) == 0
    assert "prompt embeddings: " in capsys.readouterr().out


def test_alternatives_do_not_hide_a_long_caption(write_config, photos, capsys):
    caption = "{red|" + "star " * 100 + "}"
    data = {"sources": [{"path": str(photos), "caption": caption}], "captions": {"wildcards": True}}
    assert run_of(write_config, **data, long_captions="error") == 2
    assert "only the first 75" in errors(capsys)[0]


def test_an_image_that_a_worker_misses_is_one_line(write_config, tmp_path, capsys, monkeypatch):
    from loraloom.train import build

    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "a.png").write_bytes(png())
    made = build.build_dataset
    monkeypatch.setattr(build, "build_dataset", lambda *all: (made(*all), (tmp_path / "gone" / "a.png").unlink())[0])
    data = {"sources": [{"path": str(tmp_path / "gone"), "caption": "x"}], "cache": {"latents": False}, "workers": 1}
    assert run_of(write_config, **data) == 3
    (line,) = errors(capsys)
    assert "a.png" in line
