"""`loraloom plan --measure` trains for real, and leaves nothing but cache entries."""

import json

import pytest

from loraloom.configs.loader import load_config
from loraloom.train.measure import MISSING, PARTS, STEPS, measure
from loraloom.train.plan import main, make_plan
from loraloom.train.preflight import preflight

pytestmark = pytest.mark.slow


def test_a_plan_with_measurements_names_every_part_and_adds_up(write_config, photos, tmp_path, capsys):
    sources = [
        {"path": str(photos), "caption": "a sks creature", "share": 0.5},
        {"prior": "a creature", "count": 500, "share": 0.5},  # which would take minutes to make
    ]
    config = write_config(
        data={"sources": sources, "cache": {"dir": str(tmp_path / "cache")}},
        adapter={"parts": {"unet": "attention"}},
        loop={"steps": 200},
        checkpoint={"every": 100},
        validation={"every": 50, "prompts": ["a creature", "a star"], "num_images": 3, "steps": 2},
    )
    assert main([str(config), "--measure", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("{"), out[:300]
    found = json.loads(out)["measured"]
    assert [*found["seconds_of"]] == [*PARTS, "callbacks", "the rest"]
    assert sum(found["seconds_of"].values()) == pytest.approx(found["step"], rel=1e-3)
    assert found["left"]["200 steps"] == pytest.approx(200 * found["step"])
    assert found["left"]["30 images"] == pytest.approx(30 * found["image"])
    assert 0 < found["memory"] <= found["memory_with_image"]
    assert found["checkpoint"] > 0
    assert not (tmp_path / "run").exists()
    assert main([str(config), "--measure"]) == 0
    said = capsys.readouterr().out
    assert "Measured" in said
    assert all(f"\n  {part} " in said for part in PARTS)


def latents_there(config) -> int:
    return make_plan(config, preflight(config)).caches[0].present


def test_only_what_the_first_steps_read_is_cached(write_config, photos, tmp_path):
    """Six images in batches of one, each with a caption of its own."""
    for number, file in enumerate(sorted(photos.glob("*.png"))):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / file.name).write_bytes(file.read_bytes())
        (tmp_path / "images" / file.name).with_suffix(".txt").write_text(f"creature {number}")
    config = load_config(
        write_config(
            data={"sources": [{"path": str(tmp_path / "images")}], "cache": {"dir": str(tmp_path / "cache")}},
            adapter={"parts": {"unet": "attention"}},
            loop={"steps": 100, "batch_size": 1},
        )
    )
    found = measure(config, preflight(config))
    assert found.image is None
    assert found.left["caches"] > 0
    present = latents_there(config)
    assert present >= STEPS + 1
    measure(config, preflight(config))  # each makes some of those that are missing
    assert latents_there(config) == min(6, max(present, STEPS + 1) + MISSING)
    assert measure(config, preflight(config)).left["caches"] == 0
