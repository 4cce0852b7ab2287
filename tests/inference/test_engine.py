"""Sampling: the picture depends on its prompt and seed alone, and says in its file how it was made."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from loraloom.configs.command import run_command
from loraloom.configs.errors import UserError
from loraloom.configs.schema import ModelSection
from loraloom.inference.__main__ import main
from loraloom.inference.checkpoint import checkpoints_of
from loraloom.inference.engine import MICRO_BATCH, Engine, Request
from loraloom.inference.pictures.png import image_grid, request_in
from loraloom.inference.schedulers import SCHEDULERS, compatibles
from loraloom.inference.verify import probe
from loraloom.models.family import PromptOptions
from loraloom.models.load import Base
from loraloom.train.__main__ import main as train


@pytest.fixture(scope="module")
def engine(tiny_base) -> Engine:
    return Engine.load(str(tiny_base))


def pixels(images) -> list[bytes]:
    return [image.tobytes() for image in images]


def test_an_image_does_not_depend_on_how_many_are_made(engine):
    few = engine.generate(Request.repeat(["a star"], 2, seed=3, steps=2))
    many = engine.generate(Request.repeat(["a star"], MICRO_BATCH + 2, seed=3, steps=2))
    assert pixels(many)[:2] == pixels(few)
    assert len(set(pixels(many))) == MICRO_BATCH + 2


def test_prompt_guidance_and_steps_each_matter(engine):
    def one(prompt="a star", **options):
        return pixels(engine.generate(Request([prompt], [0], **{"steps": 2, **options})))[0]

    assert len({one(), one("a heart"), one(guidance=8.0), one(steps=3), one(negative_prompt="a moon")}) == 5


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_samples(tiny_base, name):
    engine = Engine.load(str(tiny_base), scheduler=name)
    image = np.asarray(engine.generate(Request(["a star"], [0], steps=3))[0])
    assert image.shape == (32, 32, 3)
    assert type(engine.pipeline.scheduler).__name__ == SCHEDULERS[name].kind


def test_an_unknown_scheduler_is_answered_with_the_list(tiny_base):
    with pytest.raises(UserError, match=r'did you mean "euler".*dpmsolver\+\+'):
        Engine.load(str(tiny_base), scheduler="eulr")


def test_the_grid_has_a_row_for_each_prompt():
    images = [Image.new("RGB", (8, 8), "black")] * 6
    assert image_grid(images, columns=3).size == (24, 16)


def test_the_command_writes_images_that_name_their_request(tiny_base, tmp_path, capsys):
    arguments = ["--base", str(tiny_base), "--prompt", "a star", "--num-images", "2", "--steps", "2", "--seed", "7"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    with Image.open(tmp_path / "0001.png") as image:
        assert image.text["prompt"] == "a star"  # type: ignore[attr-defined]
    assert request_in(tmp_path / "0001.png")["seed"] == 8
    assert (tmp_path / "grid.png").exists()
    assert "2 images" in capsys.readouterr().out


@pytest.mark.parametrize("adapter", ["missing.safetensors", "missing.safetensors:0.5"])
def test_a_missing_adapter_is_one_line(tiny_base, tmp_path, capsys, adapter):
    arguments = ["--base", str(tiny_base), "--adapter", adapter, "--prompt", "x", "--out", str(tmp_path)]
    assert run_command(main, arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "missing.safetensors" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resolution", "30"], "no multiple of 8"),
        (["--device", "cuda:99"], "cannot be used"),
        (["--device", "nonsense"], "cannot be used"),
        (["--adapter", "x.safetensors:nan"], "not a finite number"),
        (["--scheduler", "eulr"], "euler"),
    ],
)
def test_arguments_that_cannot_be_are_one_line(tiny_base, tmp_path, capsys, arguments, words):
    assert run_command(main, ["--base", str(tiny_base), "--prompt", "x", "--out", str(tmp_path), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_missing_base_is_one_line(tmp_path, capsys):
    assert run_command(main, ["--base", "./nowhere", "--prompt", "x", "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "nowhere" in line


# ---------------------------------------------------------------------------- places, tasks, prompts


def test_an_image_is_the_same_alone_in_its_place(engine):
    many = pixels(engine.generate(Request.repeat(["a star"], 6, seed=3, steps=2)))
    for k in (1, 3, 5):
        request = Request(["a star"], [3 + k], steps=2, place=k % MICRO_BATCH)
        assert pixels(engine.generate(request)) == [many[k]]
    rest = Request.repeat(["a star"], 4, seed=5, steps=2, place=2)  # over the end of a forward pass
    assert pixels(engine.generate(rest)) == many[2:]


def test_the_forward_pass_has_its_number_of_images(engine):
    sizes = []
    hook = engine.parts["unet"].register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    for asked, found in ((None, MICRO_BATCH), (1, 1), (3, 3)):
        sizes.clear()
        images = engine.generate(Request.repeat(["a star"], 4, 0, steps=1, micro_batch=asked))
        assert len(images) == 4
        assert set(sizes) == {2 * found}
    hook.remove()


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_image_to_image_and_inpainting_are_those_of_diffusers(base_of, kind):
    engine = Engine.load(str(base_of(kind)))
    start = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8))
    mask = Image.new("L", (48, 40), 0)
    mask.paste(255, (0, 0, 24, 40))
    for further, task in (({}, "image_to_image"), ({"mask": mask}, "inpaint")):
        request = Request(["a star"], [7], steps=4, image=start, strength=0.5, micro_batch=1, **further)
        (ours,) = engine.generate(request)
        assert ours.size == (48, 40)
        pipeline = engine.pipeline_for(task)
        assert pipeline.unet is engine.pipeline.unet
        assert pipeline.vae is engine.parts["vae"]
        masked = {"mask_image": mask, "width": 48, "height": 40} if further else {}
        given = {"num_inference_steps": 4, "guidance_scale": 4.0, "strength": 0.5, "image": start, **masked}
        theirs = pipeline("a star", generator=torch.Generator().manual_seed(7), **given).images[0]
        assert np.abs(np.asarray(ours, float) - np.asarray(theirs)).max() <= 1
        other = engine.generate(Request(["a star"], [7], steps=4, image=start, strength=1.0, micro_batch=1, **further))
        assert pixels(other) != pixels([ours])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"mask": Image.new("L", (32, 32))}, "needs an image"),
        ({"image": Image.new("RGB", (32, 32)), "strength": 0.0}, "strength 0"),
        ({"image": Image.new("RGB", (32, 32)), "strength": 0.1, "steps": 2}, "give more of either"),
        ({"image": Image.new("RGB", (30, 32))}, "30 x 32 is no multiple of 8"),
        ({"resolution": (32, 30)}, "32 x 30 is no multiple of 8"),
        ({"micro_batch": 0}, "at least 1"),
    ],
)
def test_requests_that_cannot_be_are_refused(engine, wrong, words):
    with pytest.raises(UserError, match=words):
        engine.generate(Request(["x"], [0], **wrong))


def test_schedulers_are_swapped_on_every_pipeline_and_leave_nothing_behind(engine):
    request = Request(["a star"], [0], steps=3)
    before = pixels(engine.generate(request))
    inpaint = engine.pipeline_for("inpaint")
    engine.set_scheduler("heun")
    assert type(inpaint.scheduler) is type(engine.pipeline.scheduler) is diffusers.HeunDiscreteScheduler
    assert pixels(engine.generate(request)) != before
    engine.set_scheduler("KDPM2DiscreteScheduler")  # a class of diffusers
    engine.set_scheduler("dpmsolver++")
    assert pixels(engine.generate(request)) == before


def test_every_compatible_class_of_diffusers_is_named(engine):
    known = compatibles(engine.parts["scheduler"])
    assert {each.kind for each in SCHEDULERS.values()} - {"LCMScheduler"} <= set(known)  # made for distilled bases
    with pytest.raises(UserError, match="KDPM2DiscreteScheduler"):
        engine.set_scheduler("nonsense")


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_weights_of_words_change_the_embeddings_and_ones_do_not(base_of, kind):
    parts = (found := Base(ModelSection(base=str(base_of(kind))))).load()

    def encode(prompt: str, **options):
        return found.family.encode_prompts(parts, [prompt], PromptOptions(**options))

    long = "a red star on a blue background " * 20
    for prompt, options in (("a red star", {}), ("a red star", {"clip_skip": 1}), (long, {"windows": 2})):
        plain, weighted = encode(prompt, **options), encode(prompt, **options, weighted=True)
        assert torch.equal(plain.prompt_embeds, weighted.prompt_embeds)
        assert (plain.pooled_prompt_embeds is None) or torch.equal(
            plain.pooled_prompt_embeds, weighted.pooled_prompt_embeds
        )
    base = encode("a red star").prompt_embeds
    more, less = (encode(f"a (red){w} star", weighted=True).prompt_embeds - base for w in (1.5, 0.5))
    assert min(more.abs().max(), less.abs().max()) > 1e-2
    assert encode("a (red)1.0 star", weighted=True).prompt_embeds.shape == base.shape


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ('("a", "b").and()', "fills 2 windows of tokens, not 1"),
        ("a cat.swap(dog)", "swap"),
        ("star " * 90, "give that many token windows"),
    ],
)
def test_weighted_prompts_that_cannot_be_are_one_line(engine, prompt, words):
    with pytest.raises(UserError, match=words):
        engine.generate(Request([prompt], [0], steps=1, prompt_options=PromptOptions(weighted=True)))


def test_a_checkpoint_of_a_run_is_an_adapter(tiny_base, config_writer, tmp_path):
    config = config_writer(tmp_path, "run", loop={"steps": 2, "batch_size": 1}, checkpoint={"every": 2})
    assert train([str(config)]) == 0
    (checkpoint,) = checkpoints_of(tmp_path / "run")
    engines = [Engine.load(str(tiny_base)) for _ in range(2)]
    for engine, source in zip(engines, (checkpoint, tmp_path / "run/tiny.safetensors"), strict=True):
        engine.adapters.load_adapter(source, "a")
    one, other = (probe(engine.family, engine.parts) for engine in engines)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    engines[0].adapters.disable()
    assert not torch.equal(probe(engines[0].family, engines[0].parts), one)
