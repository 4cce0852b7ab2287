"""New words beside layers: known while they are loaded, forgotten without a trace, never half."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loraloom.adapters.artifact import AdapterArtifact, Weights
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


@pytest.mark.parametrize("plain", ["art", "v1.5-neg", "猫"])
@pytest.mark.parametrize("vectors", [1, 2])
def test_a_word_is_no_part_of_other_words(engine, tmp_path, plain, vectors):
    """Unless its letters are of a script that has no spaces. A file's name is the word, with its dots."""
    rows = torch.randn(vectors, 32, generator=torch.Generator().manual_seed(1))
    save_file({"emb_params": rows}, tmp_path / f"{plain}.safetensors")
    inside = f"a st{plain} of a {plain}y, p{plain}y or _{plain}_"
    before = [embeddings(engine, prompt) for prompt in (inside, f"a ({plain}), {plain}")]
    engine.adapters.load_adapter(tmp_path / f"{plain}.safetensors", "word")
    after = [embeddings(engine, prompt) for prompt in (inside, f"a ({plain}), {plain}")]
    engine.adapters.unload()
    assert torch.equal(before[0], after[0]) == plain.isascii()
    assert not torch.equal(before[1], after[1])


NAMES = ["pop", "type", "half", "train", "values", "to", "keys", "v1.5 (final)", "猫", "1", "default"]


def test_any_file_name_is_a_name(engine, tmp_path):
    """Also those that PyTorch's dictionaries have for themselves."""
    files = [tmp_path / f"{name}.safetensors" for name in NAMES]
    shape = engine.parts["unet"].get_submodule("mid_block.attentions.0.proj_in").weight.shape
    ones = {"down": torch.ones(1, *shape[1:]), "up": torch.ones(shape[0], 1, *[1] * (len(shape) - 2))}
    artifact = AdapterArtifact({("unet", "mid_block.attentions.0.proj_in"): Weights("lora", ones)})
    for file in files:
        write(artifact, file, "kohya", format_names(engine.family, engine.parts))
        engine.adapters.load_adapter(file)
    assert len(engine.adapters.get_names()) == len(files)
    for name in ("pop", "type", "to"):
        with pytest.raises(UserError, match="one of PyTorch's own words"):
            engine.adapters.load_adapter(files[0], name)
    engine.adapters.unload()


def test_a_word_has_no_weight_and_names_no_dot(engine, word):
    with pytest.raises(UserError, match="a word has no weight"):
        engine.adapters.load_adapter(word("one"), weight=0.5)
    with pytest.raises(UserError, match="letters, digits and _"):
        engine.adapters.load_adapter(word("one"), "my.word")
