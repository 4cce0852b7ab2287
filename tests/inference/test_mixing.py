"""Several adapters on one base: weighed, switched, fused, swapped, and taken out without a trace."""

import copy
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraloom.configs.errors import UserError
from loraloom.inference.engine import Engine
from loraloom.inference.layers import Layers
from loraloom.inference.verify import probe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def base(request, base_of) -> str:
    return str(base_of(request.param))


@pytest.fixture(scope="module")
def loaded(base) -> Engine:
    return Engine.load(base)


@pytest.fixture
def engine(loaded) -> Iterator[Engine]:
    """Without adapters, before and after each test: `unload` leaves no trace."""
    yield loaded
    loaded.adapters.unload()


@pytest.fixture(scope="module")
def plain(loaded) -> torch.Tensor:
    """The base's prediction."""
    loaded.adapters.unload()
    return prediction(loaded)


def prediction(engine: Engine) -> torch.Tensor:
    return probe(engine.family, engine.parts)


def hashes(engine: Engine) -> dict[str, str]:
    """Of every tensor of the base, as it is when nothing carries an adapter."""
    tensors = {
        f"{part}.{name}": tensor
        for part, model in engine.parts.items()
        if isinstance(model, torch.nn.Module)
        for name, tensor in model.state_dict().items()
    }
    return {name: hashlib.sha256(t.contiguous().view(torch.uint8).numpy()).hexdigest() for name, t in tensors.items()}


def storages(engine: Engine) -> int:
    """Bytes of all tensors of the models, each memory counted once."""
    models = [model for model in engine.parts.values() if isinstance(model, torch.nn.Module)]
    tensors = [t for model in models for t in (*model.parameters(), *model.buffers())]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


METHODS = ("lora", "loha", "lokr")
ATTENTION = {"unet": "attention", "text_encoder": "attention"}
FEW = [r"re:(down_blocks\.1|mid_block|up_blocks\.1)\..*transformer_blocks\.[01]\.attn\d\.to_(q|v|out\.0)$"]
"""Of SDXL's 70 transformer layers those that show everything: PEFT takes a second for all of them."""
only_sd1 = pytest.mark.parametrize("base", ["sd1"], indirect=True)


@pytest.fixture(scope="module")
def files(base, make_adapter) -> dict[str, Path]:
    """One adapter of each method, and two more LoRAs of other layers."""
    parts = {"unet": FEW, "text_encoder": "attention"} if "sdxl" in base else ATTENTION
    found = {m: make_adapter(base, m, name=m, parts=parts, seed=k) for k, m in enumerate(METHODS)}
    found["conv"] = make_adapter(base, name="conv", parts={"unet": ["re:mid_block.*to_k", "conv"]}, seed=5)
    found["dora"] = make_adapter(base, name="dora", parts={"unet": parts["unet"]}, dora=True, seed=6)
    return found


def load(engine: Engine, files: dict[str, Path], *names: str) -> None:
    for name in names:
        engine.adapters.load_adapter(files[name])


@pytest.mark.parametrize("method", METHODS)
def test_it_loads_every_method_and_unload_leaves_no_trace(engine, files, plain, method):
    before, size = hashes(engine), storages(engine)
    load(engine, files, method)
    assert (prediction(engine) - plain).abs().max() > 1e-3
    assert engine.adapters.get_active_adapters() == [method]
    engine.adapters.unload()
    assert torch.equal(prediction(engine), plain)
    assert hashes(engine) == before
    assert storages(engine) == size
    assert engine.adapters.get_names() == []


@only_sd1
def test_five_adapters_take_their_own_size_and_give_it_back(engine, files):
    sizes = [storages(engine)]
    for name in files:
        load(engine, files, name)
        sizes.append(storages(engine))
    assert sizes == sorted(set(sizes))
    engine.adapters.unload()
    assert storages(engine) == sizes[0]


