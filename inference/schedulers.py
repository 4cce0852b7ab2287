"""The samplers, by the names that users write, on the noise schedule of a base."""

import re
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
    "dpmsolver++_sde_karras": Scheduler("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", **KARRAS}),
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
OF_OTHERS = {
    "dpm++ 2m": "dpmsolver++",
    "dpm++ 2m karras": "dpmsolver++_karras",
    "dpm++ 2m sde": "dpmsolver++_sde",
    "dpm++ 2m sde karras": "dpmsolver++_sde_karras",
    "euler a": "euler_ancestral",
    "plms": "pndm",
    "uni pc": "unipc",
    "lms": "LMSDiscreteScheduler",
    "dpm2": "KDPM2DiscreteScheduler",
    "dpm2 a": "KDPM2AncestralDiscreteScheduler",
}
"""What web UIs call them, in small letters, with single spaces."""


def make_scheduler(name: str, base: Any) -> Any:
    """A sampler with the config of the base's own scheduler: a name of SCHEDULERS, or a compatible class of diffusers.

    Web UIs' names, such as `DPM++ 2M Karras`, are understood as well. UserError with both lists for another name.
    """
    name = known_name(name)
    sampler = SCHEDULERS.get(name) or _compatible(name, base)
    return getattr(diffusers, sampler.kind).from_config(base.config, **sampler.options)


def known_name(name: str) -> str:
    """Ours for a sampler that a web UI calls `Euler a`, `dpmpp_2m` or `Heun`; any other name as it is."""
    if name in SCHEDULERS:
        return name
    plain = _plain_name(name)
    return OF_OTHERS.get(plain) or {_plain_name(own): own for own in SCHEDULERS}.get(plain, name)


def _plain_name(name: str) -> str:
    words = re.sub(r"[\s_-]+", " ", name.lower()).strip()
    return words.replace("dpmpp", "dpm++").replace("ancestral", "a")


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
