"""The order of samples: without a past, and fair to sources, buckets and items."""

import pickle
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from loraloom.data import order as order_module
from loraloom.data.order import BLOCK, SCALE, Merge, Order, ahead, evenly, micro_batch_positions

LENGTH = 240  # a multiple of every group below

all_buckets = st.lists(st.lists(st.sampled_from([0, 3, 7]), min_size=1, max_size=9), min_size=1, max_size=3)


def arrays(buckets: list[list[int]]) -> list[np.ndarray]:
    return [np.array(ids) for ids in buckets]


@st.composite
def spans_of(draw, sources: int, group: int):
    """The first source takes part everywhere, the others from one group to another or for ever."""
    begins = [draw(st.integers(0, 12)) * group for _ in range(1, sources)]
    ends = [draw(st.none() | st.integers(1, 12).map(lambda groups, b=begin: b + groups * group)) for begin in begins]
    return [(0, None), *zip(begins, ends, strict=True)]


@st.composite
def settings_of(draw, spans: bool = True) -> dict[str, Any]:
    """Arguments of an Order: one to three sources in up to three buckets."""
    buckets, group = draw(all_buckets), draw(st.sampled_from([1, 2, 3, 4]))
    tenths = draw(st.none() | st.lists(st.integers(1, 7), min_size=len(buckets), max_size=len(buckets)))
    repeats = draw(st.lists(st.integers(1, 3), min_size=len(buckets), max_size=len(buckets)))
    return {
        "seed": draw(st.integers(0, 5)),
        "buckets": arrays(buckets),
        "shares": tenths and [tenth / 10 for tenth in tenths],
        "repeats": None if tenths else repeats,
        "group": group,
        "spans": draw(spans_of(len(buckets), group)) if spans else None,
    }


def keys_of(sequence: list[tuple[int, int]], buckets: list[np.ndarray]) -> list[tuple[int, int]]:
    return [(source, int(buckets[source][item])) for source, item in sequence]


@given(settings_of(), st.lists(st.integers(0, 2 * BLOCK), max_size=5))
@settings(max_examples=50, deadline=None)
def test_a_position_has_its_sample_however_one_comes_there(given_settings, jumps):
    used = Order(**given_settings)
    sequence = [used[position] for position in range(LENGTH)]
    fresh = Order(**given_settings)
    for position in [*jumps, 100, 3, LENGTH - 1, 4, 5]:
        assert fresh[position] == used[position]
        assert position >= LENGTH or fresh[position] == sequence[position]
    assert pickle.loads(pickle.dumps(used))[40] == sequence[40]  # what a worker process gets


@given(settings_of())
@settings(max_examples=50, deadline=None)
def test_counts_are_what_counting_gives(given_settings):
    order, tally = Order(**given_settings), Counter()
    for position in range(LENGTH):
        assert Counter(order.counts(position)) == tally
        tally.update(keys_of([order[position]], given_settings["buckets"]))


@given(settings_of())
@settings(max_examples=50, deadline=None)
def test_a_group_is_of_one_bucket(given_settings):
    order, group = Order(**given_settings), given_settings["group"]
    found = [bucket for _, bucket in keys_of([order[p] for p in range(LENGTH)], given_settings["buckets"])]
    assert all(len(set(found[first : first + group])) == 1 for first in range(0, LENGTH, group))


@given(settings_of())
@settings(max_examples=50, deadline=None)
def test_every_item_of_a_source_and_bucket_comes_once_in_each_epoch_through_all_stages(given_settings):
    order, buckets = Order(**given_settings), given_settings["buckets"]
    sequence = [order[position] for position in range(LENGTH)]
    for key in {(source, bucket) for source, ids in enumerate(buckets) for bucket in ids.tolist()}:
        members = np.flatnonzero(buckets[key[0]] == key[1]).tolist()
        items = [sample[1] for sample, of in zip(sequence, keys_of(sequence, buckets), strict=True) if of == key]
        for first in range(0, len(items), len(members)):
            epoch = items[first : first + len(members)]
            assert sorted(epoch) == members if len(epoch) == len(members) else len(set(epoch)) == len(epoch)


