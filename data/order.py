"""Which sample stands at which position of the endless sequence: a pure function of seed, items, shares and spans.

Positions are cut into groups (micro-batches). All samples of a group are of one bucket; it may mix sources. Two
merges make the sequence: of the buckets, group by group, and of the sources within each bucket, sample by sample.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from math import lcm

import numpy as np

from .draws import key_seed

Key = tuple[int, int]  # source, bucket
Span = tuple[int, int | None]  # first position, first position no longer (None: endless)

SCALE = 2**63  # times are whole numbers of 1 / SCALE of a rank; `key_seed` is below it
BLOCK = 512  # ranks that are enumerated together


class Merge:
    """Progressions p with rates r_p = weights[p] / sum(weights), merged into one endless sequence of ranks.

    Term k = 0, 1, ... of p has the time (k + d) / r_p with a shift -1 < d(p, k) < 1, and times grow with k; terms go
    by (time, p). Between T r_p - 1 and T r_p + 2 terms of p are before a time T >= 0, so between T - n and T + 2 n of
    all n progressions: to find a block of ranks, count what is before a time 2 n too early, and sort what follows.

    `shift(p, k)` is SCALE * d. Times are integers, rounded down to 1 / SCALE: equal ones stay equal and go by p, none
    moves across a whole T, and those of p still grow (each by sum(weights) / weight >= 1 of these units or more). So
    a rank has the same term wherever the counting began, on any machine.
    """

    def __init__(self, weights: Sequence[int], shift: Callable[[int, int], int]):
        self.weights, self.total, self.shift = list(weights), sum(weights), shift
        self._number = -1  # of the block in memory: its terms, the rank of the first, and the counts before that
        self._terms: list[tuple[int, int]] = []
        self._first, self._before = 0, [0] * len(weights)

    def __getitem__(self, rank: int) -> tuple[int, int]:
        """(p, k) of the term at a rank."""
        self._enumerate(rank // BLOCK)
        return self._terms[rank - self._first]

    def counts(self, rank: int) -> list[int]:
        """How many of the terms before a rank are of each progression."""
        self._enumerate(rank // BLOCK)
        counts = list(self._before)
        for which, _ in self._terms[: rank - self._first]:
            counts[which] += 1
        return counts

    def _enumerate(self, number: int) -> None:
        if number == self._number:
            return
        progressions, margin = range(len(self.weights)), 2 * len(self.weights)
        before = [self._count(p, number * BLOCK - margin) for p in progressions]
        until = [self._count(p, (number + 1) * BLOCK + margin) for p in progressions]
        terms = sorted((self._time(p, k), p, k) for p in progressions for k in range(before[p], until[p]))
        self._number, self._terms = number, [(p, k) for _, p, k in terms]
        self._first, self._before = sum(before), before

    def _count(self, which: int, time: int) -> int:
        """Terms of a progression before a time; 0 up to time 0, where a block may as well begin with all of them."""
        count = max(0, time) * self.weights[which] // self.total  # each of these has k + d < k + 1 <= time * rate
        while time > 0 and self._time(which, count) < time * SCALE:
            count += 1
        return count

    def _time(self, which: int, count: int) -> int:
        return (count * SCALE + self.shift(which, count)) * self.total // self.weights[which]


def evenly(which: int, count: int) -> int:
    """Shift of a sample to the middle of its interval: rates of .5, .25 and .25 are met by every 4 neighbours."""
    return SCALE // 2


def ahead(seed: int, buckets: Sequence[int], given: Sequence[int], which: int, count: int) -> int:
    """Shift of a bucket's group to before it is due, by a random part of the interval: no bucket is ever late."""
    return -key_seed(seed, f"order/groups/{buckets[which]}", given[which] + count)


class Shuffled:
    """Endless epochs of the items of one source in one bucket, each a permutation with its own key."""

    def __init__(self, items: np.ndarray, seed: int, purpose: str):
        self.items, self.seed, self.purpose = items, seed, purpose
        self._epoch, self._permuted = -1, items  # the one in memory

    def __getitem__(self, count: int) -> int:
        epoch, place = divmod(count, len(self.items))
        if epoch != self._epoch:
            # Generator.permutation may change with numpy's version, the raw numbers of a bit generator may not (NEP 19)
            raw = np.random.Philox(key=key_seed(self.seed, self.purpose, epoch)).random_raw(len(self.items))
            self._epoch, self._permuted = epoch, self.items[np.argsort(raw, kind="stable")]
        return int(self._permuted[place])


