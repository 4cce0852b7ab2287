"""Parameter groups, optimiser and learning-rate schedule."""

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from pydantic import BaseModel
from torch.optim.lr_scheduler import LambdaLR

from ..adapters.adapter import AdapterSet
from ..configs.choices import find
from ..configs.errors import UserError
from ..configs.faults import foreign
from ..configs.schema import OptimizerSection, PartSection
from .kernels.adamw import FlatAdamW

if TYPE_CHECKING:
    from .run import Run

Group = dict[str, Any]


class OptimizerKind(Protocol):
    """What each module in `optimizers/` has."""

    Options: type[BaseModel]
    PACKAGE: str | None
    EXTRA: str | None

    def make(self, groups: list[Group], section: OptimizerSection, options: Any) -> torch.optim.Optimizer: ...


def make_optimizer(adapters: AdapterSet, section: OptimizerSection) -> torch.optim.Optimizer:
    """The optimiser of a config with the groups of its parts, after one step of it was tried on a single weight.

    UserError where it is not installed, does not take its options or does not work on this device: nothing takes its
    place without a word.
    """
    groups = parameter_groups(adapters, section)
    device = groups[0]["params"][0].device
    _try(section, device)
    return _make(section, groups)


def parameter_groups(adapters: AdapterSet, section: OptimizerSection) -> list[Group]:
    """One for each part, named after it; with LoRA+ (Hayou et al. 2024) another for its B, at a higher rate.

    Each has the names of its weights, by which a checkpoint finds them again.
    """
    groups: list[Group] = []
    for part, named in adapters.named_parameters().items():
        own = section.parts.get(part, PartSection())
        rate = section.learning_rate if own.learning_rate is None else own.learning_rate
        decay = section.weight_decay if own.weight_decay is None else own.weight_decay
        common = {"weight_decay": decay, "stop_after": own.stop_after}
        faster = {name for name in named if "lora_B" in name} if section.lora_plus_ratio != 1 else set()
        groups.append(_group(part, {n: p for n, p in named.items() if n not in faster}, lr=rate, **common))
        if faster:
            faster_rate = rate * section.lora_plus_ratio
            groups.append(_group(f"{part}/B", {n: named[n] for n in named if n in faster}, lr=faster_rate, **common))
    return groups


def _group(name: str, named: Mapping[str, torch.nn.Parameter], **settings: Any) -> Group:
    return {"params": [*named.values()], "name": name, "weights": [*named], **settings}


def arrange_as(optimizer: torch.optim.Optimizer, saved: Sequence[Group]) -> None:
    """Brings the groups, and the weights in them, into the order of a saved optimiser, whose state goes by places.

    The order decides in which turn gradients are summed, so a run goes on with that in which it began. UserError for
    groups or weights of other names. Older checkpoints know the names of groups alone.
    """
    groups = {group["name"]: group for group in optimizer.param_groups}
    names = [group.get("name") for group in saved]
    if sorted(map(str, names)) != sorted(groups):
        raise UserError(f"its optimiser trains {', '.join(map(str, names))}, this run {', '.join(groups)}")
    for then in saved:
        group = groups[then["name"]]
        own, wanted = group["weights"], then.get("weights", group["weights"])
        if sorted(own) != sorted(wanted) or len(own) != len(then["params"]):
            raise UserError(f"its optimiser has other weights of {then['name']} than this run")
        place = {name: number for number, name in enumerate(own)}
        group["params"], group["weights"] = [group["params"][place[name]] for name in wanted], list(wanted)
    optimizer.param_groups[:] = [groups[name] for name in names]


def make_schedule(optimizer: torch.optim.Optimizer, section: OptimizerSection, steps: int) -> LambdaLR:
    """A factor on each group's rate; one step of it for each optimiser step. All of diffusers' schedules."""
    from diffusers.optimization import get_scheduler

    name = "constant_with_warmup" if section.schedule == "constant" and section.warmup_steps else section.schedule
    own = {
        "cosine_with_restarts": {"num_cycles": section.schedule_cycles},
        "polynomial": {"power": section.schedule_power},
        "piecewise_constant": {"step_rules": section.schedule_rules},
    }.get(name, {})
    return get_scheduler(
        name, optimizer, num_warmup_steps=section.warmup_steps, num_training_steps=steps, **cast(dict[str, Any], own)
    )


def clip_gradients(run: "Run", max_norm: float) -> torch.Tensor:
    """Scales all gradients to a common norm of at most `max_norm`; returns what it was."""
    if run.accelerator.scaler is not None and all(parameter.grad is None for parameter in run.trained()):
        return torch.zeros((), device=run.accelerator.device)  # all parts have stopped: nothing to unscale
    if run.is_sharded or run.accelerator.scaler is not None:
        return torch.as_tensor(run.accelerator.clip_grad_norm_(run.trained(), max_norm))
    if isinstance(run.optimizer.optimizer, FlatAdamW):
        return run.optimizer.optimizer.clip(max_norm)
    return torch.nn.utils.clip_grad_norm_(run.trained(), max_norm, foreach=True)


def drop_stopped(optimizer: Any, step: int) -> None:
    """Takes the gradients from the groups that no longer train, so that nothing of them moves or counts."""
    for group in optimizer.param_groups:
        if group["stop_after"] is not None and step >= group["stop_after"]:
            for parameter in group["params"]:
                parameter.grad = None


def _make(section: OptimizerSection, groups: list[Group]) -> torch.optim.Optimizer:
    if "." in section.name:
        return _of_path(section, groups)
    kind = cast(OptimizerKind, find("train.optimizers", section.name))
    if kind.PACKAGE is not None and importlib.util.find_spec(kind.PACKAGE) is None:
        raise UserError(
            f"optimizer.name {section.name}: {kind.PACKAGE} is not installed; pip install 'loraloom[{kind.EXTRA}]'"
        )
    try:
        return kind.make(groups, section, kind.Options.model_validate(section.options))
    except ImportError as error:
        raise UserError(f"optimizer.name {section.name}: {kind.PACKAGE} cannot be imported ({error})") from error


def _of_path(section: OptimizerSection, groups: list[Group]) -> torch.optim.Optimizer:
    """A class by its import path, such as `torch.optim.RAdam`, with the options as its arguments."""
    module, _, name = section.name.rpartition(".")
    foreign(module)
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError, SyntaxError) as error:
        raise UserError(f"optimizer.name {section.name}: cannot be imported ({error}); install its package") from error
    try:
        return kind(groups, lr=section.learning_rate, **section.options)
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer.options: {section.name} does not take them ({error})") from error


def _try(section: OptimizerSection, device: torch.device) -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2, device=device))
    optimizer = _make(section, [{"params": [weight], "lr": 1.0, "weight_decay": 0.0, "name": "x", "stop_after": None}])
    weight.sum().backward()
    try:
        optimizer.step()
    except Exception as error:  # whatever a kernel raises that does not work on this device
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"optimizer.name {section.name}: does not work on {device.type} here ({reason})") from error
