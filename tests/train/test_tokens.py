"""New words: alone (textual inversion) and beside a LoRA (pivotal tuning)."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from loraloom.adapters.token_embeddings import TOKENS, ExtendedEmbedding, embedding_of
from loraloom.configs.command import run_command
from loraloom.configs.loader import load_config
from loraloom.inference.__main__ import main as sample
from loraloom.models.clip import expanded
from loraloom.models.pocket.tokenizer import build_tokenizer
from loraloom.train.__main__ import main
from loraloom.train.build import build_trainer
from loraloom.train.plan import main as plan

pytestmark = pytest.mark.slow

WORD = {"token": "<sks>", "init": "creature", "vectors": 2}
ALONE = {"method": "textual_inversion", "tokens": [WORD], "rank": 8, "alpha": 8}


def config_of(write_config, photos, name="run", adapter=None, **sections):
    """Without the parts that the fixture adapts."""
    import yaml

    data = sections.pop("data", {"sources": [{"path": str(photos), "caption": "a <sks> on a hill"}]})
    file = write_config(name, data=data, **sections)
    content = yaml.safe_load(file.read_text())
    content["adapter"] = ALONE if adapter is None else adapter
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def test_rows_behind_the_end_train_and_nothing_else():
    base = torch.nn.Embedding(10, 4).requires_grad_(False)
    words = ExtendedEmbedding(base, 8, torch.full((2, 4), 5.0))  # the tokenizer knows eight of the ten rows
    found = words(torch.tensor([[7, 8, 9]]))
    assert torch.equal(found[0, 0], base.weight[7])
    assert (found[0, 1:] == 5).all()
    found.sum().backward()
    assert [name for name, parameter in words.named_parameters() if parameter.grad is not None] == ["own.extra"]


def test_words_of_several_vectors_are_written_out():
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<a>", "<a>_1", "<a>_2", "<b>"])
    captions = ["x <a> y <b>", "<a><a>", "<a>_1 alone", "nothing"]
    assert expanded(tokenizer, captions) == ["x <a> <a>_1 <a>_2 y <b>", "<a> <a>_1 <a>_2<a> <a>_1 <a>_2", *captions[2:]]


def test_textual_inversion_trains_the_words_alone(write_config, photos):
    trainer = build_trainer(load_config(config_of(write_config, photos)))
    trainer.callbacks = []
    run = trainer.run
    (encoder,) = run.adapters.carriers.values()
    frozen = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    unet = {name: tensor.clone() for name, tensor in run.parts["unet"].state_dict().items()}
    before = embedding_of(run.parts["text_encoder"]).extra.detach().clone()
    tokenizer = run.parts["tokenizer"]
    row = tokenizer("creature", add_special_tokens=False).input_ids[0]
    table = embedding_of(run.parts["text_encoder"]).weight
    assert torch.equal(before, torch.stack([table[row]] * 2))
    for _ in range(2):
        trainer.train_step()
    after = embedding_of(run.parts["text_encoder"]).extra
    assert not torch.equal(before, after)
    for name, tensor in encoder.state_dict().items():
        assert name.endswith("extra") or torch.equal(tensor, frozen[name]), name
    assert all(torch.equal(tensor, unet[name]) for name, tensor in run.parts["unet"].state_dict().items())
    assert [group["name"] for group in run.optimizer.param_groups] == [TOKENS]


def test_a_word_is_written_verified_and_read_by_diffusers_and_by_us(write_config, photos, tiny_base, tmp_path):
    word = WORD | {"vectors": 1}
    config = config_of(
        write_config,
        photos,
        adapter=ALONE | {"tokens": [word]},
        validation={"prompts": ["a <sks>"], "num_images": 1, "steps": 2, "every": 100, "at_start": False},
        optimizer={"learning_rate": 0.5},
        loop={"steps": 3},
    )
    assert main([str(config)]) == 0
    folder = config.parent / "run"
    record = json.loads((folder / "run.json").read_text())
    assert record["files"] == ["tiny.embedding.safetensors"]
    assert main(["--resume", str(folder)]) == 0
    (vectors,) = load_file(folder / "tiny.embedding.safetensors").values()
    assert vectors.shape == (1, 32)

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base)
    pipeline.load_textual_inversion(str(folder / "tiny.embedding.safetensors"), token="<sks>")
    known = pipeline.text_encoder.get_input_embeddings().weight[pipeline.tokenizer.convert_tokens_to_ids("<sks>")]
    torch.testing.assert_close(known, vectors[0])

    words = ["--base", str(tiny_base), "--resolution", "32", "--num-images", "1", "--steps", "2"]
    words += [
        "--adapter",
        str(folder / "tiny.embedding.safetensors"),
        "--prompt",
        "a <sks>",
        "--out",
        str(tmp_path / "s"),
    ]
    assert sample(words) == 0
    (wanted,) = (folder / "samples/step-000003").glob("00-*.png")
    assert (np.asarray(Image.open(tmp_path / "s/0000.png")) == np.asarray(Image.open(wanted))).all()


def test_words_train_beside_a_lora_and_resume_to_the_same_bytes(write_config, photos):
    both = {"rank": 4, "alpha": 8, "parts": {"unet": "attention", "text_encoder": "attention"}, "tokens": [WORD]}
    sections = {
        "optimizer": {
            "learning_rate": 1e-2,
            "parts": {"tokens": {"learning_rate": 0.1, "stop_after": 5}},
            "ema_decay": 0.9,
        },
        "loop": {"steps": 6},
        "checkpoint": {"every": 3},
    }
    whole = config_of(write_config, photos, "whole", both, **sections)
    assert main([str(whole)]) == 0
    folder = whole.parent / "whole"
    wanted = (folder / "tiny.loraloom.safetensors").read_bytes()
    tensors = load_file(folder / "tiny.loraloom.safetensors")
    assert tensors["text_encoder:embedding:<sks>"].shape == (2, 32)
    assert sum("lora" in name or name.endswith((":down", ":up")) for name in tensors) > 100
    (folder / "tiny.loraloom.safetensors").unlink()
    (folder / "checkpoints/step-000006/manifest.json").unlink()
    assert main(["--resume", str(folder)]) == 0
    assert (folder / "tiny.loraloom.safetensors").read_bytes() == wanted


def test_two_text_encoders_have_vectors_each(write_config, photos, base_of):
    config = config_of(
        write_config,
        photos,
        model={"base": str(base_of("sdxl"))},
        adapter=ALONE | {"tokens": [WORD]},
        loop={"steps": 2},
    )
    assert main([str(config)]) == 0
    vectors = load_file(config.parent / "run" / "tiny.embedding.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in vectors.items()} == {"clip_l": (2, 32), "clip_g": (2, 48)}


@pytest.mark.parametrize(
    ("adapter", "output", "words"),
    [
        ({"method": "textual_inversion"}, {}, "learns new words; give them"),
        (ALONE | {"parts": {"unet": "attention"}}, {}, "adapts no layers; take method lora to train both"),
        (ALONE, {"formats": ["kohya"]}, "kohya cannot hold tokens; take embedding or loraloom"),
        (ALONE | {"tokens": [WORD, WORD | {"token": "<b>"}]}, {"formats": ["embedding"]}, "holds one word"),
        (ALONE | {"tokens": [WORD, WORD]}, {}, "has '<sks>' twice"),
        (ALONE | {"tokens": [{"token": "star</w>"}]}, {}, "knows 'star</w>' already"),
        (
            {"method": "oft", "parts": {"unet": "attention"}},
            {"formats": ["diffusers"]},
            "diffusers cannot hold oft; take loraloom",
        ),
    ],
)
def test_what_cannot_be_learnt_or_written_is_refused_before_training(
    write_config, photos, adapter, output, words, capsys
):
    data = {"sources": [{"path": str(photos), "caption": "a <sks> <b> star</w>"}]}
    config = config_of(write_config, photos, adapter=adapter, output=output, data=data)
    assert run_command(main, [str(config)]) == 2
    assert words in capsys.readouterr().err


def test_the_plan_names_the_words(write_config, photos, capsys):
    assert plan([str(config_of(write_config, photos))]) == 0
    assert "tokens: <sks> (2 vectors), 64 new weights" in capsys.readouterr().out
