"""How strongly an adapter counts in each module: one number, one for each component, or one for each block.

In diffusers' words, `{"unet": {"down": 0.5, "up": {"block_1": [0.4, 0.8, 1.0]}}, "text_encoder": 0.7}`, and by the
beginning of a module's path: `{"unet": {"down_blocks.1.attentions": 0.5}, "text_encoder": {"layers.3": 0.0}}`. What is
not named counts fully.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ..configs.choices import did_you_mean
from ..configs.errors import UserError
from .artifact import Key, block_of

Weight = float | Mapping[str, Any]
"""A number, or component -> a number, or block -> a number or a list."""

_SIDES = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}
_NUMBER = re.compile(r"block_(\d+)$")
_BLOCK_NUMBER = re.compile(r"^\d+\.")
_PLACE = re.compile(r"[a-z_]+\.(\d+)\.|[a-z_]+$")


def weights_of(weight: Weight, keys: Collection[Key]) -> dict[Key, float]:
    """The weight of each module of an adapter. UserError for a component or block that it does not change."""
    if not isinstance(weight, Mapping):
        return dict.fromkeys(keys, _number("weight", weight))
    components = sorted({component for component, _ in keys})
    if unknown := [name for name in weight if name not in components]:
        raise UserError(
            f"the adapter has no {unknown[0]!r} to weigh{did_you_mean(unknown[0], components)}; "
            f"it has: {', '.join(components)}"
        )
    return {
        key: found
        for component in components
        for key, found in _of_component(weight.get(component, 1.0), [key for key in keys if key[0] == component])
    }


def check_rotations(title: str, weights: Mapping[Key, float], rotated: Collection[Key]) -> None:
    """UserError where a module that an adapter rotates (OFT) has another weight than 1: a rotation is there or not."""
    if any(weights[key] != 1 for key in rotated):
        raise UserError(f"{title}: an OFT adapter is a rotation, which has no weight: leave it at 1, or out")


def _of_component(weight: Weight, keys: Collection[Key]) -> Iterator[tuple[Key, float]]:
    if not isinstance(weight, Mapping):
        return iter(dict.fromkeys(keys, _number("weight", weight)).items())
    blocks = dict(_by_path(weight))
    for path in blocks:
        if not any(_begins(key, path) for key in keys):
            known = dict.fromkeys(block_of(key) for key in keys)
            raise UserError(
                f"the adapter changes nothing in the block {path!r} of {next(iter(keys))[0]}"
                f"{did_you_mean(path, known)}; it changes: {', '.join(sorted(known))}"
            )
    return ((key, _at(key, blocks)) for key in keys)


def _by_path(weight: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Beginning of a path -> a number, or the numbers of the block's layers."""
    for name, value in weight.items():
        path = _SIDES.get(name, name)
        if not isinstance(value, Mapping):
            yield path, _checked(name, value)
            continue
        for block, own in value.items():
            if path not in ("down_blocks", "up_blocks") or (found := _NUMBER.match(block)) is None:
                raise UserError(f"{name!r} has no {block!r} to weigh: say block_0, block_1, … of down and up")
            yield f"{path}.{found[1]}", _checked(f"{name}.{block}", own)


def _checked(name: str, value: Any) -> Any:
    if isinstance(value, list) and value:
        return [_number(name, each) for each in value]
    return _number(name, value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{name}: {value!r} is no number that an adapter can be weighed with")
    return float(value)


def _begins(key: Key, path: str) -> bool:
    return key[1] == path or key[1].startswith(f"{path}.") or block_of(key) == path


def _at(key: Key, blocks: Mapping[str, Any]) -> float:
    """By the longest beginning. In a list each layer of a block has its own place, as diffusers counts them."""
    known = [path for path in blocks if _begins(key, path)]
    if not known:
        return 1.0
    path = max(known, key=len)
    value = blocks[path]
    if not isinstance(value, list):
        return value
    found = _PLACE.match(_BLOCK_NUMBER.sub("", key[1].removeprefix(f"{path}."), count=1))
    place = int(found[1]) if found and found[1] else 0
    if place >= len(value) > 1:
        raise UserError(f"{path} has a layer {place + 1}, and its list of weights only {len(value)} numbers")
    return value[place] if len(value) > 1 else value[0]
