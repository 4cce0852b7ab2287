"""loraloom trains adapters (LoRA and relatives, DreamBooth) on diffusion models, and uses them.

    config = loraloom.load_config("my-dog.yaml", ["adapter.rank=16"])
    with loraloom.build_trainer(config) as trainer:
        trainer.fit()
    engine = loraloom.Engine.load("pocket")
    engine.adapters.load_adapter("runs/my-dog/my-dog.safetensors", weight=0.8)
    images = engine.generate(loraloom.Request(["a sks dog"], [0]))

What is named here is meant for programs and stays; docs/python.md has more. Nothing is imported before it is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configs.errors import UserError
    from .configs.loader import load_config
    from .configs.schema import RunConfig
    from .inference.callback import Callback as SamplingCallback
    from .inference.callbacks.adapter_schedule import AdapterSchedule
    from .inference.callbacks.dynamic_guidance import DynamicGuidance
    from .inference.callbacks.guidance_schedule import GuidanceSchedule
    from .inference.callbacks.interrupt import Interrupt
    from .inference.callbacks.preview import Preview
    from .inference.callbacks.recorder import Recorder
    from .inference.engine import Engine, Request
    from .inference.files import read_adapter, write_adapter
    from .inference.weighted_file import AdapterFile
    from .train.build import build_trainer
    from .train.callback import Callback
    from .train.run import Run
    from .train.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "AdapterFile",
    "AdapterSchedule",
    "Callback",
    "DynamicGuidance",
    "Engine",
    "GuidanceSchedule",
    "Interrupt",
    "Preview",
    "Recorder",
    "Request",
    "Run",
    "RunConfig",
    "SamplingCallback",
    "Trainer",
    "UserError",
    "build_trainer",
    "load_config",
    "read_adapter",
    "write_adapter",
]

_PLACES = {
    "load_config": "configs.loader",
    "RunConfig": "configs.schema",
    "UserError": "configs.errors",
    "build_trainer": "train.build",
    "Trainer": "train.trainer",
    "Callback": "train.callback",
    "Run": "train.run",
    "Engine": "inference.engine",
    "Request": "inference.engine",
    "SamplingCallback": "inference.callback:Callback",
    "AdapterSchedule": "inference.callbacks.adapter_schedule",
    "DynamicGuidance": "inference.callbacks.dynamic_guidance",
    "GuidanceSchedule": "inference.callbacks.guidance_schedule",
    "Interrupt": "inference.callbacks.interrupt",
    "Preview": "inference.callbacks.preview",
    "Recorder": "inference.callbacks.recorder",
    "AdapterFile": "inference.weighted_file",
    "read_adapter": "inference.files",
    "write_adapter": "inference.files",
}
"""Where each name lives, and what it is called there if that is another."""


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, own = _PLACES[name].partition(":")
    value = getattr(importlib.import_module(f".{module}", __name__), own or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
