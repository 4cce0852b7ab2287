"""sd-scripts' sample prompts: one on each line with `--n`, `--d`, `--s`, `--l` and others, or TOML or JSON."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .....configs.bounded import CONFIG, parse_json, read_text
from .....configs.errors import UserError
from ...peer import NOTHING, Outcome, Rule, Setting, Settings, lost, own, same
from ...toml_lines import read_toml
from ...values import number, numbers, positive, text, whole

LETTERS = {
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "sample_steps",
    "l": "scale",
    "n": "negative_prompt",
    "ss": "sample_sampler",
    "g": "guidance_scale",
    "cn": "controlnet_image",
    "ctr": "cfg_trunc_ratio",
    "rcfg": "renorm_cfg",
    "fs": "flow_shift",
}
"""What the flags of a line are called in the other formats."""
PROMPT = "validation.prompts.*."


def read_prompts(path: Path, run: Settings) -> list[Settings]:
    """One level of settings for each prompt. UserError where the file cannot be read."""
    raw = read_text(path, CONFIG)
    readers = {".toml": _toml, ".json": _json}
    return [Settings(given, run) for given in readers.get(path.suffix.lower(), _text)(raw, path)]


def read_lines(raw: str, place: str, run: Settings) -> list[Settings]:
    """Of prompts that stand in one setting."""
    lines = [words.strip() for words in raw.splitlines()]
    return [Settings(_line(words, place), run) for words in lines if words and not words.startswith("#")]


def _text(raw: str, path: Path) -> Iterator[list[Setting]]:
    for line, words in enumerate(raw.splitlines(), 1):
        if words.strip() and not words.startswith("#"):
            yield list(_line(words.strip(), f"{path}:{line}"))


def _line(words: str, place: str) -> Iterator[Setting]:
    prompt, *rest = words.split(" --")
    yield Setting("prompt", prompt, place)
    for each in rest:
        letter, _, value = each.partition(" ")
        yield Setting(LETTERS.get(letter.lower(), letter), value.strip(), place)


def _toml(raw: str, path: Path) -> Iterator[list[Setting]]:
    common = read_toml(path).values.get("prompt", {})
    subsets = common.pop("subset", []) if isinstance(common, dict) else None
    if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
        raise UserError(f"{path}: its prompts should be a table `prompt` with tables `subset` in it")
    for subset in subsets:
        yield [Setting(name, value, str(path)) for name, value in (common | subset).items()]


def _json(raw: str, path: Path) -> Iterator[list[Setting]]:
    listed = parse_json(raw, str(path))
    for each in listed if isinstance(listed, list) else []:
        if isinstance(each, str):
            yield list(_line(each, str(path)))
        elif isinstance(each, dict):
            yield [Setting(name, value, str(path)) for name, value in each.items()]


def side(value: int, settings: Settings) -> Outcome:
    sides = settings.value("resolution", numbers, [512.0])
    return NOTHING if set(sides) == {value} else Outcome(lost="pictures are squares with the side `data.resolution`")


def seed(value: int, settings: Settings) -> Outcome:
    """Below 0 it is drawn there."""
    return Outcome(differs=RANDOM) if value < 0 else Outcome({PROMPT + "seed": value})


RANDOM = "below 0 it is drawn there; here it is then `validation.seed`"

RULES: dict[str, Rule] = {
    "prompt": same(PROMPT + "prompt", text),
    "negative_prompt": same(PROMPT + "negative_prompt", text),
    "seed": own(whole, seed, PROMPT + "seed", RANDOM),
    "sample_steps": same(PROMPT + "steps", positive),
    "scale": same(PROMPT + "guidance", number),
    "width": own(whole, side, "data.resolution", "pictures are squares with the side `data.resolution`"),
    "height": own(whole, side, "data.resolution", "pictures are squares with the side `data.resolution`"),
    "sample_sampler": lost("pictures are sampled with DPM-Solver++", "dpmsolver++"),
    **{
        name: lost("not of these models")
        for name in ("guidance_scale", "controlnet_image", "cfg_trunc_ratio", "renorm_cfg", "flow_shift")
    },
}
"""Settings of a prompt."""


def section(prompt: Settings) -> Any:
    """A prompt as words alone, or as a section."""
    outcomes = [rule(each, prompt) for each in prompt.given if (rule := RULES.get(each.name))]
    values = {key.removeprefix(PROMPT): value for outcome in outcomes for key, value in outcome.values.items()}
    return values["prompt"] if list(values) == ["prompt"] else {"prompt": ""} | values
