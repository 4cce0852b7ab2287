"""Every row of docs/lora-api.md: the name of diffusers and ours are called, and do the same."""

import re
from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_base import (
    disable_lora_for_text_encoder,
    enable_lora_for_text_encoder,
    set_adapters_for_text_encoder,
)
from diffusers.training_utils import unet_lora_state_dict
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

from loraloom.adapters.artifact import largest_difference
from loraloom.adapters.format import read, write
from loraloom.adapters.peft_adapters import read_peft
from loraloom.inference.adapter_file import format_names
from loraloom.inference.engine import Engine
from loraloom.inference.verify import probe

pytestmark = pytest.mark.slow

TABLE = Path(__file__).parents[2] / "docs/lora-api.md"
ROWS = [line.split("|")[1].strip().strip("`") for line in TABLE.read_text().splitlines() if line.startswith("| `")]


class Bench:
    """Two engines on one base: what diffusers does to the one, we do to the other."""

    def __init__(self, base: str, files: dict[str, Path], folder: Path):
        self.theirs, self.ours = Engine.load(base), Engine.load(base)
        self.file, self.other, self.folder = files["a"], files["b"], folder
        self.plain = self.prediction(self.ours)

    @staticmethod
    def prediction(engine: Engine) -> torch.Tensor:
        return probe(engine.family, engine.parts)

    def names(self):
        return format_names(self.ours.family, self.ours.parts)

    def load(self) -> None:
        """Into both."""
        self.theirs.pipeline.load_lora_weights(str(self.file), adapter_name="a")
        self.ours.adapters.load_adapter(self.file, "a")

    def agree(self) -> torch.Tensor:
        """Both predict the same, which this is."""
        one, other = self.prediction(self.theirs), self.prediction(self.ours)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        return other

    def is_plain(self, found: torch.Tensor) -> bool:
        return bool((found - self.plain).abs().max() < 1e-5)


def load_lora_weights(b: Bench) -> None:
    b.load()
    assert not b.is_plain(b.agree())


def save_lora_weights(b: Bench) -> None:
    b.load()
    state = get_peft_model_state_dict(b.theirs.parts["unet"], adapter_name="a")
    b.theirs.pipeline.save_lora_weights(b.folder, unet_lora_layers=state)
    artifact = read(b.file, b.names())
    write(artifact, b.folder / "ours.safetensors", "diffusers", b.names())
    for file in (b.folder / "ours.safetensors", b.folder / "pytorch_lora_weights.safetensors"):
        found = read(file, b.names())
        assert found.modules.keys() >= {key for key in artifact.modules if key[0] == "unet"}
    assert largest_difference(read(b.folder / "ours.safetensors", b.names()), artifact)[0] == 0


def lora_state_dict(b: Bench) -> None:
    state, _ = b.theirs.pipeline.lora_state_dict(str(b.file))
    assert len(state) == 2 * len(read(b.file, b.names()).modules)


def load_lora_into_unet(b: Bench) -> None:
    state, alphas = b.theirs.pipeline.lora_state_dict(str(b.file))
    b.theirs.pipeline.load_lora_into_unet(state, alphas, b.theirs.parts["unet"], adapter_name="a")
    b.ours.adapters.load_adapter(b.file, "a")
    b.ours.adapters.set_adapters({"a": {"text_encoder": 0.0}})
    assert not b.is_plain(b.agree())


def load_lora_into_text_encoder(b: Bench) -> None:
    state, alphas = b.theirs.pipeline.lora_state_dict(str(b.file))
    b.theirs.pipeline.load_lora_into_text_encoder(state, alphas, b.theirs.parts["text_encoder"], adapter_name="a")
    b.ours.adapters.load_adapter(b.file, "a")
    b.ours.adapters.set_adapters({"a": {"unet": 0.0}})
    assert not b.is_plain(b.agree())


