"""What every family must do: one test for all of them, and for a toy that is no UNet."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from loraloom.adapters.format import read, write
from loraloom.adapters.peft_adapters import install, tuner_layers
from loraloom.adapters.targets import select
from loraloom.configs.choices import find, names
from loraloom.configs.errors import UserError
from loraloom.configs.schema import AdapterSection, LossSection, ModelSection, NoiseSection
from loraloom.data.draws import Draws
from loraloom.data.sample import Batch, Sample
from loraloom.data.transforms import place
from loraloom.inference.engine import Engine, Request
from loraloom.inference.mixing import format_names
from loraloom.models.aligned import align
from loraloom.models.base import detect_family
from loraloom.models.encode import encode_caption, encode_image
from loraloom.models.family import Conditioning, PromptOptions
from loraloom.models.load import Base
from loraloom.train.objective import Objective

spec = importlib.util.spec_from_file_location("toy_flow", Path(__file__).with_name("toy_flow.py"))
assert spec is not None
assert spec.loader is not None
toy_flow = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy_flow)

SHIPPED = names("models.families")
COUNTS = {  # preset -> modules, as the blocks of the real models have them
    "sd1": {"unet": {"attention": 128, "ff": 64, "conv": 64}, "text_encoder": {"attention": 8, "ff": 4}},
    "sd2": {"unet": {"attention": 128, "ff": 64, "conv": 64}, "text_encoder": {"attention": 8, "ff": 4}},
    "sdxl": {
        "unet": {"attention": 560, "ff": 162, "conv": 49},
        "text_encoder": {"attention": 8, "ff": 4},
        "text_encoder_2": {"attention": 8, "ff": 4},
    },
    "toy_flow": {"transformer": {"attention": 12}, "text_encoder": {}},
}
CAPTIONS = ["a sks creature", "a red star", "", "a blue moon on a hill"]
SECTION = AdapterSection(rank=4, alpha=8)
METHODS = {name: find("adapters.methods", name) for name in names("adapters.methods")}
FILED = [name for name, method in METHODS.items() if method.SELECTION is not None and not method.CHANGES_BASE]


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.slow if name in ("sd2", "sdxl") else ()) for name in [*SHIPPED, "toy_flow"]
    ]
)
def family(request):
    return toy_flow.FAMILY if request.param == "toy_flow" else find("models.families", request.param).FAMILY


@pytest.fixture
def load(family, base_of):
    """Parts of the family's base, each time new."""

    def load():
        if family is toy_flow.FAMILY:
            parts = family.load(None, torch.float32)
            for part in parts.values():
                align(part)
            return parts
        return Base(ModelSection(base=str(base_of(family.name)))).load()

    return load


def adapters_of(family, parts, section=SECTION, presets=None):
    targets = {family.denoiser: presets or "attention"}
    found = {part: select(part, parts[part], words, family.targets[part]) for part, words in targets.items()}
    return find("adapters.methods", section.method).inject(parts, section, found, 0)


def batch_of(positions, moments=None, prompts=None, **options) -> Batch:
    """Images of noise in one bucket, other captions in turn."""
    geometry = place((48, 40), (32, 32), flip=True)
    samples = [Sample(p, 0, p % 3, geometry, CAPTIONS[p % 4]) for p in positions]
    pixels = torch.stack([torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(p % 3)) for p in positions])
    count = len(samples)
    return Batch(
        samples=samples,
        pixels=None if moments is not None else pixels * 2 - 1,
        moments=moments,
        prompts=prompts,
        masks=None,
        loss_weights=torch.ones(count),
        keeps_base=options.get("keeps_base", [False] * count),
        sources=["x"] * count,
        files=["x"] * count,
    )


def objective_of(family, parts, adapters, **options) -> Objective:
    return Objective(family, family.noise(parts, NoiseSection()), adapters, LossSection(), 0, 2, **options)


