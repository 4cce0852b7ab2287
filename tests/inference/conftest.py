"""Adapter files with random weights, for any base and of any method; none of their numbers is zero."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from loraloom.adapters.format import write
from loraloom.adapters.targets import select
from loraloom.configs.choices import find
from loraloom.configs.schema import AdapterSection, ModelSection
from loraloom.inference.adapter_file import format_names
from loraloom.models.load import Base

ATTENTION = {"unet": "attention", "text_encoder": "attention"}


@pytest.fixture(scope="session")
def make_adapter(tmp_path_factory):
    """Writes an adapter for a base and answers with its file."""

    def make_adapter(
        base: str | Path,
        method: str = "lora",
        *,
        name: str = "adapter",
        parts: Mapping[str, str] = ATTENTION,
        rank: int = 4,
        alpha: float = 8,
        seed: int = 0,
        std: float = 0.1,
        format_name: str = "loraloom",
        **options,
    ) -> Path:
        found = Base(ModelSection(base=str(base)))
        loaded = found.load([*found.family.kohya_prefixes, "scheduler"])
        names = format_names(found.family, loaded)
        section = AdapterSection(method=method, rank=rank, alpha=alpha, parts=dict(parts), options=options)
        targets = {p: select(p, loaded[p], each, found.family.targets[p]) for p, each in parts.items()}
        adapters = find("adapters.methods", method).inject(loaded, section, targets, seed)
        generator = torch.Generator().manual_seed(seed)
        for parameters in adapters.parameters().values():
            for parameter in parameters:
                parameter.data += std * torch.randn(parameter.shape, generator=generator)
        file = tmp_path_factory.mktemp("adapters") / f"{name}.safetensors"
        write(adapters.artifact(), file, format_name, names)
        return file

    return make_adapter
