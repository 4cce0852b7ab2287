"""Every method on every kind of layer: what it computes, what its file holds, and what a fresh base makes of that."""

import copy

import pytest
import torch
from torch import nn

from loraloom.adapters import format
from loraloom.adapters.artifact import base_modules, base_weights, largest_difference
from loraloom.adapters.format import FormatNames
from loraloom.adapters.peft_adapters import install, read_peft
from loraloom.adapters.targets import by_pattern, problems_of, select
from loraloom.configs.choices import find, names
from loraloom.configs.errors import UserError
from loraloom.configs.schema import AdapterSection

LINEAR, ALL = ["first", "last"], ["first", "kernel", "point", "last"]
METHODS = {
    "lora": ("lora", {}, ALL),
    "lora, rslora": ("lora", {"rslora": True}, ALL),
    "lora, gaussian": ("lora", {"init": "gaussian"}, ALL),
    "lora, pissa": ("lora", {"init": "pissa"}, LINEAR),
    "dora": ("lora", {"dora": True}, ALL),
    "loha": ("loha", {}, ALL),
    "lokr": ("lokr", {}, ALL),
    "lokr, both": ("lokr", {"decompose_both": True, "factor": 4}, ALL),
    "lokr, whole": ("lokr", {"factor": 2}, ALL),
    "oft": ("oft", {"block_size": 4}, LINEAR),
}
RANKS = {"lokr, whole": 64}


