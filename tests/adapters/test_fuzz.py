"""Damaged and hostile files: reading one either gives an adapter that works or says what is wrong, at once.

Nothing else comes out: no other exception, no code that runs, no memory for what a header merely claims.
"""

import json
import math
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from loraloom.adapters import format
from loraloom.adapters.artifact import AdapterArtifact, Weights
from loraloom.adapters.format import FormatNames
from loraloom.configs.errors import UserError

pytestmark = pytest.mark.slow

SHAPES: dict[tuple[str, str], tuple[int, ...]] = {("unet", "a.to_q"): (4, 6), ("unet", "a.conv"): (4, 6, 3, 3)}
KNOWN = FormatNames({"unet": {path: shape for (_, path), shape in SHAPES.items()}}, {"unet": "lora_unet"}, "x", "sd_v1")
UNKNOWN = FormatNames({"unet": [path for _, path in SHAPES]}, {"unet": "lora_unet"}, "x", "sd_v1")
"""A base whose sizes are known, and one whose are not."""

FILES = [("diffusers", "lora"), ("kohya", "lora"), ("kohya", "dora"), ("kohya", "loha, core"), ("kohya", "lokr, core")]
FILES += [("loraloom", "lora"), ("loraloom", "lokr"), ("peft", "lora"), ("peft", "loha")]

