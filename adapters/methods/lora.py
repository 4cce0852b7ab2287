"""LoRA: h = W x + (alpha / r) B A x   (Hu et al. 2021, equation 3)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ...configs.schema import AdapterSection, Section

if TYPE_CHECKING:
    from ..adapter import AdapterSet, Targets


class Options(Section):
    """Options of LoRA."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping an input of A during training."""


def inject(parts: Mapping[str, Any], section: AdapterSection, targets: "Targets", seed: int) -> "AdapterSet":
    """A starts as Kaiming-uniform noise and B as zero, so that training begins at the base."""
    from peft import LoraConfig

    from ..adapter import inject_peft

    options = Options.model_validate(section.options)
    configs = {
        part: LoraConfig(
            r=section.rank,
            lora_alpha=section.alpha,  # type: ignore[arg-type]  # PEFT's annotation says int, any number works
            lora_dropout=options.dropout,
            target_modules=list(targets[part]),
        )
        for part in section.parts
    }
    return inject_peft(parts, configs, targets, {part: seed + index for index, part in enumerate(sorted(configs))})
