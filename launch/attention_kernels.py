"""Which of torch's attention kernels (SDPA) run here: asked in the interpreter that tries torch, and put into words."""

from collections.abc import Iterator, Mapping, Sequence

ASK = """
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

def runs(kernel, tensor):
    try:
        with sdpa_kernel(kernel):
            scaled_dot_product_attention(tensor, tensor, tensor).float().sum().backward()
        return True
    except RuntimeError:
        return False

def usable(device, dtype):
    tensor = torch.zeros(1, 2, 64, 64, device=device, dtype=dtype, requires_grad=True)
    chosen = torch._fused_sdp_choice(tensor, tensor, tensor)  # the number of the kernel that torch itself takes
    names = [name for name, kernel in KERNELS.items() if runs(kernel, tensor)]
    return sorted(names, key=lambda name: KERNELS[name].value != chosen)

def attention(device):
    return {name: usable(device, dtype) for name, dtype in TYPES.items()}
"""
"""Defines `attention(device)`: for each type the kernels that go forward and back, the one that torch takes first."""


def attention_lines(found: Mapping[str, Mapping[str, Sequence[str]]]) -> Iterator[str]:
    """One line for each device: `attention on CPU: fp32 flash (math), bf16 flash (math), ...`."""
    for device, types in found.items():
        yield f"attention on {device}: " + ", ".join(f"{name} {_words(kernels)}" for name, kernels in types.items())


def _words(kernels: Sequence[str]) -> str:
    if not kernels:
        return "none"
    return kernels[0] + (f" (or {', '.join(kernels[1:])})" if kernels[1:] else "")
