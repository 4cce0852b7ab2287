"""Reading the settings of another trainer: the nouns, and the contract of each file in `peers/`.

A reader is a table, from each setting of the tool to a `Rule` that says what becomes of it here: the same, nearly the
same, or nothing. Every setting of a file ends in exactly one of these three lists.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from ...configs.choices import did_you_mean, find, names
from ...configs.errors import UserError
from ...configs.problems import shown
from .values import Setting, flag, plain

T = TypeVar("T")
PEERS = "launch.translation.peers"
NO_TEXT = (".ipynb", ".safetensors", ".ckpt", ".pt", ".yaml", ".yml")
"""Endings of files that hold no settings of a tool that is read."""
UNSET = ("", None)
"""Values with which a file says that it says nothing."""


class Settings:
    """Settings of one level, such as a folder of images, which falls back on the levels around it."""

    def __init__(self, given: Iterable[Setting], around: "Settings | None" = None):
        self.given, self.around = list(given), around
        self._last = {setting.name: setting for setting in self.given}

    def find(self, name: str) -> Setting | None:
        """The setting that counts; of one given twice the last, of several levels the nearest."""
        own = self._last.get(name)
        if own is not None and own.value not in UNSET:
            return own
        return self.around.find(name) if self.around else None

    def value(self, name: str, of: Callable[[Any], T], default: T) -> T:
        """Its value as `of` reads it."""
        setting = self.find(name)
        return default if setting is None else converted(setting, of)

    def asked(self, name: str) -> bool:
        """Whether a flag is on."""
        return self.value(name, flag, False)

    def counts(self, setting: Setting) -> bool:
        """Whether nothing further down on the same level says it again."""
        return self._last[setting.name] is setting


def converted(setting: Setting, of: Callable[[Any], T]) -> T:
    """The value, or a UserError with its place."""
    try:
        return of(setting.value)
    except ValueError as error:
        raise UserError(f"{setting.place}: {setting.name}: should be {error}, found {shown(setting.value)}") from error


class Outcome(NamedTuple):
    """What becomes of a setting: values for our keys, and what has to be said about them."""

    values: Mapping[str, Any] = {}  # dotted key, with `*` for any entry of a list
    differs: str = ""  # how ours is not the same
    lost: str = ""  # why there is nothing like it
    said: str = ""  # what else is worth knowing of one that is carried over


NOTHING = Outcome()
Apply = Callable[[Any, Any], Outcome]
"""From a value and the `Settings` around it."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What becomes of one setting of a tool."""

    of: Callable[[Any], Any]  # how its value is read
    apply: Apply
    ours: str = ""  # our keys, for people
    words: str = ""  # what there is to say about it, for people
    is_lost: bool = False  # whether there is nothing like it

    def __call__(self, setting: Setting, settings: Settings) -> Outcome:
        if setting.value in UNSET:
            return NOTHING
        return self.apply(converted(setting, self.of), settings)


RuleOf = Callable[[str], Rule | None]
"""The rule of a setting by its name; None for a name that the tool is not known to have."""


def same(key: str, of: Callable[[Any], Any], make: Callable[[Any], Any] = plain) -> Rule:
    """Our key means the same; `make` spells its value as we do."""
    return Rule(of, lambda value, settings: Outcome({key: make(value)}), key)


def near(key: str, of: Callable[[Any], Any], words: str, make: Callable[[Any], Any] = plain) -> Rule:
    """Our key means nearly the same; nothing is said of a flag that is off."""
    return Rule(of, lambda value, settings: Outcome({key: make(value)}, "" if value is False else words), key, words)


def own(of: Callable[[Any], Any], apply: Apply, ours: str, words: str = "") -> Rule:
    """A function decides, with the other settings before it."""
    return Rule(of, apply, ours, words)


def switch(values: Mapping[str, Any], words: str = "") -> Rule:
    """A flag that sets our values where it is on."""
    return Rule(flag, lambda value, settings: Outcome(values, words) if value else NOTHING, next(iter(values)), words)


def with_others(ours: str, of: Callable[[Any], Any]) -> Rule:
    """Goes into what another setting becomes."""
    return Rule(of, lambda value, settings: NOTHING, ours)


def lost(words: str, *idle: Any) -> Rule:
    """There is nothing like it; values that ask for nothing are no loss."""
    fine = (None, False, 0, "", [], "false", "False", "0", *idle, *map(str, idle))
    return Rule(plain, lambda value, settings: NOTHING if value in fine else Outcome(lost=words), "", words, True)


def needless(words: str) -> Rule:
    """Nothing has to be set for it here."""
    return Rule(plain, lambda value, settings: Outcome(said=words), "", words)


def alike(rule: Rule, *settings: str) -> dict[str, Rule]:
    """The same rule for several settings."""
    return dict.fromkeys(settings, rule)


class Line(NamedTuple):
    """What became of one setting."""

    setting: Setting
    keys: tuple[str, ...]  # of ours
    words: str = ""


class Chosen(NamedTuple):
    """A value of ours, and the setting that it comes from."""

    value: Any
    setting: Setting