@given(settings_of())
@settings(max_examples=50, deadline=None)
def test_a_source_is_seen_within_its_span_only(given_settings):
    order, spans = Order(**given_settings), given_settings["spans"]
    for position in range(LENGTH):
        first, until = spans[order[position][0]]
        assert first <= position and (until is None or position < until)


@given(settings_of(spans=False), st.integers(0, 10**7))
@settings(max_examples=100, deadline=None)
def test_every_bucket_and_source_has_its_due(given_settings, groups):
    """The bounds of `Order`'s docstring, and what follows for the items."""
    order, buckets, group = Order(**given_settings), given_settings["buckets"], given_settings["group"]
    sizes = [len(ids) for ids in buckets]
    weights = given_settings["shares"] or [n * r for n, r in zip(sizes, given_settings["repeats"], strict=True)]
    shares = [Fraction(str(weight)) / sum(Fraction(str(each)) for each in weights) for weight in weights]
    counts = order.counts(groups * group)
    rates = {(s, b): shares[s] * int(np.sum(buckets[s] == b)) / sizes[s] for s, b in counts}
    assert sum(counts.values()) == groups * group
    found = {bucket for _, bucket in counts}
    for bucket in found:
        members = [key for key in counts if key[1] == bucket]
        rate, samples = sum(rates[key] for key in members), sum(counts[key] for key in members)
        assert groups == 0 or rate * (groups - 2 * len(found)) * group < samples < (rate * groups + 2) * group
        for key in members:
            part = rates[key] / rate
            assert abs(counts[key] - part * samples) <= (1 + part * len(members)) / 2


