"""Sound files of every kind that loraloom reads, and what makes them hostile: structure-aware mutations by one draw."""

import csv
import io
import json
import os
import random
import shutil
import socket
import struct
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ODD: list[Any] = [
    *(None, True, [], {}, "", "\0", "\ud800", "a\nb", "\x1b[2J", "..", "../x", "/dev/zero", "x" * 5000, "{" * 300),
    *(-1, 0, 1, 2**31, 2**63, 10**30, 1e308, -1e308, 0.5, "1e999", [1], [[1]], {"a": 1}, [None]),
    *(float("nan"), float("inf")),
]  # fmt: skip
DEEP = ("[" * 50_000, '{"a":' * 20_000, "[" * 70 + "]" * 70, '["]",' * 3000, "a: &a [*a]", "- " * 3000)
LAUGHS = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)


class Target(NamedTuple):
    """A kind of file, and the commands that read it."""

    name: str
    files: Sequence[str]  # patterns in the folder of a case; one of the files is mutated
    commands: Sequence[str]
    before: str = ""  # a command that makes some of the files: what is remembered of a folder holds for that one alone


TARGETS = (
    Target("config", ["c.yaml"], ["plan c.yaml", "plan c.yaml", "preview c.yaml", "slurm c.yaml", "train c.yaml"]),
    Target("requests", ["requests.yaml"], ["sample requests.yaml --out out"]),
    Target("grid", ["grid.yaml"], ["grid grid.yaml --out out"]),
    Target(
        "picture with a request", ["again.png"], ["sample --from again.png --out out", "sample --image again.png {}"]
    ),
    Target("list of images", ["listed/*/metadata.*"], ["plan {c} data.sources.0.path=listed/NAME"]),
    Target(
        "images and captions",
        ["photos/*"],
        ["plan {c}", "preview {c}", "cache {c} output.dir=again", "init --data photos --out new.yaml"],
    ),
    Target("tar shards", ["a.tar"], ["plan {c} data.sources=[{{shards: a.tar}}]"]),
    Target("saved dataset", ["saved/*"], ["plan {c} data.sources=[{{dataset: saved}}]"]),
    Target(
        "adapter files",
        ["run/ad*.safetensors", "peft/*", "peft/unet/*"],
        ["adapter inspect FILE", "adapter convert FILE --to kohya --base pocket --out x.safetensors",
         "sample --adapter FILE {}", "reproduce FILE", "adapter inspect peft", "sample --adapter peft {}"],
    ),
    Target(
        "model folder",
        ["base/*", "base/unet/*", "base/vae/*", "base/text_encoder/*", "base/tokenizer/*", "base/scheduler/*"],
        ["sample --base ./base {}", "plan {c} model.base=./base"],
    ),
    Target(
        "single file", ["one.safetensors"], ["convert one.safetensors --out new", "plan {c} model.base=one.safetensors"]
    ),
    Target(
        "run folder",
        ["run/*", "run/logs/*", "run/samples/*/*", "run/checkpoints/*/*"],
        ["runs .", "runs --compare run run2", "push run --dry-run --repo a/b", "resume run loop.steps=3",
         "replay run --step 2"],
    ),
    Target(
        "caches",
        ["cache/*/*.parquet", "cache/*/*.json", "cache/*/*/*.safetensors"],
        ["plan {c} output.dir=again", "train {c} output.dir=again", "cache {c} output.dir=again"],
        before="plan {c} output.dir=again",
    ),
    Target(
        "files of other trainers",
        ["init.sh", "init.toml", "init.json", "init.bat"],
        ["init --from FILE --out new.yaml"],
    ),
)  # fmt: skip
WITHOUT_RUN = ("config", "list of images", "images and captions", "tar shards", "files of other trainers")
"""Kinds for which nothing has to be trained before."""
SHORT = "--prompt x --steps 1 --num-images 1 --out out"


