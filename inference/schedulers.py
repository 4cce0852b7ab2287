"""The samplers, by the names that users write, on the noise schedule of a base."""

import inspect
import math
import re
from typing import Any, NamedTuple

import diffusers

from ..configs.choices import did_you_mean
from ..configs.errors import UserError


class Scheduler(NamedTuple):
    """A scheduler of diffusers, and what it is told beside the base's own config."""

    kind: str
    options: dict[str, Any] = {}


FLOW = "FlowMatch"  # how the names of diffusers' samplers for flow matching begin
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
    "uni pc bh2": "unipc",
    "unipc bh2": "unipc",
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
    kind = getattr(diffusers, sampler.kind)
    try:
        return kind.from_config(base.config, **sampler.options | _flow_options(name, kind, base))
    except ImportError as error:  # of a class that diffusers has in name only, without its library
        raise UserError(f"scheduler {name!r}: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise UserError(f"scheduler {name!r} does not fit this base: {' '.join(str(error).split())}") from error


def _flow_options(name: str, kind: Any, base: Any) -> dict[str, Any]:
    """What a sampler has to be told for a base of flow matching; UserError for one that knows noise schedules only."""
    if not type(base).__name__.startswith(FLOW) or kind.__name__.startswith(FLOW):
        return {}
    if "use_flow_sigmas" not in inspect.signature(kind).parameters:
        able = [own for own, each in SCHEDULERS.items() if _takes_flow(each)]
        raise UserError(f"scheduler {name!r} is not for bases of flow matching; there are: {', '.join(able)}")
    return {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": base.config.get("shift", 1.0)}


def _takes_flow(sampler: Scheduler) -> bool:
    kind = getattr(diffusers, sampler.kind)
    return sampler.options.keys().isdisjoint(KARRAS) and "use_flow_sigmas" in inspect.signature(kind).parameters


def check_steps(scheduler: Any, steps: int) -> None:
    """UserError for a number of steps that a sampler cannot make on its schedule."""
    if not hasattr(scheduler, "set_timesteps"):
        return
    words = f"{type(scheduler).__name__} cannot make {counted(steps)} on this base"
    total = scheduler.config.get("num_train_timesteps") or math.inf
    if steps > total:
        raise UserError(f"{words}, which was trained with {total}: give fewer steps")
    try:
        scheduler.set_timesteps(steps)
    except (ValueError, IndexError, RuntimeError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{words}: give another number of steps, or another --scheduler ({reason})") from error
    is_flow = type(scheduler).__name__.startswith(FLOW) or scheduler.config.get("use_flow_sigmas")
    if not is_flow and float(scheduler.timesteps.max()) >= total:  # those of flow matching end at 1, which is the total
        raise UserError(f"{words}: its spacing of timesteps goes beyond the last one, {total - 1}; give fewer steps")


def counted(steps: int) -> str:
    return f"{steps} step" if steps == 1 else f"{steps} steps"


def known_name(name: str) -> str:
    """Ours for a sampler that a web UI calls `Euler a`, `dpmpp_2m` or `Heun`; any other name as it is."""
    if name in SCHEDULERS:
        return name
    plain = _plain_name(name)
    return OF_OTHERS.get(plain) or {_plain_name(own): own for own in SCHEDULERS}.get(plain, name)


def _plain_name(name: str) -> str:
    """As A1111, ComfyUI, InvokeAI and diffusers' pages spell it: `k_euler_a`, `dpmpp_2m_k`, `DPM-Solver++ (2M)`."""
    words = re.sub(r"[\s_()-]+", " ", name.lower()).strip()
    words = re.sub(r"^k (?=\S)| gpu$", "", words).replace("ancestral", "a").replace("dpm solver", "dpmsolver")
    words = re.sub(r" ka?$", " karras", words)
    # the multistep solver alone: `DPM++ SDE` of web UIs is another one than our `dpmsolver++_sde`
    words = re.sub(r"dpm ?pp|dpmsolver\+\+(?= ?2m)", "dpm++", words)
    return re.sub(r"(?<=dpm\+\+)(?=\d)", " ", words).replace("dpm 2", "dpm2")


def compatibles(base: Any) -> list[str]:
    """The classes of diffusers that sample on the same kind of noise schedule.

    diffusers also names some that know nothing of a base's betas (EDM's), and draw something else.
    """
    kinds = base.compatibles
    if "beta_schedule" in base.config:
        kinds = [kind for kind in kinds if _knows_betas(kind)]
    return sorted(kind.__name__ for kind in kinds)


def _knows_betas(kind: Any) -> bool:
    """Also where diffusers has it in name only, as its library is not installed."""
    return hasattr(kind, "_backends") or "beta_schedule" in inspect.signature(kind).parameters


def _compatible(name: str, base: Any) -> Scheduler:
    known = compatibles(base)
    if name not in known:
        hint = did_you_mean(name, [*SCHEDULERS, *known])
        raise UserError(
            f"scheduler {name!r} is unknown{hint}; there are: {', '.join(SCHEDULERS)}; "
            f"or one of diffusers' classes: {', '.join(known)}"
        )
    return Scheduler(name)
