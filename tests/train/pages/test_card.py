"""The model card: what it tells, what it must not, and that its code runs on the files that were written."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from loraloom.train.__main__ import main
from loraloom.train.pages.card import write_card
from loraloom.train.pages.usage import NO_BASE, REPOSITORY
from loraloom.train.run_folder import CARD_MARK, prepare_folder

pytestmark = pytest.mark.slow

BASE = "stabilityai/stable-diffusion-xl-base-1.0"
PUBLIC = {"lora", "unet", "attention", "adamw", "cosine", "bf16", "sdxl", "tiny", BASE, "ab" * 20}
"""All texts in the config below that a card may hold by itself; each of the others is told apart by its letters."""
CONFIG = {
    "model": {"base": BASE, "family": "sdxl", "revision": "ab" * 20, "dtype": "bf16", "adapters": ["/home/zoe/old:1"]},
    "data": {
        "resolution": [768, 1024],
        "sources": [
            {"path": "/home/zoe/kittens", "caption": "qwx kitten asleep", "name": "kitchen"},
            {"prior": "some kitten", "name": "kennel"},
        ],
        "captions": {"trigger": "qwx", "class_token": "kitten", "template": "[trigger] at zoe's", "prefix": "veryzoe"},
        "cache": {"dir": "/home/zoe/.cache"},
    },
    "adapter": {"method": "lora", "rank": 8, "alpha": 4.0, "parts": {"unet": "attention"}, "start_from": "zoe.st"},
    "optimizer": {"name": "adamw", "learning_rate": 1e-4, "schedule": "cosine"},
    "loop": {"steps": 300, "batch_size": 4, "micro_batch": 1, "precision": "bf16", "seed": 7},
    "validation": {
        "prompts": ["qwx riding", {"prompt": "plain `kitten`", "negative_prompt": "uglyzoe"}],
        "num_images": 2,
        "steps": 25,
        "guidance": 5.0,
        "sources": [{"path": "/home/zoe/heldout", "caption": "kitten unseen"}],
    },
    "output": {"dir": "/home/zoe/runs/cats", "name": "tiny"},
}
CHECK = {"modules": 560, "delta_difference": 0.0, "prediction_difference": 2e-7, "tolerance": 1e-5}
RECORD = {
    "state": "done",
    "step": 300,
    "steps": 300,
    "train_seconds": 90.0,
    "trainable_parameters": 1234567,
    "modules": {"unet": 560},
    "best": {"step": 200, "held_out": 0.1234},
    "versions": {"torch": "2.13.0", "diffusers": "0.42.1"},
    "files": ["tiny.safetensors", "tiny.kohya.safetensors"],
    "verify": {"diffusers": CHECK, "kohya": CHECK},
}


def texts(value: Any) -> Iterator[str]:
    """Every text in a config."""
    if isinstance(value, dict | list):
        for below in value.values() if isinstance(value, dict) else value:
            yield from texts(below)
    elif isinstance(value, str):
        yield value


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """Makes a run folder as a finished run leaves it, with pictures; keywords replace keys of sections."""

    def make(record: dict | None = None, **sections: dict) -> Path:
        folder = tmp_path / "secretplace"
        config = {name: {**section, **sections.get(name, {})} for name, section in CONFIG.items()}
        for step in (0, 200, 300):
            samples = folder / f"samples/step-{step:06d}"
            samples.mkdir(parents=True)
            listed = [
                {"file": f"{row:02d}-words-{column}.png", "prompt": prompt, "seed": column}
                for row, prompt in enumerate(["qwx riding", "plain `kitten`"])
                for column in range(2)
            ]
            for entry in listed:
                Image.new("RGB", (8, 8)).save(samples / entry["file"])
            Image.new("RGB", (16, 16)).save(samples / "grid.png")
            (samples / "samples.json").write_text(json.dumps(listed))
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        (folder / "run.json").write_text(json.dumps(RECORD | (record or {})))
        return folder

    return make


def card_in(folder: Path) -> ModelCard:
    assert write_card(folder) == folder / "README.md"
    return ModelCard.load(folder / "README.md")


def test_the_hub_reads_its_head(run):
    head = card_in(run()).data.to_dict()
    assert head == {
        "base_model": BASE,
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers", "loraloom", "lora", "dreambooth", "template:sd-lora"],
    }


def test_nothing_of_the_data_is_told(run):
    """Every text of the config that is not public by its nature, and each longer word of it."""
    folder = run()
    card = card_in(folder).content
    private = {text for text in texts(CONFIG) if text not in PUBLIC} | {folder.name}
    words = {word for text in private for word in re.findall(r"[a-z]{3,}", text.lower())} - {"old"}
    assert {"qwx", "kitten", "zoe", "kennel", "heldout", "uglyzoe", "secretplace"} <= words
    assert [text for text in (*private, str(folder)) if text in card] == []
    assert [word for word in words if word in card.lower()] == []


def test_it_tells_the_training(run):
    card = card_in(run()).text
    for row in (
        f"| base | [{BASE}](https://huggingface.co/{BASE}) |",
        "| method | lora · rank 8 · alpha 4 · unet: 560 modules |",
        "| trained parameters | 1,234,567 |",
        "| batch | 4 · 1 at a time |",
        "| resolution | 1024 |",
        "| learning rate | 1e-4 · cosine |",
        "| seed | 7 |",
        "| best held-out loss | 0.123 at step 200 |",
        "| versions | torch 2.13.0, diffusers 0.42.1 |",
        "| kohya | 560 | 0 | 2e-7 | 1e-5 |",
    ):
        assert row in card
    assert "![samples of step 300](samples/step-000300/grid.png)" in card
    assert "needed beside this: 1 more adapters" in card


def test_full_metadata_tells_prompts_and_trigger_words(run):
    card = card_in(run({"weights": "of step 200"}, output={"metadata": "full"}))
    assert card.data["instance_prompt"] == "qwx"
    assert card.data["widget"] == [
        {"text": "qwx riding", "output": {"url": "samples/step-000200/00-words-0.png"}},
        {"text": "plain `kitten`", "output": {"url": "samples/step-000200/01-words-0.png"}},
    ]
    assert "1. `qwx riding`\n1. `plain 'kitten'`" in card.text
    assert 'prompt = "qwx riding"' in card.text
    assert "zoe" not in card.content, "folders and negative prompts stay untold"


def outside_of_code(text: str) -> str:
    """What of Markdown is no code: neither in a fence (which one as long ends) nor in a code span."""
    left, fence = [], ""
    for line in text.splitlines():
        if fence:
            fence = "" if re.fullmatch(f"{fence}`*", line.strip()) else fence
        elif opening := re.match("`{3,}", line):
            fence = opening[0]
        else:
            left.append(re.sub("(`+)[^`]+\\1", "", line))
    assert not fence, "a block is not closed"
    return "\n".join(left)


@pytest.mark.parametrize(
    "prompt", ["a\n```\n# INJECTED\n```bash", "a\n``````\n<b>INJECTED</b>", "`INJECTED", "a\x1b[2J INJECTED\u202e"]
)
def test_a_prompt_stays_in_its_code(run, prompt):
    folder = run(output={"metadata": "full"}, validation={"prompts": [prompt]})
    for file in folder.glob("samples/*/samples.json"):
        file.write_text(json.dumps([{"file": "00-words-0.png", "prompt": prompt, "seed": 0}]))
    card = card_in(folder)
    assert "INJECTED" in card.text
    assert "INJECTED" not in outside_of_code(card.text)
    assert not {"\x1b", "\u202e"} & set(card.text)
    assert card.data["widget"][0]["text"] == prompt


@pytest.mark.parametrize("base", ["/home/zoe/base", "zoe/base", "pocket"])
def test_a_base_that_is_not_on_the_hub_is_no_base_model(run, base):
    card = card_in(run(model={"base": base, "revision": None}))
    assert "base_model" not in card.data.to_dict()
    assert "zoe" not in card.content
    assert ("comes with loraloom" in card.text) == (base == "pocket")


def test_the_repository_is_named_where_the_config_names_it(run):
    card = card_in(run(output={"push_to": "me/mine"})).text
    assert "me/mine" in card
    assert REPOSITORY not in card


def test_a_card_that_a_person_wrote_or_changed_is_left_alone(run):
    folder = run()
    card = folder / "README.md"
    card.write_text("# mine")
    assert write_card(folder) is None
    prepare_folder(folder, "tiny", overwrite=True)
    assert card.read_text() == "# mine"
    card.write_text(f"# ours, once\n{CARD_MARK}\n")  # of a version that kept no record
    assert write_card(folder) == card
    ours = card.read_text()
    assert "# ours, once" not in ours
    card.write_text(f"{ours}\nmy words\n")
    assert write_card(folder) is None
    prepare_folder(folder, "tiny", overwrite=True)
    assert card.read_text() == f"{ours}\nmy words\n"
    card.write_text(ours)
    prepare_folder(folder, "tiny", overwrite=True)
    assert not card.exists()


def test_the_same_files_give_the_same_bytes(run):
    folder = run()
    assert write_card(folder).read_bytes() == write_card(folder).read_bytes()


ALONE = {"method": "textual_inversion", "tokens": [{"token": "<sks>", "init": "creature", "vectors": 2}]}
LORA = {"rank": 4, "alpha": 8, "parts": {"unet": "attention", "text_encoder": "attention"}}
KINDS = {
    "lora": ("sd1", LORA, {}),
    "kohya alone": ("sdxl", LORA, {"formats": ["kohya"], "metadata": "full"}),
    "word": ("sd1", ALONE, {}),
    "word of two encoders": ("sdxl", ALONE, {}),
    "whole": ("sd1", {"method": "full", "parts": {"unet": "attention"}}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_code_on_the_card_of_a_real_run_works(kind, base_of, config_writer, photos, tmp_path, monkeypatch):
    family, adapter, output = KINDS[kind]
    file = config_writer(
        tmp_path,
        "run",
        model={"base": str(base_of(family))},
        data={"sources": [{"path": str(photos), "caption": "qwx <sks>" if "word" in kind else "a qwx creature"}]},
        loop={"steps": 2},
        validation={"prompts": ["one qwx"], "num_images": 1, "steps": 2, "at_start": False},
    )
    content = yaml.safe_load(file.read_text())
    content["output"] |= output
    file.write_text(yaml.safe_dump(content | {"adapter": adapter}, sort_keys=False))
    assert main([str(file)]) == 0
    folder = tmp_path / "run"
    card = ModelCard.load(folder / "README.md")
    assert "base_model" not in card.data.to_dict()
    for private in (str(tmp_path), str(photos), photos.name, *([] if output.get("metadata") else ["qwx"])):
        assert private not in card.content
    pipeline = run_code(card.text, folder / "tiny" if kind == "whole" else folder, base_of(family), monkeypatch)
    modules = json.loads((folder / "run.json").read_text())["modules"]
    layers = [name for name, _ in pipeline.unet.named_modules() if name.endswith(".lora_A.default_0")]
    assert len(layers) == (modules["unet"] if adapter is LORA else 0)
    assert ("<word>" in pipeline.tokenizer.get_vocab()) == ("word" in kind)


def run_code(card: str, repository: Path, base: Path, monkeypatch) -> Any:
    """The pipeline of a card's program, run beside the files, whose folder stands for the repository."""
    (program,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(repository.parent)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda folder, name: str(Path(folder) / name))
    names: dict[str, Any] = {}
    exec(program.replace(REPOSITORY, str(repository)).replace(NO_BASE, str(base)), names)
    assert Image.open("image.png").size == (32, 32)
    return names["pipeline"]
