"""`loop.fast` and `loop.compile` change kernels, and nothing else."""

import gc
import json
import weakref
from copy import deepcopy

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from loraloom.configs.errors import UserError
from loraloom.configs.loader import load_config
from loraloom.train import build
from loraloom.train.build import build_trainer
from loraloom.train.fast import fast_optimizer, use_fast_layers
from loraloom.train.kernels import attention, convolution
from loraloom.train.kernels.adamw import FlatAdamW
from loraloom.train.kernels.attention import FastAttention
from loraloom.train.kernels.convolution import FastConv2d
from loraloom.train.kernels.lora_linear import FastLinear, apply_together, base_products


def unet_with_lora(base, dtype=torch.float32, **options) -> UNet2DConditionModel:
    """The tiny base's, with a LoRA that does something, in training mode."""
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet", torch_dtype=dtype).requires_grad_(False)
    torch.manual_seed(0)
    wanted = {"target_modules": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2"], "r": 4, "lora_alpha": 6}
    inject_adapter_in_model(LoraConfig(init_lora_weights=False, **wanted | options), unet)
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return unet.train()


def step_of(unet: UNet2DConditionModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Its prediction and all gradients of one step."""
    torch.manual_seed(1)
    width = unet.config.cross_attention_dim
    latents = torch.randn(2, 4, 8, 8, dtype=unet.dtype)
    predicted = unet(latents, torch.tensor([10, 500]), torch.randn(2, 77, width, dtype=unet.dtype)).sample
    F.mse_loss(predicted.float(), torch.randn(2, 4, 8, 8)).backward()
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    gradients = torch.cat([parameter.grad.flatten() for parameter in trained])
    for parameter in trained:
        parameter.grad = None
    return predicted.detach(), gradients


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture
def small_products(monkeypatch):
    """Convolutions of the tiny base become products as the large ones of Stable Diffusion do."""
    monkeypatch.setattr(convolution, "LEAST_WEIGHTS", 1)
    monkeypatch.setattr(convolution, "MOST_POSITIONS", 32)


def test_predictions_and_gradients_agree(tiny_base, small_products):
    unet = unet_with_lora(tiny_base, rank_pattern={"to_k": 2})
    plain = step_of(unet)
    changed = use_fast_layers({"unet": unet})
    assert set(changed) == {"FastLinear", "FastAttention", "FastConv2d"}
    fast = step_of(unet)
    assert all(distance(a, b) <= 1e-5 for a, b in zip(fast, plain, strict=True))
    assert not torch.equal(fast[1], plain[1])  # or nothing was tested


@pytest.mark.parametrize("autocast", [False, True])
def test_in_bf16_they_are_as_near_to_the_truth(tiny_base, small_products, autocast):
    unet = unet_with_lora(tiny_base, torch.bfloat16).float()
    exact = step_of(unet)
    unet = unet if autocast else unet_with_lora(tiny_base, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain = step_of(unet)
        use_fast_layers({"unet": unet})
        fast = step_of(unet)
    for one, other, truth in zip(fast, plain, exact, strict=True):
        assert 0 < distance(one, truth) <= 1.1 * distance(other, truth)


def test_gradient_checkpointing_and_no_gradient_for_the_input(tiny_base):
    unet = unet_with_lora(tiny_base)
    unet.enable_gradient_checkpointing()
    plain = step_of(unet)
    use_fast_layers({"unet": unet})
    assert all(distance(a, b) <= 1e-5 for a, b in zip(step_of(unet), plain, strict=True))


@torch.no_grad()
def test_in_evaluation_and_without_the_adapter_every_bit_is_as_before(tiny_base):
    unet = unet_with_lora(tiny_base)
    latents, words = torch.randn(1, 4, 8, 8), torch.randn(1, 77, unet.config.cross_attention_dim)
    layers = [module for module in unet.modules() if hasattr(module, "lora_A")]

    def seen():
        return unet(latents, 3, words).sample

    sampled = unet.eval() and seen()
    for layer in layers:
        layer._disable_adapters = True
    bare = seen()
    use_fast_layers({"unet": unet})
    assert torch.equal(seen(), bare)
    assert torch.equal(unet.train() and seen(), bare)
    for layer in layers:
        layer._disable_adapters = False
    assert torch.equal(unet.eval() and seen(), sampled)


@pytest.mark.parametrize("autocast", [False, True])
def test_words_that_come_again_are_projected_once_and_change_no_bit(tiny_base, monkeypatch, autocast):
    unet = unet_with_lora(tiny_base)
    use_fast_layers({"unet": unet})
    attentions = [each for each in unet.modules() if isinstance(each, FastAttention) and each.is_cross_attention]
    made = []

    def counted(words, layers):
        made.append(words)
        return base_products(words, layers)

    monkeypatch.setattr(attention, "base_products", counted)
    one, other, third = (torch.randn(1, 77, unet.config.cross_attention_dim) for _ in range(3))
    latents = torch.randn(1, 4, 8, 8)

    def seen(words):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            unet(latents, 3, words).sample.square().mean().backward()
        gradients = [p.grad for p in unet.parameters() if p.requires_grad]
        unet.zero_grad()
        return torch.cat([gradient.flatten() for gradient in gradients])

    wanted = {words: seen(words.clone()) for words in (one, other, third)}  # each a batch that never came before
    assert not made
    for words in (one, other, one, one, other, third, third, one):  # two are known at a time
        assert torch.equal(seen(words), wanted[words])
    assert [sum(words is each for words in made) for each in (one, other, third)] == [len(attentions)] * 3


def test_known_words_are_not_kept_for_longer_than_somebody_has_them(tiny_base):
    unet = unet_with_lora(tiny_base)
    use_fast_layers({"unet": unet})
    words = torch.randn(1, 77, unet.config.cross_attention_dim)
    for _ in range(2):
        unet(torch.randn(1, 4, 8, 8), 3, words).sample.mean().backward()
    gone = weakref.ref(words)
    del words
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_layers_that_do_more_stay_as_they_are(tiny_base, options):
    unet = unet_with_lora(tiny_base, **options)
    assert "FastLinear" not in use_fast_layers({"unet": unet})
    step_of(unet)


def test_layers_of_one_input_may_differ_in_rank_bias_and_scale():
    torch.manual_seed(0)
    parent = nn.ModuleDict({name: nn.Linear(6, width, bias=width > 3) for name, width in {"a": 3, "b": 5}.items()})
    parent.requires_grad_(False)
    options = {"rank_pattern": {"a": 2}, "alpha_pattern": {"b": 7}, "init_lora_weights": False}
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=6, target_modules=["a", "b"], **options), parent.train())
    x = torch.randn(2, 7, 6, requires_grad=True)

    def gradients(outputs):
        total = sum((output * (index + 1)).square().sum() for index, output in enumerate(outputs))
        return torch.autograd.grad(total, [x, *(p for p in parent.parameters() if p.requires_grad)])

    wanted = gradients([parent["a"](x), parent["b"](x)])
    use_fast_layers({"parent": parent})
    found = gradients(apply_together(x, parent["a"], parent["b"]))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("kernel", "size", "count"), [(3, (2, 2), 1), (3, (4, 5), 2), (1, (4, 4), 1)])
def test_a_convolution_of_few_positions_is_a_product(monkeypatch, kernel, size, count):
    monkeypatch.setattr(convolution, "LEAST_WEIGHTS", 1)
    layer = nn.Conv2d(8, 12, kernel, padding=kernel // 2).requires_grad_(False)
    x = torch.randn(count, 8, *size, requires_grad=True)
    gradient = torch.randn(count, 12, *size)
    plain = layer(x)
    wanted = torch.autograd.grad(plain, x, gradient)[0]
    assert FastConv2d.fits(layer)
    layer.__class__ = FastConv2d
    fast = layer(x)
    assert fast.grad_fn.name() == "_ProductBackward" and fast.is_contiguous()
    torch.testing.assert_close(fast, plain)
    torch.testing.assert_close(torch.autograd.grad(fast, x, gradient)[0], wanted)
    many = torch.randn(65, 8, 1, 1)
    assert torch.equal(layer(many), nn.Conv2d.forward(layer, many))


@pytest.mark.parametrize("options", [{"stride": 2}, {"dilation": 2}, {"groups": 2}, {"padding": 0}])
def test_other_convolutions_stay_as_they_are(monkeypatch, options):
    monkeypatch.setattr(convolution, "LEAST_WEIGHTS", 1)
    layer = nn.Conv2d(8, 12, 3, **{"padding": 1} | options).requires_grad_(False)
    assert not FastConv2d.fits(layer)
    assert not FastConv2d.fits(nn.Conv2d(8, 12, 3, padding=1))  # it trains


@pytest.mark.slow
def test_a_run_sees_the_same_samples_noise_and_timesteps(write_config):
    seen, losses = {}, {}
    for name, options in {
        "fast": {},
        "plain": {"fast": False},
        "free": {"fast": False, "deterministic": False},
    }.items():
        config = write_config(name, loop={"steps": 8, "batch_size": 2} | options)
        trainer = build_trainer(load_config(config), overwrite=True)
        kinds = {type(module) for module in trainer.run.parts["unet"].modules()}
        assert ({FastLinear, FastAttention} <= kinds) == (name == "fast")
        looked, forward = [], trainer.forward

        def look(batch, trainer=trainer, forward=forward, looked=looked):
            noised, _ = trainer.objective.noised(trainer.run.parts, batch, torch.device("cpu"))
            looked.append((batch.files, noised.latents, noised.timesteps, noised.target))
            return forward(batch)

        trainer.forward = look
        trainer.callbacks = []
        losses[name] = torch.tensor([trainer.train_step()[0].loss for _ in range(8)])
        seen[name] = looked
    for other in ("plain", "free"):
        for (files, *tensors), (others, *wanted) in zip(seen["fast"], seen[other], strict=True):
            assert files == others and all(map(torch.equal, tensors, wanted))
        torch.testing.assert_close(losses["fast"], losses[other], rtol=1e-4, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("how", [True, "model"])
def test_compiled_they_train_as_the_others_and_sample_uncompiled(write_config, monkeypatch, how):
    """Two sizes of buckets, each with graphs of its own; images have the bits of a run that is not compiled."""
    torch._dynamo.config.recompile_limit = 1  # type: ignore[attr-defined]
    traced = {"dynamic": False, "backend": "aot_eager"}  # inductor takes four minutes here
    monkeypatch.setattr(build, "compiler_options", lambda device: traced)
    data, prompts = {"resolution": [32, 48]}, ["a creature"]
    losses, images = {}, {}
    for name in ("plain", "compiled"):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        validation = {"every": 6, "prompts": prompts, "steps": 2, "at_start": False}
        options = {
            "loop": {"steps": 6, "batch_size": 2, "compile": how if name == "compiled" else False},
            "validation": validation,
        }
        config = load_config(write_config(name, data=data, optimizer={"learning_rate": 1e-9}, **options))
        trainer = build_trainer(config, overwrite=True)
        trainer.callbacks = [each for each in trainer.callbacks if type(each).__name__ in ("Validation", "Tracking")]
        trainer.fit()
        run = trainer.run
        losses[name] = [json.loads(line)["loss"] for line in (run.folder / "logs/history.jsonl").open()]
        images[name] = [file.read_bytes() for file in sorted(run.folder.rglob("samples/**/*.png"))]
        assert bool(torch._dynamo.utils.counters["stats"]["unique_graphs"]) == (name == "compiled")
    torch.testing.assert_close(torch.tensor(losses["compiled"]), torch.tensor(losses["plain"]), rtol=1e-4, atol=0)
    assert images["compiled"] == images["plain"] != []


@pytest.mark.slow
def test_gradients_are_checkpointed_in_the_blocks_named_and_change_no_bit(write_config):
    losses = {}
    for blocks in (False, ["down_blocks.0", "up_blocks.3"]):
        config = write_config(f"{len(losses)}", loop={"steps": 2, "gradient_checkpointing": blocks})
        trainer = build_trainer(load_config(config), overwrite=True)
        trainer.callbacks = []
        flagged = {name for name, each in trainer.run.parts["unet"].named_modules() if _checkpoints(each)}
        losses[bool(blocks)] = [trainer.train_step()[0].loss for _ in range(2)]
        assert {name.split(".")[0] for name in flagged} == ({"down_blocks", "up_blocks"} if blocks else set())
        assert not any(name.startswith("down_blocks.1") for name in flagged)
    assert losses[True] == losses[False]
    config = write_config("odd", loop={"gradient_checkpointing": ["down_block.0"]})
    with pytest.raises(UserError, match=r"'down_block\.0' .*did you mean .*down_blocks\.0"):
        build_trainer(load_config(config), overwrite=True)


def _checkpoints(module: nn.Module) -> bool:
    return getattr(module, "gradient_checkpointing", False) is True


def two_optimizers() -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """The same two groups of weights of odd sizes, for torch's AdamW and for ours."""
    found = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        shapes = [(3, 5), (7,), (4, 1), (6, 11)]
        weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        groups = [{"params": weights[:2], "lr": 0.1, "weight_decay": 0.3}, {"params": weights[2:], "lr": 0.01}]
        found.append(torch.optim.AdamW(groups, betas=(0.8, 0.9), fused=True))
    fast = fast_optimizer(found[1])
    assert type(fast) is FlatAdamW
    return found[0], fast


def weights_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def train(optimizers, steps, faulty=(), without=()) -> None:
    """The same gradients for all; weights whose place is in `without` have none."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for drawn in zip(*map(weights_of, optimizers), strict=True):
            gradient = torch.randn(drawn[0].shape, generator=generator)
            for weight in drawn:
                weight.grad = gradient.clone()
        for optimizer in optimizers:
            for place in without:
                weights_of(optimizer)[place].grad = None
            optimizer.found_inf = torch.tensor(float(step in faulty))
            optimizer.step()
            del optimizer.found_inf


def assert_alike(plain, flat) -> None:
    for ours, theirs in zip(weights_of(flat), weights_of(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
        for name, value in plain.state[theirs].items():
            torch.testing.assert_close(flat.state[ours][name], value, rtol=1e-6, atol=1e-7)


def test_one_call_for_a_group_makes_the_steps_of_adamw():
    plain, flat = two_optimizers()
    train((plain, flat), range(6), faulty={3})
    assert_alike(plain, flat)
    assert float(plain.state[weights_of(plain)[0]]["step"]) == 5
    first, second = weights_of(flat)[:2]
    assert second.data_ptr() == first.data_ptr() + 4 * first.numel()  # they lie one behind the other


@pytest.mark.parametrize("without", [(), (0,), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize("max_norm", [0.1, 1e9])
def test_gradients_are_clipped_as_torch_does_it(without, max_norm):
    plain, flat = two_optimizers()
    train((plain, flat), [0])
    for step in range(1, 4):
        generator = torch.Generator().manual_seed(step)
        for place, (one, other) in enumerate(zip(weights_of(plain), weights_of(flat), strict=True)):
            gradient = torch.randn(one.shape, generator=generator)
            one.grad, other.grad = (None, None) if place in without else (gradient, gradient.clone())
        wanted = torch.nn.utils.clip_grad_norm_(weights_of(plain), max_norm)
        torch.testing.assert_close(flat.clip(max_norm), wanted)
        plain.step()
        flat.step()
    assert_alike(plain, flat)


def test_clipped_gradients_that_are_dropped_are_not_taken_later():
    plain, flat = two_optimizers()
    for weight in weights_of(flat):
        weight.grad = torch.full_like(weight, 100.0)
    flat.clip(1.0)
    flat.zero_grad()
    train((plain, flat), [0])
    assert_alike(plain, flat)


@pytest.mark.parametrize("without", [(0, 1), (1,)], ids=["group", "weight"])
def test_weights_without_gradients_stay_as_with_adamw(without):
    plain, flat = two_optimizers()
    train((plain, flat), range(3))
    held = weights_of(flat)[1].detach().clone()
    train((plain, flat), range(3, 5), without=without)
    assert torch.equal(weights_of(flat)[1], held)
    assert_alike(plain, flat)
    train((plain, flat), range(5, 8))  # counts of one group may differ from now on
    assert_alike(plain, flat)


def test_each_goes_on_where_the_other_stopped():
    plain, flat = two_optimizers()
    train((plain, flat), range(3))
    for (to_plain, to_flat), saved in ((two_optimizers(), plain), (two_optimizers(), flat)):
        for optimizer in (to_plain, to_flat):
            optimizer.load_state_dict(deepcopy(saved.state_dict()))  # torch takes the tensors themselves
            with torch.no_grad():
                for weight, value in zip(weights_of(optimizer), weights_of(saved), strict=True):
                    weight.copy_(value)
        train((to_plain, to_flat), range(3, 6))
        assert_alike(to_plain, to_flat)


def test_weights_that_were_put_elsewhere_are_found():
    plain, flat = two_optimizers()
    train((plain, flat), range(3))
    for optimizer in (plain, flat):
        weights_of(optimizer)[2].data = torch.ones(4, 1)
    train((plain, flat), range(3, 5))
    assert_alike(plain, flat)


def test_other_optimisers_stay():
    weight = nn.Parameter(torch.ones(3))
    for optimizer in (torch.optim.SGD([weight], lr=1), torch.optim.AdamW([weight], fused=False)):
        assert fast_optimizer(optimizer) is optimizer
    half = torch.optim.AdamW([nn.Parameter(torch.ones(3, dtype=torch.bfloat16))], fused=True)
    assert fast_optimizer(half) is half
