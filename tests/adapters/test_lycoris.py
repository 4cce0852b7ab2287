"""LyCORIS reads our kohya files: it takes every module, and computes the change of the weight that we mean.

Its forward is asked, not `get_merged_weight`, which applies the scale twice (4.1.3). Bases are in float64, where the
change can be taken apart from the base without rounding.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.kohya import LycorisNetworkKohya, create_network_from_weights
from lycoris.modules.locon import LoConModule
from lycoris.modules.lokr import LokrModule
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loraloom.adapters import format
from loraloom.adapters.artifact import AdapterArtifact, Key, Weights, module_path
from loraloom.adapters.format import FormatNames
from loraloom.benchmarks.formats import tiny_pipeline
from loraloom.configs.choices import find
from loraloom.inference.adapter_file import format_names

pytestmark = pytest.mark.slow

Draw = Callable[..., Weights]
Layers = dict[Key, Any]

RANKS, ALPHAS = (2, 3, 8, 1), (1.0, 6.0, 5.0)


@pytest.fixture(autouse=True)
def no_name_twice(monkeypatch: pytest.MonkeyPatch):
    """Its own list has the time embedding under a class and under a name, and refuses the UNet of Stable Diffusion."""
    monkeypatch.setattr(LycorisNetworkKohya, "UNET_TARGET_REPLACE_NAME", [])


def tree(layers: Mapping[str, nn.Module]) -> nn.Module:
    """A module whose layers have these paths."""
    root = nn.Module()
    for path, layer in layers.items():
        *above, name = path.split(".")
        place = root
        for step in above:
            if step not in place._modules:
                place.add_module(step, nn.Module())
            place = place.get_submodule(step)
        place.add_module(name, layer)
    return root


@torch.no_grad()
def change(module: Any) -> Tensor:
    """What its forward adds to each unit vector, or to each picture with one pixel that is on: (out, in * k * k)."""
    module.double().eval()
    module.org_forward = lambda x: torch.zeros((), dtype=x.dtype)
    out, into, *kernel = module.org_module[0].weight.shape
    ones = torch.eye(into * torch.Size(kernel).numel(), dtype=torch.float64).reshape(-1, into, *kernel)
    if kernel:
        module.kw_dict = module.kw_dict | {"stride": 1, "padding": 0}
    return module(ones).reshape(len(ones), out).T


def drawn(draw: Draw, kinds: Sequence[str], layers: Layers, step: int) -> AdapterArtifact:
    """Random weights for every `step`th layer: kinds, ranks and alphas take turns."""
    generator = torch.Generator().manual_seed(3)
    modules: dict[Key, Weights] = {}
    for number, (key, layer) in enumerate([*layers.items()][::step]):
        rank, alpha = RANKS[number % len(RANKS)], ALPHAS[number % len(ALPHAS)]
        kind = kinds[number % len(kinds)]
        modules[key] = draw(kind, tuple(layer.weight.shape), rank, alpha / rank, generator)
    return AdapterArtifact(modules)


def assert_same_changes(found: Mapping[Key, Any], artifact: AdapterArtifact, layers: Layers) -> None:
    assert found.keys() == artifact.modules.keys()
    for key, weights in artifact.modules.items():
        wanted = weights.delta(layers[key].weight).flatten(1).double()
        apart = ((change(found[key]) - wanted).abs().max() / wanted.abs().max()).item()
        assert apart <= 1e-6, (key, weights.kind, apart)


def assert_lycoris_agrees(base: "Base", artifact: AdapterArtifact, folder: Path) -> None:
    """It takes what is in the file, no more and no less, for what the artifact is."""
    format.write(artifact, folder / "x.safetensors", "kohya", base.names)
    network, _ = create_network_from_weights(1.0, str(folder / "x.safetensors"), None, base.text_encoders, base.unet)
    taken = {each.lora_name: each for each in [*network.unet_loras, *network.text_encoder_loras]}
    assert taken.keys() == {name.partition(".")[0] for name in load_file(folder / "x.safetensors")}
    keys = {layer: key for key, layer in base.layers.items()}
    assert_same_changes({keys[each.org_module[0]]: each for each in taken.values()}, artifact, base.layers)


@dataclass(frozen=True)
class Base:
    """The layers of a pipeline as LyCORIS wants to meet them."""

    names: FormatNames
    layers: Layers
    unet: nn.Module
    text_encoders: Any  # one, or a list


def base_of(kind: str) -> Base:
    pipeline = tiny_pipeline(kind)
    family = find("models.families", kind).FAMILY
    names = format_names(family, pipeline.components)
    layers: Layers = {}
    for part, paths in names.module_paths.items():
        model = pipeline.components[part].double()
        has = {name for name, _ in model.named_modules()}
        layers |= {(part, path): model.get_submodule(module_path(part, path, has)) for path in paths}
    called = names.original if names.kohya_original else {}
    unet, *texts = (
        tree({called.get(path, path): layer for (own, path), layer in layers.items() if own == part})
        for part in names.module_paths
    )
    return Base(names, layers, unet, texts if len(texts) > 1 else texts[0])


@pytest.fixture(scope="module")
def sd1() -> Base:
    return base_of("sd1")


@pytest.fixture(scope="module")
def sdxl() -> Base:
    """Its UNet has the names of the original code: LyCORIS asks for those in files for SDXL."""
    return base_of("sdxl")


def test_every_layer_of_a_plain_lora(sd1: Base, random_weights: Draw, tmp_path: Path):
    """Of several ranks and alphas, all in one file: LyCORIS' own `text_model.` spelling, convolutions too."""
    assert_lycoris_agrees(sd1, drawn(random_weights, ["lora"], sd1.layers, 1), tmp_path)


