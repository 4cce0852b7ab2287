"""diffusers' example scripts: command lines in a shell script or a text."""

from collections.abc import Mapping
from pathlib import Path

from ... import launcher
from ...peer import Asked, Rule, Setting, Settings, Translation, asked_settings
from ...shell import find_script
from .data import add_sources
from .flags import LAUNCHED
from .flags import RULES as FLAGS
from .run import SCRIPTS, USUAL, Run

NAME = "diffusers"
READS = "command lines with diffusers' scripts for DreamBooth, text-to-image (LoRA or all weights) and new words"
RULES: Mapping[str, Rule] = FLAGS


def translate(path: Path, asked: Asked) -> Translation | None:
    """A text with one command of diffusers' examples."""
    script = find_script(path, tuple(SCRIPTS), asked.taken)
    if script is None:
        return None
    usual = [Setting(name, value, f"default of {script.name}") for name, value in _defaults(script.name).items()]
    base = [] if asked.base is None else [Setting("pretrained_model_name_or_path", asked.base, "--base")]
    started = Setting("script", script.name, script.place)
    run = Run(
        [started, *script.launcher, *script.settings, *base], Settings(usual, asked_settings(asked, path, script.name))
    )
    translation = Translation(NAME)
    translation.assume(run, {setting.name for setting in run.given}, rule_of)
    translation.level(run, rule_of, RULES)
    if not translation.problems:
        add_sources(translation, run)
    return translation


def rule_of(name: str) -> Rule | None:
    """The rule of a script's flag, or of the launcher's."""
    if name == f"{launcher.PREFIX}mixed_precision":
        return LAUNCHED
    return launcher.rule_of(name) if name.startswith(launcher.PREFIX) else RULES.get(name)


def _defaults(script: str) -> dict[str, object]:
    """What a script does where nothing is said, and we do not."""
    return USUAL | SCRIPTS[script].defaults
