"""From a YAML file to a `RunConfig` and back: `extends:`, `key=value` overrides, and all problems in one answer."""

import inspect
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from . import choices
from .bounded import regular
from .document import Document, KeyPath, add_core_scalars, dotted, overlay, parse_document, read_document, resolve
from .errors import UserError
from .paths import expanded
from .plain import plain
from .problems import explain, keys_of, known_keys, sections_of, shown
from .schema import AdapterSection, LoopSection, LossSection, OptimizerSection, RunConfig

SHIPPED = Path(__file__).parent
"""Folder of the recipes that come with the package: `extends: pocket/dreambooth`."""
COMMAND_LINE = "command line"
MOST_EXTENDED = 20
"""Files in a chain of `extends`."""
NAMED_FILES = {
    ("model", "family"): "models.families",
    ("adapter", "method"): "adapters.methods",
    ("loss", "kind"): "train.losses",
    ("optimizer", "name"): "train.optimizers",
    ("output", "formats"): "adapters.formats",
}
"""Keys whose values are file names in a package."""
WITH_OPTIONS = (
    ("adapter", "method", "adapters.methods", AdapterSection().method),
    ("loss", "kind", "train.losses", LossSection().kind),
    ("optimizer", "name", "train.optimizers", OptimizerSection().name),
)
"""Sections whose `options` are those of a file in a package."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config in a YAML file (or a shipped name such as `pocket/dreambooth`) with `key=value` overrides.

    UserError with one line for each problem, `file:line: dotted.key: what is wrong, what is allowed`.
    """
    main = _locate(expanded(str(path)), Path())
    document = _override(_read_chain(main, ()), overrides)
    _spell_precision(document.values)
    return accepted(document, str(main))


def accepted(document: Document, name: str) -> RunConfig:
    """The config that a document called `name` is. UserError as of `load_config`."""
    config, problems = _validate(document, name)
    if config is None or problems:
        raise UserError(problems)
    return config


def _locate(name: str, folder: Path) -> Path:
    """The file that `name` means in `folder`, else among the shipped recipes; the ending .yaml may be left out."""
    for candidate in (folder / name, folder / f"{name}.yaml", SHIPPED / name, SHIPPED / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    if (folder / name).is_dir():
        raise UserError(f"{folder / name}: a folder; name a YAML file")
    for candidate in (folder / name, folder / f"{name}.yaml"):
        if os.path.lexists(candidate):
            regular(candidate)  # says what it is instead
    beside = [file.name if name.endswith(".yaml") else file.stem for file in (folder / name).parent.glob("*.yaml")]
    shipped = [file.relative_to(SHIPPED).with_suffix("").as_posix() for file in SHIPPED.glob("*/*.yaml")]
    hint = choices.did_you_mean(Path(name).name, beside) or choices.did_you_mean(name, shipped)
    raise UserError(f"{folder / name}: no such file{hint}; shipped: {', '.join(sorted(shipped)) or 'none'}")


def _read_chain(path: Path, readers: tuple[Path, ...]) -> Document:
    """A file laid over the one that it extends; `readers` are the files that extend this one."""
    document = read_document(path)
    if "extends" not in document.values:
        return document
    name, where = document.values.pop("extends"), document.origins.pop(("extends",))
    readers = (*readers, path)
    if len(readers) > MOST_EXTENDED:
        raise UserError(f"{where}: extends: more than {MOST_EXTENDED} files extend one another")
    if not isinstance(name, str):
        raise UserError(f"{where}: extends: should be the name of one file, found {shown(name)}")
    try:
        parent = _locate(expanded(name), path.parent)
    except UserError as error:
        raise UserError(f"{where}: extends: {error}") from error
    if parent.resolve() in [reader.resolve() for reader in readers]:
        raise UserError(f"{where}: extends: a circle: {' -> '.join(str(file) for file in (*readers, parent))}")
    return overlay(_read_chain(parent, readers), document)


def _override(document: Document, overrides: Iterable[str]) -> Document:
    for override in overrides:
        try:
            document = _override_one(document, override)
        except UserError as error:
            document.problems.append(f"{COMMAND_LINE}: {error}")
    return document


def _override_one(document: Document, override: str) -> Document:
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"{override}: should be key=value, such as adapter.rank=16")
    if key == "extends":
        raise UserError("extends: belongs in the file")
    path = resolve(document.values, key)
    try:
        value = parse_document(text, lambda line: COMMAND_LINE, COMMAND_LINE)
    except UserError as error:
        raise UserError(f"{key}: {text!r} is not a YAML value; put it in quotes twice: {key}='\"...\"'") from error
    value.origins[()] = COMMAND_LINE
    value.problems = [_of_key(key, problem.removeprefix(f"{COMMAND_LINE}: ")) for problem in value.problems]
    return overlay(document, value, path)


