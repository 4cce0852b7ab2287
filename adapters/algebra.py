"""Arithmetic on adapters: sums, differences, ranks, what is in one checkpoint and not in another. Pure functions.

Everything is done one module after the other, so that memory is bounded by the largest module. delta is the change that
an adapter makes of a weight W; for a LoRA delta = s B A, with B (out, r) and A (r, in), also called up and down. Other
methods (LoHa, LoKr, OFT, DoRA), whose change is no product of two factors, are taken apart by their singular values;
for these a `base` is needed, which gives the weight of a module, or at least its shape.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..configs.errors import UserError
from .artifact import AdapterArtifact, Base, Key, Weights, listed

Rank = Callable[[Tensor], int]
"""How many of these singular values, falling, are kept."""
Weighted = Sequence[tuple[AdapterArtifact, float]]
"""Adapters with the weights that they are mixed in with."""
Progress = Callable[[Iterable[Key]], Iterable[Key]]
"""Such as tqdm."""


@dataclass(frozen=True, slots=True)
class Approximated:
    """An adapter that stands for something else, and how far it is from it."""

    artifact: AdapterArtifact
    lost: dict[Key, float]  # |delta - kept| / |delta| of each module, Frobenius

    @property
    def worst(self) -> tuple[float, Key]:
        """The module that lost most."""
        return max((lost, key) for key, lost in self.lost.items())


def scaled(artifact: AdapterArtifact, factor: float, only: str = "") -> AdapterArtifact:
    """delta' = factor * delta, of the modules whose `component.path` the expression `only` matches somewhere.

    UserError where the change is not proportional to anything: DoRA and OFT.
    """
    chosen = _matching(artifact, only)
    if odd := [key for key in chosen if artifact.modules[key].depends_on_base]:
        raise UserError(f"{artifact.modules[odd[0]].kind} has no scale ({listed(odd)}); bake it into a LoRA first")
    modules = {k: replace(w, scale=w.scale * factor) if k in chosen else w for k, w in artifact.modules.items()}
    return replace(artifact, modules=modules)


def without(artifact: AdapterArtifact, expression: str) -> AdapterArtifact:
    """Leaves out the modules whose `component.path` the expression matches somewhere: `^text_encoder`, `up_blocks`;
    and new words, which are `words.<word>` here.

    UserError where that is none of them, or all.
    """
    words = {word for own in artifact.embeddings.values() for word in own}
    unwanted = {word for word in words if _pattern(expression).search(f"words.{word}")}
    gone = set() if unwanted and not _any_module(artifact, expression) else _matching(artifact, expression)
    modules = {key: weights for key, weights in artifact.modules.items() if key not in gone}
    kept = {part: {w: r for w, r in own.items() if w not in unwanted} for part, own in artifact.embeddings.items()}
    return replace(artifact, modules=modules, embeddings={part: own for part, own in kept.items() if own})


def _matching(artifact: AdapterArtifact, expression: str) -> set[Key]:
    pattern = _pattern(expression)
    check_modules(artifact)
    found = {key for key in artifact.modules if pattern.search(".".join(key))}
    if not found:
        raise UserError(
            f"{expression!r} matches none of the {len(artifact.modules)} modules, such as {_example(artifact)}"
        )
    return found


def check_modules(artifact: AdapterArtifact) -> None:
    """UserError for an adapter of words alone."""
    if not artifact.modules:
        raise UserError("the adapter holds words alone, and no layers: a word has no rank and no scale")


def _any_module(artifact: AdapterArtifact, expression: str) -> bool:
    return any(_pattern(expression).search(".".join(key)) for key in artifact.modules)


def _pattern(expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise UserError(f"{expression!r} is no regular expression ({error})") from None


def _example(artifact: AdapterArtifact) -> str:
    return ".".join(next(iter(artifact.modules), ("", "")))


# ------------------------------------------------------------------------------- ranks


def fixed(rank: int) -> Rank:
    """That many."""
    return lambda values: min(rank, len(values))


def by_energy(share: float) -> Rank:
    """As few as hold this share of the sum of the squares: 0.99 of energy is an error of 0.1 of the norm."""
    return lambda values: _first(values.square().cumsum(0), share)


def by_norm(share: float) -> Rank:
    """As few as hold this share of the Frobenius norm, the root of the energy."""
    return lambda values: _first(values.square().cumsum(0).sqrt(), share)


def _first(rising: Tensor, share: float) -> int:
    enough = rising >= share * rising[-1] * (1 - 1e-12)
    return max(1, int(enough.int().argmax()) + 1)


def resized(artifact: AdapterArtifact, rank: Rank, base: Base | None = None, progress: Progress = iter) -> Approximated:
    """The nearest LoRA: delta = U S V^T, of which the largest singular values stay (Eckart and Young 1936)."""

    def change(key: Key) -> Weights | Tensor:
        weights = artifact.modules[key]
        return weights if weights.kind == "lora" else _change(key, weights, base)

    return approximated(artifact, artifact.modules, change, rank, progress)


def baked(artifact: AdapterArtifact, base: Base, rank: Rank, progress: Progress = iter) -> Approximated:
    """Every DoRA as a plain LoRA: m V / |V| - W for V = W + s B A has no low rank, so something is lost, which is said.

    Modules without a magnitude stay as they are.
    """
    dora = {key: weights for key, weights in artifact.modules.items() if weights.is_dora}
    found = approximated(artifact, dora, lambda key: _change(key, dora[key], base), rank, progress)
    return replace(found, artifact=replace(artifact, modules=artifact.modules | found.artifact.modules))


def extracted(
    tuned: Base, original: Base, keys: Iterable[Key], rank: Rank, progress: Progress = iter, unchanged: float = 0.0
) -> Approximated:
    """delta = W_tuned - W_original of these modules, but for those whose numbers changed by `unchanged` at most.

    UserError where all are such.
    """
    deltas: dict[Key, float] = {}
    for key in progress(list(keys)):
        deltas[key] = (tuned(key) - original(key)).abs().max().item()
    changed = [key for key, largest in deltas.items() if largest > unchanged]
    if not changed:
        raise UserError("the two checkpoints are the same in all layers that an adapter can change")

    def change(key: Key) -> Tensor:
        return tuned(key) - original(key)

    return approximated(None, changed, change, rank, progress)


def approximated(
    like: AdapterArtifact | None,
    keys: Iterable[Key],
    change: Callable[[Key], Weights | Tensor],
    rank: Rank,
    progress: Progress = iter,
) -> Approximated:
    """A LoRA for each of these changes, which are a LoRA or a tensor (out, in[, k, k])."""
    modules, lost = {}, {}
    for key in progress(list(keys)):
        found = change(key)
        left, values, right, kernel = _taken_apart(found)
        if not values.isfinite().all():
            raise UserError(f"the change of {listed([key])} is not finite")
        kept = rank(values) if values[0] > 0 else 1
        modules[key] = _lora(left[:, :kept], values[:kept], right[:kept], kernel)
        total = values.square().sum().sqrt().item()
        lost[key] = values[kept:].square().sum().sqrt().item() / total if total else 0.0
    metadata, embeddings = ({}, {}) if like is None else (like.metadata, like.embeddings)
    return Approximated(AdapterArtifact(modules, metadata, embeddings), lost)


def balanced(weights: Weights) -> Weights:
    """The same change of a plain LoRA by factors of one size, which cancel nothing."""
    return _lora(*_taken_apart(weights))


def _taken_apart(change: Weights | Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """U (out, n), S (n), V^T (n, in * k * k) in float64, and the kernel; of a LoRA from its factors alone.

    Of a whole change by the eigenvectors of the smaller of D D^T and D^T D, which is several times as fast. Singular
    values below 1e-8 of the largest are noise then.
    """
    if isinstance(change, Tensor):
        return *_by_gram(change.double().flatten(1)), tuple(change.shape[2:])
    up, down = change.tensors["up"].double().flatten(1), change.tensors["down"].double().flatten(1)
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    left, values, right = torch.linalg.svd(change.scale * r_up @ r_down.T)
    return q_up @ left, values, right @ q_down.T, tuple(change.tensors["down"].shape[2:])


def _by_gram(change: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if change.shape[0] > change.shape[1]:
        right, values, left = _by_gram(change.T)
        return left.T, values, right.T
    left = torch.linalg.eigh(change @ change.T).eigenvectors
    rows = left.T @ change
    values, order = rows.norm(dim=1).sort(descending=True, stable=True)
    return left[:, order], values, rows[order] / values.clamp(min=1e-300)[:, None]


def _lora(left: Tensor, values: Tensor, right: Tensor, kernel: tuple[int, ...]) -> Weights:
    """Both factors have the same norm."""
    root, rank, ones = values.sqrt(), len(values), [1] * len(kernel)
    down = (root[:, None] * right).reshape(rank, -1, *kernel)
    up = (left * root).reshape(-1, rank, *ones)
    return Weights("lora", {"down": down.float().contiguous(), "up": up.float().contiguous()})


# ------------------------------------------------------------------------------- mixtures


def concatenated(mixed: Weighted) -> AdapterArtifact:
    """sum_i w_i delta_i without any loss: A = (A_1; A_2; ...), B = (w_1 s_1 B_1, w_2 s_2 B_2, ...). The ranks add up.

    UserError for adapters that are not plain LoRAs, and for words, which do not add up.
    """
    _check_words(mixed)
    for artifact, _ in mixed:
        if odd := [key for key, weights in artifact.modules.items() if weights.kind != "lora"]:
            kind = artifact.modules[odd[0]].kind
            raise UserError(f"{kind} has no factors to put side by side ({listed(odd)}); take svd with a rank")
    modules = {}
    for key in _keys(mixed):
        several = [(a.modules[key], weight) for a, weight in mixed if key in a.modules]
        downs = [weights.tensors["down"] for weights, _ in several]
        ups = [(weights.tensors["up"].double() * weights.scale * factor).float() for weights, factor in several]
        if len({(down.shape[1:], up.shape[:1]) for down, up in zip(downs, ups, strict=True)}) > 1:
            raise UserError(f"{listed([key])} has another size in each adapter: they are for different bases")
        modules[key] = Weights("lora", {"down": torch.cat(downs, 0), "up": torch.cat(ups, 1)})
    return AdapterArtifact(modules, embeddings=_words(mixed))


def difference(one: AdapterArtifact, other: AdapterArtifact) -> AdapterArtifact:
    """delta = delta_one - delta_other, for plain LoRAs."""
    return concatenated([(one, 1.0), (other, -1.0)])


def summed(mixed: Weighted, rank: Rank, base: Base | None = None, progress: Progress = iter) -> Approximated:
    """The nearest LoRA to sum_i w_i delta_i."""

    def mix(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        return torch.stack([weight * change for change, weight in zip(changes, weights, strict=True)]).sum(0)

    return _mixed(mixed, lambda key, changes, weights: mix(changes, weights), rank, base, progress)


def by_ties(
    mixed: Weighted, density: float, rank: Rank, base: Base | None = None, progress: Progress = iter
) -> Approximated:
    """TIES (Yadav et al. 2023) on the changes of each weight; see `ties`."""
    return _mixed(mixed, lambda key, changes, weights: ties(changes, weights, density), rank, base, progress)


def by_dare(
    mixed: Weighted, density: float, seed: int, rank: Rank, base: Base | None = None, progress: Progress = iter
) -> Approximated:
    """DARE (Yu et al. 2024) on the changes of each weight; every module has a generator of its own; see `dare`."""

    def mix(key: Key, changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        own = torch.Generator().manual_seed(seed ^ _number(key))
        return dare(changes, weights, density, own)

    return _mixed(mixed, mix, rank, base, progress)


def ties(changes: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Of each change the share `density` of its numbers that are largest; where their sum has a sign, the mean of the
    weighted numbers with that sign (Yadav et al. 2023, algorithm 1)."""
    kept = torch.stack([_largest(change, density) for change in changes])
    sign = torch.where(kept.sum(0) >= 0, 1.0, -1.0)
    agreeing = kept.sign() == sign
    weighted = kept * torch.tensor(list(weights), dtype=kept.dtype).reshape(-1, *[1] * (kept.ndim - 1))
    return (weighted * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)


