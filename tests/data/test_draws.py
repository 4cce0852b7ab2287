"""Random numbers: functions of their keys, whoever stands beside."""

import subprocess
import sys
from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom.data.draws import Draws, Stream, key_seed

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


@given(st.integers(0, 2**32), st.integers(0, 10**9), st.integers(0, 20))
@settings(max_examples=50, deadline=None)
def test_a_stream_is_a_function_of_its_key_alone(seed, position, taken):
    entered, replayed = Stream(seed, "a", position), Stream(seed, "a", position)
    numbers = [entered.uniform() for _ in range(taken)]
    fork = entered.fork("b")
    assert [replayed.uniform() for _ in range(taken)] == numbers
    assert fork.uniform() == Stream(seed, "a/b", position).uniform()  # however much was taken before
    assert entered.uniform() == replayed.uniform()  # and the fork took nothing from it


def test_streams_of_other_keys_have_other_numbers():
    keys = [(seed, purpose, place) for seed in (0, 1) for purpose in ("a", "b", "a/0") for place in (0, 1)]
    firsts = {Stream(*key).uniform() for key in keys} | {Stream(*key).fork("0").uniform() for key in keys}
    assert len(firsts) == 12 + 8  # forking "a" is the same as asking for "a/0"


def test_the_numbers_of_a_stream_never_change():
    """Runs that are resumed depend on them."""
    stream = Stream(7, "caption", 12)
    assert [stream.below(1000) for _ in range(5)] == [987, 993, 312, 638, 289]
    assert stream.uniform() == 0.5307971093231814


def test_stream_numbers_are_uniform():
    stream = Stream(0, "uniform")
    numbers = [stream.uniform() for _ in range(20_000)]
    assert 0 <= min(numbers) < 0.001
    assert 0.999 < max(numbers) < 1
    assert abs(sum(numbers) / len(numbers) - 0.5) < 0.01
    counts = Counter(stream.below(7) for _ in range(14_000))
    assert sorted(counts) == list(range(7))
    assert all(abs(count - 2000) < 200 for count in counts.values())  # five standard deviations are 207


@given(st.lists(st.integers(), max_size=20), st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_shuffling_keeps_every_item(items, seed):
    before = list(items)
    assert sorted(Stream(seed, "shuffle").shuffled(items)) == sorted(before)
    assert items == before


def test_all_orders_are_equally_likely():
    counts = Counter("".join(Stream(0, "shuffle", place).shuffled("abc")) for place in range(6000))
    assert len(counts) == 6
    assert all(abs(count - 1000) < 150 for count in counts.values())


def test_streams_captions_and_buckets_need_no_torch():
    modules = "draws, captions, buckets"
    code = f"import sys; from loraloom.data import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
