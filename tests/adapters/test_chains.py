"""Any adapter through any formats that can carry it stays the same adapter; what cannot be carried is never written."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom.adapters import format
from loraloom.adapters.artifact import AdapterArtifact, Key, Weights
from loraloom.adapters.format import FormatNames
from loraloom.configs.errors import UserError
from loraloom.configs.record import NAME as RECORD

pytestmark = pytest.mark.slow

Draw = Callable[..., Weights]

SHAPES: dict[Key, tuple[int, ...]] = {
    ("unet", "down.0.to_q"): (12, 8),
    ("unet", "down.0.proj_in"): (8, 8, 1, 1),
    ("unet", "down_0.conv"): (8, 12, 3, 3),
    ("unet", "up.ff"): (18, 8),
    ("text_encoder", "text_model.encoder.layers.0.mlp.fc1"): (16, 8),
    ("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj"): (8, 8),
    ("text_encoder_2", "text_projection"): (6, 8),
}
PARTS = sorted({part for part, _ in SHAPES})
FORMATS = ("diffusers", "kohya", "loraloom", "peft")
KINDS = ("lora", "dora", "loha", "loha, core", "lokr", "lokr, both", "lokr, whole", "lokr, core")
NAMES = FormatNames(
    module_paths={part: {path: shape for (own, path), shape in SHAPES.items() if own == part} for part in PARTS},
    kohya_prefixes={"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    architecture="x",
    kohya_version="sdxl",
    flat=["text_encoder"],
)
BASE = {key: torch.randn(shape, generator=torch.Generator().manual_seed(9)) for key, shape in SHAPES.items()}

Plan = Mapping[Key, tuple[str, int, float]]
"""Kind, rank and scale of each module."""

one_module = st.tuples(st.integers(1, 6), st.floats(0.01, 20.0))


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """One kind for all modules, or one for each part, or for each module."""
    keys = sorted(draw(st.sets(st.sampled_from(sorted(SHAPES)), min_size=1)))
    alike = draw(st.sampled_from([lambda key: "", lambda key: key[0], lambda key: key]))
    kinds = {group: draw(st.sampled_from(KINDS)) for group in sorted({str(alike(key)) for key in keys})}
    return {key: (kinds[str(alike(key))], *draw(one_module)) for key in keys}


def made(plan: Plan, random_weights: Draw) -> AdapterArtifact:
    generator = torch.Generator().manual_seed(len(plan))
    modules = {key: random_weights(kind, SHAPES[key], *own, generator) for key, (kind, *own) in plan.items()}
    return AdapterArtifact(modules, metadata={"modelspec.title": "tïtle", "ss_output_name": "x"})


def kinds_of(artifact: AdapterArtifact, part: str) -> set[str]:
    return {weights.kind for (own, _), weights in artifact.modules.items() if own == part}


def is_carried(artifact: AdapterArtifact, name: str) -> bool | None:
    """As each tool's loader has it; None for a LoKr in PEFT, which depends on how the factors were made."""
    if name == "diffusers":
        texts = set().union(*(kinds_of(artifact, part) for part in PARTS if part != "unet"))
        return texts <= {"lora"} and kinds_of(artifact, "unet") in (set(), {"lora"}, {"dora"})
    if name == "peft":
        several = [kinds_of(artifact, part) for part in PARTS]
        if any(len(kinds) > 1 for kinds in several):
            return False
        return None if any(kinds & {"loha", "lokr"} for kinds in several) else True
    return True


def apart(one: AdapterArtifact, other: AdapterArtifact) -> float:
    """The largest difference of a change, relative to its own largest number (the base's too, for DoRA)."""
    assert one.modules.keys() == other.modules.keys()
    worst = 0.0
    for key, weights in one.modules.items():
        wanted, found = (each.delta(BASE[key]).flatten(1) for each in (weights, other.modules[key]))
        assert wanted.shape == found.shape
        worst = max(worst, ((wanted - found).abs().max() / wanted.abs().max()).item())
    return worst


def adapters_in(folder: Path) -> list[Path]:
    """All but the record of what was written there."""
    return [each for each in folder.iterdir() if each.name != RECORD]


def through(artifact: AdapterArtifact, name: str, folder: Path) -> AdapterArtifact | None:
    """Written and read again; None where the format refuses it, after which the folder is as empty as before."""
    file = folder / format.file_name("x", name)
    expected = is_carried(artifact, name)
    try:
        format.write(artifact, file, name, NAMES)
    except UserError:
        assert not expected, f"{name} refuses what it can carry"
        assert not adapters_in(folder)
        return None
    assert expected is not False, f"{name} writes what its readers cannot load"
    assert adapters_in(folder) == [file]
    again = format.read(file, NAMES)
    assert (again.method, again.metadata) == (artifact.method, artifact.metadata)
    return again


@settings(max_examples=60, deadline=None, derandomize=True)
@given(plan=plans(), name=st.sampled_from(FORMATS))
def test_every_format_carries_an_adapter_or_refuses_it(random_weights: Draw, plan: Plan, name: str):
    artifact = made(plan, random_weights)
    with TemporaryDirectory() as folder:
        again = through(artifact, name, Path(folder))
    assert again is None or apart(artifact, again) <= (0.0 if name == "loraloom" else 2e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(plan=plans(), chain=st.lists(st.sampled_from(FORMATS), min_size=2, max_size=4))
def test_chains_of_formats_change_nothing(random_weights: Draw, plan: Plan, chain: Sequence[str]):
    """A format that refuses is passed over. Scales are folded in once: later steps lose nothing at all."""
    artifact = step = made(plan, random_weights)
    folded = False
    for name in chain:
        with TemporaryDirectory() as folder:
            again = through(step, name, Path(folder))
        if again is None:
            continue
        assert apart(step, again) <= (0.0 if folded else 2e-6)
        step, folded = again, folded or name != "loraloom"
    assert apart(artifact, step) <= 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_kohya_and_our_own_format_hold_every_kind(random_weights: Draw, kind: str):
    """And PEFT's every kind but for a LoKr that it would take apart otherwise."""
    artifact = made(dict.fromkeys(SHAPES, (kind, 1, 0.5)), random_weights)
    for name in ("kohya", "loraloom", *(["peft"] if kind not in ("lokr, whole", "lokr, core") else [])):
        with TemporaryDirectory() as folder:
            again = through(artifact, name, Path(folder))
        assert again is not None, name
        assert apart(artifact, again) == 0.0


@pytest.mark.parametrize("name", FORMATS)
def test_what_no_other_tool_knows_is_refused(name: str, tmp_path: Path):
    """OFT, and new words beside layers, are our own format's alone."""
    turned = Weights("oft", {"oft_R": torch.full((2, 6), 0.1)})
    plain = Weights("lora", {"down": torch.ones(1, 8), "up": torch.ones(12, 1)})
    words = {"text_encoder": {"<sks>": torch.ones(2, 8)}}
    titled = {"modelspec.title": "x"}
    for artifact in (
        AdapterArtifact({("unet", "down.0.to_q"): turned}, titled),
        AdapterArtifact({("unet", "down.0.to_q"): plain}, titled, words),
    ):
        if name == "loraloom":
            again = through(artifact, name, tmp_path)
            assert again is not None
            assert apart(artifact, again) == 0.0
            assert again.embeddings.keys() == artifact.embeddings.keys()
            (tmp_path / format.file_name("x", name)).unlink()
            continue
        with pytest.raises(UserError, match=f"the format {name} cannot hold"):
            format.write(artifact, tmp_path / "x", name, NAMES)
        assert not adapters_in(tmp_path)
