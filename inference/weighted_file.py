"""An adapter file as a user names it: with the weight that it is mixed in with. No torch."""

import math
from dataclasses import dataclass
from pathlib import Path

from ..configs.arguments import file_and_weight
from ..configs.errors import UserError


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """A file with the weight it is mixed in with."""

    file: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "AdapterFile":
        """`path.safetensors` or `path.safetensors:0.8`."""
        file, weight = file_and_weight(text)
        if not math.isfinite(weight):
            raise UserError(f"--adapter {text}: the weight is not a finite number")
        return cls(Path(file), weight)
