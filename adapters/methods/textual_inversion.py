"""Textual inversion: new words are learnt, and nothing else (Gal et al. 2022)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...configs.schema import AdapterSection
from ...configs.section import Section

if TYPE_CHECKING:
    from ..adapter import Targets

FORMATS = ("embedding",)
SELECTION = None
CHANGES_BASE = False


class Options(Section):
    """It has none; the words are under `adapter.tokens`."""


def inject(parts: Mapping[str, Any], section: AdapterSection, targets: "Targets", seed: int) -> None:
    """No layer is adapted; `adapter.tokens` brings the words, for this method as beside any other."""
    return