def load_attn_procs(b: Bench) -> None:
    with pytest.raises(ValueError, match="Custom Diffusion"):
        b.theirs.parts["unet"].load_attn_procs(load_file(b.file))
    b.theirs.parts["unet"].load_lora_adapter(load_file(b.file), adapter_name="a", prefix="unet")
    b.ours.adapters.load_adapter(b.file)
    b.ours.adapters.set_adapters({"a": {"text_encoder": 0.0}})
    assert not b.is_plain(b.agree())


def save_attn_procs(b: Bench) -> None:
    b.load()
    with pytest.raises(ValueError, match="save_lora_adapter"):
        b.theirs.parts["unet"].save_attn_procs(b.folder)
    b.theirs.parts["unet"].save_lora_adapter(b.folder, adapter_name="a")
    (written,) = b.folder.glob("*.safetensors")
    assert len(load_file(written)) == 2 * len(read_peft("unet", b.ours.parts["unet"], "a"))


def unet_state(b: Bench) -> None:
    b.load()
    assert unet_lora_state_dict(b.theirs.parts["unet"]) == {}  # the hole of which the table speaks
    state = get_peft_model_state_dict(b.theirs.parts["unet"], adapter_name="a")
    found = read_peft("unet", b.ours.parts["unet"], "a")
    key = next(iter(found))
    assert torch.equal(state[f"{key[1]}.lora_A.weight"], found[key].tensors["down"])


def set_adapters(b: Bench) -> None:
    b.load()
    b.theirs.pipeline.load_lora_weights(str(b.other), adapter_name="b")
    b.ours.adapters.load_adapter(b.other, "b")
    b.theirs.pipeline.set_adapters(["a", "b"], [0.5, {"unet": {"mid": 0.3, "down": 0.0}}])
    b.ours.adapters.set_adapters({"a": 0.5, "b": {"unet": {"mid": 0.3, "down": 0.0}}})
    assert not b.is_plain(b.agree())


def text_encoder_weight(b: Bench) -> None:
    b.load()
    set_adapters_for_text_encoder(["a"], b.theirs.parts["text_encoder"], [0.5])
    b.ours.adapters.set_adapters({"a": {"text_encoder": 0.5}})
    assert not b.is_plain(b.agree())


def get_active_adapters(b: Bench) -> None:
    b.load()
    assert b.theirs.pipeline.get_active_adapters() == b.ours.pipeline.get_active_adapters() == ["a"]
    assert b.ours.adapters.get_active_adapters() == ["a"]


def get_list_adapters(b: Bench) -> None:
    b.load()
    assert b.theirs.pipeline.get_list_adapters() == b.ours.pipeline.get_list_adapters()
    assert b.ours.adapters.get_list_adapters() == b.ours.pipeline.get_list_adapters()
    assert b.theirs.adapters.get_list_adapters() == b.ours.pipeline.get_list_adapters()


def disable_lora(b: Bench) -> None:
    b.load()
    b.theirs.pipeline.disable_lora()
    b.ours.adapters.disable()
    assert b.is_plain(b.agree())


def enable_lora(b: Bench) -> None:
    disable_lora(b)
    b.ours.pipeline.enable_lora()  # each takes back what the other did
    b.theirs.adapters.enable()
    assert not b.is_plain(b.agree())


def disable_text_encoder(b: Bench) -> None:
    b.load()
    disable_lora_for_text_encoder(b.theirs.parts["text_encoder"])
    b.ours.adapters.set_adapters({"a": {"text_encoder": 0.0}})
    b.agree()


def enable_text_encoder(b: Bench) -> None:
    disable_text_encoder(b)
    enable_lora_for_text_encoder(b.theirs.parts["text_encoder"])
    b.ours.adapters.set_adapters({"a": 1.0})
    b.agree()


def fuse_lora(b: Bench) -> None:
    b.load()
    b.theirs.pipeline.fuse_lora(components=["unet", "text_encoder"])
    b.ours.adapters.fuse()
    assert not b.is_plain(b.agree())


