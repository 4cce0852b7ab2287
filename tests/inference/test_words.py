"""New words beside layers: known while they are loaded, forgotten without a trace, never half."""

from pathlib import Path

import pytest
import torch

from loraloom.adapters.artifact import AdapterArtifact
from loraloom.adapters.format import write
from loraloom.configs.errors import UserError
from loraloom.inference.adapter_file import format_names
from loraloom.inference.engine import Engine
from loraloom.models.encode import encoder_of


@pytest.fixture(scope="module")
def engine(tiny_base) -> Engine:
    return Engine.load(str(tiny_base))


@pytest.fixture
def word(engine, tmp_path):
    """Writes a word of some vectors."""

    def word(name: str, vectors: int = 2, width: int = 32, seed: int = 0) -> Path:
        rows = torch.randn(vectors, width, generator=torch.Generator().manual_seed(seed))
        artifact = AdapterArtifact({}, embeddings={"text_encoder": {f"<{name}>": rows}})
        file = tmp_path / f"{name}.safetensors"
        write(artifact, file, "loraloom", format_names(engine.family, engine.parts))
        return file

    return word


def embeddings(engine: Engine, prompt: str) -> torch.Tensor:
    return encoder_of(engine.family, engine.parts)([prompt]).prompt_embeds


def test_words_are_known_and_forgotten_one_by_one(engine, word):
    inpaint = engine.pipeline_for("inpaint")
    size, prompts = len(engine.parts["tokenizer"]), ("a <one> star", "a <two> star")
    before = [embeddings(engine, prompt) for prompt in prompts]
    for name, seed in (("one", 1), ("two", 2)):
        engine.adapters.load_adapter(word(name, seed=seed))
    both = [embeddings(engine, prompt) for prompt in prompts]
    assert not any(torch.equal(a, b) for a, b in zip(before, both, strict=True))
    assert engine.adapters.get_names() == ["one", "two"]
    engine.adapters.delete_adapters("one")
    assert torch.equal(embeddings(engine, prompts[0]), before[0])
    assert torch.equal(embeddings(engine, prompts[1]), both[1])
    assert inpaint.tokenizer is engine.pipeline.tokenizer is engine.parts["tokenizer"]
    engine.adapters.unload()
    assert len(engine.parts["tokenizer"]) == size
    assert [torch.equal(embeddings(engine, p), b) for p, b in zip(prompts, before, strict=True)] == [True, True]


@pytest.mark.parametrize("first", [[], ["one"]], ids=["alone", "beside another"])
def test_a_word_of_another_width_or_known_already_leaves_nothing_behind(engine, word, first):
    for name in first:
        engine.adapters.load_adapter(word(name))
    size, plain = len(engine.parts["tokenizer"]), embeddings(engine, "a <one> star")
    with pytest.raises(UserError, match="vectors of 48 numbers, this text_encoder has 32"):
        engine.adapters.load_adapter(word("wide", width=48))
    if first:
        with pytest.raises(UserError, match="knows '<one>' already"):
            engine.adapters.load_adapter(word("one", seed=5), "again")
    assert engine.adapters.get_names() == first
    assert len(engine.parts["tokenizer"]) == size
    assert torch.equal(embeddings(engine, "a <one> star"), plain)
    engine.adapters.load_adapter(word("wide"))  # the name is free
    engine.adapters.unload()


def test_a_word_has_no_weight_and_names_no_dot(engine, word):
    with pytest.raises(UserError, match="a word has no weight"):
        engine.adapters.load_adapter(word("one"), weight=0.5)
    with pytest.raises(UserError, match="letters, digits and _"):
        engine.adapters.load_adapter(word("one"), "my.word")