def steps_of(objective, adapters, parts, batches) -> list[float]:
    parameters = [p for each in adapters.parameters().values() for p in each]
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01, fused=True), []
    for batch in batches:
        loss = objective(parts, batch, torch.device("cpu")).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_the_contract_is_kept(family, load):
    parts = load()
    assert {family.denoiser, *family.text_encoders, *family.image_encoders, *family.prompt_encoders} <= parts.keys()
    assert family.targets.keys() <= parts.keys()
    for part in parts.values():
        if isinstance(part, nn.Module):
            assert not any(parameter.requires_grad for parameter in part.parameters())
            assert not part.training
    moments = family.encode_images(parts, torch.zeros(2, 3, 32, 48))
    assert moments.shape[1:] == (2, *family.latent_shape(parts, 48, 32))
    assert moments.dtype == torch.float32
    assert family.latent_rgb(parts).shape == (moments.shape[2] + 1, 3)
    kinds = {type(module).__name__ for module in parts[family.denoiser].modules()}
    assert set(family.repeated_blocks) <= kinds
    latents = torch.randn(2, *family.native_latents(parts))
    noised = family.noise(parts, NoiseSection()).noised(latents, torch.randn_like(latents), torch.tensor([3, 999]))
    assert family.predict(parts, noised, family.encode_prompts(parts, ["a", "b c"]), torch.ones(2, 6)).shape == (
        noised.target.shape
    )
    assert family.count_tokens(parts, ["", "a red star"])[0] in (0, len(""))
    assert family.count_tokens(parts, ["a red star"])[0] > 0


def test_presets_mean_as_many_modules_as_the_real_models_have(family, load):
    parts, found = load(), {}
    for part, presets in family.targets.items():
        found[part] = {preset: len(select(part, parts[part], preset, presets)) for preset in presets}
    assert found == COUNTS[family.name]


def test_losses_are_those_of_a_bare_loop_to_the_bit(family, load):
    parts = load()
    adapters = adapters_of(family, parts)
    batches = [batch_of(range(2 * step, 2 * step + 2)) for step in range(10)]
    losses = steps_of(objective_of(family, parts, adapters), adapters, parts, batches)
    assert losses == bare_losses(family, load())
    assert len(set(losses)) == 10


def bare_losses(family, parts) -> list[float]:
    """What one would write by hand for each family, on the same keyed draws."""
    from peft import LoraConfig, inject_adapter_in_model

    endings = list(family.targets[family.denoiser]["attention"])
    torch.manual_seed(0)
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=endings), parts[family.denoiser])
    parameters = [p for p in parts[family.denoiser].parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01, fused=True), []
    for step in range(10):
        positions = [2 * step, 2 * step + 1]
        draws = Draws(0, positions)
        images = torch.stack(
            [torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(p % 3)) * 2 - 1 for p in positions]
        )
        predicted, target = BARE[family.name](parts, images, [CAPTIONS[p % 4] for p in positions], draws)
        loss = F.mse_loss(predicted, target, reduction="none").mean((1, 2, 3)).sum() / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def vae_latents(parts, images, draws):
    rows = []
    for image, noise in zip(images, draws.normal("vae", (4, 4, 4)), strict=True):
        posterior, scale = parts["vae"].encode(image[None]).latent_dist, parts["vae"].config.scaling_factor
        rows.append((posterior.mean * scale + posterior.std * scale * noise)[0])
    return torch.stack(rows)


def tokens_of(tokenizer, captions):
    return tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids


def noisy(parts, latents, draws):
    noise, timesteps = draws.normal("noise", latents.shape[1:]), draws.integers("timestep", 0, 1000)
    velocity = parts["scheduler"].get_velocity(latents, noise, timesteps)
    return parts["scheduler"].add_noise(latents, noise, timesteps), timesteps, noise, velocity


def bare_sd(parts, images, captions, draws):
    latents, timesteps, noise, velocity = noisy(parts, vae_latents(parts, images, draws), draws)
    with torch.no_grad():
        hidden = torch.cat([parts["text_encoder"](tokens_of(parts["tokenizer"], [c]))[0] for c in captions])
    v = parts["scheduler"].config.prediction_type == "v_prediction"
    return parts["unet"](latents, timesteps, hidden).sample, velocity if v else noise


def bare_sdxl(parts, images, captions, draws):
    latents, timesteps, noise, _ = noisy(parts, vae_latents(parts, images, draws), draws)
    embeds, pooled = [], []
    with torch.no_grad():
        for caption in captions:
            one = parts["text_encoder"](tokens_of(parts["tokenizer"], [caption]), output_hidden_states=True)
            two = parts["text_encoder_2"](tokens_of(parts["tokenizer_2"], [caption]), output_hidden_states=True)
            embeds.append(torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1))
            pooled.append(two.text_embeds)
    # 48 x 40 scaled to 38 x 32; the middle begins at 3, and was mirrored: 38 - 32 - 3
    time_ids = torch.tensor([[40.0, 48.0, 0.0, 3.0, 32.0, 32.0]] * len(captions))
    added = {"text_embeds": torch.cat(pooled), "time_ids": time_ids}
    return parts["unet"](latents, timesteps, torch.cat(embeds), added_cond_kwargs=added).sample, noise