def make_sound(folder: Path) -> None:
    """Sound files of every kind; the run folder and the caches are made by a run of two steps, by the caller."""
    from PIL import Image

    (folder / "photos").mkdir(parents=True)
    for k in range(3):
        image = Image.effect_noise((96, 80), 60).convert("RGB")
        image.save(folder / "photos" / f"p{k}.{('png', 'jpg', 'webp')[k]}")
        (folder / "photos" / f"p{k}.txt").write_text(f"a sks creature {k}\n")
    rows = [
        {"file_name": f"p{k}.{('png', 'jpg', 'webp')[k]}", "text": f"a {k}", "width": 96, "height": 80}
        for k in range(3)
    ]
    for name in ("jsonl", "csv", "parquet"):
        shutil.copytree(folder / "photos", folder / "listed" / name, ignore=shutil.ignore_patterns("*.txt"))
        _write_list(folder / "listed" / name / f"metadata.{name}", rows)
    with tarfile.open(folder / "a.tar", "w") as tar:
        for file in sorted((folder / "photos").iterdir()):
            tar.add(file, file.name)
    config = {
        "model": {"base": "pocket"},
        "data": {"resolution": 64, "sources": [{"path": "photos"}], "captions": {"trigger": "sks"}},
        "adapter": {"rank": 2, "alpha": 2.0, "parts": {"unet": "attention"}},
        "optimizer": {"learning_rate": 1e-4},
        "loop": {"steps": 2, "batch_size": 1, "threads": 1},
        "checkpoint": {"every": 1},
        "validation": {"prompts": ["a sks creature"], "num_images": 1, "steps": 1, "at_start": False},
        "trackers": [],
        "output": {"dir": "run", "name": "ad", "formats": ["diffusers", "kohya"]},
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "sound.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    requests = {
        "base": "pocket",
        "steps": 1,
        "requests": [{"prompt": "a", "seed": 1}, {"prompt": "b", "width": 64, "height": 64}],
    }
    (folder / "requests.yaml").write_text(yaml.safe_dump(requests))
    (folder / "grid.yaml").write_text(
        yaml.safe_dump({"prompt": "a", "steps": 1, "x": {"seed": [0, 1]}, "y": {"guidance": [1, 3]}})
    )
    script = "accelerate launch train_network.py --pretrained_model_name_or_path=pocket --train_data_dir=photos\n"
    (folder / "init.sh").write_text(f"#!/bin/bash\nX=4\n{script}")
    (folder / "init.bat").write_text(script)
    (folder / "init.toml").write_text('pretrained_model_name_or_path = "pocket"\nnetwork_dim = 4\n[a]\nb = [1, 2]\n')
    (folder / "init.json").write_text(json.dumps({"pretrained_model_name_or_path": "pocket", "network_dim": 4}))


def _write_list(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif file.suffix == ".csv":
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(list(rows)), file)


def mutate(file: Path, draw: random.Random) -> str:
    """Makes a file hostile; says how."""
    ways: list[Callable[[Path, random.Random], str]] = [_other_kind, _bytes, _bytes]
    own = {
        ".json": _json, ".jsonl": _json_lines, ".yaml": _yaml, ".safetensors": _safetensors, ".png": _png,
        ".jpg": _picture, ".webp": _picture, ".tar": _tar, ".parquet": _parquet,
        ".csv": _text, ".txt": _text, ".sh": _text, ".bat": _text, ".toml": _text,
    }.get(file.suffix)  # fmt: skip
    return draw.choice([*ways, *[own] * 9] if own else ways)(file, draw)


def _other_kind(file: Path, draw: random.Random) -> str:
    file.unlink()
    kind = draw.choice(["fifo", "folder", "link to a device", "dangling link", "socket", "nothing", "empty", "circle"])
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
        (file / "x.json").write_text("{}")
    elif kind == "socket":
        where = os.getcwd()
        os.chdir(file.parent)  # their names are short
        socket.socket(socket.AF_UNIX).bind(file.name[:90])
        os.chdir(where)
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind != "nothing":
        file.symlink_to({"link to a device": "/dev/zero", "dangling link": "/nowhere/x"}.get(kind, file))
    return kind


