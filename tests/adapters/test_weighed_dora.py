"""A weight means one thing, whatever the adapters are and whoever adds them up: W + sum of w (W' - W)."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from loraloom.adapters import active, algebra
from loraloom.adapters.artifact import AdapterArtifact, Weights, largest_difference
from loraloom.adapters.peft_adapters import install, read_peft
from loraloom.inference.hotswap import prepare, swap

pytestmark = pytest.mark.slow

KINDS = ("dora", "dora, inputs", "lora", "loha", "lokr")
LAYERS = {"linear": (6, 8), "conv": (6, 4, 3, 3), "pixel": (6, 6, 1, 1)}
"""Of a model: a linear layer, a convolution, and one whose inputs are as many as its outputs."""


class Layers(nn.Module):
    """Three layers side by side."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 6)
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.pixel = nn.Conv2d(6, 6, 1)
        self.requires_grad_(False)

    def forward(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        flat, small, square = (torch.randn(2, *size, generator=generator) for size in ((5, 8), (4, 7, 7), (6, 5, 5)))
        return [self.linear(flat), self.conv(small), self.pixel(square)]


def adapter(draw: Callable[..., Weights], kind: str, seed: int) -> AdapterArtifact:
    generator = torch.Generator().manual_seed(seed)
    return AdapterArtifact({("unet", name): draw(kind, shape, 2, 0.5, generator) for name, shape in LAYERS.items()})


def merged(mixed: list[tuple[AdapterArtifact, float]]) -> list[Tensor]:
    model = Layers()
    for name in LAYERS:
        layer = model.get_submodule(name)
        changes = [(a.modules["unet", name], weight) for a, weight in mixed if ("unet", name) in a.modules]
        layer.weight.data = algebra.merged(layer.weight, changes)
    return model()


def assert_close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


WEIGHTS = st.sampled_from([0.0, 0.5, 1.0, -1.0, 2.0])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mixed=st.lists(st.tuples(st.sampled_from(KINDS), WEIGHTS), min_size=1, max_size=3), begin=WEIGHTS)
def test_what_is_mixed_is_what_is_merged(random_weights, mixed: list[tuple[str, float]], begin: float):
    """Whatever their order, and whatever their weights were before."""
    adapters = [(adapter(random_weights, kind, seed), weight) for seed, (kind, weight) in enumerate(mixed)]
    model, base = Layers(), Layers()()
    for number, (artifact, _) in enumerate(adapters):
        install(artifact, {"unet": model}, f"a{number}")
        keys = dict.fromkeys(artifact.modules, begin)
        active.add("unet", model, f"a{number}", keys)
    own = {f"a{number}": dict.fromkeys(artifact.modules, weight) for number, (artifact, weight) in enumerate(adapters)}
    active.activate("unet", model, own)
    assert_close(model(), merged(adapters))
    if all(weight == 0 for _, weight in mixed):
        assert all(torch.equal(one, other) for one, other in zip(model(), base, strict=True))
    read = AdapterArtifact(read_peft("unet", model, "a0"))
    if "dora" in mixed[0][0] or mixed[0][1] == 1:  # the weight of the others is in their scale
        assert largest_difference(read, adapters[0][0], lambda key: getattr(Layers(), key[1]).weight)[0] < 1e-5


@pytest.mark.parametrize("kind", ["dora", "dora, inputs"])
@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 2.0])
def test_fusing_by_peft_and_back(random_weights, kind: str, weight: float):
    """`fuse_lora` of diffusers."""
    artifact, model = adapter(random_weights, kind, 3), Layers()
    install(artifact, {"unet": model}, "a")
    active.activate("unet", model, {"a": dict.fromkeys(artifact.modules, weight)})
    beside, layers = model(), [model.get_submodule(name) for name in LAYERS]
    for safe in (False, True):
        for layer in layers:
            layer.merge(safe_merge=safe)
        assert_close(model(), beside)
        for layer in layers:
            layer.unmerge()
        assert_close(model(), beside)


@pytest.mark.parametrize("kind", ["dora", "dora, inputs"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_dora_is_swapped_for_another(random_weights, kind: str, compiled: bool):
    """With its weight, and with nothing left of it in a module that the other one leaves alone."""
    old, new, model = adapter(random_weights, kind, 1), adapter(random_weights, kind, 2), Layers()
    new = AdapterArtifact({key: weights for key, weights in new.modules.items() if key[1] != "conv"})
    install(old, {"unet": model}, "a")
    if compiled:
        prepare(model, 4)
    active.activate("unet", model, {"a": dict.fromkeys(old.modules, 0.5)})
    assert_close(model(), merged([(old, 0.5)]))
    swap("unet", model, new, Path("x"), "a")
    for weight in (0.5, 2.0):
        active.activate("unet", model, {"a": dict.fromkeys(old.modules, weight)})
        assert_close(model(), merged([(new, weight)]))


def test_a_dora_of_scale_zero_has_a_weight_too(random_weights):
    artifact, model = adapter(random_weights, "dora", 4), Layers()
    flat = AdapterArtifact({key: Weights("lora", w.tensors, 0.0) for key, w in artifact.modules.items()})
    install(flat, {"unet": model}, "a")
    active.activate("unet", model, {"a": dict.fromkeys(flat.modules, 0.5)})
    assert_close(model(), merged([(flat, 0.5)]))


def test_one_adapter_may_have_several_methods(random_weights):
    """DoRA in one module only, and LyCORIS' other algorithm in convolutions."""
    generator = torch.Generator().manual_seed(5)
    kinds = dict(zip(LAYERS, ("lora", "dora", "loha"), strict=True))
    several = {("unet", n): random_weights(kinds[n], shape, 2, 0.5, generator) for n, shape in LAYERS.items()}
    artifact, model = AdapterArtifact(several), Layers()
    install(artifact, {"unet": model}, "a")
    active.activate("unet", model, {"a": dict.fromkeys(several, 0.5)})
    assert_close(model(), merged([(artifact, 0.5)]))
    active.remove(model, ["a"])
    assert all(torch.equal(one, other) for one, other in zip(model(), Layers()(), strict=True))


@pytest.mark.parametrize("kind", ["dora", "dora, inputs"])
def test_on_a_base_of_half_precision(random_weights, kind: str):
    """Lengths are not rounded, beside other adapters too: what is off is the rounding of the base's own outputs."""
    adapters = [(adapter(random_weights, each, seed), 0.5) for seed, each in enumerate(("lora", kind))]
    model = Layers().bfloat16()
    for number, (artifact, _) in enumerate(adapters):
        install(artifact, {"unet": model}, f"a{number}")
    active.activate("unet", model, {f"a{n}": dict.fromkeys(a.modules, w) for n, (a, w) in enumerate(adapters)})
    generator = torch.Generator().manual_seed(1)
    flat, small, square = (torch.randn(2, *size, generator=generator) for size in ((5, 8), (4, 7, 7), (6, 5, 5)))
    found = model.linear(flat.bfloat16()), model.conv(small.bfloat16()), model.pixel(square.bfloat16())
    for one, other in zip(found, merged(adapters), strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.float() - other).abs().max() < 0.02 * other.abs().max()
