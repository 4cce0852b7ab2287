"""Parameter groups, optimiser and learning-rate schedule."""

import torch
from diffusers.optimization import get_scheduler
from torch.optim.lr_scheduler import LambdaLR

from ..adapters.adapter import AdapterSet
from ..configs.schema import OptimizerSection


def make_optimizer(adapters: AdapterSet, section: OptimizerSection) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) with one group for each part, named after it."""
    groups = [
        {"params": parameters, "lr": section.part_learning_rates.get(part, section.learning_rate), "name": part}
        for part, parameters in adapters.parameters().items()
    ]
    return torch.optim.AdamW(groups, lr=section.learning_rate, weight_decay=section.weight_decay)


def make_schedule(optimizer: torch.optim.Optimizer, section: OptimizerSection, steps: int) -> LambdaLR:
    """A factor on each group's rate; one step of it for each optimiser step."""
    name = "constant_with_warmup" if section.schedule == "constant" and section.warmup_steps else section.schedule
    return get_scheduler(name, optimizer, num_warmup_steps=section.warmup_steps, num_training_steps=steps)
