"""What torch says of its attention kernels, asked for every device and type."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from loraloom.launch.attention_kernels import ASK, attention_lines

SCOPE = {"torch": torch}
exec(ASK, SCOPE)


def test_the_kernels_that_run_are_those_that_torch_does_not_refuse_and_its_own_choice_is_first():
    tensor = torch.zeros(1, 2, 64, 64)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert torch.nn.functional.scaled_dot_product_attention(tensor, tensor, tensor).shape == tensor.shape
    assert SCOPE["attention"]("cpu") == {name: ["flash", "math"] for name in ("fp32", "bf16", "fp16")}
    with sdpa_kernel(SDPBackend.MATH):  # torch would take another now, and can still be made to take flash
        assert SCOPE["usable"]("cpu", torch.float32) == ["math", "flash"]


def test_a_line_for_each_device():
    found = {"A GPU": {"fp32": ["memory-efficient", "math"], "fp16": []}, "CPU": {"fp32": ["math"]}}
    assert list(attention_lines(found)) == [
        "attention on A GPU: fp32 memory-efficient (or math), fp16 none",
        "attention on CPU: fp32 math",
    ]