quickly = settings(
    max_examples=60,
    deadline=timedelta(seconds=10),
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def sound(random_weights: Callable[..., Weights], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Good files, by format and kind; of a folder its one file of weights."""
    folder, found = tmp_path_factory.mktemp("sound"), {}
    for name, kind in FILES:
        generator = torch.Generator().manual_seed(0)
        drawn = {key: random_weights(kind, shape, 1, 0.5, generator) for key, shape in SHAPES.items()}
        file = folder / format.file_name(kind, name)
        format.write(AdapterArtifact(drawn), file, name, KNOWN)
        file = file / "unet" / "adapter_model.safetensors" if file.is_dir() else file
        found[f"{name} {kind}"] = file.read_bytes()
    return found


which = st.sampled_from([f"{name} {kind}" for name, kind in FILES if name != "peft"])


def sound_or_said(file: Path, names: FormatNames = KNOWN) -> bool:
    """Whether it is read. What is read has a change of the right size for each module."""
    try:
        artifact = format.read(file, names)
    except UserError as error:
        said = error.problems
    else:
        for key, weights in artifact.modules.items():
            assert names is UNKNOWN or weights.delta(torch.ones(SHAPES[key])).flatten(1).shape == flat(SHAPES[key])
        return True
    assert all(problem.startswith(f"{file}: ") for problem in said)
    return False


def flat(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def taken_apart(content: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def put_together(header: Any, payload: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload


# ---- bytes


@quickly
@given(name=which, place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), in_header=st.booleans())
def test_a_flipped_bit(sound: dict[str, bytes], name: str, place: float, bit: int, in_header: bool, tmp_path: Path):
    content = bytearray(sound[name])
    end = 8 + int.from_bytes(content[:8], "little") if in_header else len(content)
    content[int(place * end)] ^= 1 << bit
    (tmp_path / "x").write_bytes(content)
    sound_or_said(tmp_path / "x")


@quickly
@given(name=which, place=st.floats(0, 1, exclude_max=True))
def test_a_file_that_ends_early_is_never_read(sound: dict[str, bytes], name: str, place: float, tmp_path: Path):
    (tmp_path / "x").write_bytes(sound[name][: int(place * len(sound[name]))])
    assert not sound_or_said(tmp_path / "x")


@quickly
@given(name=which, more=st.binary(min_size=1, max_size=64))
def test_a_file_with_more_behind_it_is_never_read(sound: dict[str, bytes], name: str, more: bytes, tmp_path: Path):
    (tmp_path / "x").write_bytes(sound[name] + more)
    assert not sound_or_said(tmp_path / "x")


@quickly
@given(content=st.binary(max_size=300), size=st.none() | st.integers(0, 2**64 - 1))
def test_random_bytes_are_never_read(content: bytes, size: int | None, tmp_path: Path):
    (tmp_path / "x").write_bytes(content if size is None else struct.pack("<Q", size) + content)
    assert not sound_or_said(tmp_path / "x")


# ---- headers

odd_numbers = st.sampled_from([-1, 0, 1, 2, 7, 2**31, 2**40, 2**63, 2**64, 2**80, 1.5, None, "4"])
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "C64", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "X1", 3]
FIELDS = {
    "dtype": st.sampled_from(DTYPES),
    "shape": st.lists(odd_numbers, max_size=5) | odd_numbers,
    "data_offsets": st.lists(odd_numbers, max_size=3),
}


@quickly
@given(name=which, data=st.data())
def test_a_damaged_entry(sound: dict[str, bytes], name: str, data: st.DataObject, tmp_path: Path):
    header, payload = taken_apart(sound[name])
    key = data.draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))
    for field in data.draw(st.sets(st.sampled_from(sorted(FIELDS)), min_size=1)):
        header[key][field] = data.draw(FIELDS[field])
    (tmp_path / "x").write_bytes(put_together(header, payload))
    sound_or_said(tmp_path / "x")


@quickly
@given(name=which, data=st.data())
def test_tensors_of_other_shapes(sound: dict[str, bytes], name: str, data: st.DataObject, tmp_path: Path):
    """A whole file in which some tensors have other sizes, types or names, or are not there."""
    header, _ = taken_apart(sound[name])
    tensors = {key: torch.ones(entry["shape"]) for key, entry in header.items() if key != "__metadata__"}
    sizes = st.lists(st.sampled_from([0, 1, 2, 3, 4, 6, 24, 54]), max_size=5)
    types = [torch.float32, torch.float64, torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64]
    for key in data.draw(st.sets(st.sampled_from(sorted(tensors)), min_size=1, max_size=3)):
        match data.draw(st.sampled_from(["shape", "type", "name", "gone"])):
            case "shape":
                tensors[key] = torch.ones(data.draw(sizes))
            case "type":
                tensors[key] = tensors[key].to(data.draw(st.sampled_from(types)))
            case "name":
                start = key.rpartition(".")[0]
                others = sorted({other.rpartition(".")[2] for other in tensors} | {"hada_t1", "lokr_w2", "alpha"})
                tensors[data.draw(st.sampled_from([f"{start}.{other}" for other in others]))] = tensors.pop(key)
            case _:
                del tensors[key]
    (tmp_path / "x").write_bytes(save(tensors, header["__metadata__"]))
    sound_or_said(tmp_path / "x")
    sound_or_said(tmp_path / "x", UNKNOWN)


words = st.text(max_size=6)
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)


@quickly
@given(name=which, data=st.data())
def test_other_words_in_the_header(sound: dict[str, bytes], name: str, data: st.DataObject, tmp_path: Path):
    header, payload = taken_apart(sound[name])
    modules = st.dictionaries(st.sampled_from(["unet.a.to_q", "unet.a.conv", "x"]), anything | METHODS, max_size=3)
    settings_of_peft = st.dictionaries(
        st.sampled_from(["unet.r", "unet.lora_alpha", "unet.alpha_pattern", "unet.use_rslora"]), anything, max_size=4
    )
    header["__metadata__"] |= data.draw(
        st.fixed_dictionaries(
            {},
            optional={
                "loraloom.modules": st.one_of(modules, anything).map(json.dumps) | st.text(max_size=9),
                "lora_adapter_metadata": st.one_of(settings_of_peft, anything).map(json.dumps) | st.text(max_size=9),
                "ss_base_model_version": st.text(max_size=9),
            },
        )
    )
    (tmp_path / "x").write_bytes(put_together(header, payload))
    sound_or_said(tmp_path / "x")


METHODS = st.tuples(st.sampled_from(["lora", "loha", "lokr", "oft", "full", "textual_inversion", "x"]), st.floats())


DEEP = "[" * 200_000
HUGE = "1" + "0" * 400


@pytest.mark.parametrize("text", [DEEP, '{"unet.a.to_q": ' + DEEP, f'{{"unet.r": 1, "unet.lora_alpha": {HUGE}}}'])
@pytest.mark.parametrize(("name", "entry"), [("diffusers", "lora_adapter_metadata"), ("loraloom", "loraloom.modules")])
def test_what_json_cannot_hold_is_said(sound: dict[str, bytes], name: str, entry: str, text: str, tmp_path: Path):
    header, payload = taken_apart(sound[f"{name} lora"])
    header["__metadata__"][entry] = text
    (tmp_path / "x").write_bytes(put_together(header, payload))
    assert not sound_or_said(tmp_path / "x")


# ---- folders of PEFT


def peft_folder(folder: Path, config: str | bytes, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_bytes(config.encode() if isinstance(config, str) else config)
    (folder / "adapter_model.safetensors").write_bytes(content)
    return folder


CONFIG = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "alpha_pattern": {"to_q": 1}, "use_rslora": False}


@quickly
@given(data=st.data())
def test_other_settings_of_peft(sound: dict[str, bytes], data: st.DataObject, tmp_path: Path):
    changed = data.draw(st.dictionaries(st.sampled_from(sorted(CONFIG)), anything, min_size=1))
    sound_or_said(peft_folder(tmp_path / "x", json.dumps({**CONFIG, **changed}), sound["peft lora"]))


@quickly
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), cut=st.booleans())
def test_damaged_json_of_peft(sound: dict[str, bytes], place: float, byte: int, cut: bool, tmp_path: Path):
    text = bytearray(json.dumps(CONFIG).encode())
    text[int(place * len(text))] = byte
    config = bytes(text[: int(place * len(text))] if cut else text)
    found = sound_or_said(peft_folder(tmp_path / "x", config, sound["peft lora"]))
    assert not (cut and found)


@pytest.mark.parametrize("config", ["", "[]", "null", DEEP, '{"r": ' + HUGE + "}", '{"lora_alpha": [1]}', "\xff{"])
def test_settings_that_are_none(config: str, sound: dict[str, bytes], tmp_path: Path):
    found = sound_or_said(peft_folder(tmp_path / "x", config.encode("latin-1"), sound["peft lora"]))
    assert not found


@pytest.mark.parametrize("pattern", ["(a+)+", "(.*.*)*x", "(a|aa)+", ".*.*.*.*.*.*.*.*!", "(", "a{9999999999}"])
def test_a_pattern_that_would_search_for_years_is_refused(pattern: str, sound: dict[str, bytes], tmp_path: Path):
    """Patterns are regular expressions that strangers write, and names of modules are theirs too."""
    path = f"{'a' * 60}.to_q"
    names = FormatNames({"unet": {path: (4, 6), "a.conv": (4, 6, 3, 3)}}, {"unet": "lora_unet"}, "x", "sd_v1")
    header, payload = taken_apart(sound["peft lora"])
    renamed = {key.replace("model.a.to_q", f"model.{path}"): entry for key, entry in header.items()}
    config = json.dumps({**CONFIG, "alpha_pattern": {pattern: 1}})
    assert not sound_or_said(peft_folder(tmp_path / "x", config, put_together(renamed, payload)), names)


def test_folders_that_hold_something_else(sound: dict[str, bytes], tmp_path: Path):
    """A name with a colon is no tensor of ours, and a tensor called like PEFT's config makes no folder."""
    inner = tmp_path / "x" / "a:b"
    inner.mkdir(parents=True)
    (inner / "adapter_model.safetensors").write_bytes(sound["peft lora"])
    assert not sound_or_said(tmp_path / "x")
    for name in ("adapter_config.json", "unet/adapter_config.json"):
        (tmp_path / "y").write_bytes(save({name: torch.ones(1)}))
        assert not sound_or_said(tmp_path / "y")
    (tmp_path / "z" / "x.safetensors").mkdir(parents=True)
    assert not sound_or_said(tmp_path / "z")


# ---- what a file claims


MEASURED = """
import resource, sys
from loraloom.adapters import format
from loraloom.adapters.format import FormatNames
from loraloom.configs.errors import UserError
import loraloom.adapters.formats.diffusers, loraloom.adapters.formats.kohya
names = FormatNames({"unet": ["a.to_q", "a.conv"]}, {"unet": "lora_unet"}, "x", "sd_v1")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for file in sys.argv[1:]:
    try:
        format.read(file, names)
        said = "read"
    except UserError as error:
        said = "refused"
    print(said, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory_is_for_what_is_there(tmp_path: Path):
    """MiB that the process grows by: not for a header that claims a terabyte, nor for a core that multiplies."""
    whole = {
        "lora_unet_a_to_q.lora_down.weight": torch.ones(64, 2**15),
        "lora_unet_a_to_q.lora_up.weight": torch.ones(4, 64),
    }
    claims = put_together({"x.lora_A.weight": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}, b"")
    size = struct.pack("<Q", 2**40) + b"{}"
    start = "lora_unet_a_conv.lora_"
    core = {f"{start}down.weight": torch.ones(1, 2**18, 1, 1), f"{start}mid.weight": torch.ones(2**18, 1, 1, 1)}
    kernel = {f"{start}down.weight": torch.ones(1, 2**18, 1, 1), f"{start}mid.weight": torch.ones(1, 1, 512, 512)}
    none = {f"{start}down.weight": torch.ones(0, 2**40, 1, 1), f"{start}mid.weight": torch.ones(1, 0, 1, 1)}
    up = {f"{start}up.weight": torch.ones(4, 1, 1, 1)}
    contents = [save(whole), claims, size, *(save(each | up) for each in (core, kernel, none))]
    files = [tmp_path / f"{number}" for number in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    command = [sys.executable, "-c", MEASURED, *map(str, files)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert found.returncode == 0, found.stderr
    said = [line.split() for line in found.stdout.splitlines()]
    assert [word for word, _ in said] == ["read"] + ["refused"] * 5
    assert max(int(grown) for _, grown in said) <= 4 * len(contents[0]) // 2**20


# ---- pickles


class Payload:
    """Makes a file where it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


def as_zip(content: bytes, file: Path) -> bytes:
    """As torch.save has written since 1.6."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3")
    return file.read_bytes()


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", ["x.bin", "x.pt", "x.ckpt", "x.pth", "x.safetensors", "adapter_model.bin"])
def test_a_pickle_is_refused_and_does_nothing(name: str, zipped: bool, tmp_path: Path):
    trace = tmp_path / "trace"
    content = pickle.dumps({"lora_unet_a_to_q.lora_down.weight": Payload(trace)})
    file = tmp_path / "files" / name
    file.parent.mkdir()
    file.write_bytes(as_zip(content, tmp_path / "zip") if zipped else content)
    (file.parent / "adapter_config.json").write_text(json.dumps(CONFIG))
    for path in (file, file.parent):
        with pytest.raises(UserError, match="pickles"):
            format.read(path, KNOWN)
    assert not trace.exists()
    pickle.loads(content)
    assert trace.exists()  # this one was loaded: the payload works
