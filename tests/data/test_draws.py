"""Random numbers and order: functions of their keys, whoever stands beside."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom.data.draws import Draws, key_seed
from loraloom.data.order import Order, micro_batch_positions

positions = st.lists(st.integers(0, 10**9), min_size=1, max_size=5)


@given(positions, st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_a_sample_draws_the_same_in_any_company(places, seed):
    together = Draws(seed, places)
    for row, place in enumerate(places):
        alone = Draws(seed, [place])
        assert torch.equal(together.normal("noise", (2, 3))[row], alone.normal("noise", (2, 3))[0])
        assert together.integers("timestep", 0, 1000)[row] == alone.integers("timestep", 0, 1000)[0]


def test_seed_purpose_and_position_each_change_the_numbers():
    keys = {key_seed(seed, purpose, place) for seed in (0, 1) for purpose in ("a", "b") for place in (0, 1)}
    assert len(keys) == 8


def test_noise_is_standard_normal_and_timesteps_are_uniform():
    draws = Draws(0, range(2000))
    noise, timesteps = draws.normal("noise", (16,)), draws.integers("timestep", 0, 1000).float()
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert abs(timesteps.mean() - 499.5) < 20
    assert timesteps.min() < 10
    assert timesteps.max() > 989


@given(st.lists(st.integers(1, 7), min_size=1, max_size=3), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_every_sample_comes_once_in_each_epoch_of_its_source(sizes, seed):
    order = Order(seed, sizes)
    sequence = [order[position] for position in range(6 * sum(sizes))]
    for source, size in enumerate(sizes):
        indices = [index for which, index in sequence if which == source]
        for start in range(0, len(indices) - size + 1, size):
            assert sorted(indices[start : start + size]) == list(range(size))


@given(st.integers(1, 4), st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_shares_hold_in_every_stretch(quarters, seed):
    share = quarters / 5
    order = Order(seed, [3, 100], [share, 1 - share])
    first = [order[position][0] == 0 for position in range(200)]
    for stop in range(1, 200):
        assert abs(sum(first[:stop]) - share * stop) <= 1


def test_the_order_is_the_same_when_entered_in_the_middle():
    whole, late = Order(3, [5, 4]), Order(3, [5, 4])
    assert late[40] == whole[40]
    assert [whole[position] for position in range(60)] == [late[position] for position in range(60)]
    assert [Order(4, [50])[position] for position in range(50)] != [Order(3, [50])[position] for position in range(50)]


def test_processes_share_a_step_as_accumulation_does():
    one = [list(micro_batch_positions(3, index, 0, 1, 8, 2)) for index in range(4)]
    two = [list(micro_batch_positions(3, index, rank, 2, 8, 2)) for index in range(2) for rank in range(2)]
    assert one == two == [[24, 25], [26, 27], [28, 29], [30, 31]]
