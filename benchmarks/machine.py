"""The machine that figures hold for."""

import os
import platform

import torch

from ..configs.machine import cores


def machine_line() -> str:
    """Its processor or GPU, cores, memory, and what torch uses of them."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    kernels = torch.backends.cpu.get_cpu_capability()
    return f"{device}, {cores()} cores ({kernels}), {memory:.0f} GiB, torch {torch.__version__}"


def _processor() -> str:
    """Its name, as Linux has it."""
    with open("/proc/cpuinfo") as info:
        names = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    return names[0] if names else platform.processor()
