"""How often each timestep is trained: densities over [0, 1), from clean to noise."""

from collections.abc import Callable

import torch
from torch import Tensor

from .process import KeyedDraws

Density = Callable[[KeyedDraws], Tensor]


def uniform(draws: KeyedDraws) -> Tensor:
    """(B,), all alike."""
    return draws.uniform("timestep")


def logit_normal(draws: KeyedDraws) -> Tensor:
    """(B,) sigmoid of a standard normal number: the middle more often (Esser et al. 2024, equation 19)."""
    return torch.sigmoid(draws.normal("timestep", ()))


def cosmap(draws: KeyedDraws) -> Tensor:
    """(B,) as rectified flow on the cosine schedule would have it (Esser et al. 2024, section 3.1)."""
    return 1 - 1 / (torch.tan(torch.pi / 2 * draws.uniform("timestep")) + 1)


DENSITIES: dict[str, Density] = {"uniform": uniform, "logit_normal": logit_normal, "cosmap": cosmap}


def draw_timesteps(draws: KeyedDraws, density: str, first: int, end: int) -> Tensor:
    """(B,) whole numbers in [first, end)."""
    if density == "uniform":
        return draws.integers("timestep", first, end)
    place = DENSITIES[density](draws).clamp(0, 1)
    return (first + (place * (end - first)).long()).clamp(max=end - 1)
