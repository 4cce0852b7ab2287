"""ControlNets beside a base: from a folder or a file they are the same, and they work with adapters and each other."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from diffusers.loaders import single_file_utils as tables
from PIL import Image
from safetensors.torch import load_file, save_file

from loraloom.adapters.artifact import AdapterArtifact, Weights
from loraloom.adapters.format import write
from loraloom.configs.errors import UserError
from loraloom.inference.__main__ import main as sample
from loraloom.inference.adapter_file import format_names
from loraloom.inference.controlnet import Control, load_controlnets
from loraloom.inference.engine import Engine, Request
from loraloom.inference.weighted_file import AdapterFile
from loraloom.models import single_file
from loraloom.models.layout import original_names

pytestmark = pytest.mark.slow

KINDS = ["sd1", "sdxl"]


@pytest.fixture(scope="module")
def engines(base_of):
    return {kind: Engine.load(str(base_of(kind))) for kind in KINDS}


@pytest.fixture(scope="module")
def folders(engines, tmp_path_factory):
    """Two ControlNets for each base, whose zero convolutions are not zero, so that they do something."""
    folder = tmp_path_factory.mktemp("controlnets")
    for kind, engine in engines.items():
        for seed in (0, 1):
            torch.manual_seed(seed)
            controlnet = ControlNetModel.from_unet(
                engine.parts["unet"], conditioning_embedding_out_channels=(4, 8, 8, 16)
            )
            for name, parameter in controlnet.named_parameters():
                if name.startswith(("controlnet_down_blocks", "controlnet_mid_block")) or "cond_embedding" in name:
                    torch.nn.init.normal_(parameter, std=0.3)
            controlnet.save_pretrained(folder / f"{kind}-{seed}")
    return folder


@pytest.fixture
def tiny_configs(base_of, tmp_path, monkeypatch):
    """The configs of the tiny bases in the place of the real ones."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    for kind in ("sd1", "sd2", "sdxl"):
        config = json.loads((base_of(kind) / "unet/config.json").read_text())
        (folder / f"{kind}.json").write_text(json.dumps({"unet/config.json": config}))
    monkeypatch.setattr(single_file, "SHIPPED", folder)


def hint(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def picture(pipeline, **arguments):
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 1, "height": 32, "width": 32, "output_type": "np", "guidance_scale": 4.0}
    return pipeline("a red star", generator=generator, **options, **arguments).images[0]


def controlled(engine, controlnets, scale=1.0):
    images = hint() if len(controlnets) == 1 else [hint(), hint()]
    return picture(engine.pipeline_with(controlnets), image=images, controlnet_conditioning_scale=scale)


@pytest.mark.parametrize("kind", KINDS)
def test_it_works_as_strongly_as_asked_and_beside_others(kind, engines, folders):
    engine = engines[kind]
    one, two = load_controlnets([str(folders / f"{kind}-{seed}") for seed in (0, 1)])
    plain, full = picture(engine.pipeline), controlled(engine, [one])
    assert (controlled(engine, [one], 0.0) == plain).all()
    assert np.abs(full - plain).max() > 1e-3
    assert (controlled(engine, [one, two], [1.0, 0.0]) == full).all()
    assert np.abs(controlled(engine, [one, two], [1.0, 1.0]) - full).max() > 1e-3
    assert (picture(engine.pipeline) == plain).all()


@pytest.mark.parametrize("kind", KINDS)
def test_it_shares_every_part_and_leaves_the_rest_out(kind, engines, folders):
    pipeline = engines[kind].pipeline_with(load_controlnets([str(folders / f"{kind}-0")]))
    own = engines[kind].pipeline.components
    assert all(pipeline.components[name] is part for name, part in own.items())
    assert getattr(pipeline, "safety_checker", None) is None
    assert getattr(pipeline, "watermark", None) is None
    assert type(pipeline).__name__ == type(engines[kind].pipeline).__name__.replace("Pipeline", "ControlNetPipeline")


@pytest.mark.parametrize("kind", KINDS)
def test_the_hint_is_followed_from_an_image_too(kind, engines, folders):
    (controlnet,) = load_controlnets([str(folders / f"{kind}-0")])
    for task, rest in (("image_to_image", {}), ("inpaint", {"mask_image": Image.new("L", (32, 32), 255)})):
        pipeline = engines[kind].pipeline_with([controlnet], task)
        first, second = (
            picture(
                pipeline, image=hint(1), control_image=hint(), strength=1.0, controlnet_conditioning_scale=s, **rest
            )
            for s in (0.0, 1.0)
        )
        assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_the_base_work_in_it(kind, base_of, folders, tmp_path):
    engine = Engine.load(str(base_of(kind)))
    controlnets = load_controlnets([str(folders / f"{kind}-0")])
    before = controlled(engine, controlnets)
    names, generator = format_names(engine.family, engine.parts), torch.Generator().manual_seed(0)
    modules = {}
    for path, shape in names.module_paths["unet"].items():
        if path.endswith("attn2.to_v"):
            down, up = (torch.randn(size, generator=generator) for size in ((2, shape[1]), (shape[0], 2)))
            modules["unet", path] = Weights("lora", {"down": down, "up": up}, 1.0)
    write(AdapterArtifact(modules), tmp_path / "a.safetensors", "loraloom", names)
    pipeline = engine.pipeline_with(controlnets)
    engine.attach([AdapterFile(tmp_path / "a.safetensors")])
    both = picture(pipeline, image=hint(), controlnet_conditioning_scale=1.0)
    assert np.abs(both - before).max() > 1e-3
    assert np.abs(both - picture(engine.pipeline)).max() > 1e-3
    engine.pipeline.disable_lora()
    assert (controlled(engine, controlnets) == before).all()


