"""On the way to a device nothing changes; page-locked memory needs a GPU and is not tested here."""

import pytest
import torch

from loraloom.models.to_device import to_device, to_like


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_numbers_and_types_are_those_of_to(dtype):
    tensor = torch.randn(3, 4)
    found = to_device(tensor, "cpu", dtype)
    assert torch.equal(found, tensor.to(dtype or torch.float32))
    assert found.dtype == (dtype or torch.float32)


def test_no_device_leaves_it_where_it_is():
    tensor = torch.ones(2)
    assert to_device(tensor, None) is tensor


def test_like_another():
    other = torch.empty(2, dtype=torch.bfloat16, device="meta")
    found = to_like(torch.ones(3), other)
    assert (found.device, found.dtype) == (other.device, other.dtype)