MARKS = {
    "lora": "up",
    "dora": "magnitude",
    "loha": "hada_w1_a",
    "loha, core": "hada_t1",
    "lokr": "lokr_w2_a",
    "lokr, both": "lokr_w1_b",
    "lokr, whole": "lokr_w2",
}


@pytest.mark.parametrize("kind", MARKS)
def test_every_kind(sd1: Base, random_weights: Draw, kind: str, tmp_path: Path):
    artifact = drawn(random_weights, [kind], sd1.layers, 7)
    assert sum(MARKS[kind] in weights.tensors for weights in artifact.modules.values()) > 1
    assert_lycoris_agrees(sd1, artifact, tmp_path)


@pytest.mark.parametrize("over_outputs", [True, False])
def test_dora_that_lycoris_trains_is_read(sd1: Base, over_outputs: bool, tmp_path: Path):
    """Over the inputs too, which its own reader of files takes for outputs."""
    torch.manual_seed(0)
    square = [key for key, layer in sd1.layers.items() if len({*layer.weight.shape[:2]}) == 1][::9]
    chosen = [*square, *[key for key in sd1.layers if key not in square][::40]]
    modules, tensors = {}, {}
    for key in chosen:
        start = f"{'lora_unet' if key[0] == 'unet' else 'lora_te'}_{key[1].replace('.', '_')}"
        module = LoConModule(start, sd1.layers[key], 1.0, 4, 2.0, weight_decompose=True, wd_on_out=over_outputs)
        for parameter in (module.lora_up.weight, module.dora_scale):
            parameter.data += 0.1 * torch.randn_like(parameter)
        modules[key] = module
        tensors |= {f"{start}.{name}": tensor.detach().contiguous() for name, tensor in module.state_dict().items()}
    save_file(tensors, tmp_path / "x.safetensors")
    found = format.read(tmp_path / "x.safetensors", sd1.names)
    assert {weights.kind for weights in found.modules.values()} == {"dora" if over_outputs else "dora over inputs"}
    assert_same_changes(modules, found, sd1.layers)


def test_lokr_with_cores(sd1: Base, random_weights: Draw, tmp_path: Path):
    """Its reader takes the rank for a number of outputs there, so that its module is made as for training."""
    kernels = {key: layer for key, layer in sd1.layers.items() if layer.weight.shape[2:].numel() > 1}
    drawn_here = drawn(random_weights, ["lokr, core"], kernels, 2).modules
    artifact = AdapterArtifact({key: weights for key, weights in drawn_here.items() if "lokr_t2" in weights.tensors})
    assert len(artifact.modules) > 5
    format.write(artifact, tmp_path / "x.safetensors", "kohya", sd1.names)
    tensors, found = load_file(tmp_path / "x.safetensors"), {}
    for key, weights in artifact.modules.items():
        start = f"lora_unet_{key[1].replace('.', '_')}."
        own = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
        rank = len(weights.tensors["lokr_t2"])
        found[key] = LokrModule(start, kernels[key], 1.0, rank, float(own.pop("alpha")), use_tucker=True)
        found[key].load_state_dict(own, strict=False)
        assert own.keys() == dict(found[key].named_parameters()).keys()
    assert_same_changes(found, artifact, sd1.layers)


def test_every_layer_of_sdxl(sdxl: Base, random_weights: Draw, tmp_path: Path):
    assert_lycoris_agrees(sdxl, drawn(random_weights, ["lora"], sdxl.layers, 1), tmp_path)


def test_all_kinds_in_one_file_for_sdxl(sdxl: Base, random_weights: Draw, tmp_path: Path):
    assert_lycoris_agrees(sdxl, drawn(random_weights, ["lora", "dora", "loha", "lokr"], sdxl.layers, 5), tmp_path)