def _of_key(key: str, problem: str) -> str:
    """What is wrong with the value of a key, or with a key below it."""
    below = re.match(r"\w+(\.\w+)*: ", problem) is not None
    return f"{COMMAND_LINE}: {key}{'.' if below else ': '}{problem}"


def _spell_precision(values: Any) -> None:
    """`precision: false` is what other YAML writers make of `no`."""
    loop = values.get("loop")
    if isinstance(loop, dict) and loop.get("precision") is False:
        loop["precision"] = "no"


def _validate(document: Document, name: str) -> tuple[RunConfig | None, list[str]]:
    """The config, if the schema accepts it, and every problem."""
    found: list[tuple[KeyPath, str]] = []
    config = None
    try:
        config = RunConfig.model_validate(document.values)
    except ValidationError as error:
        found += [explain(details, known_keys()) for details in error.errors(include_url=False)]
    found += [*_check_names(document.values), *_check_options(document.values), *_check_across(document.values)]
    keys = [(f"{document.where(path, name)}: {dotted(path)}: ", words) for path, words in found]
    # what could not be read counts as nothing, of which no more needs to be said
    lines = [key + words for key, words in keys if not any(problem.startswith(key) for problem in document.problems)]
    return config, sorted(dict.fromkeys([*document.problems, *lines]), key=_place_in_file)


def _place_in_file(problem: str) -> tuple[bool, str, int]:
    """Sorts from the top of a file to its end; what has no line comes last."""
    match = re.match(r"(.+?):(\d+): ", problem)
    return (False, match[1], int(match[2])) if match else (True, "", 0)


def _get(values: Any, *path: str, default: Any = None) -> Any:
    for step in path:
        if not isinstance(values, dict) or step not in values:
            return default
        values = values[step]
    return values


def _check_names(values: Any) -> Iterator[tuple[KeyPath, str]]:
    """Names that stand for files of ours."""
    for path, package in NAMED_FILES.items():
        given = _get(values, *path)
        known = choices.names(package)
        entries = [((*path, k), name) for k, name in enumerate(given)] if isinstance(given, list) else [(path, given)]
        for where, name in entries:
            if isinstance(name, str) and name not in known and not _is_import_path(path, name):
                near = choices.did_you_mean(name, known)
                yield where, f"{json.dumps(name)} is unknown{near}; there are: {', '.join(known)}"


def _is_import_path(path: KeyPath, name: str) -> bool:
    return path == ("optimizer", "name") and "." in name and all(word.isidentifier() for word in name.split("."))


def _check_options(values: Any) -> Iterator[tuple[KeyPath, str]]:
    """Options of the adapter method and of the optimiser, each by its own schema."""
    for section, key, package, default in WITH_OPTIONS:
        name, given = _get(values, section, key, default=default), _get(values, section, "options", default={})
        if name not in choices.names(package) or not isinstance(given, dict):
            continue
        options: type[BaseModel] = choices.find(package, name).Options
        try:
            options.model_validate(given)
        except ValidationError as error:
            known = dict(keys_of(options, ()))
            for details in error.errors(include_url=False):
                yield explain(details, known, (section, "options"))


def _check_across(values: Any) -> Iterator[tuple[KeyPath, str]]:
    """Values that must agree with values of another key."""
    sizes = {key: _get(values, "loop", key) for key in ("batch_size", "micro_batch")}
    try:
        loop = LoopSection.model_validate({"steps": 1} | {key: size for key, size in sizes.items() if size is not None})
    except ValidationError:
        loop = None  # reported already
    if loop and loop.micro_batch and loop.batch_size % loop.micro_batch:
        words = f"should be divisible by loop.micro_batch = {loop.micro_batch}, found {loop.batch_size}"
        yield ("loop", "batch_size"), words
    parts = _get(values, "adapter", "parts", default=None)
    if _get(values, "adapter", "tokens") and isinstance(parts, dict):
        parts = parts | {"tokens": None}
    own = _get(values, "optimizer", "parts", default={})
    for part in own if isinstance(parts, dict) and isinstance(own, dict) else ():
        if part not in parts:
            near = choices.did_you_mean(part, parts)
            words = f"is not trained{near}; adapter.parts has: {', '.join(parts)}"
            yield ("optimizer", "parts", part), words