def original(folder):
    """As the authors' code names it, by a table of our own."""
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    layers = original_names({name.rpartition(".")[0] for name in tensors if not name.startswith("controlnet")})
    result = {}
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        if found := re.fullmatch(r"controlnet_down_blocks\.(\d+)", path):
            path = f"zero_convs.{found[1]}.0"
        elif found := re.fullmatch(r"controlnet_cond_embedding\.blocks\.(\d+)", path):
            path = f"input_hint_block.{2 * int(found[1]) + 2}"
        else:
            hints = {"conv_in": "input_hint_block.0", "conv_out": "input_hint_block.14"}
            named = {f"controlnet_cond_embedding.{name}": value for name, value in hints.items()}
            path = ({"controlnet_mid_block": "middle_block_out.0"} | named | layers)[path]
        result[f"{path}.{leaf}"] = tensor
    assert len(result) == len(tensors)
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_folder_and_single_files_make_the_same_picture(kind, engines, folders, tiny_configs, tmp_path):
    folder = folders / f"{kind}-0"
    named = original(folder)
    save_file({f"control_model.{name}": tensor for name, tensor in named.items()}, tmp_path / "prefixed.safetensors")
    save_file(named, tmp_path / "bare.safetensors")
    shutil.copy(folder / "diffusion_pytorch_model.safetensors", tmp_path / "diffusers.safetensors")
    (expected,) = load_controlnets([str(folder)])
    image = controlled(engines[kind], [expected])
    state = expected.state_dict()
    for name in ("prefixed", "bare", "diffusers"):
        (found,) = load_controlnets([str(tmp_path / f"{name}.safetensors")])
        assert all(torch.equal(tensor, state[key]) for key, tensor in found.state_dict().items()), name
        assert (controlled(engines[kind], [found]) == image).all(), name


def test_the_configs_of_real_ones_are_those_that_their_tensors_tell():
    """Made from the shipped UNets, with no numbers."""
    from diffusers import UNet2DConditionModel

    from loraloom.inference.controlnet import _config, _kind_of

    for kind in ("sd1", "sd2", "sdxl"):
        usual = single_file.shipped_configs(kind)["unet/config.json"]
        with torch.device("meta"):
            wanted = ControlNetModel.from_unet(UNet2DConditionModel.from_config(usual), load_weights_from_unet=False)
            tensors = wanted.state_dict()
            assert _kind_of(tensors) == kind
            found = ControlNetModel.from_config(_config(usual, tensors))
        assert {name: tensor.shape for name, tensor in found.state_dict().items()} == {
            name: tensor.shape for name, tensor in tensors.items()
        }
        settings = ("attention_head_dim", "cross_attention_dim", "use_linear_projection", "addition_embed_type")
        assert [found.config[name] for name in settings] == [wanted.config[name] for name in settings]
        assert list(found.config["conditioning_embedding_out_channels"]) == [16, 32, 96, 256]
        assert list(found.config["down_block_types"]) == list(wanted.config["down_block_types"])


def test_the_type_is_the_one_that_is_asked(folders, tiny_configs):
    folder = folders / "sd1-0"
    for source in (folder, folder / "diffusion_pytorch_model.safetensors"):
        (model,) = load_controlnets([str(source)], "bf16")
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_one_for_another_family_is_refused_with_both_names(engines, folders, tiny_configs):
    (controlnet,) = load_controlnets([str(folders / "sdxl-0")])
    with pytest.raises(UserError, match=r"sdxl-0: is for sdxl, the base is sd1 \(cross_attention_dim 80 instead of 32"):
        engines["sd1"].pipeline_with([controlnet])


def test_none_and_unknown_tasks_are_refused(engines, folders):
    with pytest.raises(UserError, match="no ControlNet was given"):
        engines["sd1"].pipeline_with([])
    with pytest.raises(UserError, match=r"task .controlnet_video. is unknown.*controlnet_inpaint"):
        engines["sd1"].pipeline_with(load_controlnets([str(folders / "sd1-0")]), "video")