def dare(changes: Sequence[Tensor], weights: Sequence[float], density: float, generator: torch.Generator) -> Tensor:
    """sum_i w_i m_i delta_i / density, where m_i keeps each number with the probability `density` (Yu et al. 2024,
    equation 3): the expectation is the plain sum."""
    total = torch.zeros_like(changes[0])
    for change, weight in zip(changes, weights, strict=True):
        mask = torch.bernoulli(torch.full_like(change, density), generator=generator)
        total += weight * (change * mask / density)
    return total


def _largest(change: Tensor, density: float) -> Tensor:
    flat = change.flatten()
    kept = torch.zeros_like(flat)
    places = flat.abs().topk(int(density * flat.numel())).indices
    kept[places] = flat[places]
    return kept.reshape(change.shape)


def _mixed(
    mixed: Weighted,
    mix: Callable[[Key, Sequence[Tensor], Sequence[float]], Tensor],
    rank: Rank,
    base: Base | None,
    progress: Progress,
) -> Approximated:
    """Adapters that leave a module alone do not take part in it."""
    _check_words(mixed)

    def change(key: Key) -> Tensor:
        several = [(artifact.modules[key], weight) for artifact, weight in mixed if key in artifact.modules]
        changes = [_change(key, weights, base) for weights, _ in several]
        if len({each.shape for each in changes}) > 1:
            raise UserError(f"{listed([key])} has another size in each adapter: they are for different bases")
        return mix(key, changes, [weight for _, weight in several])

    found = approximated(None, _keys(mixed), change, rank, progress)
    return replace(found, artifact=replace(found.artifact, embeddings=_words(mixed)))