class Model(nn.Module):
    """A linear layer, two convolutions and another linear layer."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 24), nn.Linear(20, 12)
        self.kernel, self.point = nn.Conv2d(6, 10, 3, padding=1, stride=2), nn.Conv2d(10, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).unflatten(-1, (6, 2, 2))
        return self.last(self.point(self.kernel(x)).flatten(1).repeat(1, 4))


def model(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model().requires_grad_(False)


def inject(name: str, base: nn.Module, seed: int = 0, **section):
    method, options, targets = METHODS[name]
    wanted = AdapterSection(method=method, rank=RANKS.get(name, 3), alpha=6, options=options, **section)
    return find("adapters.methods", method).inject({"unet": base}, wanted, {"unet": targets}, seed)


def trained(name: str, **section):
    """A model whose adapter is no longer what it began as, and its adapter set."""
    base = model()
    adapters = inject(name, base, **section)
    torch.manual_seed(1)
    for parameter in adapters.parameters()["unet"]:
        parameter.data += 0.1 * torch.randn_like(parameter)
    return base.eval(), adapters


INPUT = torch.randn(7, 16, generator=torch.Generator().manual_seed(5))
every_method = pytest.mark.parametrize("name", METHODS)


@every_method
def test_training_begins_at_the_base_and_moves_the_adapter_alone(name):
    base = model()
    expected = base(INPUT)
    adapters = inject(name, base)
    torch.testing.assert_close(base(INPUT), expected, atol=1e-5, rtol=0)
    frozen = {key: value.clone() for key, value in base.state_dict().items() if "base_layer" in key}
    optimizer = torch.optim.SGD(adapters.parameters()["unet"], lr=0.1)
    for _ in range(2):  # a factor that is zero gets no gradient in the first step
        optimizer.zero_grad()
        base(INPUT).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(value, base.state_dict()[key]) for key, value in frozen.items())
    assert (base(INPUT) - expected).abs().max() > 1e-4
    assert all(parameter.dtype == torch.float32 for parameter in adapters.parameters()["unet"])


@every_method
def test_the_same_seed_gives_the_same_weights(name):
    one, two, other = (inject(name, model(), seed).states()["unet"] for seed in (3, 3, 4))
    assert all(torch.equal(one[key], two[key]) for key in one)
    if METHODS[name][0] != "oft" and name != "lora, pissa":  # these begin at zero, or at the base's singular values
        assert any(not torch.equal(one[key], other[key]) for key in one)


@every_method
def test_merged_is_unmerged(name):
    """The base with every delta-W added gives what base and adapter give together."""
    base, adapters = trained(name)
    merged = model()
    weights = base_weights({"unet": merged})
    for key, change in adapters.artifact().modules.items():
        layer = merged.get_submodule(key[1])
        layer.weight.data += change.delta(weights(key)).reshape(layer.weight.shape)
    torch.testing.assert_close(merged(INPUT), base(INPUT), atol=1e-5, rtol=1e-5)


@every_method
def test_an_installed_artifact_computes_the_same(name):
    base, adapters = trained(name)
    artifact, fresh = adapters.artifact(), model()
    install(artifact, {"unet": fresh}, "again")
    torch.testing.assert_close(fresh.eval()(INPUT), base(INPUT), atol=1e-5, rtol=1e-5)
    again = read_peft("unet", fresh, "again")
    assert {key: weights.tensors.keys() for key, weights in again.items()} == {
        key: weights.tensors.keys() for key, weights in artifact.modules.items()
    }


@every_method
def test_a_state_goes_into_a_fresh_adapter(name):
    base, adapters = trained(name)
    fresh = model()
    inject(name, fresh).load("unet", adapters.states()["unet"])
    assert torch.equal(fresh.eval()(INPUT), base(INPUT))
    state = adapters.states()["unet"]
    with pytest.raises(UserError, match="do not fit this adapter"):
        inject(name, model()).load("unet", dict(list(state.items())[1:]))


@every_method
def test_the_base_is_there_while_the_adapter_is_disabled(name):
    base, adapters = trained(name)
    if name == "lora, pissa":
        with pytest.raises(UserError, match="the base alone is not at hand"), adapters.disabled():
            pass
        return
    with adapters.disabled():
        assert torch.equal(base(INPUT), model()(INPUT))
    assert not torch.equal(base(INPUT), model()(INPUT))
    assert all(parameter.requires_grad for parameter in adapters.parameters()["unet"])


@every_method
@pytest.mark.parametrize("kind", names("adapters.formats"))
def test_every_format_holds_a_method_or_says_that_it_cannot(name, kind, tmp_path):
    adapters = trained(name)[1]
    artifact, file = adapters.artifact(), tmp_path / "x.safetensors"
    known = FormatNames({"unet": base_modules("unet", model())}, {"unet": "lora_unet"}, "x", "sd_v1")
    holds = find("adapters.formats", kind).HOLDS
    if ("dora" if name == "dora" else METHODS[name][0]) not in holds:
        with pytest.raises(UserError, match=f"the format {kind} .*output.formats"):
            format.write(artifact, file, kind, known)
        return
    format.write(artifact, file, kind, known)
    again = format.read(file, known)
    assert again.method == artifact.method
    assert largest_difference(artifact, again, base_weights({"unet": model()}))[0] <= 1e-6
    if kind == "loraloom":  # without any loss
        for key, weights in artifact.modules.items():
            assert again.modules[key].scale == weights.scale
            assert all(
                torch.equal(tensor, again.modules[key].tensors[part]) for part, tensor in weights.tensors.items()
            )


def test_ranks_and_alphas_by_pattern():
    base = model()
    adapters = inject("lora", base, rank_pattern={"kernel": 5, "unet.l": 2}, alpha_pattern={"point": 1.5})
    found = {key[1]: (weights.rank, weights.scale) for key, weights in adapters.artifact().modules.items()}
    assert found == {"first": (3, 2.0), "kernel": (5, 6 / 5), "point": (3, 0.5), "last": (2, 3.0)}
    fresh = model()
    install(adapters.artifact(), {"unet": fresh}, "again")
    torch.testing.assert_close(fresh(INPUT), base(INPUT))
    with pytest.raises(UserError, match=r"adapter.rank_pattern: 'kernle' matches no adapted module"):
        inject("lora", model(), rank_pattern={"kernle": 5})
    assert by_pattern("x", {"a": ["b.c"], "d": ["b.c"]}, {"d": 1, "b": 2}) == {"a": {"b.c": 2}, "d": {"b.c": 1}}


def test_what_oft_cannot_rotate_is_named():
    section = AdapterSection(method="oft", options={"block_size": 5})
    with pytest.raises(UserError) as raised:
        find("adapters.methods", "oft").inject({"unet": model()}, section, {"unet": ALL}, 0)
    kernel, point = (line for line in raised.value.problems if "convolution" in line)
    assert "kernel" in kernel
    assert "point" in point
    assert any("first has 16 inputs, no multiple of 5" in line for line in raised.value.problems)


def test_oft_is_orthogonal():
    _, adapters = trained("oft")
    weight = torch.eye(16)
    ((_, change),) = [item for item in adapters.artifact().modules.items() if item[0][1] == "first"]
    turned = weight + change.delta(weight)
    torch.testing.assert_close(turned @ turned.T, weight, atol=1e-5, rtol=0)
    assert (turned - weight).abs().max() > 0.05


def test_dropout_is_on_in_training_and_keyed_by_the_generator():
    base = model()
    targets = METHODS["lora"][2]
    section = AdapterSection(rank=3, options={"dropout": 0.5})
    adapters = find("adapters.methods", "lora").inject({"unet": base}, section, {"unet": targets}, 0)
    for parameter in adapters.parameters()["unet"]:
        parameter.data += 0.1
    base.train()
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(base(INPUT))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


PRESETS = {"attention": ("to_q",), "conv": ("conv",)}


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = (nn.ModuleDict({"to_q": nn.Linear(2, 2), "conv": nn.Conv2d(2, 2, 1)}) for _ in range(2))
        self.norm, self.xto_q = nn.LayerNorm(2), nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("selection", "found"),
    [
        ("attention", ["down.to_q", "up.to_q"]),
        ("attention+conv", ["down.to_q", "down.conv", "up.to_q", "up.conv"]),
        ("all-linear", ["down.to_q", "up.to_q", "xto_q"]),
        (["conv", "re:xto.*"], ["down.conv", "up.conv", "xto_q"]),
        ("re:up\\..*", ["up.to_q", "up.conv"]),
    ],
)
def test_presets_and_expressions_select_layers(selection, found):
    assert select("unet", Blocks(), selection, PRESETS) == found


def test_a_selection_that_matches_nothing_is_an_error():
    with pytest.raises(UserError, match=r"adapter.parts.unet: 're:to_v' matches no layer of unet"):
        select("unet", Blocks(), ["attention", "re:to_v"], PRESETS)
    assert problems_of("attention+konv", PRESETS) == [
        "no preset 'konv' (did you mean \"conv\"?); there are: attention, conv, all-linear, and re:…"
    ]
    (problem,) = problems_of(["re:("], PRESETS)
    assert "is no regular expression" in problem


def test_two_adapters_on_one_base_do_not_touch_each_other():
    base, adapters = trained("lora")
    alone = copy.deepcopy(base)
    artifact = adapters.artifact()
    install(artifact, {"unet": base}, "second")
    assert adapters.states()["unet"].keys() == inject("lora", model()).states()["unet"].keys()
    assert largest_difference(artifact, adapters.artifact())[0] == 0.0
    assert torch.equal(alone(INPUT), alone(INPUT))


@pytest.mark.parametrize(("method", "factors"), [("lora", 1), ("loha", 2)])
def test_an_adapter_that_no_memory_holds_is_refused_before_it_is_made(method, factors, monkeypatch):
    model, section = Model(), AdapterSection(method=method, rank=4, rank_pattern={"last": 8})
    numbers = factors * (4 * (16 + 24) + 8 * (20 + 12))
    for room, refused in ((4 * numbers - 1, True), (4 * numbers, False), (0, False)):
        monkeypatch.setattr("loraloom.adapters.peft_adapters.memory", lambda room=room: room)
        parts = {"unet": copy.deepcopy(model)}
        if refused:
            with pytest.raises(UserError, match=r"adapter\.rank: the weights of this adapter would take"):
                find("adapters.methods", method).inject(parts, section, {"unet": LINEAR}, 0)
        else:
            find("adapters.methods", method).inject(parts, section, {"unet": LINEAR}, 0)
