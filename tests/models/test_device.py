"""Which device and type are taken where nobody said it; the machines stand in for what torch says of them."""

import pytest
import torch

from loraloom.configs.errors import UserError
from loraloom.models.device import best_device, chosen_device, chosen_dtype


@pytest.mark.parametrize(
    ("there", "expected"), [((), "cpu"), (("xpu",), "xpu"), (("mps",), "mps"), (("cuda", "mps"), "cuda")]
)
def test_the_best_device_that_is_there(monkeypatch, there, expected):
    for name, module in {"cuda": torch.cuda, "mps": torch.backends.mps, "xpu": torch.xpu}.items():
        monkeypatch.setattr(module, "is_available", lambda name=name: name in there)
    assert best_device() == chosen_device("auto") == chosen_device(None) == expected


@pytest.mark.parametrize(
    ("device", "capability", "base", "expected"),
    [
        ("cpu", None, "x", "fp32"),
        ("mps", None, "x", "fp32"),
        ("xpu", None, "x", "bf16"),
        ("cuda", (9, 0), "x", "bf16"),
        ("cuda:0", (7, 5), "x", "fp16"),
        ("cuda", (9, 0), "pocket", "fp32"),
    ],
)
def test_the_type_that_suits_it(monkeypatch, device, capability, base, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert chosen_dtype("auto", device, base) == expected
    assert [chosen_dtype(name, device, base) for name in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]


@pytest.mark.parametrize("name", ["cuda:99", "nonsense", "cpu:x"])
def test_a_device_that_cannot_be_used_is_one_line(name):
    with pytest.raises(UserError, match=f"device '{name}' cannot be used: .") as told:
        chosen_device(name)
    assert len(told.value.problems) == 1
