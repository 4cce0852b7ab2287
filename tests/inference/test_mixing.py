"""Several adapters on one base: weighed, switched, fused, swapped, and taken out without a trace."""

import hashlib

import pytest
import torch

from loraloom.configs.errors import UserError
from loraloom.inference.engine import Engine
from loraloom.inference.verify import probe


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def base(request, base_of) -> str:
    return str(base_of(request.param))


@pytest.fixture
def engine(base) -> Engine:
    return Engine.load(base)


def prediction(engine: Engine) -> torch.Tensor:
    return probe(engine.family, engine.parts)


def hashes(engine: Engine) -> dict[str, str]:
    """Of every tensor of the base, as it is when nothing carries an adapter."""
    tensors = {
        f"{part}.{name}": tensor
        for part, model in engine.parts.items()
        if isinstance(model, torch.nn.Module)
        for name, tensor in model.state_dict().items()
    }
    return {name: hashlib.sha256(t.contiguous().view(torch.uint8).numpy()).hexdigest() for name, t in tensors.items()}


def storages(engine: Engine) -> int:
    """Bytes of all tensors of the models, each memory counted once."""
    models = [model for model in engine.parts.values() if isinstance(model, torch.nn.Module)]
    tensors = [t for model in models for t in (*model.parameters(), *model.buffers())]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


METHODS = ("lora", "loha", "lokr")


@pytest.mark.parametrize("method", METHODS)
def test_it_loads_every_method_and_unload_leaves_no_trace(engine, base, make_adapter, method):
    before, plain, size = hashes(engine), prediction(engine), storages(engine)
    engine.adapters.load_adapter(make_adapter(base, method), "a")
    assert (prediction(engine) - plain).abs().max() > 1e-3
    assert engine.adapters.get_active_adapters() == ["a"]
    engine.adapters.unload()
    assert torch.equal(prediction(engine), plain)
    assert hashes(engine) == before
    assert storages(engine) == size
    assert engine.adapters.get_names() == []