@dataclass(slots=True)
class Translation:
    """What became of all settings of a file."""

    tool: str  # such as "sd-scripts"
    values: dict[str, Chosen] = field(default_factory=dict)  # dotted key -> value
    sources: list[dict[str, Chosen]] = field(default_factory=list)
    carried: list[Line] = field(default_factory=list)
    differs: list[Line] = field(default_factory=list)
    lost: list[Line] = field(default_factory=list)
    assumed: list[Line] = field(default_factory=list)  # defaults of the tool, which ours do not have
    problems: list[str] = field(default_factory=list)

    def report(self, setting: Setting, outcome: Outcome, ours: str = "") -> None:
        """Puts a setting of the file on its list."""
        keys = tuple(outcome.values) or ((ours,) if ours else ())
        if outcome.lost:
            self.lost.append(Line(setting, (), outcome.lost))
        elif outcome.differs:
            self.differs.append(Line(setting, keys, outcome.differs))
        else:
            self.carried.append(Line(setting, keys, outcome.said))

    def set(self, setting: Setting, values: Mapping[str, Any]) -> None:
        """Takes values over, but for those of single entries; later ones win."""
        self.values |= {key: Chosen(value, setting) for key, value in values.items() if not _of_entry(key)}

    def level(self, settings: Settings, rule_of: RuleOf, known: Iterable[str]) -> None:
        """All settings of one level, each by its rule."""
        for setting in settings.given:
            rule = rule_of(setting.name)
            if not settings.counts(setting):
                self.report(setting, Outcome(said="given again further on, which counts"))
            elif rule is None:
                near = did_you_mean(setting.name, known)
                self.report(setting, Outcome(lost=f"{self.tool} is not known to have it{near}"))
            else:
                outcome = self.outcome(setting, rule, settings)
                self.report(setting, outcome, rule.ours)
                self.set(setting, outcome.values)

    def outcome(self, setting: Setting, rule: Rule, settings: Settings) -> Outcome:
        """By its rule; what is wrong with its value is remembered."""
        try:
            return rule(setting, settings)
        except UserError as error:
            self.problems += error.problems
            return NOTHING

    def assume(self, run: Settings, given: Collection[str], rule_of: RuleOf) -> None:
        """The tool's own defaults where nothing is given; they come first, so that what is given wins."""
        for setting in run.around.given if run.around else ():
            if setting.name not in given and (rule := rule_of(setting.name)):
                outcome = self.outcome(setting, rule, run)
                self.set(setting, outcome.values)
                if outcome.values or outcome.differs:
                    self.assumed.append(Line(setting, tuple(outcome.values), outcome.differs))

    def named(self, name: str) -> str:
        """The adapter's name; `name`, and a folder in `runs`, where the file says nothing."""
        setting = Setting("--name", name, "--name")
        found = self.values.setdefault("output.name", Chosen(name, setting)).value
        self.values.setdefault("output.dir", Chosen(f"runs/{found}", setting))
        return found

    def doubt(self, setting: Setting, words: str) -> None:
        """A setting that was carried over is not quite the same, as turns out later."""
        for line in [line for line in self.carried if line.setting is setting]:
            self.carried.remove(line)
            self.differs.append(Line(setting, line.keys, words))
            return
        for place, line in enumerate(self.differs):
            if line.setting is setting and words not in line.words:
                self.differs[place] = line._replace(words=f"{line.words}; {words}")


def _of_entry(key: str) -> bool:
    """Whether a value is of one entry of a list, or of one source's captions: who makes these lists takes it."""
    return ".*." in key or key.startswith("data.captions.")


class Asked(NamedTuple):
    """What the command line of `loraloom init` says beside the file."""

    base: str | None = None
    data: Path | None = None
    steps: int | None = None
    name: str | None = None
    taken: Mapping[str, str] = {}
    """Variables of the environment that a script may use."""


def asked_settings(asked: Asked, path: Path, script: str) -> Settings:
    """What is known beside the file, as the outermost level; no tool has names with dashes before them."""
    known = {"--steps": asked.steps, "--name": asked.name, "--script": script, "--file": str(path)}
    known |= {"--data": None if asked.data is None else str(asked.data)}
    return Settings(Setting(name, value, name) for name, value in known.items())


class Peer(Protocol):
    """What each module in `peers/` has."""

    NAME: str  # of the tool
    READS: str  # what files of it can be read
    RULES: Mapping[str, Rule]

    def translate(self, path: Path, asked: Asked) -> Translation | None:
        """None for a file that is not one of the tool's. UserError for one that cannot be used."""
        ...


def translate(path: Path, asked: Asked) -> Translation:
    """The translation of a file by the first tool that knows it."""
    from .others import refuse

    if not path.is_file():
        raise UserError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}; --from is a file")
    peers: list[Peer] = [find(PEERS, name) for name in names(PEERS)]  # type: ignore[misc]
    for peer in peers if path.suffix.lower() not in NO_TEXT else ():
        if (translation := peer.translate(path, asked)) is not None:
            if translation.problems:
                raise UserError(list(dict.fromkeys(translation.problems)))
            return translation
    raise refuse(path, [peer.READS for peer in peers])
