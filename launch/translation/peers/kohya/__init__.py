"""sd-scripts by kohya-ss: its TOML files of settings and of data sets, its command lines, and its window's JSON."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .....configs.errors import UserError
from ... import launcher
from ...peer import Asked, Rule, Setting, Settings, Translation, asked_settings, converted
from ...shell import find_script
from ...toml_lines import Toml, read_toml
from ...values import text, texts
from . import data, files, flags, gui, optimizer, prompts
from .run import Run, folders_of, is_class, with_folder

NAME = "sd-scripts"
SCRIPTS = ("train_network.py", "sdxl_train_network.py")
READS = f"TOML files of sd-scripts, JSON files of kohya_ss, and command lines with {' or '.join(SCRIPTS)}"
RULES: Mapping[str, Rule] = flags.RULES
LISTED = ("network_args", "optimizer_args", "lr_scheduler_args")
"""Settings that are lists of `name=value`."""


def translate(path: Path, asked: Asked) -> Translation | None:
    """A TOML file, the JSON file of kohya_ss, or a script with a command of sd-scripts."""
    if path.suffix.lower() == ".toml":
        toml = read_toml(path)
        run = _run(list(_flat(toml)), path, asked)
        return _translated(run, toml if "datasets" in toml.values else _dataset_file(run))
    if path.suffix.lower() == ".json":
        window = gui.read_gui(path)
        run = None if window is None else _run(window.settings, path, asked, window.script)
        return None if run is None else _translated(run, _dataset_file(run))
    script = find_script(path, SCRIPTS, asked.taken)
    if script is None:
        return None
    named = [setting for setting in script.settings if setting.name == "config_file"]
    tomls = [read_toml(_with_ending(path, setting)) for setting in named]
    settings = [each for toml in tomls for each in _flat(toml)]  # the command line counts where both say something
    run = _run([*settings, *script.settings, *script.launcher], path, asked, script.name)
    return _translated(run, _dataset_file(run))


def rule_of(name: str) -> Rule | None:
    """The rule of a setting, also of one in a list."""
    group, dot, inner = name.partition(".")
    if group == "launcher":
        return launcher.rule_of(name)
    if group == "optimizer_args" and dot:
        return optimizer.argument(inner)
    return RULES.get(name)


def _run(given: Iterable[Setting], path: Path, asked: Asked, script: str = "") -> Run:
    """The settings with the defaults of sd-scripts around them, and what our command line says around these."""
    usual = [Setting(name, value, f"default of {NAME}") for name, value in flags.DEFAULTS.items()]
    base = [] if asked.base is None else [Setting("pretrained_model_name_or_path", asked.base, "--base")]
    listed = [inner for setting in [*given, *base] for inner in _expanded(setting)]
    return Run(listed, Settings(usual, asked_settings(asked, path, script)))


def _flat(toml: Toml) -> Iterator[Setting]:
    """Sections of a file of settings have no meaning; data sets are left out."""
    has_data = "datasets" in toml.values
    for name, value in toml.values.items():
        if has_data and name in ("general", "datasets"):
            continue
        if isinstance(value, dict):
            yield from (Setting(key, each, toml.place(name, key)) for key, each in value.items())
        else:
            yield Setting(name, value, toml.place(name))


def _expanded(setting: Setting) -> list[Setting]:
    """The entries `name=value` of a list as settings of their own."""
    if setting.name not in LISTED:
        return [setting]
    value = setting.value.split() if isinstance(setting.value, str) else setting.value
    pairs = [entry.partition("=") for entry in converted(Setting(setting.name, value, setting.place), texts)]
    inner = [
        Setting(f"{setting.name}.{name.strip()}", each.strip() if equals else True, setting.place)
        for name, equals, each in pairs
    ]
    return inner or [setting]


def _with_ending(path: Path, setting: Setting) -> Path:
    """The ending .toml may be left out there."""
    name = Path(text(setting.value))
    name = name if name.suffix == ".toml" else name.with_name(f"{name.name}.toml")
    return name if name.is_file() else path.parent / name


def _dataset_file(run: Run) -> Toml | None:
    setting = run.find("dataset_config")
    if setting is None:
        return None
    path = files.beside(run, converted(setting, text))
    if not path.is_file():
        raise UserError(f"{setting.place}: dataset_config: {path}: no such file")
    if path.suffix.lower() != ".toml":
        raise UserError(f"{setting.place}: dataset_config: {path}: only TOML is read")
    return read_toml(path)


def _levels(toml: Toml, run: Run) -> tuple[list[Settings], list[list[Settings]]]:
    """All levels of a file of data sets, and the subsets of each set."""
    general = Settings(_settings(toml, "general"), run)
    levels, subsets = [general], []
    for number, entry in enumerate(toml.values.get("datasets", [])):
        level = Settings((each for each in _settings(toml, "datasets", number) if each.name != "subsets"), general)
        inner = [
            Settings(_settings(toml, "datasets", number, "subsets", index), level)
            for index, _ in enumerate(entry.get("subsets", []))
        ]
        levels += [level, *inner]
        subsets += [inner] if inner else []
    return levels, subsets


def _settings(toml: Toml, *section: str | int) -> Iterator[Setting]:
    values: Any = toml.values
    for step in section:
        values = values.get(step, {}) if isinstance(values, dict) else values[step]
    yield from (Setting(name, value, toml.place(*section, name)) for name, value in values.items())


def _folders(run: Run) -> list[list[Settings]]:
    """One data set of `train_data_dir` and `reg_data_dir`."""
    folders = {name: run.value(name, text, "") for name in ("train_data_dir", "reg_data_dir")}
    folders["train_data_dir"] = run.value("--data", text, "") or folders["train_data_dir"]
    found = [subset for name, path in folders.items() if path for subset in folders_of(run, name, path)]
    return [found] if found else []


def _translated(run: Run, datasets: Toml | None) -> Translation:
    translation = Translation(NAME)
    levels, run.data = _levels(datasets, run) if datasets else ([], _folders(run))
    if datasets and run.find("--data"):
        run.data = with_folder(run, run.value("--data", text, ""))
    if all(map(is_class, run.subsets)):
        what = "images beside its class images" if run.data else "images (train_data_dir, dataset_config)"
        raise UserError(f"{run.value('--file', text, '')}: names no {what}; give --data FOLDER")
    given = {setting.name for level in [run, *levels] for setting in level.given}
    translation.assume(run, given, rule_of)
    translation.level(run, rule_of, RULES)
    for level in levels:
        translation.level(level, data.RULES.get, data.RULES)
    for subset in run.subsets if datasets and run.find("--data") else ():
        if subset.around and (replaced := subset.around.find("image_dir")):
            translation.doubt(replaced, "--data counts")
    if not translation.problems:
        data.add_sources(translation, run)
    for prompt in files.prompt_levels(run):
        translation.level(prompt, prompts.RULES.get, prompts.RULES)
    return translation