def unfuse_lora(b: Bench) -> None:
    fuse_lora(b)
    b.theirs.pipeline.unfuse_lora(components=["unet", "text_encoder"])
    b.ours.adapters.unfuse()
    b.agree()
    for engine in (b.theirs, b.ours):
        engine.adapters.unload()
    assert torch.equal(b.prediction(b.ours), b.plain)


def delete_adapters(b: Bench) -> None:
    b.load()
    b.ours.pipeline.delete_adapters("a")  # theirs on what ours has loaded, and the other way round
    b.theirs.adapters.delete_adapters("a")
    assert b.is_plain(b.agree())


def unload_lora_weights(b: Bench) -> None:
    b.load()
    b.ours.pipeline.unload_lora_weights()
    b.theirs.adapters.unload()
    assert b.is_plain(b.agree())
    assert b.ours.adapters.get_names() == b.theirs.adapters.get_names() == []
    b.load()
    assert not b.is_plain(b.agree())


def enable_lora_hotswap(b: Bench) -> None:
    b.theirs.pipeline.enable_lora_hotswap(target_rank=8)
    b.ours.adapters.enable_hotswap(target_rank=8)
    unet_files = [b.folder / "one.safetensors", b.folder / "two.safetensors"]
    for source, file in zip((b.file, b.other), unet_files, strict=True):
        artifact = read(source, b.names())
        modules = {key: weights for key, weights in artifact.modules.items() if key[0] == "unet"}
        write(type(artifact)(modules), file, "diffusers", b.names())
    b.theirs.pipeline.load_lora_weights(str(unet_files[0]), adapter_name="a")
    b.ours.adapters.load_adapter(unet_files[0], "a")
    before = b.agree()
    b.theirs.pipeline.load_lora_weights(str(unet_files[1]), adapter_name="a", hotswap=True)
    b.ours.adapters.hotswap(unet_files[1], "a")
    assert not torch.equal(b.agree(), before)


def set_lora_device(b: Bench) -> None:
    b.load()
    b.ours.pipeline.set_lora_device(["a"], "cpu")
    b.agree()


CALLS = {
    "load_lora_weights": load_lora_weights,
    "save_lora_weights": save_lora_weights,
    "lora_state_dict": lora_state_dict,
    "load_lora_into_unet": load_lora_into_unet,
    "load_lora_into_text_encoder": load_lora_into_text_encoder,
    "load_attn_procs": load_attn_procs,
    "save_attn_procs": save_attn_procs,
    "unet_lora_state_dict": unet_state,
    "set_adapters": set_adapters,
    "set_adapters_for_text_encoder": text_encoder_weight,
    "get_active_adapters": get_active_adapters,
    "get_list_adapters": get_list_adapters,
    "disable_lora": disable_lora,
    "enable_lora": enable_lora,
    "disable_lora_for_text_encoder": disable_text_encoder,
    "enable_lora_for_text_encoder": enable_text_encoder,
    "fuse_lora": fuse_lora,
    "unfuse_lora": unfuse_lora,
    "delete_adapters": delete_adapters,
    "unload_lora_weights": unload_lora_weights,
    "enable_lora_hotswap": enable_lora_hotswap,
    "load_lora_weights(hotswap=True)": enable_lora_hotswap,
    "set_lora_device": set_lora_device,
}


@pytest.fixture(scope="module")
def files(tiny_base, make_adapter) -> dict[str, Path]:
    found = {"a": {"seed": 1}, "b": {"seed": 2, "rank": 8}}
    return {name: make_adapter(tiny_base, name=name, format_name="diffusers", **own) for name, own in found.items()}


def test_the_table_has_every_name():
    assert list(CALLS) == ROWS
    assert not re.search(r"TODO|\?\?", TABLE.read_text())


@pytest.mark.parametrize("row", [row for row in CALLS if "hotswap=" not in row])
def test_the_row_works(tiny_base, files, tmp_path, row):
    CALLS[row](Bench(str(tiny_base), files, tmp_path))
