"""How strongly adapters count, as a function of the denoising: a style from the middle on, a subject that fades in.

schedule = AdapterSchedule(engine.adapters, {"style": lambda fraction: 0.0 if fraction < 0.5 else 1.0})
engine.generate(request, callbacks=[schedule])
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...adapters import active
from ...adapters.artifact import Key, canonical_path
from ...adapters.peft_adapters import carried, tuner_layers
from ...adapters.weighing import Weight, weights_of
from ...configs.errors import UserError
from ..callback import Callback, fraction
from ..mixing import Mixing

Schedule = Callable[[float], Weight]
"""From the fraction of the denoising that is behind a step, in [0, 1), to the weight in that step."""


class AdapterSchedule(Callback):
    """The weight of adapters in the denoiser, step by step; afterwards all of them have theirs of before.

    A named adapter is active for as long as the call lasts; one that is not named keeps its weight, or stays off. The
    words are encoded before the first step: in the text encoders an adapter keeps the weight that it was given before.
    UserError before the first step for an unknown adapter, one that the denoiser does not carry, a rotation, a weight
    that is none, and on a fused pipeline.
    """

    def __init__(self, adapters: Mixing, weights: Mapping[str, Schedule]) -> None:
        """`adapters` of the engine that samples; a function answers with a number, or numbers by component or block."""
        super().__init__()
        self._adapters, self._weights = adapters, dict(weights)
        self._scheduled: list[_Scheduled] = []

    @contextmanager
    def around(self, pipeline: Any, num_steps: int) -> Iterator[None]:
        with self._adapters.weighted({name: weight(0.0) for name, weight in self._weights.items()}):
            pass  # what cannot be is said before anything is sampled
        family, parts = self._adapters.family, self._adapters.parts
        models = {part: parts[part] for part in (family.denoiser, *family.text_encoders) if part in parts}
        self._scheduled = [_find(name, weight, models) for name, weight in self._weights.items()]
        with active.as_before([parts[family.denoiser]]):
            for each in self._scheduled:
                each.begin()
            yield

    def callback_fn(
        self, pipeline: Any, step_index: int, timesteps: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        if step_index + 1 < pipeline.num_timesteps:
            for each in self._scheduled:
                each.set(fraction(pipeline, step_index + 1))
        return callback_kwargs


@dataclass(frozen=True, slots=True)
class _Scheduled:
    """An adapter with its layers of the denoiser, found once: a step sets numbers and searches nothing."""

    name: str
    weight: Schedule
    keys: list[Key]  # of all components, for a weight may name any of them
    layers: list[tuple[Key, Any]]

    def begin(self) -> None:
        """Active beside what is active already, with the weight of the first step."""
        for _, layer in self.layers:
            before = [] if layer.disable_adapters else [*layer.active_adapters]
            layer.set_adapter([*dict.fromkeys([*before, self.name])], inference_mode=True)
            layer._disable_adapters = False
        self.set(0.0)

    def set(self, fraction: float) -> None:
        weights = weights_of(self.weight(fraction), self.keys)
        for key, layer in self.layers:
            active.set_scale(layer, self.name, weights[key])


def _find(name: str, weight: Schedule, models: Mapping[str, Any]) -> _Scheduled:
    """`models` begin with the denoiser."""
    denoiser = next(iter(models))
    layers = [
        ((denoiser, canonical_path(denoiser, path)), layer)
        for path, layer in tuner_layers(models[denoiser])
        if name in carried(layer)
    ]
    if not layers:
        raise UserError(f"the adapter {name!r} has nothing in the {denoiser}, whose weights alone follow a schedule")
    if any(active.is_rotation(layer) for _, layer in layers):
        raise UserError(f"the adapter {name!r} is a rotation (OFT), which has no weight that could follow a schedule")
    keys = [key for part, model in models.items() for key in active.keys_of(part, model, name)]
    return _Scheduled(name, weight, keys, layers)
