"""The samplers, by the names that users write, on the noise schedule of a base."""

from typing import Any, NamedTuple

import diffusers

from ..configs.choices import did_you_mean
from ..configs.errors import UserError


class Scheduler(NamedTuple):
    """A scheduler of diffusers, and what it is told beside the base's own config."""

    kind: str
    options: dict[str, Any] = {}


KARRAS = {"use_karras_sigmas": True}  # Karras et al. 2022, equation 5
SCHEDULERS = {
    "dpmsolver++": Scheduler("DPMSolverMultistepScheduler"),
    "dpmsolver++_karras": Scheduler("DPMSolverMultistepScheduler", KARRAS),
    "dpmsolver++_sde": Scheduler("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "ddim": Scheduler("DDIMScheduler"),
    "ddpm": Scheduler("DDPMScheduler"),
    "deis": Scheduler("DEISMultistepScheduler"),
    "euler": Scheduler("EulerDiscreteScheduler"),
    "euler_karras": Scheduler("EulerDiscreteScheduler", KARRAS),
    "euler_ancestral": Scheduler("EulerAncestralDiscreteScheduler"),
    "heun": Scheduler("HeunDiscreteScheduler"),
    "lcm": Scheduler("LCMScheduler"),
    "pndm": Scheduler("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": Scheduler("UniPCMultistepScheduler"),
}
DEFAULT_SCHEDULER = "dpmsolver++"


def make_scheduler(name: str, base: Any) -> Any:
    """A sampler with the config of the base's own scheduler: a name of SCHEDULERS, or a compatible class of diffusers.

    UserError with both lists for another name.
    """
    sampler = SCHEDULERS.get(name) or _compatible(name, base)
    return getattr(diffusers, sampler.kind).from_config(base.config, **sampler.options)


def compatibles(base: Any) -> list[str]:
    """The classes of diffusers that sample on the same kind of noise schedule."""
    return sorted(kind.__name__ for kind in base.compatibles)


def _compatible(name: str, base: Any) -> Scheduler:
    known = compatibles(base)
    if name not in known:
        hint = did_you_mean(name, [*SCHEDULERS, *known])
        raise UserError(
            f"scheduler {name!r} is unknown{hint}; there are: {', '.join(SCHEDULERS)}; "
            f"or one of diffusers' classes: {', '.join(known)}"
        )
    return Scheduler(name)