def bare_flow(parts, images, captions, draws):
    latents = torch.cat([parts["vae"](image[None]) for image in images])
    noise, timesteps = draws.normal("noise", (4, 4, 4)), draws.integers("timestep", 1, 1000)
    t = timesteps[:, None, None, None] / 1000
    letters = torch.tensor([[ord(letter) % 128 for letter in caption[:8].ljust(8)] for caption in captions])
    words = parts["text_encoder"](letters)
    return parts["transformer"]((1 - t) * latents + t * noise, timesteps / 1000, words), noise - latents


BARE = {"sd1": bare_sd, "sd2": bare_sd, "sdxl": bare_sdxl, "toy_flow": bare_flow}


def test_cached_and_uncached_steps_are_equal(family, load):
    parts = load()
    positions = [[0, 1], [2, 3], [4, 5]]
    plain = [batch_of(each) for each in positions]
    moments = {p: encode_image(family, parts, batch_of([p]).pixels[0]) for each in positions for p in each}
    prompts = {caption: encode_caption(family, parts, caption) for caption in CAPTIONS}
    cached = [
        batch_of(each, torch.stack([moments[p] for p in each]), [prompts[CAPTIONS[p % 4]] for p in each])
        for each in positions
    ]
    losses = []
    for batches in (plain, cached):
        fresh = load()
        adapters = adapters_of(family, fresh)
        losses.append(steps_of(objective_of(family, fresh, adapters), adapters, fresh, batches))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("method", FILED)
def test_every_method_trains_and_its_file_makes_the_same_of_a_fresh_base(family, load, method, tmp_path):
    options = {"block_size": 8} if method == "oft" else {}
    section = AdapterSection(method=method, rank=2, alpha=4, options=options)
    parts = load()
    frozen = {name: value.clone() for name, value in parts[family.denoiser].state_dict().items()}
    adapters = adapters_of(family, parts, section)
    steps_of(objective_of(family, parts, adapters), adapters, parts, [batch_of([0, 1]), batch_of([2, 3])])
    for name, value in parts[family.denoiser].state_dict().items():
        if (before := frozen.get(name.replace(".base_layer", ""))) is not None:
            assert torch.equal(value, before), name
    fresh = load()
    known = format_names(family, fresh)
    write(adapters.artifact(), tmp_path / "x.safetensors", "loraloom", known)
    install(read(tmp_path / "x.safetensors", known), fresh, "again")
    latents = torch.randn(2, *family.native_latents(parts), generator=torch.Generator().manual_seed(0))
    noised = family.noise(parts, NoiseSection()).noised(latents, latents, torch.tensor([3, 999]))
    predictions = [
        family.predict(each, noised, family.encode_prompts(each, CAPTIONS[:2]), torch.full((2, 6), 32.0))
        for each in (parts, fresh, load())
    ]
    torch.testing.assert_close(predictions[0], predictions[1], atol=1e-5, rtol=1e-5)
    assert (predictions[0] - predictions[2]).abs().max() > 1e-5


def test_full_fine_tuning_is_a_bare_loop_over_all_weights(family, load):
    parts = load()
    adapters = adapters_of(family, parts, AdapterSection(method="full"), "all")
    batches = [batch_of([0, 1]), batch_of([2, 3])]
    losses = steps_of(objective_of(family, parts, adapters), adapters, parts, batches)
    bare = load()
    denoiser = bare[family.denoiser].requires_grad_(True)
    assert list(adapters.named_parameters()[family.denoiser]) == [name for name, _ in denoiser.named_parameters()]
    optimizer, wanted = torch.optim.AdamW(denoiser.parameters(), lr=1e-3, weight_decay=0.01, fused=True), []
    objective = objective_of(family, bare, adapters_of(family, load()))
    for batch in batches:
        loss = objective(bare, batch, torch.device("cpu")).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wanted.append(loss.item())
    assert losses == wanted
    assert losses[0] != losses[1]
    trained = parts[family.denoiser].state_dict()
    for name, tensor in denoiser.state_dict().items():
        assert torch.equal(trained[name], tensor), name