class Stage:
    """A stretch in which the same sources take part; positions count from its begin, epochs go on from `before`."""

    def __init__(self, seed: int, group: int, rates: Mapping[Key, Fraction], before: Mapping[Key, int]):
        self.group, self.before = group, before
        buckets = sorted({bucket for _, bucket in rates})
        self.keys = [[key for key in rates if key[1] == bucket] for bucket in buckets]
        scale = lcm(*(rate.denominator for rate in rates.values()))
        self.within = [Merge([int(rates[key] * scale) for key in keys], evenly) for keys in self.keys]
        given = [sum(before[key] for key in before if key[1] == bucket) // group for bucket in buckets]
        self.groups = Merge([merge.total for merge in self.within], partial(ahead, seed, buckets, given))

    def __getitem__(self, position: int) -> tuple[Key, int]:
        """(source, bucket) at a position, and how many samples these have given before."""
        group, place = divmod(position, self.group)
        which, count = self.groups[group]
        member, taken = self.within[which][count * self.group + place]
        key = self.keys[which][member]
        return key, self.before[key] + taken

    def counts(self, positions: int) -> dict[Key, int]:
        """(source, bucket) -> samples, with those of earlier stages."""
        group, place = divmod(positions, self.group)
        samples = [count * self.group for count in self.groups.counts(group)]
        samples[self.groups[group][0]] += place
        counts = dict(self.before)
        for keys, merge, number in zip(self.keys, self.within, samples, strict=True):
            for key, count in zip(keys, merge.counts(number), strict=True):
                counts[key] += count
        return counts


class Order:
    """The endless sequence; a look-up or a count costs a block of each merge and one permutation, wherever it is.

    `buckets[s][i]` is the bucket of item i of source s. Without `shares` a source has the share len(items) * repeats.
    Shares are renormalised over the sources whose span, of whole groups, covers a position; where these change a new
    stage begins, and all epochs go on. R_b, the rate of bucket b, is the sum over sources of share * part in b.
    Of N groups of a stage with B buckets, b has more than R_b (N - 2 B) and fewer than R_b N + 2; of the samples of
    b, each of its S sources has its part q to within (1 + q S) / 2. With one bucket nothing depends on `group`.

    Raises ValueError if a source has no items, or if there are positions in which no source takes part.
    """

    def __init__(
        self,
        seed: int,
        buckets: Sequence[np.ndarray],
        shares: Sequence[float] | None = None,
        *,
        repeats: Sequence[int] | None = None,
        group: int = 1,
        spans: Sequence[Span] | None = None,
    ):
        sizes = [len(ids) for ids in buckets]
        if not sizes or min(sizes) < 1:
            raise ValueError(f"every source needs at least one sample, the sizes are {sizes}")
        items = {(s, b): each for s, ids in enumerate(buckets) for b, each in _by_bucket(ids).items()}
        self._items = {(s, b): Shuffled(each, seed, f"order/{s}/{b}") for (s, b), each in items.items()}
        weights = shares or [size * times for size, times in zip(sizes, repeats or [1] * len(sizes), strict=True)]
        # str: a share of .1 is a tenth, as the user wrote it, not the binary fraction beside it
        rates = {(s, b): Fraction(str(weights[s])) * len(each) / sizes[s] for (s, b), each in items.items()}
        self._starts: list[int] = []
        self._stages: list[Stage] = []
        before = dict.fromkeys(items, 0)
        for first, until, sources in _stretches(spans or [(0, None)] * len(sizes)):
            assert first % group == 0, f"a span has an end at {first}, within a group of {group}"
            stage = Stage(seed, group, {key: rate for key, rate in rates.items() if key[0] in sources}, before)
            self._starts.append(first)
            self._stages.append(stage)
            before = stage.counts(until - first) if until else before

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(source, index within the source) at a position, counted from 0."""
        number = bisect_right(self._starts, position) - 1
        key, count = self._stages[number][position - self._starts[number]]
        return key[0], self._items[key][count]

    def counts(self, positions: int) -> dict[tuple[int, int], int]:
        """(source, bucket) -> samples among the first `positions`, without going through them."""
        number = bisect_right(self._starts, positions) - 1
        return self._stages[number].counts(positions - self._starts[number])


def _by_bucket(ids: np.ndarray) -> dict[int, np.ndarray]:
    items = np.argsort(ids, kind="stable")
    found, firsts = np.unique(ids[items], return_index=True)
    return dict(zip(found.tolist(), np.split(items, firsts[1:]), strict=True))


def _stretches(spans: Sequence[Span]) -> Iterator[tuple[int, int | None, set[int]]]:
    """(first position, first no longer, sources that take part) between neighbouring ends of spans."""
    edges = sorted({0, *(edge for span in spans for edge in span if edge is not None)})
    for first, until in zip(edges, [*edges[1:], None], strict=True):
        sources = {s for s, (begin, end) in enumerate(spans) if begin <= first and (end is None or first < end)}
        if not sources:
            to = f"to {until - 1}" if until else "on"
            raise ValueError(f"no source takes part from position {first} {to}: let one begin earlier or end later")
        yield first, until, sources


def micro_batch_positions(step: int, index: int, rank: int, world: int, batch_size: int, micro_batch: int) -> range:
    """Positions of one forward pass: the micro-batches of a step are dealt to the processes in turn.

    `index` counts the micro-batches of this process within the step. One process with two micro-batches
    therefore sees what two processes with one each see.
    """
    first = step * batch_size + (index * world + rank) * micro_batch
    return range(first, first + micro_batch)
