"""Samplers by the names that web UIs have for them, and sizes, as people type them."""

from argparse import ArgumentTypeError

import pytest

from loraloom.inference.pictures.arguments import _size
from loraloom.inference.schedulers import SCHEDULERS, known_name


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("DPM++ 2M Karras", "dpmsolver++_karras"),
        ("DPM++ 2M SDE", "dpmsolver++_sde"),
        ("dpmpp_2m", "dpmsolver++"),
        ("Euler a", "euler_ancestral"),
        ("euler_ancestral", "euler_ancestral"),
        ("Euler", "euler"),
        ("PLMS", "pndm"),
        ("uni_pc", "unipc"),
        ("DPM2 a", "KDPM2AncestralDiscreteScheduler"),
        ("EulerDiscreteScheduler", "EulerDiscreteScheduler"),
        ("k_euler_a", "euler_ancestral"),
        ("k_dpmpp_2m_ka", "dpmsolver++_karras"),
        ("dpmpp_2m_sde_gpu", "dpmsolver++_sde"),
        ("DPM++2M Karras", "dpmsolver++_karras"),
        ("DPM-Solver++ (2M)", "dpmsolver++"),
        ("dpm_2_ancestral", "KDPM2AncestralDiscreteScheduler"),
        ("uni_pc_bh2", "unipc"),
        ("euler_k", "euler_karras"),
        ("DPM++ SDE Karras", "DPM++ SDE Karras"),
        ("eulr", "eulr"),
    ],
)
def test_names_of_web_uis(theirs, ours):
    assert known_name(theirs) == ours
    assert all(known_name(name) == known_name(name.upper()) == name for name in SCHEDULERS)


@pytest.mark.parametrize("text", ["512x", "x512", "axb", "512x512x512", ""])
def test_half_a_size_is_refused(text):
    with pytest.raises(ArgumentTypeError):
        _size(text)
    assert (_size("512"), _size("512x768")) == ((512, 512), (512, 768))
