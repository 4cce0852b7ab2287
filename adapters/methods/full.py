"""Full fine-tuning: the weights of the base themselves are trained, as in DreamBooth (Ruiz et al. 2023, section 3)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...configs.schema import AdapterSection
from ...configs.section import Section

if TYPE_CHECKING:
    from ..adapter import Targets
    from ..trained_base import TrainedBase

FORMATS = ("embedding",)  # of new words beside it
SELECTION = "all"
CHANGES_BASE = True


class Options(Section):
    """It has none."""


def inject(parts: Mapping[str, Any], section: AdapterSection, targets: "Targets", seed: int) -> "TrainedBase":
    """Nothing is put in: the chosen weights begin to train, in float32."""
    from ..trained_base import TrainedBase

    names: dict[str, list[str]] = {}
    for part, modules in targets.items():
        model, chosen = parts[part].float(), set(modules)
        names[part] = [name for name, _ in model.named_parameters() if name.rpartition(".")[0] in chosen]
        for name in names[part]:
            model.get_parameter(name).requires_grad_(True)
    return TrainedBase({part: parts[part] for part in targets}, names)