def _bytes(file: Path, draw: random.Random) -> str:
    content = bytearray(file.read_bytes())
    place = draw.randrange(len(content) + 1)
    kind = draw.choice(["cut", "flip", "flip", "insert", "repeat", "zeros", "much"])
    if kind == "cut":
        del content[place:]
    elif kind == "flip" and content:
        for _ in range(draw.choice([1, 1, 4])):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif kind == "insert":
        content[place:place] = draw.randbytes(draw.choice([1, 8, 300]))
    elif kind == "repeat":
        content += content[: draw.choice([10, 1000, len(content)])]
    elif kind == "zeros":
        content[place : place + 64] = bytes(min(64, len(content) - place))
    else:
        content += b"a" * draw.choice([10_000, 5_000_000])
    file.write_bytes(bytes(content))
    return kind


def odd_value(values: Any, draw: random.Random) -> str:
    """Changes lists and mappings in place somewhere; says where and what."""
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            walk(value[key])

    walk(values)
    if not places:
        return "nothing"
    container, key = draw.choice(places)
    kind = draw.choice(["set", "set", "set", "set", "drop", "rename", "add"])
    value = draw.choice(ODD)
    if kind == "drop":
        container.pop(key)
    elif isinstance(container, dict) and kind in ("rename", "add"):
        container[draw.choice(["Author", "", "<<", "\0", "x" * 3000, str(key).title(), "steps"])] = (
            container.pop(key) if kind == "rename" else value
        )
    else:
        container[key] = value
    return f"{kind} {str(key)[:30]!r} {str(value)[:30]!r}"


def _structured(
    text: str, load: Callable[[str], Any], dump: Callable[[Any], str], draw: random.Random
) -> tuple[str, str]:
    if draw.random() < 0.12:
        return draw.choice(DEEP), "deep"
    values = load(text)
    words = odd_value(values, draw)
    if draw.random() < 0.2:
        words += ", " + odd_value(values, draw)
    return dump(values), words


def _write(file: Path, text: str) -> None:
    file.write_bytes(text.encode("utf-8", "surrogatepass"))


def _json(file: Path, draw: random.Random) -> str:
    text, words = _structured(file.read_text(), json.loads, json.dumps, draw)
    _write(file, text)
    return words


def _json_lines(file: Path, draw: random.Random) -> str:
    lines = file.read_text().splitlines() or ["{}"]
    place = draw.randrange(len(lines))
    lines[place], words = _structured(lines[place], json.loads, json.dumps, draw)
    _write(file, "\n".join(lines) + "\n")
    return words


def _yaml(file: Path, draw: random.Random) -> str:
    if draw.random() < 0.08:
        _write(file, LAUGHS + file.read_text())
        return "laughs"
    dump = lambda values: yaml.safe_dump(values, allow_unicode=False, sort_keys=False)  # noqa: E731
    text, words = _structured(file.read_text(), yaml.safe_load, dump, draw)
    _write(file, text)
    return words


def _safetensors(file: Path, draw: random.Random) -> str:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    values = json.loads(content[8 : 8 + length])
    metadata = values.get("__metadata__", {})
    inner = [name for name in metadata if metadata[name][:1] in "[{"]
    if inner and draw.random() < 0.4:
        name = draw.choice(inner)
        metadata[name], words = _structured(metadata[name], json.loads, json.dumps, draw)
        text = json.dumps(values)
    else:
        text, words = _structured(json.dumps(values), json.loads, json.dumps, draw)
    raw = text.encode("utf-8", "surrogatepass")
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + length :])
    return f"header: {words}"


