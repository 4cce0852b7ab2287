"""Custom pipelines on a base of ours: the parts are loaded once, by the engine, and handed over."""

import inspect
from typing import Any

from diffusers import DiffusionPipeline

from ..configs.choices import did_you_mean
from ..configs.errors import UserError
from ..models.base import check_base
from .engine import Engine
from .pipeline_code import pipeline_class


def load_pipeline(
    base: str | Engine, custom: str, *, trust_remote_code: bool = False, revision: str | None = None, **components: Any
) -> DiffusionPipeline:
    """A custom pipeline with the parts of a base.

    `base` is what `Engine.load` takes, or an engine, whose parts are shared with their adapters, precision and device.
    `custom` names the pipeline:

        clip_guided            one in `inference/pipelines/`
        package.module:Class   of an installed package
        ./folder               its pipeline.py, with `trust_remote_code=True`
        owner/name             pipeline.py of the hub's repository, with that and `revision`, a commit of 40 digits
        community:name         of diffusers' community, with both; the commit is one of `pipeline_code.MIRROR`

    `components` are what it needs beside those of the base, or instead of them. UserError, before anything runs, for
    code that is not allowed or not pinned; also for components that are missing or that it does not have.
    """
    if isinstance(base, str) and (problems := check_base(base)):
        raise UserError(problems)
    kind = pipeline_class(custom, trust_remote_code=trust_remote_code, revision=revision)
    wanted = inspect.signature(kind).parameters
    _check_known(kind, components, list(wanted))
    plain = (base if isinstance(base, Engine) else Engine.load(base)).pipeline
    available = {**plain.config, **plain.components, **components}
    required = [name for name, parameter in wanted.items() if parameter.default is inspect.Parameter.empty]
    if missing := [name for name in required if name not in available]:
        listed = ", ".join(f"{name}=..." for name in missing)
        raise UserError(f"{kind.__name__} needs more than a {type(plain).__name__} has; give {listed}")
    return kind(**{name: available[name] for name in wanted if name in available}).to(plain.device)


def _check_known(kind: type[DiffusionPipeline], components: dict[str, Any], wanted: list[str]) -> None:
    for name in components:
        if name not in wanted:
            hint = did_you_mean(name, wanted)
            raise UserError(f"{kind.__name__} has no component {name!r}{hint}; it has: {', '.join(wanted)}")