def test_what_is_no_controlnet_is_refused_in_a_line(folders, base_of, tiny_configs, tmp_path):
    tensors = load_file(folders / "sd1-0/diffusion_pytorch_model.safetensors")
    lacking = {name: tensor for name, tensor in tensors.items() if name != "controlnet_mid_block.bias"}
    files = {
        "adapter": ({"lora_unet_x.lora_down.weight": torch.ones(1)}, "is no ControlNet: it holds an adapter"),
        "control-lora": (
            {"lora_controlnet": torch.ones(1), "input_hint_block.0.weight": torch.ones(1)},
            "it holds a control-LoRA",
        ),
        "model": ({"model.diffusion_model.x": torch.ones(1)}, "it holds a whole checkpoint"),
        "other": ({"x": torch.ones(1)}, "its 1 tensors are of something else"),
        "lacking": (lacking, r"lacks 1 of \d+ tensors of a sd1 ControlNet, first controlnet_mid_block.bias"),
        "union": (tensors | {"task_embedding": torch.ones(1)}, "has 1 tensors that no sd1 ControlNet has, first task"),
        "wide": (
            tensors | {"conv_in.bias": torch.ones(3)},
            r"conv_in.bias is \(3,\), in a sd1 ControlNet it is \(16,\)",
        ),
    }
    for name, (content, words) in files.items():
        save_file(content, tmp_path / f"{name}.safetensors")
        with pytest.raises(UserError, match=words) as caught:
            load_controlnets([str(tmp_path / f"{name}.safetensors")])
        assert len(caught.value.problems) == 1
        assert str(caught.value).startswith(f"ControlNet {tmp_path}/{name}.safetensors: ")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x.pth", "a pickle can run code"),
        ("none.safetensors", "there is no such file"),
        ("nowhere", "no such folder; give one"),
        ("lllyasviel/sd-controlnet-canny", "a hub id with its commit"),
    ],
)
def test_sources_that_cannot_be_are_one_line(source, words):
    with pytest.raises(UserError, match=words):
        load_controlnets([source])


def test_folders_of_other_things_are_refused(base_of, tmp_path):
    with pytest.raises(UserError, match="is a UNet2DConditionModel, not a ControlNetModel"):
        load_controlnets([str(base_of("sd1") / "unet")])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_controlnets([str(tmp_path)])


def test_a_hub_id_is_read_at_its_commit(folders, tmp_path, monkeypatch):
    """From the hub's cache on this machine; another commit is not there."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--someone--canny" / "snapshots" / commit
    shutil.copytree(folders / "sd1-0", snapshot)
    (model,) = load_controlnets([f"someone/canny@{commit}"])
    (wanted,) = load_controlnets([str(folders / "sd1-0")])
    assert all(torch.equal(tensor, wanted.state_dict()[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(UserError, match=f"ControlNet someone/canny@f{commit[1:]}: cannot be loaded"):
        load_controlnets([f"someone/canny@f{commit[1:]}"])


def test_the_table_of_diffusers_for_size_conditions_is_still_there():
    sizes = tables.DIFFUSERS_TO_LDM_MAPPING["controlnet"]["addition_embed_type"]
    assert sizes["add_embedding.linear_1.weight"] == "label_emb.0.0.weight"


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_follows_one_or_several_as_the_pipeline_does(kind, engines, folders):
    engine = engines[kind]
    one, two = load_controlnets([str(folders / f"{kind}-{seed}") for seed in (0, 1)])
    controls = [Control(one, hint(), 0.7), Control(two, hint(1), 0.4)]
    settings = {"steps": 1, "micro_batch": 1}
    for some, given in ((controls[:1], (hint(), 0.7)), (controls, ([hint(), hint(1)], [0.7, 0.4]))):
        (ours,) = engine.generate(Request(["a red star"], [0], controls=some, **settings))
        pipeline = engine.pipeline_with([control.model for control in some])
        theirs = picture(pipeline, image=given[0], controlnet_conditioning_scale=given[1])
        assert np.abs(np.asarray(ours, float) - theirs * 255).max() <= 1
    start = Image.new("RGB", (32, 32), "red")
    settings |= {"image": start, "strength": 1.0}
    (from_image,) = engine.generate(Request(["a red star"], [0], controls=controls, **settings))
    (free,) = engine.generate(Request(["a red star"], [0], **settings))
    assert (np.asarray(from_image) != np.asarray(free)).any()
    with pytest.raises(UserError, match="30 x 32 is no multiple of 8"):
        engine.generate(Request(["x"], [0], controls=[Control(one, hint().resize((30, 32)))]))


def test_the_command_takes_controlnets_and_makes_the_picture_again(base_of, folders, tmp_path):
    hint().save(tmp_path / "hint.png")
    control = f"{folders / 'sd1-0'}={tmp_path / 'hint.png'}:0.5"
    common = ["--base", str(base_of("sd1")), "--prompt", "a red star", "--steps", "1", "--num-images", "2"]
    assert sample([*common, "--control", control, "--out", str(tmp_path / "one")]) == 0
    assert sample([*common, "--out", str(tmp_path / "free")]) == 0
    assert sample(["--from", str(tmp_path / "one/0001.png"), "--out", str(tmp_path / "again")]) == 0
    names = ("one/0001.png", "free/0001.png", "again/0000.png")
    made, free, again = (np.asarray(Image.open(tmp_path / name)) for name in names)
    assert (made == again).all()
    assert (made != free).any()
    with pytest.raises(UserError, match=r"sdxl-0: is for .*, the base is sd1"):
        sample([*common, "--control", control.replace("sd1-0", "sdxl-0"), "--out", str(tmp_path / "no")])