def test_methods_in_the_same_layers_add_up(engine, base, files):
    """In one linear layer, where nothing else mixes them."""
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    width = engine.parts["unet"].get_submodule(path).weight.shape[1]
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    plain = engine.parts["unet"].get_submodule(path)(x)
    load(engine, files, *METHODS)

    def change(**weights: float) -> torch.Tensor:
        with engine.adapters.weighted(weights):
            return engine.parts["unet"].get_submodule(path)(x) - plain

    alone = [change(**{method: 1.0}) for method in METHODS]
    assert all(each.abs().max() > 1e-3 for each in alone)
    torch.testing.assert_close(change(lora=1.0, loha=1.0, lokr=1.0), sum(alone), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(change(lora=0.5, lokr=-2.0), 0.5 * alone[0] - 2 * alone[2], rtol=1e-4, atol=1e-5)


def test_weights_by_component_and_block_are_those_of_diffusers(engine, files):
    load(engine, files, "lora")
    weight = {"unet": {"down": [0.3, 0.8], "mid": 0.5, "up": {"block_1": [0.1, 0.6, 0.9]}}, "text_encoder": 0.2}
    theirs, ours = copy.deepcopy(weight), weight
    engine.pipeline.set_adapters(["lora"], [theirs])
    wanted = prediction(engine)
    engine.adapters.set_adapters({"lora": 1.0})
    assert not torch.equal(prediction(engine), wanted)
    engine.adapters.set_adapters({"lora": ours})
    assert torch.equal(prediction(engine), wanted)


def test_a_block_can_be_named_by_the_begin_of_its_path(engine, files, plain):
    load(engine, files, "conv", "lora")
    engine.adapters.set_adapters({"conv": {"unet": {"mid_block": 0, "down_blocks": 0, "up_blocks": 0}}})
    assert torch.equal(prediction(engine), plain)
    engine.adapters.set_adapters({"lora": {"unet": 0, "text_encoder": {"layers.0": 0}}})
    one_layer = prediction(engine)
    engine.adapters.set_adapters({"lora": {"unet": 0, "text_encoder": 1.0}})
    assert not torch.equal(prediction(engine), one_layer)


@only_sd1
def test_weighted_lasts_as_long_as_its_block(engine, files):
    load(engine, files, "lora", "loha")
    engine.adapters.set_adapters({"lora": {"unet": {"mid": 0.5}}})
    before = prediction(engine)
    with pytest.raises(ZeroDivisionError), engine.adapters.weighted({"loha": 0.7}):
        assert engine.adapters.get_active_adapters() == ["loha"]
        assert not torch.equal(prediction(engine), before)
        1 / 0  # noqa: B018
    assert torch.equal(prediction(engine), before)
    assert engine.adapters.get_active_adapters() == ["lora"]
    assert engine.adapters.weights["lora"] == {"unet": {"mid": 0.5}}


@only_sd1
def test_disable_and_enable_keep_the_weights(engine, files, plain):
    load(engine, files, "lora", "lokr")
    engine.adapters.set_adapters({"lora": 0.4, "lokr": 0.2})
    mixed = prediction(engine)
    engine.adapters.disable()
    assert torch.equal(prediction(engine), plain)
    assert engine.adapters.get_active_adapters() == []
    engine.adapters.enable()
    assert torch.equal(prediction(engine), mixed)


@only_sd1
def test_deleting_one_leaves_the_others_as_they_are(engine, files):
    load(engine, files, "loha")
    alone = prediction(engine)
    load(engine, files, "lora", "lokr")
    engine.adapters.set_adapters({"loha": 1.0})
    engine.adapters.delete_adapters(["lora", "lokr"])
    assert engine.adapters.get_list_adapters() == {part: ["loha"] for part in ("unet", "text_encoder")}
    assert torch.equal(prediction(engine), alone)


# ---------------------------------------------------------------------------- fusing


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def typed(request, base) -> Engine:
    return Engine.load(base, dtype=request.param)


@pytest.mark.parametrize("names", [["lora"], ["lora", "loha"], ["lora", "loha", "lokr", "conv", "dora"]], ids=len)
def test_unfusing_gives_every_bit_back(typed, files, names):
    engine = typed
    before = hashes(engine)
    load(engine, files, *names)
    engine.adapters.set_adapters({name: 0.3 + 0.1 * k for k, name in enumerate(names)})
    beside = prediction(engine)
    engine.adapters.fuse()
    assert hashes(engine).keys() == before.keys()  # nothing is left around the layers
    assert hashes(engine) != before
    fused = prediction(engine)
    assert engine.adapters.get_active_adapters() == names
    engine.adapters.unfuse()
    assert torch.equal(prediction(engine), beside)
    engine.adapters.unload()
    assert hashes(engine) == before
    if typed.parts["unet"].dtype == torch.float32:
        torch.testing.assert_close(fused, beside, rtol=1e-4, atol=1e-5)


@only_sd1
def test_the_weights_can_be_read_again_instead_of_kept(engine, files):
    before = hashes(engine)
    load(engine, files, "lora", "conv")
    beside = storages(engine)
    engine.adapters.fuse(base_weights=Layers(engine.base).weight)
    assert storages(engine) < beside
    engine.adapters.unload()
    assert hashes(engine) == before


def test_fused_is_what_merging_makes(engine, base, files):
    merged = Engine.load(base, merged=[f"{files['lora']}:0.5", f"{files['lokr']}:0.8"])
    load(engine, files, "lora", "lokr")
    engine.adapters.set_adapters({"lora": 0.5, "lokr": 0.8})
    beside = prediction(engine)
    engine.adapters.fuse()
    torch.testing.assert_close(prediction(engine), prediction(merged), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(beside, prediction(merged), rtol=1e-4, atol=1e-5)


@only_sd1
@pytest.mark.parametrize(
    "change",
    [
        lambda adapters: adapters.set_adapters({"lora": 0.5}),
        lambda adapters: adapters.delete_adapters("lora"),
        lambda adapters: adapters.disable(),
        lambda adapters: adapters.fuse(),
        lambda adapters: adapters.load_adapter("other.safetensors"),
        lambda adapters: adapters.hotswap("other.safetensors", "lora"),
    ],
)
def test_what_is_fused_cannot_be_changed(fused_engine, change):
    with pytest.raises(UserError, match="unfuse first"):
        change(fused_engine.adapters)


@pytest.fixture(scope="module")
def fused_engine(base, files) -> Engine:
    engine = Engine.load(base)
    load(engine, files, "lora")
    engine.adapters.fuse()
    return engine


# ---------------------------------------------------------------------------- hot-swapping


@pytest.fixture(scope="module")
def unet_files(base, make_adapter) -> list[Path]:
    """LoRAs of other ranks and alphas in the same modules."""
    parts = {"unet": FEW if "sdxl" in base else "attention"}
    return [make_adapter(base, parts=parts, rank=r, alpha=a, seed=r, name=f"r{r}") for r, a in ((4, 8), (2, 1), (8, 4))]


def test_a_swapped_adapter_is_the_new_one(base, unet_files):
    engine = Engine.load(base)
    engine.adapters.enable_hotswap(target_rank=8)
    engine.adapters.load_adapter(unet_files[0], "a", weight=0.7)
    for file in unet_files:
        engine.adapters.hotswap(file, "a")
        fresh = Engine.load(base)
        fresh.adapters.load_adapter(file, "a", weight=0.7)
        torch.testing.assert_close(prediction(engine), prediction(fresh), rtol=1e-4, atol=1e-5)
        assert engine.adapters.get_active_adapters() == ["a"]


@only_sd1
def test_a_swap_leaves_other_adapters_alone(engine, unet_files, files):
    """Also those whose name, or whose modules' names, hold the swapped one's."""
    engine.adapters.load_adapter(unet_files[2], "a", weight=0.7)
    engine.adapters.load_adapter(unet_files[1], "ab", weight=0.5)
    with engine.adapters.weighted({"ab": 0.5}):
        alone = prediction(engine)
    engine.adapters.hotswap(unet_files[0], "a")
    with engine.adapters.weighted({"ab": 0.5}):
        assert torch.equal(prediction(engine), alone)
    engine.adapters.delete_adapters("ab")
    swapped = prediction(engine)
    engine.adapters.unload()
    engine.adapters.load_adapter(unet_files[0], "a", weight=0.7)
    torch.testing.assert_close(prediction(engine), swapped, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="rank 8, and there is room for 4"):
        engine.adapters.hotswap(unet_files[2], "a")
    engine.adapters.load_adapter(files["lora"], "both")
    with pytest.raises(UserError, match="more than layers of the unet"):
        engine.adapters.hotswap(unet_files[0], "both")


@only_sd1
def test_rotations_have_no_weight_and_are_fused_alone(engine, base, make_adapter, files):
    oft = make_adapter(base, "oft", name="oft", parts={"unet": "attention"}, std=0.05, block_size=8)
    load(engine, files, "lora")
    with pytest.raises(UserError, match="rotation, which has no weight"):
        engine.adapters.load_adapter(oft, weight={"unet": {"mid": 0.5}})
    engine.adapters.load_adapter(oft, weight={"unet": 1.0})
    beside = prediction(engine)
    with pytest.raises(UserError, match="rotation, which has no weight"):
        engine.adapters.set_adapters({"lora": 1.0, "oft": 0.5})
    with pytest.raises(UserError, match="fuse one of them"):
        engine.adapters.fuse()
    assert torch.equal(prediction(engine), beside)
    engine.adapters.set_adapters({"oft": 1.0})
    alone = prediction(engine)
    engine.adapters.fuse()
    torch.testing.assert_close(prediction(engine), alone, rtol=1e-4, atol=1e-5)


@only_sd1
def test_what_was_switched_off_comes_back_with_its_weights(engine, files):
    load(engine, files, "lora", "loha")
    engine.adapters.set_adapters({"lora": 0.3, "loha": 0.6})
    engine.pipeline.set_adapters(["lora", "loha"], [0.4, 0.6])  # by diffusers' own method
    engine.adapters.disable()
    load(engine, files, "lokr")
    assert engine.adapters.get_active_adapters() == ["lora", "loha", "lokr"]
    found = prediction(engine)
    engine.adapters.set_adapters({"lora": 0.4, "loha": 0.6, "lokr": 1.0})
    assert torch.equal(prediction(engine), found)


@only_sd1
def test_nothing_is_compiled_again(base, unet_files):
    engine = Engine.load(base)
    engine.adapters.enable_hotswap(target_rank=8)
    engine.adapters.load_adapter(unet_files[0], "a")
    torch._dynamo.reset()
    counts, forward = torch._dynamo.utils.counters, engine.parts["unet"].forward
    engine.parts["unet"].forward = torch.compile(forward, backend="eager", dynamic=False)
    first = prediction(engine)
    compiled = dict(counts["stats"])
    assert compiled["unique_graphs"] >= 1
    for file in unet_files[1:]:
        engine.adapters.hotswap(file, "a")
        assert not torch.equal(prediction(engine), first)
    engine.adapters.set_adapters({"a": 0.5})
    prediction(engine)
    assert dict(counts["stats"]) == compiled


@only_sd1
def test_text_encoders_other_methods_and_modules_are_not_swapped(base, engine, files, unet_files):
    engine.adapters.load_adapter(unet_files[0], "a")
    with pytest.raises(UserError, match="text encoders are not compiled"):
        engine.adapters.hotswap(files["lora"], "a")
    with pytest.raises(UserError, match="no module of the LoRA"):
        engine.adapters.hotswap(files["conv"], "a")
    with pytest.raises(UserError, match="is dora in the file, and lora in the adapter"):
        engine.adapters.hotswap(files["dora"], "a")
    with pytest.raises(UserError, match="before the first adapter"):
        engine.adapters.enable_hotswap(8)


# ---------------------------------------------------------------------------- mistakes


@only_sd1
@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"lorra": 1.0}, 'did you mean "lora"'),
        ({"lora": {"vae": 1.0}}, "it has: text_encoder"),
        ({"lora": {"unet": {"down_blocks.7": 1.0}}}, "it changes: down_blocks"),
        ({"lora": {"unet": {"mid": {"block_0": 1.0}}}}, "of down and up"),
        ({"lora": {"unet": {"up": {"block_1": [1.0, 2.0]}}}}, "only 2 numbers"),
        ({"lora": float("nan")}, "no number"),
        ({"lora": {"unet": {"down": [0.1]}, "text_encoder": {"layers.9": 1}}}, "it changes: layers"),
        ({"lora": "0.5"}, "no number"),
    ],
)
def test_weights_that_cannot_be_are_one_line(lora_engine, weights, words):
    before = prediction(lora_engine)
    with pytest.raises(UserError, match=words):
        lora_engine.adapters.set_adapters(weights)
    assert torch.equal(prediction(lora_engine), before)


