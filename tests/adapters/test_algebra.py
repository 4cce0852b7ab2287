"""Sums, ranks and differences of adapters, each against the plain matrices that it is about, or against PEFT."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils
from torch import Tensor

from loraloom.adapters import algebra
from loraloom.adapters.algebra import by_energy, by_norm, fixed
from loraloom.adapters.artifact import AdapterArtifact, Key, Weights
from loraloom.configs.errors import UserError

LINEAR, CONV, TEXT = ("unet", "down.to_q"), ("unet", "up.conv"), ("text_encoder", "fc1")
SHAPES: dict[Key, tuple[int, ...]] = {LINEAR: (12, 10), CONV: (8, 6, 3, 3), TEXT: (7, 9)}


def lora(key: Key, seed: int, rank: int = 3, scale: float = 0.5) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    out, into, *kernel = SHAPES[key]
    down = torch.randn(rank, into, *kernel, generator=generator)
    return Weights("lora", {"down": down, "up": torch.randn(out, rank, *[1] * len(kernel), generator=generator)}, scale)


def adapter(seed: int, keys=SHAPES, **options) -> AdapterArtifact:
    return AdapterArtifact({key: lora(key, seed + number, **options) for number, key in enumerate(keys)})


def base(key: Key) -> Tensor:
    return torch.randn(SHAPES[key], generator=torch.Generator().manual_seed(len(key[1])))


def dora(key: Key, seed: int) -> Weights:
    plain = lora(key, seed)
    lengths = base(key).flatten(1).norm(dim=1) * 1.3
    return Weights("lora", {**plain.tensors, "magnitude": lengths}, plain.scale)


def far(one: AdapterArtifact, wanted: dict[Key, Tensor]) -> float:
    """Largest error of a change, relative to its norm."""
    assert one.modules.keys() == wanted.keys()
    return max(((one.modules[k].delta() - wanted[k]).norm() / wanted[k].norm()).item() for k in wanted)


def test_a_scale_multiplies_the_change_of_what_is_chosen():
    before = adapter(0)
    after = algebra.scaled(before, -2.0, only="^unet")
    deltas = {key: weights.delta() * (-2.0 if key[0] == "unet" else 1.0) for key, weights in before.modules.items()}
    assert far(after, deltas) == 0.0
    turned = AdapterArtifact({LINEAR: dora(LINEAR, 0)})
    with pytest.raises(UserError, match="dora has no scale"):
        algebra.scaled(turned, 0.5)


def test_components_and_blocks_are_left_out():
    assert algebra.without(adapter(0), "^text_encoder").modules.keys() == {LINEAR, CONV}
    assert algebra.without(adapter(0), r"unet\.up").modules.keys() == {LINEAR, TEXT}
    with pytest.raises(UserError, match=r"'nothing' matches none of the 3 modules, such as unet\.down\.to_q"):
        algebra.without(adapter(0), "nothing")
    with pytest.raises(UserError, match="is no regular expression"):
        algebra.without(adapter(0), "(")
    with pytest.raises(UserError, match="the adapter has no modules"):
        algebra.without(adapter(0), ".")


def test_concatenation_is_the_weighted_sum_without_loss():
    one, other = adapter(0), adapter(10, keys=[LINEAR, TEXT], rank=5, scale=2.0)
    mixed = algebra.concatenated([(one, 0.25), (other, -1.5)])
    wanted = {key: 0.25 * weights.delta() for key, weights in one.modules.items()}
    for key, weights in other.modules.items():
        wanted[key] = wanted[key] - 1.5 * weights.delta()
    assert far(mixed, wanted) <= 1e-6
    assert {key: weights.rank for key, weights in mixed.modules.items()} == {LINEAR: 8, CONV: 3, TEXT: 8}


def test_a_difference_added_again_is_the_first():
    one, other = adapter(0), adapter(10)
    back = algebra.concatenated([(algebra.difference(one, other), 1.0), (other, 1.0)])
    assert far(back, {key: weights.delta() for key, weights in one.modules.items()}) <= 1e-5


def test_a_sum_at_full_rank_is_the_sum_and_at_a_smaller_one_the_nearest():
    one, other = adapter(0), adapter(10)
    wanted = {key: one.modules[key].delta() + 2 * other.modules[key].delta() for key in one.modules}
    assert far(algebra.summed([(one, 1.0), (other, 2.0)], fixed(6)).artifact, wanted) <= 1e-6
    found = algebra.summed([(one, 1.0), (other, 2.0)], fixed(2))
    for key, weights in found.artifact.modules.items():
        values = torch.linalg.svdvals(wanted[key].double().flatten(1))
        error = (weights.delta() - wanted[key]).norm().item()
        assert error == pytest.approx(values[2:].norm().item(), rel=1e-5)  # no matrix of rank 2 is nearer
        assert found.lost[key] == pytest.approx((values[2:].norm() / values.norm()).item(), rel=1e-5)
    assert found.worst[0] == max(found.lost.values())


@pytest.mark.parametrize("rank", [3, 10, 99])
def test_resized_to_its_rank_or_more_an_adapter_is_the_same(rank):
    before = adapter(0)
    found = algebra.resized(before, fixed(rank))
    assert far(found.artifact, {key: weights.delta() for key, weights in before.modules.items()}) <= 1e-6
    assert max(found.lost.values()) <= 1e-7


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0.05, 1.0), seed=st.integers(0, 99), energy=st.booleans())
def test_a_share_of_energy_or_norm_is_kept_by_as_few_as_can(share, seed, energy):
    before = AdapterArtifact({CONV: lora(CONV, seed, rank=6)})
    (weights,) = algebra.resized(before, (by_energy if energy else by_norm)(share)).artifact.modules.values()
    values = torch.linalg.svdvals(before.modules[CONV].delta().double().flatten(1))
    squares = values.square().cumsum(0) / values.square().sum()
    held = squares if energy else squares.sqrt()
    assert held[weights.rank - 1] >= share * (1 - 1e-6)
    assert weights.rank == 1 or held[weights.rank - 2] < share


def test_what_is_between_two_checkpoints_is_extracted():
    """Merged into a base and extracted at full rank, an adapter comes back."""
    trained = adapter(0)

    def tuned(key: Key) -> Tensor:
        weights = trained.modules.get(key)
        return base(key) if weights is None else algebra.merged(base(key), [(weights, 1.0)])

    found = algebra.extracted(tuned, base, SHAPES, fixed(12))
    for key, weights in trained.modules.items():
        error = (found.artifact.modules[key].delta() - weights.delta()).norm()
        assert error <= 1e-5 * base(key).norm()
    short = algebra.extracted(tuned, base, SHAPES, by_energy(0.999999))
    assert {key: weights.rank for key, weights in short.artifact.modules.items()} == dict.fromkeys(SHAPES, 3)
    with pytest.raises(UserError, match="the two checkpoints are the same"):
        algebra.extracted(base, base, SHAPES, fixed(4))
    partly = algebra.extracted(lambda key: tuned(key) if key == CONV else base(key), base, SHAPES, fixed(4))
    assert partly.artifact.modules.keys() == {CONV}


def test_dora_is_baked_with_the_loss_said():
    before = AdapterArtifact({LINEAR: dora(LINEAR, 0), CONV: dora(CONV, 1), TEXT: lora(TEXT, 2)})
    whole = algebra.baked(before, base, fixed(99))
    wanted = {key: weights.delta(base(key)).reshape(SHAPES[key]) for key, weights in before.modules.items()}
    assert far(whole.artifact, wanted) <= 1e-5
    assert whole.artifact.modules[TEXT] is before.modules[TEXT]
    small = algebra.baked(before, base, fixed(3))
    errors = {
        key: ((small.artifact.modules[key].delta() - wanted[key]).norm() / wanted[key].norm()).item()
        for key in (LINEAR, CONV)
    }
    assert small.lost == pytest.approx(errors, rel=1e-4)
    assert small.worst[0] > 0.1


def test_other_methods_need_the_shape_of_the_weight():
    factors = {name: torch.randn(*shape) for name, shape in {
        "hada_w1_a": (8, 2), "hada_w1_b": (2, 54), "hada_w2_a": (8, 2), "hada_w2_b": (2, 54)}.items()}  # fmt: skip
    hada = AdapterArtifact({CONV: Weights("loha", factors, 0.5)})
    found = algebra.resized(hada, fixed(8), base).artifact.modules[CONV]
    assert found.tensors["down"].shape == (4, 6, 3, 3) or found.tensors["down"].shape == (8, 6, 3, 3)
    torch.testing.assert_close(found.delta().flatten(1), hada.modules[CONV].delta().flatten(1), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="give the base"):
        algebra.resized(hada, fixed(4))
    with pytest.raises(UserError, match="loha has no factors to put side by side"):
        algebra.concatenated([(hada, 1.0), (hada, 1.0)])


@pytest.mark.parametrize("density", [0.1, 0.5, 0.99])
def test_ties_and_dare_are_those_of_peft(density):
    generator = torch.Generator().manual_seed(0)
    changes = [torch.randn(9, 14, generator=generator) for _ in range(3)]
    weights = [1.0, 0.5, 2.0]
    wanted = merge_utils.ties(changes, torch.tensor(weights), density)
    torch.testing.assert_close(algebra.ties(changes, weights, density), wanted, atol=1e-6, rtol=1e-6)
    torch.manual_seed(3)
    wanted = merge_utils.dare_linear(changes, torch.tensor(weights), density)
    found = algebra.dare(changes, weights, density, torch.Generator().manual_seed(3))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-6)


def test_mixtures_of_adapters_are_those_of_their_changes():
    one, other = adapter(0), adapter(10)
    found = algebra.by_ties([(one, 1.0), (other, 0.5)], 0.4, fixed(99)).artifact
    wanted = {
        key: algebra.ties([one.modules[key].delta(), other.modules[key].delta()], [1.0, 0.5], 0.4) for key in SHAPES
    }
    assert far(found, wanted) <= 1e-5
    drawn = [algebra.by_dare([(one, 1.0), (other, 0.5)], 0.4, seed, fixed(99)).artifact for seed in (1, 1, 2)]
    assert far(drawn[0], {key: weights.delta() for key, weights in drawn[1].modules.items()}) == 0.0
    assert far(drawn[0], {key: weights.delta() for key, weights in drawn[2].modules.items()}) > 0.1


def test_adapters_of_different_bases_and_the_same_word_twice_are_refused():
    small = AdapterArtifact({LINEAR: Weights("lora", {"down": torch.ones(1, 4), "up": torch.ones(5, 1)})})
    for mix in (algebra.concatenated, lambda mixed: algebra.summed(mixed, fixed(2))):
        with pytest.raises(UserError, match="they are for different bases"):
            mix([(adapter(0), 1.0), (small, 1.0)])
    words = AdapterArtifact({}, embeddings={"text_encoder": {"<a>": torch.ones(1, 4)}})
    with pytest.raises(UserError, match="the word '<a>' is in two of the adapters"):
        algebra.concatenated([(words, 1.0), (words, 1.0)])
    assert algebra.concatenated([(words, 1.0), (adapter(0), 1.0)]).embeddings == words.embeddings


def test_norms_and_distances_are_those_of_the_matrices():
    one, other = adapter(0), adapter(10)
    for weights in one.modules.values():
        assert algebra.norm(weights) == pytest.approx(weights.delta().norm().item(), rel=1e-5)
    found = algebra.distances(one, other)[LINEAR]
    first, second = one.modules[LINEAR].delta().flatten(), other.modules[LINEAR].delta().flatten()
    assert found.norms == pytest.approx((first.norm().item(), second.norm().item()), rel=1e-5)
    assert found.apart == pytest.approx((first - second).norm().item(), rel=1e-5)
    assert found.cosine == pytest.approx(torch.cosine_similarity(first, second, 0).item(), abs=1e-6)
    assert algebra.distances(one, one)[CONV].cosine == pytest.approx(1.0)