@given(settings_of(spans=False), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_each_item_is_seen_once_for_each_epoch_that_is_due_and_each_repeat(given_settings, epochs):
    assume(given_settings["shares"] is None)
    order, buckets, group = Order(**given_settings), given_settings["buckets"], given_settings["group"]
    found = {int(bucket) for ids in buckets for bucket in ids}
    sum_of_weights = sum(len(ids) * times for ids, times in zip(buckets, given_settings["repeats"], strict=True))
    # the groups that buckets may be ahead, and the samples that sources of a bucket may be
    slack = 2 * group * len(found) if len(found) > 1 else 0
    behind = (1 + len(buckets)) / 2 if len(buckets) > 1 else 0
    positions = -(-(epochs * sum_of_weights) // group) * group + slack
    seen = Counter(order[position] for position in range(positions))
    for source, times in enumerate(given_settings["repeats"]):
        for item, bucket in enumerate(buckets[source]):
            members = int(np.sum(buckets[source] == bucket))
            least = (epochs * times * members - behind) // members
            assert seen[source, item] >= least


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(0, 5), st.integers(2, 6), st.booleans())
@settings(max_examples=50, deadline=None)
def test_with_one_bucket_the_order_does_not_depend_on_the_group(sizes, seed, group, short):
    buckets = [np.zeros(size, int) for size in sizes]
    spans = [(0, None), *[(30 * group, 60 * group if short else None)] * (len(sizes) - 1)]
    one, many = Order(seed, buckets, spans=spans), Order(seed, buckets, group=group, spans=spans)
    assert [one[position] for position in range(LENGTH)] == [many[position] for position in range(LENGTH)]


def test_every_four_neighbours_have_shares_of_a_half_and_two_quarters():
    order = Order(0, [np.zeros(size, int) for size in (3, 50, 7)], [0.5, 0.25, 0.25])
    for first in [*range(0, 2000, 4), 4 * 10**8]:
        assert Counter(order[position][0] for position in range(first, first + 4)) == {0: 2, 1: 1, 2: 1}


def test_equal_shares_take_turns_for_ever():
    """Each three are tied; times without their last digits, as far floats are, would tie neighbours of these too."""
    order = Order(0, arrays([[0] * 3] * 3))
    assert all([order[first + place][0] for place in range(3)] == [0, 1, 2] for first in range(0, 3 * BLOCK, 3))
    assert [order[3 * 10**18 + place][0] for place in range(3)] == [0, 1, 2]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.booleans(), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_a_merge_sorts_the_times_of_its_terms(weights, jitter, seed):
    shift = partial(ahead, seed, range(len(weights)), [0] * len(weights)) if jitter else evenly
    length = BLOCK + 100
    times = [
        (Fraction(count * SCALE + shift(which, count), SCALE * weight), which, count)
        for which, weight in enumerate(weights)
        for count in range(length * weight // sum(weights) + 2 * len(weights) + 2)
    ]
    merge, expected = Merge(weights, shift), [(which, count) for _, which, count in sorted(times)][:length]
    assert [merge[rank] for rank in range(length)] == expected
    tally = Counter(which for which, _ in expected)
    assert Merge(weights, shift).counts(length) == [tally[which] for which in range(len(weights))]


def far_order() -> tuple[Order, list[np.ndarray]]:
    generator = np.random.default_rng(0)
    buckets = [generator.integers(0, 30, size) for size in (100, 700, 3000)]
    return Order(1, buckets, [0.2, 0.3, 0.5], group=4, spans=[(0, None), (40, None), (0, 4000)]), buckets


def test_far_away_the_order_goes_on_as_it_counts():
    order, buckets = far_order()
    first, last = 10**9, 10**9 + 4 * BLOCK + 3
    tally = Counter(keys_of([order[position] for position in range(first, last)], buckets))
    assert Counter(order.counts(last)) - Counter(order.counts(first)) == tally


def test_a_look_up_far_away_replays_nothing(monkeypatch):
    asked: list[str] = []
    true = order_module.key_seed
    monkeypatch.setattr(order_module, "key_seed", lambda *key: asked.append(key[1]) or true(*key))
    order, _ = far_order()
    asked.clear()
    order[10**9]
    assert len(asked) < 2 * BLOCK


def test_an_epoch_is_shuffled_by_seed_source_bucket_and_epoch():
    def epoch(seed: int, source: int, bucket: int, number: int) -> list[int]:
        order = Order(seed, arrays([[bucket] * 50] * 2))
        samples = [order[position] for position in range(100 * number, 100 * number + 100)]
        return [item for of, item in samples if of == source]

    epochs = [epoch(*key) for key in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]]
    assert len({tuple(items) for items in epochs}) == 5
    assert all(sorted(items) == list(range(50)) != items for items in epochs)


def test_buckets_are_not_ahead_by_the_same_part_each_time():
    """Two equal buckets would otherwise alternate for ever."""
    order = Order(0, [np.array([0, 1])])
    turns = [order[position][1] for position in range(200)]
    assert 20 < sum(before == after for before, after in pairwise(turns)) < 180


def test_a_new_stage_draws_anew():
    order = Order(0, arrays([[0, 1]] * 3), spans=[(0, None), (0, 100), (100, None)])  # the same rates in both stages
    turns = [bucket for _, bucket in (order[position] for position in range(200))]
    assert turns[:100] != turns[100:]


def test_the_order_of_a_seed_never_changes():
    """Runs that are resumed depend on it."""
    order = Order(7, arrays([[0, 0, 1, 1, 1], [1, 0]]), [0.6, 0.4], group=2)
    expected = [(0, 3), (1, 0), (0, 1), (1, 1), (0, 0), (1, 1), (0, 4), (0, 2), (1, 0), (0, 3), (0, 2), (1, 0)]
    assert [order[position] for position in range(12)] == expected


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_processes_share_a_step_as_accumulation_does(world, micro_batch, accumulation):
    batch_size = world * micro_batch * accumulation
    for step in range(3):
        dealt = [
            position
            for index in range(accumulation)
            for rank in range(world)
            for position in micro_batch_positions(step, index, rank, world, batch_size, micro_batch)
        ]
        assert dealt == list(range(step * batch_size, (step + 1) * batch_size))


def test_a_source_without_items_is_refused():
    with pytest.raises(ValueError, match=r"at least one sample, the sizes are \[2, 0\]"):
        Order(0, arrays([[0, 0], []]))
    with pytest.raises(ValueError, match="at least one sample"):
        Order(0, [])


def test_positions_without_a_source_are_named():
    with pytest.raises(ValueError, match="from position 8 to 19"):
        Order(0, arrays([[0], [0]]), spans=[(0, 8), (20, None)])
    with pytest.raises(ValueError, match="from position 0 to 3"):
        Order(0, arrays([[0]]), spans=[(4, None)])
    with pytest.raises(ValueError, match="from position 8 on"):
        Order(0, arrays([[0], [0]]), spans=[(0, 8), (0, 4)])


def test_the_order_needs_no_torch():
    check = "import sys, loraloom.data.order; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