def test_the_pipeline_takes_parts_prompts_and_adapter(family, load):
    parts = load()
    adapters = adapters_of(family, parts)
    for _, layer in tuner_layers(parts[family.denoiser]):
        nn.init.normal_(layer.lora_B["default"].weight, std=0.5)
    own = None if family is toy_flow.FAMILY else "ddim"
    request = Request(["a red star", "a moon"], [1, 2], steps=2, resolution=32)
    images = [np.asarray(image) for image in Engine(family, parts, own).generate(request)]
    with adapters.disabled():
        base = [np.asarray(image) for image in Engine(family, parts, own).generate(request)]
    assert all(image.ndim == 3 for image in images)
    assert any((one != other).any() for one, other in zip(images, base, strict=True))


def test_what_the_base_says_can_be_the_target(family, load):
    """With B zero the adapter says what the base says: no loss. Afterwards it does not."""
    parts = load()
    adapters = adapters_of(family, parts)
    objective = objective_of(family, parts, adapters)
    kept = batch_of([0, 1], keeps_base=[True, False])
    first = objective(parts, kept, torch.device("cpu")).per_sample
    assert first[0] == 0
    assert first[1] > 0
    for _, layer in tuner_layers(parts[family.denoiser]):
        nn.init.normal_(layer.lora_B["default"].weight)
    losses = objective(parts, kept, torch.device("cpu"))
    assert losses.per_sample[0] > 0
    losses.total.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters.parameters()[family.denoiser])


# ---------------------------------------------------------------------------- what only some have


@pytest.mark.parametrize("name", SHIPPED)
def test_a_base_is_known_by_its_files(name, base_of):
    assert detect_family(base_of(name)) == name


@pytest.mark.parametrize(
    ("name", "part", "change", "words"),
    [
        ("sd1", "unet", {"in_channels": 9}, "takes 9 channels, which is an inpainting"),
        ("sd2", "scheduler", {"prediction_type": "sample"}, "predicts 'sample'"),
        ("sdxl", "", {"requires_aesthetics_score": True}, "is the refiner of SDXL"),
        ("sdxl", "", {"text_encoder": [None, None]}, "is the refiner of SDXL"),
    ],
)
def test_what_cannot_be_trained_is_said_before_it_is_loaded(name, part, change, words, base_of, tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    for file in base_of(name).iterdir():
        (folder / file.name).symlink_to(file)
    files = {"": "model_index.json", "unet": "unet/config.json", "scheduler": "scheduler/scheduler_config.json"}
    source = base_of(name) / files[part]
    if part:
        (folder / part).unlink()
        (folder / part).mkdir()
    target = folder / files[part]
    target.unlink(missing_ok=True)
    target.write_text(json.dumps(json.loads(source.read_text()) | change))
    with pytest.raises(UserError, match=words):
        Base(ModelSection(base=str(folder)))


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("skip", [0, 1])
def test_clip_skip_leaves_out_layers(name, skip, base_of):
    """Layer by layer: embeddings, then so many layers, then the final norm where the family has it."""
    base = Base(ModelSection(base=str(base_of(name))))
    parts, family = base.load(), base.family
    found = family.encode_prompts(parts, ["a red star"], PromptOptions(clip_skip=skip)).prompt_embeds
    by_hand = []
    for encoder, tokenizer in zip(family.text_encoders, ("tokenizer", "tokenizer_2"), strict=False):
        model = getattr(parts[encoder], "text_model", parts[encoder])
        hidden = model.embeddings(input_ids=tokens_of(parts[tokenizer], ["a red star"]))
        mask = torch.full((77, 77), -torch.inf).triu(1)[None, None]
        layers = list(model.encoder.layers)
        for layer in layers[: len(layers) - skip - (name == "sdxl")]:
            hidden = layer(hidden, attention_mask=mask)
        by_hand.append(hidden if name == "sdxl" else model.final_layer_norm(hidden))
    torch.testing.assert_close(found, torch.cat(by_hand, -1), atol=1e-5, rtol=1e-5)


def test_the_pooled_embedding_is_of_the_first_window(base_of):
    base = Base(ModelSection(base=str(base_of("sdxl"))))
    parts, words = base.load(), "a red star " * 40
    short, long = (base.family.encode_prompts(parts, [words], PromptOptions(windows)) for windows in (1, 2))
    assert isinstance(short, Conditioning)
    assert short.pooled_prompt_embeds is not None
    assert long.pooled_prompt_embeds is not None
    torch.testing.assert_close(short.pooled_prompt_embeds, long.pooled_prompt_embeds)
    assert (short.prompt_embeds.shape[1], long.prompt_embeds.shape[1]) == (77, 152)
