"""What `plan` accepts ends with exit code 0 and verified files; what it refuses is lines, and nothing is trained."""

import itertools
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from loraloom.configs.choices import find
from loraloom.configs.command import run_command
from loraloom.train.__main__ import main as train
from loraloom.train.plan import main as plan

pytestmark = pytest.mark.slow

FACTORS: dict[str, list[Any]] = {
    "adapter": [
        {"method": "lora"},
        {"method": "lora", "options": {"dora": True}},
        {"method": "lora", "options": {"init": "pissa"}},
        {"method": "lora", "options": {"dora": True, "init": "pissa"}},
        {"method": "lora", "options": {"rslora": True}, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_v": 3}},
        {"method": "loha"},
        {"method": "lokr", "options": {"decompose_both": True}},
        {"method": "lokr", "rank": 64, "rank_pattern": {"to_q": 2}},
        {"method": "oft", "options": {"block_size": 8}},
    ],
    "parts": [
        {"unet": [r"re:mid_block\..*to_(q|k|v|out\.0)"]},
        {"unet": [r"re:mid_block\..*to_(q|v)", r"re:mid_block\.resnets\.0\.conv1"]},
        {"text_encoder": "attention"},
        {"unet": [r"re:mid_block\..*to_(q|v)"], "text_encoder": "attention"},
    ],
    "dtype": ["fp32", "bf16", "fp16"],
    "base": ["fp32", "bf16"],
    "formats": [[], ["kohya"], ["diffusers", "kohya"], ["peft", "loraloom"]],
}


def pairs() -> Iterator[dict[str, Any]]:
    """Cases in which every two values of two factors meet: the one of many drawn that has most new pairs, each time."""
    draw, names = random.Random(0), list(FACTORS)
    wanted = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i, j in itertools.product(range(len(FACTORS[a])), range(len(FACTORS[b])))
    }
    while wanted:
        drawn = [{name: draw.randrange(len(FACTORS[name])) for name in names} for _ in range(60)]
        met = [set(itertools.combinations(case.items(), 2)) & wanted for case in drawn]
        best = max(range(len(drawn)), key=lambda k: len(met[k]))
        wanted -= met[best]
        if met[best]:
            yield {name: FACTORS[name][index] for name, index in drawn[best].items()}


def is_impossible(case: dict[str, Any]) -> bool:
    """Whether it is known to be impossible."""
    adapter, parts = case["adapter"], case["parts"]
    options = adapter.get("options", {})
    convolutions = any("conv1" in each for each in parts.get("unet", ()))
    kind = "dora" if options.get("dora") else adapter["method"]
    pissa = options.get("init") == "pissa" and (options.get("dora") or convolutions or case["base"] != "fp32")
    in_text = kind == "dora" and "text_encoder" in parts and "diffusers" in case["formats"]
    held = all(kind in find("adapters.formats", name).HOLDS for name in case["formats"])
    patterns = "rank_pattern" in adapter and "unet" not in parts  # which match nothing there
    rotated = kind == "oft" and convolutions
    odd = adapter["method"] == "lokr" and "peft" in case["formats"]  # PEFT takes other factors apart
    return pissa or in_text or not held or patterns or rotated or odd


CASES = [*pairs()]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_what_is_planned_can_be_written(write_config, case: dict[str, Any], capsys):
    config = write_config(
        model={"dtype": case["base"]},
        data={"cache": {"latents": False, "prompts": False}},
        adapter=case["adapter"] | {"parts": case["parts"]} | ({} if "rank" in case["adapter"] else {"rank": 4}),
        loop={"steps": 2, "batch_size": 1},
        output={"dtype": case["dtype"], "formats": case["formats"]},
        checkpoint={"every": 2},
    )
    planned = run_command(plan, [str(config)])
    said = capsys.readouterr()
    assert planned in (0, 2), said.err
    if planned == 2:
        assert said.err.startswith("error: ") and "Traceback" not in said.err
        assert is_impossible(case), said.err
        return
    code = run_command(train, [str(config)])
    assert code == 0, capsys.readouterr().err
    facts = json.loads((config.parent / "run/run.json").read_text())
    assert facts["state"] == "done"
    assert facts["verify"].keys() == {*case["formats"]} or not case["formats"]
    assert all((config.parent / "run" / name).exists() for name in facts["files"])
