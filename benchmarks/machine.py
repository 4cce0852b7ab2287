"""The machine that figures hold for."""

import os
import platform
from typing import Any

import torch

from ..configs.machine import cores


def machine() -> dict[str, Any]:
    """Its processor or GPU, cores, bytes of memory, and what torch uses of them."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    kernels = torch.backends.cpu.get_cpu_capability()
    return {"device": device, "cores": cores(), "memory": memory, "kernels": kernels, "torch": torch.__version__}


def machine_line() -> str:
    """The same in a line."""
    found = machine()
    memory = f"{found['memory'] / 2**30:.0f} GiB"
    return f"{found['device']}, {found['cores']} cores ({found['kernels']}), {memory}, torch {found['torch']}"


def _processor() -> str:
    """Its name, as Linux has it."""
    with open("/proc/cpuinfo") as info:
        names = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    return names[0] if names else platform.processor()
