"""What an adapter is called after its file."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraloom.adapters.format import file_name
from loraloom.adapters.titles import ENDINGS, title_of
from loraloom.configs.choices import find, names

TITLES = st.text(string.ascii_letters + string.digits + "._- ", min_size=1, max_size=20)


@given(title=TITLES, kind=st.sampled_from(names("adapters.formats")))
def test_the_name_of_a_file_gives_the_title_back(title: str, kind: str):
    """Dots are its own, unless it ends as a format does."""
    if not title.endswith((*ENDINGS, ".safetensors")):
        assert title_of(f"folder.v2/{file_name(title, kind)}") == title


def test_every_format_is_known():
    assert {*ENDINGS} == {find("adapters.formats", name).SUFFIX for name in names("adapters.formats")} - {""}


@pytest.mark.parametrize("name", ["style-SD1.5-V1", "v1.5-neg", "style.v2", "step-000010"])
def test_folders_and_plain_names_too(name: str):
    assert title_of(f"a/{name}") == title_of(f"{name}.peft") == title_of(f"{name}.SAFETENSORS") == name
