"""The recipe of the embedded base, 20 steps of it: resumable to the bit, and readable by plain diffusers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from loraloom.models.pocket import build, check

pytestmark = pytest.mark.slow

RECIPE = build.Recipe(
    num_scenes=64, vae_steps=20, vae_batch=2, unet_steps=20, unet_batch=2, debiased_from=9, precision="no"
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """CPU kernels round differently with another number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    build.build(RECIPE, folder / "pocket", folder / "work", CPU)
    return folder / "pocket"


@pytest.fixture(scope="module")
def pipeline(built: Path) -> StableDiffusionPipeline:
    return check.load_pipeline(built)


def build_until(stage: int, last: int, folder: Path) -> None:
    """Builds until somebody presses Ctrl-C in step `last` of a stage (1: VAE, 2: UNet)."""
    make_generator = build._generator

    def interrupting(seed: int, purpose: int, step: int):
        if (purpose, step) == (stage, last):
            raise KeyboardInterrupt
        return make_generator(seed, purpose, step)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build, "_generator", interrupting)
        patch.setattr(build, "SAVE_EVERY", 5)
        build.build(RECIPE, folder / "pocket", folder / "work", CPU)


def test_interrupted_twice_and_resumed_gives_the_same_weights(built: Path, tmp_path: Path):
    build_until(1, 7, tmp_path)
    build_until(2, 12, tmp_path)
    assert not (tmp_path / "pocket").exists()
    assert torch.load(tmp_path / "work" / "unet.pt", weights_only=True)["step"] == 10
    build.build(RECIPE, tmp_path / "pocket", tmp_path / "work", CPU)
    for part in ("vae", "unet", "text_encoder"):
        (file,) = (built / part).glob("*.safetensors")
        resumed = load_file(tmp_path / "pocket" / part / file.name)
        for name, weight in load_file(file).items():
            assert torch.equal(weight, resumed[name]), f"{part}: {name}"


def test_another_recipe_in_the_same_work_folder_is_refused(tmp_path: Path):
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(SystemExit, match="another recipe"):
        build.build(RECIPE, tmp_path / "pocket", tmp_path, CPU)


def test_text_encoder_keys_are_spelled_for_every_version_of_transformers(built: Path):
    keys = load_file(built / "text_encoder" / "model.safetensors")
    assert keys and all(key.startswith("text_model.") for key in keys)


def test_plain_diffusers_reads_the_trained_weights_of_every_part(built: Path, pipeline: StableDiffusionPipeline):
    for part in ("vae", "unet", "text_encoder"):
        (file,) = (built / part).glob("*.safetensors")
        loaded = getattr(pipeline, part).state_dict()
        for name, weight in load_file(file).items():
            mine = loaded[name] if name in loaded else loaded[name.removeprefix("text_model.")]
            assert torch.equal(mine, weight.float()), f"{part}: {name}"


def test_plain_diffusers_samples_it_alone_as_in_a_batch(pipeline: StableDiffusionPipeline):
    prompts, seeds = ["a red star on a blue background", "a creature"], [0, 1]
    both = check.sample_prompts(pipeline, prompts, seeds, steps=2)
    assert both.shape == (2, 64, 64, 3) and both.dtype == np.uint8
    assert not np.array_equal(both[0], both[1])
    alone = check.sample_prompts(pipeline, prompts[1:], seeds[1:], steps=2)
    np.testing.assert_allclose(alone[0].astype(int), both[1], atol=2)  # another batch size rounds differently


def test_the_vae_round_trip_keeps_shape_and_range(pipeline: StableDiffusionPipeline):
    pictures = build.draw_scenes(0, 3, first=500)[1]
    decoded = check.round_trip(pipeline, pictures)
    assert decoded.shape == (3, 64, 64, 3)
    assert decoded.min() >= 0.0 and decoded.max() <= 1.0