def _png(file: Path, draw: random.Random) -> str:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    with Image.open(file) as image:
        pixels, text = image.convert("RGB"), image.info.get("loraloom")
    if text is None or draw.random() < 0.2:
        content = bytearray(file.read_bytes())
        content[16:24] = struct.pack(">II", *(draw.choice([0, 1, 96, 30_000, 2**31 - 1]) for _ in range(2)))
        file.write_bytes(bytes(content))
        return "size of the header"
    text, words = _structured(text, json.loads, json.dumps, draw)
    info = PngInfo()
    info.add_itxt("loraloom", text.encode("utf-8", "replace").decode(), zip=draw.random() < 0.5)
    if draw.random() < 0.1:
        info.add_text("x" if draw.random() < 0.5 else "loraloom", " " * (50 << 20), zip=True)
    pixels.save(file, pnginfo=info)
    return words


def _picture(file: Path, draw: random.Random) -> str:
    """A JPEG or WebP whose pixels, size or kind are not what its head or its name says."""
    content = bytearray(file.read_bytes())
    frame = content.find(b"\xff\xc0")
    kind = draw.choice(["half", "a hole", "size", "another kind", "behind text", "joined", "segment"])
    if kind == "half":
        del content[draw.randrange(len(content) // 4, len(content) - 2) :]
    elif kind == "a hole":
        del content[len(content) // 2 : len(content) // 2 + draw.choice([1, 50, 500])]
    elif kind == "size":
        sizes = struct.pack(">HH", *(draw.choice([0, 1, 79, 96, 30_000, 65_535]) for _ in range(2)))
        place = frame + 5 if frame > 0 else 24
        content[place : place + 4] = sizes
    elif kind == "another kind":
        content = _other_kind_of_picture()
    elif kind == "behind text":
        content[:0] = b"<html>" + bytes(draw.choice([0, 3, 5000]))
    elif kind == "joined":
        content += bytes(content)
    else:
        content[4:6] = draw.randbytes(2)  # the length of the first segment, or of the file
    file.write_bytes(bytes(content))
    return kind


def _other_kind_of_picture() -> bytearray:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (96, 80), "red").save(buffer, "PNG")
    return bytearray(buffer.getvalue())


def _tar(file: Path, draw: random.Random) -> str:
    content = bytearray(file.read_bytes())
    place = 1024 * draw.randrange(3)
    header = content[place : place + 512]
    field = draw.choice([(124, 136), (156, 157), (0, 100), (257, 265), (345, 500)])
    header[slice(*field)] = draw.choice(
        [
            b"\x80" + (1 << draw.choice([40, 62, 80])).to_bytes(11, "big"),
            b"77777777777\0",
            draw.randbytes(12),
            b"x" * 12,
            b"L",
        ]
    )[: field[1] - field[0]].ljust(field[1] - field[0], b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    content[place : place + 512] = header
    file.write_bytes(bytes(content))
    return f"field {field}"


def _parquet(file: Path, draw: random.Random) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(file)
    name = draw.choice(table.column_names)
    values = table[name].to_pylist()
    kind = draw.choice(["drop", "numbers", "odd text", "nulls", "lists", "binary"])
    place = table.column_names.index(name)
    if kind == "drop":
        table = table.remove_column(place)
    else:
        odd = {"numbers": 10**18, "odd text": "a\0b", "nulls": None, "lists": [1], "binary": b"\xff\xfe"}[kind]
        table = table.set_column(place, name, pa.array([odd] * len(values)))
    pq.write_table(table, file)
    return f"{kind} of {name}"


def _text(file: Path, draw: random.Random) -> str:
    odd = [
        "\0",
        "\ud800",
        '"',
        "'",
        "[" * 4000,
        "$HOME",
        "$(touch pwned)",
        "\x1b[2J",
        "9" * 5000,
        "\\",
        "a" * 200_000,
        "<<E\n",
        "{" * 99,
    ]
    text, piece = file.read_text(), draw.choice(odd)
    place = draw.randrange(len(text) + 1)
    _write(file, text[:place] + piece + text[place:])
    return f"inserted {piece[:20]!r}"


def sound_png(file: Path, request: dict[str, Any]) -> None:
    """A picture as `loraloom sample` writes them."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("loraloom", json.dumps(request))
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(buffer, "PNG", pnginfo=info)
    file.write_bytes(buffer.getvalue())
