"""What all sections of a config have in common, and the type of their paths."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo

from .bounded import why_no_text
from .paths import checked, expanded

AS_IT_IS = "paths as they are"
"""Context of a validation: in what a program wrote, or a stranger sent, nothing is replaced."""
Seed = Annotated[int, Field(ge=0, lt=2**62)]
"""Room for the numbers of pictures that are added to it; torch takes 64 bits."""
Denoising = Annotated[int, Field(ge=1, le=1000)]
"""Steps of a sampler; bases have 1,000 timesteps."""
Guidance = Annotated[float, Field(ge=0, le=1000)]
"""Scale of classifier-free guidance; far less is usual."""
Threads = Annotated[int, Field(ge=1, le=1024)]
"""Of a CPU."""
Batch = Annotated[int, Field(ge=1, le=65_536)]
"""Samples or pictures."""
Rank = Annotated[int, Field(ge=1, le=100_000)]
"""Of an adapted module; the widest layers of these families have 10,240 inputs."""


LONGEST_WORDS = 100_000
"""Characters of a prompt; tokenizers take a second for so many."""


def _words(text: str) -> str:
    reason = why_no_text(text) or (f"has more than {LONGEST_WORDS:,} characters" if len(text) > LONGEST_WORDS else None)
    if reason:
        raise ValueError(f"the text {reason}")
    return text


Words = Annotated[str, AfterValidator(_words)]
"""What a model reads: no NUL, no halves of characters."""


class Section(BaseModel):
    """A part of the config: unknown keys are errors, the values cannot be changed afterwards."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, defer_build=True
    )


def _path(text: str, info: ValidationInfo) -> str:
    context: Any = info.context
    return checked(text) if context == AS_IT_IS else expanded(text)


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression ({error})") from None
    return text


def _revision(text: str) -> str:
    if not _REVISION.fullmatch(text) or ".." in text:
        raise ValueError(f"{text!r} is no revision: the hash of a commit, or the name of a branch or tag")
    return text


_REVISION = re.compile(r"[^-/\s\x00-\x20\x7f~^:?*\[\\][^\s\x00-\x20\x7f~^:?*\[\\]*")  # as git has it
PatternText = Annotated[str, AfterValidator(_pattern)]
"""A regular expression."""
Revision = Annotated[str, AfterValidator(_revision)]
"""A commit, branch or tag of a repository on the hub."""
PathText = Annotated[str, AfterValidator(_path)]
"""A file or folder, or what may be one beside other things; `~` and `$NAME` are replaced."""
