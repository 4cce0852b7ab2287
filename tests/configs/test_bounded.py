"""Whatever a file holds, reading it gives a value or a UserError, and takes little time and memory."""

import json
import os
import socket
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom.configs import bounded, headers
from loraloom.configs.document import CoreLoader, FastCoreLoader
from loraloom.configs.errors import UserError

LAUGHS = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-bounded.LARGEST, bounded.LARGEST) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


def refused(read, *arguments) -> str:
    with pytest.raises(UserError) as error:
        read(*arguments)
    assert len(error.value.problems) == 1 and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", ["folder", "fifo", "socket", "device", "nothing", "loop", "long", "nul"])
def test_only_regular_files_are_opened(tmp_path, kind):
    path: Path | str = tmp_path / kind
    if kind == "folder":
        os.mkdir(path)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        where = os.getcwd()
        os.chdir(tmp_path)  # a name of a socket is short
        socket.socket(socket.AF_UNIX).bind(kind)
        os.chdir(where)
    elif kind == "device":
        path = "/dev/zero"
    elif kind == "loop":
        os.symlink(path, path)
    elif kind != "nothing":
        path = f"{tmp_path}/{'a' * 5000 if kind == 'long' else chr(0)}"
    for read in (bounded.regular, bounded.read_bytes, bounded.read_json, headers.safetensors_header):
        assert refused(read, path).startswith(f"{path}: ")


def test_a_link_to_a_file_is_that_file_and_sizes_are_limited(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}')
    (tmp_path / "b.json").symlink_to("a.json")
    assert bounded.read_json(tmp_path / "b.json") == {"a": 1}
    assert "more than the 4" in refused(bounded.read_bytes, tmp_path / "b.json", 4)
    assert "a JSON list, found a JSON object" in refused(bounded.read_json, tmp_path / "b.json", list)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        '["]",' * 100_000,  # brackets in texts hide none
        "[" * 65 + "]" * 65,
        '["' + "[" * 500 + '",' + '["]",' * 500 + "1" + "]" * 501,
        f'{{"a": {"9" * 5000}}}',
        '{"a": 9223372036854775808}',
        '{"a": 1e999}',
        "[" + "[]," * 2_000_001 + "1]",
        '{"a": 1',
        "",
        b"\xff\xfe",
    ],
    ids=lambda text: str(text[:12]),
)
def test_json_out_of_bounds_is_one_line(text):
    assert refused(bounded.parse_json, text, "x.json").startswith("x.json: ")


@given(VALUES)
@settings(max_examples=50, deadline=None)
def test_json_within_bounds_is_what_it_was(values):
    text = json.dumps(values)
    assert repr(bounded.parse_json(text, "x")) == repr(json.loads(text))


def test_depth_counts_what_is_nested_and_nothing_else():
    text = json.dumps([{"a": "[" * 1000, "b": ["]" * 1000] * 100}] * 100)
    assert bounded.parse_json(text, "x") == json.loads(text)
    assert bounded.parse_json("[" * 64 + "]" * 64, "x")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "\n".join(" " * k + "a:" for k in range(1500)), LAUGHS, "- [] \n" * 400_000]
)
def test_yaml_out_of_bounds_is_refused_by_both_loaders(text):
    refused(bounded.parse_yaml, text, "x.yaml")
    with pytest.raises(ValueError, match="more than"):
        bounded.compose_yaml(text, CoreLoader, FastCoreLoader)


@pytest.mark.parametrize("text", ["a: 2026-99-99", "a: &a [*a]", "? [a]\n: b", "a: !!python/name:os.system", "a: [\0]"])
def test_odd_yaml_is_one_line(text):
    refused(bounded.parse_yaml, text, "x.yaml")


@pytest.mark.parametrize("text", [f"a = {'[' * 5000}", f"{'.'.join('a' * 3000)} = 1", f"a = {'9' * 5000}", "a = "])
def test_toml_out_of_bounds_is_one_line(text):
    assert refused(bounded.parse_toml, text, "x.toml").startswith("x.toml: ")


def packed(header, content: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


SOUND = {
    "a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
    "b": {"dtype": "F16", "shape": [], "data_offsets": [8, 10]},
}


@given(st.sampled_from(["dtype", "shape", "data_offsets"]), VALUES)
@settings(max_examples=100, deadline=None)
def test_a_header_with_another_value_is_refused(tmp_path_factory, key, value):
    file = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    changed = {**SOUND, "a": {**SOUND["a"], key: value}}
    file.write_bytes(packed(changed, bytes(10)))
    if changed == SOUND:
        assert headers.safetensors_header(file).tensors["a"].shape == (2, 1)
    else:
        refused(headers.safetensors_header, file)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        packed(b"[" * 100_000),
        packed([1]),
        packed({"__metadata__": {"a": 5}}),
        packed({"__metadata__": [1]}),
        packed({**SOUND, "a": 5}, bytes(10)),
        packed({**SOUND, "a": SOUND["b"]}, bytes(10)),
        packed({**SOUND, "\0": {"dtype": "F16", "shape": [0], "data_offsets": [10, 10]}}, bytes(10)),
        packed(SOUND, bytes(9)),
        packed(SOUND, bytes(11)),
        struct.pack("<Q", 2**63),
    ],
)
def test_a_header_that_is_not_sound_is_one_line(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    refused(headers.safetensors_header, tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "names", [{}, [], 5, {"a": 5}, {"a": "../b.safetensors"}, {"a": ".."}, {"a": "x\0"}, {"a": "pipe"}]
)
def test_an_index_names_files_of_its_folder(tmp_path, names):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "x.index.json").write_text(json.dumps({"weight_map": names}))
    refused(headers.weight_index, tmp_path / "x.index.json")


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


BOMB = zlib.compress(b" " * (300 << 20), 9)


@pytest.mark.slow
@pytest.mark.parametrize("bomb", [chunk(b"zTXt", b"loraloom\0\0" + BOMB), chunk(b"iTXt", b"loraloom\0\1\0\0\0" + BOMB)])
def test_texts_of_a_png_are_not_unpacked_without_end(tmp_path, bomb):
    file = tmp_path / "a.png"
    begin = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    file.write_bytes(begin + chunk(b"tEXt", b"other\0words") + chunk(b"iTXt", b"loraloom\0\0\0\0\0{}"))
    assert (headers.png_text(file, "loraloom"), headers.png_text(file, "x")) == ("{}", None)
    file.write_bytes(begin + bomb)
    assert "unpacked" in refused(headers.png_text, file, "loraloom")