class _InlineDumper(yaml.SafeDumper):
    """Quotes whatever YAML 1.1 or 1.2 would read as something else than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if plain(text) != text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


add_core_scalars(_InlineDumper)
_InlineDumper.add_representer(str, _represent_text)


def inline_yaml(value: Any) -> str:
    """A value on one line, as every YAML reader reads it back."""
    # mappings keep their order: the first pattern that matches is the one that counts
    settings = {"default_flow_style": True, "allow_unicode": True, "width": math.inf, "sort_keys": False}
    text = yaml.dump([value], Dumper=_InlineDumper, **settings)
    # what `plain` spells is within double quotes, where YAML has the same escapes
    return plain(text.removeprefix("[").removesuffix("]\n"))


def dump_yaml(config: RunConfig) -> str:
    """The config with every value written out, in the order of the schema; loads back to an equal config."""
    return "\n".join(_lines(config, mark=False)) + "\n"


def marked_yaml(config: RunConfig) -> str:
    """As `dump_yaml`, with `# default` behind each value that the user did not set."""
    return "\n".join(_lines(config, mark=True)) + "\n"


def given_yaml(config: RunConfig) -> str:
    """What the user has set and nothing else; loads back to an equal config, too."""
    return "\n".join(_lines(config, mark=False, only_set=True)) + "\n"


def _lines(section: BaseModel, mark: bool, only_set: bool = False) -> Iterator[str]:
    for key in _own_first(type(section)):
        value = getattr(section, key)
        if only_set and key not in section.model_fields_set:
            continue
        if isinstance(value, BaseModel):
            inner = [*_lines(value, mark, only_set)]
            yield f"{key}:" if inner else f"{key}: {{}}"
            yield from (f"  {line}" for line in inner)
        elif isinstance(value, list) and any(isinstance(item, BaseModel) for item in value):
            yield f"{key}:"
            for item in value:
                first, *rest = _lines(item, mark, only_set) if isinstance(item, BaseModel) else [inline_yaml(item)]
                yield f"  - {first}"
                yield from (f"    {line}" for line in rest)
        else:
            if isinstance(value, dict):
                value = {
                    k: v.model_dump(exclude_none=True) if isinstance(v, BaseModel) else v for k, v in value.items()
                }
            yield f"{key}: {inline_yaml(value)}{'  # default' if mark and key not in section.model_fields_set else ''}"


def _own_first(section: type[BaseModel]) -> Iterator[str]:
    """Fields of the section itself, then those that it shares with others of its kind."""
    for kind in section.__mro__:
        yield from (key for key in inspect.get_annotations(kind) if key in section.model_fields)


def json_schema() -> dict[str, Any]:
    """JSON schema of a config file, with help texts, `extends`, and the names and options of what is shipped."""
    schema = RunConfig.model_json_schema()
    sections = schema["$defs"]
    mergeable = [name for name, value in known_keys().items() if len(name) == 1 and sections_of(value.annotation)]
    for (name,) in mergeable:
        for section in sections_of(known_keys()[name,].annotation):
            sections[section.__name__].pop("required", None)  # may come from the file that this one extends
    schema["anyOf"] = [{"required": ["extends"]}, {"required": schema.pop("required")}]
    extends = {"type": "string", "description": "File that this one is laid over: same folder, or a shipped name."}
    schema["properties"] = {"extends": extends} | schema["properties"]
    _describe_choices(sections)
    return schema


def _describe_choices(sections: dict[str, Any]) -> None:
    adapter, output = sections["AdapterSection"], sections["OutputSection"]
    sections["LossSection"]["properties"]["kind"]["enum"] = choices.names("train.losses")
    adapter["properties"]["method"]["enum"] = choices.names("adapters.methods")
    sections["OptimizerSection"]["properties"]["name"]["examples"] = choices.names("train.optimizers")
    output["properties"]["formats"]["items"]["enum"] = choices.names("adapters.formats")
    for section, key, package, default in WITH_OPTIONS:
        kinds = [_options_of(package, key, name, default) for name in choices.names(package)]
        sections[f"{section.title()}Section"]["allOf"] = kinds


def _options_of(package: str, key: str, name: str, default: str) -> dict[str, Any]:
    options: type[BaseModel] = choices.find(package, name).Options
    required = [] if name == default else [key]  # no name given means the default one
    return {
        "if": {"properties": {key: {"const": name}}, "required": required},
        "then": {"properties": {"options": options.model_json_schema()}},
    }