def _keys(mixed: Weighted) -> Iterator[Key]:
    return iter(dict.fromkeys(key for artifact, _ in mixed for key in artifact.modules))


def _check_words(mixed: Weighted) -> None:
    seen: set[tuple[str, str]] = set()
    for artifact, weight in mixed:
        own = {(part, token) for part, tokens in artifact.embeddings.items() for token in tokens}
        if own and not artifact.modules and weight != 1:
            raise UserError(f"the word {sorted(own)[0][1]!r} has no weight: leave out {weight:g}")
        if twice := seen & own:
            raise UserError(f"the word {sorted(twice)[0][1]!r} is in two of the adapters, and words do not add up")
        seen |= own


def _words(mixed: Weighted) -> dict[str, dict[str, Tensor]]:
    words: dict[str, dict[str, Tensor]] = {}
    for artifact, _ in mixed:
        for part, tokens in artifact.embeddings.items():
            words.setdefault(part, {}).update(tokens)
    return words


def _change(key: Key, weights: Weights, base: Base | None) -> Tensor:
    """delta in the shape of the weight. UserError where that is not told by the adapter, and there is no base."""
    if weights.kind == "lora":
        return weights.delta()
    if base is None:
        raise UserError(
            f"{weights.kind} ({listed([key])}) has no shape without the weight that it changes: give the base"
        )
    weight = base(key)
    return weights.delta(weight).reshape(weight.shape)


