"""Back-ends are tried before they are set, reach every layer of a UNet, and compute the same."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch.nn.attention import SDPBackend, sdpa_kernel

from loraloom.configs.errors import UserError
from loraloom.inference import attention
from loraloom.inference.attention import DispatchedProcessor, choose_attention, why_not
from loraloom.inference.engine import Engine

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def loaded(tiny_base) -> Engine:
    return Engine.load(str(tiny_base))


@pytest.fixture
def engine(loaded):
    yield loaded
    loaded.parts["unet"].set_attn_processor(AttnProcessor2_0())


def predict(unet: UNet2DConditionModel) -> torch.Tensor:
    draws = torch.Generator().manual_seed(1)
    latents, words = (torch.randn(shape, generator=draws) for shape in ((1, 4, 4, 4), (1, 8, 32)))
    return unet(latents, 500, words).sample


def test_diffusers_own_call_leaves_a_unet_as_it_is(engine):
    """If this fails, `DispatchedProcessor` is no longer needed."""
    with sdpa_kernel(SDPBackend.MATH):
        engine.parts["unet"].set_attention_backend("_native_flash")
        assert all(type(each) is AttnProcessor2_0 for each in engine.parts["unet"].attn_processors.values())
    Registry.set_active_backend("native")


@pytest.mark.parametrize("name", ["_native_math", "_native_flash"])
def test_the_kernel_that_is_named_computes_every_layer(engine, name):
    unet = engine.parts["unet"]
    expected = predict(unet)
    assert choose_attention(engine.pipeline, name).backend == name
    with torch.profiler.profile() as profile:
        found = predict(unet)
    assert (found - expected).abs().max() <= 1e-5
    calls = {event.key: event.count for event in profile.key_averages()}
    own, other = "aten::_scaled_dot_product_attention_math", "aten::_scaled_dot_product_flash_attention_for_cpu"
    if name == "_native_flash":
        own, other = other, own
    assert calls[own] == len(unet.attn_processors) == 32
    assert other not in calls


@torch.no_grad()
def test_the_trial_has_gradients_where_there_are_none():
    assert why_not("_native_math", CPU, torch.float32) == ""


def test_gradients_are_those_of_torch_s_own(engine):
    unet = engine.parts["unet"]
    weight = unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.requires_grad_()
    (expected,) = torch.autograd.grad(predict(unet).square().sum(), weight)
    choose_attention(unet, "_native_math")
    (found,) = torch.autograd.grad(predict(unet).square().sum(), weight)
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_sdpa_puts_the_plain_processors_back_and_other_models_are_left_alone(engine, tiny_base):
    unet, other = engine.parts["unet"], Engine.load(str(tiny_base)).parts["unet"]
    choose_attention(unet, "_native_math")
    assert {type(each) for each in unet.attn_processors.values()} == {DispatchedProcessor}
    assert {type(each) for each in other.attn_processors.values()} == {AttnProcessor2_0}
    assert Registry.get_active_backend()[0] == "native"
    assert choose_attention(unet, "sdpa").backend == "native"
    assert {type(each) for each in unet.attn_processors.values()} == {AttnProcessor2_0}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("xformers", r'xformers is not installed \(pip install "loraloom\[xformers\]"\)'),
        ("flash", r"flash_attn is not installed \(pip install flash-attn\)"),
        ("sage", r"sageattention is not installed \(pip install sageattention\)"),
        ("_native_cudnn", r"on cpu in torch.float32: RuntimeError: No viable backend"),
        ("flahs", r'did you mean "flash".*there are: auto, sdpa, flash, .*xformers'),
    ],
)
def test_what_cannot_be_used_is_one_line_and_changes_nothing(engine, name, words):
    with pytest.raises(UserError, match=words) as caught:
        choose_attention(engine.pipeline, name)
    assert len(str(caught.value).splitlines()) == 1
    assert {type(each) for each in engine.parts["unet"].attn_processors.values()} == {AttnProcessor2_0}


def test_auto_takes_torch_s_own_and_says_why(engine):
    chosen = choose_attention(engine.pipeline)
    assert chosen.backend == "native"
    assert str(chosen).startswith("attention: native (_flash_3: flash_attn_interface is not installed")
    assert len(str(chosen).splitlines()) == 1


def test_auto_takes_the_first_that_can(engine, monkeypatch):
    monkeypatch.setattr(attention, "AUTOMATIC", ("_native_cudnn", "_native_math", "_native_flash"))
    assert choose_attention(engine.pipeline) == attention.Attention("_native_math")


def test_a_kernel_whose_numbers_are_wrong_is_refused(monkeypatch):
    right = attention._attend
    monkeypatch.setattr(
        attention, "_attend", lambda name, *rest: [x * (2 - (name == "native")) for x in right(name, *rest)]
    )
    assert why_not("_native_math", CPU, torch.float32).startswith("its numbers are off torch's own by ")


def test_a_kernel_without_gradients_is_refused_in_training_only(monkeypatch):
    """As sage: its output knows nothing of its inputs."""
    forward = Registry._backends["_native_math"]
    monkeypatch.setitem(Registry._backends, "_native_math", lambda **inputs: forward(**inputs).detach())
    assert "does not require grad" in why_not("_native_math", CPU, torch.float32, training=True)
    assert why_not("_native_math", CPU, torch.float32, training=False) == ""


def test_a_model_with_a_processor_of_its_own_is_told(engine):
    engine.parts["unet"].mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(AttnProcessor())
    before = dict(engine.parts["unet"].attn_processors)
    with pytest.raises(UserError, match="AttnProcessor of this model cannot be told"):
        choose_attention(engine.pipeline, "_native_math")
    assert engine.parts["unet"].attn_processors == before