@pytest.fixture(scope="module")
def lora_engine(base, files) -> Engine:
    engine = Engine.load(base)
    load(engine, files, "lora")
    return engine


@only_sd1
def test_a_name_is_taken_once(lora_engine, files):
    with pytest.raises(UserError, match="already"):
        lora_engine.adapters.load_adapter(files["conv"], "lora")


@only_sd1
def test_the_name_is_the_files_and_a_second_one_gets_a_number(engine, files):
    load(engine, files, "lora", "lora")
    assert engine.adapters.get_names() == ["lora", "lora_1"]


def test_an_adapter_of_another_base_and_one_that_holds_nan_are_one_line(engine, base, base_of, make_adapter, tmp_path):
    other = base_of("sd1" if "sdxl" in base else "sdxl")
    with pytest.raises(UserError, match=r"stable-diffusion-(v1|xl).*stable-diffusion-(v1|xl)") as told:
        engine.adapters.load_adapter(make_adapter(other, format_name="kohya"))
    assert len(told.value.problems) == 1
    file = tmp_path / "nan.safetensors"
    tensors = load_file(make_adapter(base, format_name="diffusers"))
    first = next(iter(tensors))
    save_file(tensors | {first: torch.full_like(tensors[first], float("nan"))}, file)
    with pytest.raises(UserError, match="NaN"):
        engine.adapters.load_adapter(file)
    save_file({f"nothing.{name}": tensor for name, tensor in tensors.items()}, file)
    with pytest.raises(UserError, match=r"nan\.safetensors"):
        engine.adapters.load_adapter(file)
    assert engine.adapters.get_names() == []