def _number(key: Key) -> int:
    """The same in every process, unlike `hash`."""
    return int.from_bytes(hashlib.sha256(".".join(key).encode()).digest()[:7], "little")


# ------------------------------------------------------------------------------- into a weight, and beside each other


def merged(weight: Tensor, changes: Iterable[tuple[Weights, float]], name: str = "a weight") -> Tensor:
    """W + sum_i w_i delta_i(W) in the weight's own type, summed in float32; every change is that of W itself.

    UserError, with the `name` of the weight, where a finite W becomes Inf or NaN.
    """
    base = weight.detach().float().cpu()
    total = torch.zeros_like(base)
    for weights, factor in changes:
        total += factor * weights.delta(base).reshape(base.shape)
    result = (base + total).to(weight.dtype)
    if not result.isfinite().all() and base.isfinite().all():
        dtype = str(weight.dtype).removeprefix("torch.")
        raise UserError(f"{name}: with the adapters its numbers are too large for {dtype}; give smaller weights")
    return result


@dataclass(frozen=True, slots=True)
class Distance:
    """How far two changes of one weight are from each other."""

    norms: tuple[float, float]  # |delta_1|, |delta_2|, Frobenius
    apart: float  # |delta_1 - delta_2|
    cosine: float  # <delta_1, delta_2> / |delta_1| |delta_2|; 0 where one is zero


