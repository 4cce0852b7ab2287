"""The in-memory form: paths, products and checks, with numbers that can be checked on paper."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from loraloom.adapters.artifact import (
    AdapterArtifact,
    Weights,
    base_modules,
    canonical_path,
    largest_difference,
    module_path,
)
from loraloom.adapters.peft_adapters import read_peft
from loraloom.configs.errors import UserError

KEY = ("unet", "mid_block.attentions.0.proj_in")


def lora(down: torch.Tensor, up: torch.Tensor, scale: float) -> Weights:
    return Weights("lora", {"down": down, "up": up}, scale)


def weights(fill: float = 1.0, scale: float = 1.0) -> Weights:
    return lora(torch.full((2, 3), fill), torch.ones(4, 2), scale)


def test_delta_of_a_linear_layer():
    down, up = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [1.0, -1.0], [0.0, 2.0]])
    expected = torch.tensor([[0.5, 1.0], [-1.0, -1.0], [3.0, 4.0]])
    assert torch.equal(lora(down, up, 0.5).delta(), expected)


def test_delta_of_a_convolution_is_the_two_convolutions_after_each_other():
    torch.manual_seed(0)
    conv = lora(torch.randn(2, 3, 3, 3), torch.randn(5, 2, 1, 1), 0.5)
    pixels = torch.randn(1, 3, 6, 6)
    two_steps = 0.5 * nn.functional.conv2d(nn.functional.conv2d(pixels, conv.tensors["down"]), conv.tensors["up"])
    torch.testing.assert_close(nn.functional.conv2d(pixels, conv.delta()), two_steps, rtol=1e-4, atol=1e-4)


def test_folding_moves_the_scale_into_up():
    artifact = AdapterArtifact({KEY: weights(scale=0.25)}, metadata={"a": "b"})
    folded = artifact.folded()
    assert folded.modules[KEY].scale == 1.0
    assert torch.equal(folded.modules[KEY].tensors["up"], torch.full((4, 2), 0.25))
    assert folded.metadata == {"a": "b"}
    assert largest_difference(artifact, folded) == (0.0, KEY)


def test_largest_difference_names_the_module():
    other = ("unet", "conv_in")
    a = AdapterArtifact({KEY: weights(), other: weights()})
    b = AdapterArtifact({KEY: weights(fill=1.5), other: weights(fill=1.25)})
    assert largest_difference(a, b) == (1.0, KEY)  # 2 ranks x 0.5


def test_a_difference_that_is_no_number_is_the_largest():
    """A DoRA of a base whose weights are zero divides by their length."""
    zero = ("unet", "conv_out")
    still = lora(torch.ones(1, 3), torch.zeros(4, 1), 1.0)
    dora = Weights("lora", still.tensors | {"magnitude": torch.ones(4)}, 1.0)
    a = AdapterArtifact({KEY: weights(), zero: dora})
    assert largest_difference(a, a, lambda key: torch.zeros(4, 3)) == (float("inf"), zero)


def test_largest_difference_names_what_is_missing():
    a = AdapterArtifact({KEY: weights(), ("unet", "conv_in"): weights()})
    with pytest.raises(UserError, match="1 modules are missing from the second adapter: unet conv_in"):
        largest_difference(a, AdapterArtifact({KEY: weights()}))
    with pytest.raises(UserError, match="missing from the first adapter: unet conv_in"):
        largest_difference(AdapterArtifact({KEY: weights()}), a)


def test_different_shapes_of_one_module_are_an_error():
    wide = lora(torch.ones(2, 5), torch.ones(4, 2), 1.0)
    with pytest.raises(UserError, match=r"proj_in is \(4, 3\) in one adapter, \(4, 5\) in the other"):
        largest_difference(AdapterArtifact({KEY: weights()}), AdapterArtifact({KEY: wide}))


def test_an_artifact_has_modules():
    with pytest.raises(UserError, match="no modules"):
        AdapterArtifact({})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(value: float):
    with pytest.raises(UserError, match=r"1 of 2 modules hold NaN or Inf: unet mid_block\.attentions\.0\.proj_in$"):
        AdapterArtifact({("unet", "conv_in"): weights(), KEY: weights(fill=value)})
    with pytest.raises(UserError, match="NaN or Inf"):
        AdapterArtifact({KEY: weights(scale=value)})


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ((2, 3), (4, 3)),  # ranks differ
        ((2, 3), (4, 2, 1, 1)),  # a linear layer and a convolution
        ((2, 3, 3, 3), (4, 2, 3, 3)),  # only `down` looks around
        ((0, 3), (4, 0)),  # nothing
    ],
)
def test_factors_must_fit(down: tuple[int, ...], up: tuple[int, ...]):
    with pytest.raises(UserError, match="do not fit in unet mid_block"):
        AdapterArtifact({KEY: lora(torch.ones(down), torch.ones(up), 1.0)})


@pytest.mark.parametrize(
    ("component", "path", "canonical"),
    [
        ("text_encoder", "encoder.layers.0.mlp.fc1", "text_model.encoder.layers.0.mlp.fc1"),
        ("text_encoder", "text_model.encoder.layers.0.mlp.fc1", "text_model.encoder.layers.0.mlp.fc1"),
        ("text_encoder_2", "text_projection", "text_projection"),
        ("text_encoder_3", "encoder.block.0.layer.0.SelfAttention.q", "encoder.block.0.layer.0.SelfAttention.q"),
        ("unet", "down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.0.conv1"),
    ],
)
def test_canonical_path_and_back(component: str, path: str, canonical: str):
    assert canonical_path(component, path) == canonical
    assert module_path(component, canonical, {path}) == path


def test_a_path_that_the_model_lacks_is_named():
    with pytest.raises(UserError, match=r'no module text_model\.x\.to_p \(did you mean "text_model\.x\.to_q"\?\)'):
        module_path("text_encoder", "text_model.x.to_p", {"text_model.x.to_q"})


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(3, 4), nn.LayerNorm(4), nn.Conv2d(4, 5, 3)


def inject(model: nn.Module, **settings) -> nn.Module:
    return inject_adapter_in_model(LoraConfig(target_modules=["first", "second"], **settings), model, "mine")


def test_read_peft_copies_the_weights():
    model = inject(Small(), r=2, lora_alpha=3)
    modules = read_peft("unet", model, "mine")
    assert set(modules) == {("unet", "first"), ("unet", "second")}
    first, second = modules["unet", "first"], modules["unet", "second"]
    assert (first.rank, first.scale, first.tensors["down"].requires_grad) == (2, 1.5, False)
    assert (second.tensors["down"].shape, second.tensors["up"].shape) == ((2, 4, 3, 3), (5, 2, 1, 1))
    down = model.get_parameter("first.lora_A.mine.weight")
    assert torch.equal(first.tensors["down"], down)
    with torch.no_grad():
        down.zero_()
    assert first.tensors["down"].abs().sum() > 0


def test_base_modules_are_the_same_with_and_without_an_adapter():
    assert (
        base_modules("unet", Small())
        == base_modules("unet", inject(Small(), r=2))
        == {"first": (4, 3), "second": (5, 4, 3, 3)}
    )


def test_read_peft_refuses_what_it_would_lose():
    with pytest.raises(UserError, match="no adapter named 'yours'"):
        read_peft("unet", inject(Small(), r=2), "yours")
    with pytest.raises(UserError, match="a bias of its own"):
        read_peft("unet", inject(Small(), r=2, lora_bias=True), "mine")


def test_read_peft_spells_clip_as_other_tools_do(artifact: AdapterArtifact):
    paths = [path for component, path in artifact.modules if component == "text_encoder"]
    assert paths and all(path.startswith("text_model.encoder.layers.") for path in paths)