def distances(
    one: AdapterArtifact, other: AdapterArtifact, base: Base | None = None, progress: Progress = iter
) -> dict[Key, Distance]:
    """Of the modules that both have."""
    both = [key for key in one.modules if key in other.modules]
    return {key: distance(key, one.modules[key], other.modules[key], base) for key in progress(both)}


def distance(key: Key, one: Weights, other: Weights, base: Base | None = None) -> Distance:
    """Of LoRAs from their factors alone: <B A, B' A'> = sum of (B^T B') * (A A'^T), which gives |delta - delta'|
    to 1e-8 of the norms."""
    if one.shape is not None and other.shape is not None and one.shape != other.shape:
        raise UserError(f"{listed([key])} is {one.shape} in one adapter, {other.shape} in the other")
    if one.kind == other.kind == "lora":
        return _of_products(_inner(one, one), _inner(other, other), _inner(one, other), one, other)
    first, second = (_change(key, weights, base).double().flatten() for weights in (one, other))
    if len(first) != len(second):
        raise UserError(f"{listed([key])} has {len(first)} numbers in one adapter, {len(second)} in the other")
    return _of_products(first @ first, second @ second, first @ second, one, other)


def _of_products(first: Tensor, second: Tensor, both: Tensor, one: Weights, other: Weights) -> Distance:
    squares, inner = (max(first.item(), 0.0), max(second.item(), 0.0)), both.item()
    norms = math.sqrt(squares[0]), math.sqrt(squares[1])
    apart = 0.0 if _same(one, other) else math.sqrt(max(squares[0] + squares[1] - 2 * inner, 0.0))
    product = norms[0] * norms[1]
    return Distance(norms, apart, inner / product if product else 0.0)


def _same(one: Weights, other: Weights) -> bool:
    """Number for number."""
    if one.method != other.method or one.scale != other.scale or one.tensors.keys() != other.tensors.keys():
        return False
    return all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


def _inner(one: Weights, other: Weights) -> Tensor:
    """<delta, delta'>, Frobenius, of two LoRAs."""
    ups, downs = ([each.tensors[name].double().flatten(1) for each in (one, other)] for name in ("up", "down"))
    return one.scale * other.scale * ((ups[0].T @ ups[1]) * (downs[0] @ downs[1].T)).sum()


def norm(weights: Weights, base: Tensor | None = None) -> float:
    """|delta|, Frobenius."""
    if weights.kind != "lora":
        return weights.delta(base).double().norm().item()
    up, down = (weights.tensors[name].float().flatten(1) for name in ("up", "down"))
    square = ((up.T @ up).double() * (down @ down.T).double()).sum().item()
    return abs(weights.scale) * math.sqrt(max(square, 0.0))
