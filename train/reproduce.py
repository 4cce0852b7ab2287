"""loraloom reproduce FILE --data DIR: the config of the run that made an adapter file, from its header."""

import argparse
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..configs.arguments import Parser, path_text
from ..configs.command import run_command
from ..configs.data_sections import SOURCE_KINDS
from ..configs.document import Document
from ..configs.errors import UserError
from ..configs.files import reason
from ..configs.loader import accepted, dump_yaml
from ..configs.ownership import write_file
from ..configs.plain import plain
from ..configs.words import counted
from .facts import at
from .record import Record, changed_texts, file_hash, hashed, is_hashed, read_record, texts_of
from .run_folder import installed

if TYPE_CHECKING:
    from ..configs.schema import RunConfig

HELP = """\
Write the config of the run that made an adapter file. Its header has the settings, and hashes in
the place of what is private: you give the folders, and the texts that stood in the config, such as
the caption of all images. Every text is checked against its hash, every folder against the hash of
its images and captions, the base against the hashes of its weights."""
EXAMPLES = """\
Folders stand in the order of the sources; class images need none, the run makes them. Held-out
images come last, and may be left out where they decide nothing. An error says what is missing.

examples:
  loraloom reproduce my-dog.safetensors --data photos/ --caption "a sks dog"
  loraloom reproduce style.kohya.safetensors --data one/ --data two/ --base my-base/ --out style.yaml
  loraloom reproduce word.safetensors --data photos/ --token "<sks>" --token creature
  loraloom train my-dog.yaml

exit codes: 0 written, 2 something is missing, or the data or the base is not the same; --force
writes the config all the same."""
ADAPTER = re.compile(r"(sha256:[0-9a-f]{16}):(.+)")
"""An adapter that is merged into the base, and its weight."""
WORDS = {True: "same", False: "differs", None: "unknown"}


@dataclass(frozen=True, slots=True)
class Given:
    """What the user gives for what the record has as hashes."""

    data: Sequence[str] = ()  # in the order of the sources
    base: str | None = None
    adapters: Sequence[str] = ()  # files: those in the base, then that from which training began
    texts: Sequence[str] = ()


@dataclass(slots=True)
class Filled:
    """The values of a config on the way from its record."""

    values: dict[str, Any]
    problems: list[str] = field(default_factory=list)  # what is missing, or is not what it should be
    notes: list[str] = field(default_factory=list)  # what is left out


@dataclass(frozen=True, slots=True)
class Compared:
    """One thing beside what the record says of it."""

    what: str
    same: bool | None  # None where it cannot be known
    words: str

    def line(self) -> str:
        """For people."""
        return f"{WORDS[self.same]:8} {self.what}: {self.words}"


FORCE = "write it also where the data or the base differs; a file that is there is never written over"


def main(arguments: Sequence[str]) -> int:
    """Writes the config, and prints what is the same as in the run and what is not."""
    options = _parser().parse_args(list(arguments))
    record = read_record(Path(options.file))
    given = Given(options.data, options.base, options.adapter, [*options.caption, *options.token])
    config, notes = config_of(record, given, options.file)
    out = Path(options.out or f"{config.output.name}.yaml")
    if os.path.lexists(out):
        raise UserError(f"{out}: there is such a file already; name another with --out")
    found = [*compare_data(config, record), *compare_base(config, record)]
    print("\n".join(map(plain, [*(each.line() for each in found), *(f"left out {note}" for note in notes)])))
    for line in differing_versions(record):
        print(f"warning: {plain(line)}", file=sys.stderr)
    if not options.force and (other := [each.what for each in found if each.same is False]):
        raise UserError(f"{', '.join(other)}: not as in the run, so {out} was not written; --force writes it")
    try:
        write_file(out, dump_yaml(config), by="reproduce")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({reason(error)})") from error
    print(f"wrote {out}")
    return 0


def config_of(record: Record, given: Given, name: str) -> tuple["RunConfig", list[str]]:
    """The config of a record with what was given in place, and what was left out; UserError with all that is missing.

    The run folder is `runs/<output.name>`.
    """
    filled = Filled(deepcopy(record.config))
    _fill_base(filled, given.base)
    _fill_data(filled, given.data)
    _fill_adapters(filled, given.adapters)
    _fill_texts(filled, {hashed(text): text for text in given.texts})
    _check_texts(filled, record, given.texts)
    if filled.problems:
        raise UserError([f"{name}: {problem}" for problem in filled.problems])
    filled.values["output"]["dir"] = f"runs/{filled.values['output']['name']}"
    return accepted(Document(filled.values), name), filled.notes


def _fill_base(filled: Filled, base: str | None) -> None:
    model = filled.values["model"]
    if base is not None:
        model["base"] = base
        model.pop("revision", None)
    elif is_hashed(model["base"]):
        filled.problems.append("model.base was a base on that machine, whose path is not told: give it with --base")


def _fill_data(filled: Filled, folders: Sequence[str]) -> None:
    """Folders for all sources that have images of their own, those that are held out last."""
    values = filled.values
    held_out = at(values, "validation.sources") or []
    own = [source for source in values["data"]["sources"] if "prior" not in source]
    more = f" and {len(held_out)} held out" if held_out else ""
    if held_out and len(folders) < len(own) + len(held_out) and not _held_out_decides(values):
        values["validation"]["sources"] = held_out = []
        more += ", which may stay away"
        filled.notes.append("validation.sources: the loss on held-out images decides no weight of this run")
    wanted = [*own, *held_out]
    if len(folders) != len(wanted):
        filled.problems.append(
            f"{counted(len(own), 'source')} {'has' if len(own) == 1 else 'have'} images{more}, "
            f"and {len(folders)} of --data {'was' if len(folders) == 1 else 'were'} given: "
            f"give {len(wanted)}, in their order"
        )
        for source in wanted:  # one answer for all of them is enough
            source[_key_of(source)] = "?"
        return
    for source, folder in zip(wanted, folders, strict=True):
        source[_key_of(source)] = folder


def _key_of(source: Mapping[str, Any]) -> str:
    """The key that says where the images are."""
    return next(key for key in SOURCE_KINDS if key in source)


def _held_out_decides(values: dict[str, Any]) -> bool:
    """Whether the loss on held-out images decides which weights a run ends with."""
    return at(values, "validation.patience") is not None or at(values, "output.weights") == "best"


def _fill_adapters(filled: Filled, files: Sequence[str]) -> None:
    model, adapter = filled.values["model"], filled.values.get("adapter", {})
    merged = [match for text in model.get("adapters", []) if (match := ADAPTER.fullmatch(text))]
    began = is_hashed(adapter.get("start_from"))
    if len(files) != len(merged) + began:
        words = "those that were merged into the base, in their order, then the one from which training began"
        filled.problems.append(f"{len(merged) + began} of --adapter are needed, {len(files)} given: {words}")
    model["adapters"] = [f"{file}:{match[2]}" for file, match in zip(files, merged, strict=False)]
    if began:
        adapter["start_from"] = files[-1] if files else "?"


def _fill_texts(filled: Filled, known: Mapping[str, str]) -> None:
    """Each text in the places of its hash; names and prompts that nobody gave are left out."""
    filled.values = changed_texts(filled.values, lambda place, text: known.get(text, text))
    _leave_out(filled)
    for place, text in texts_of(filled.values):
        if is_hashed(text) and place != "model.base":
            option = "--token" if place.startswith("adapter.tokens.") else "--caption"
            filled.problems.append(f"{place} is known by its hash alone ({text}): give its text with {option}")


def _check_texts(filled: Filled, record: Record, texts: Sequence[str]) -> None:
    hashes = {text for _, text in texts_of(record.config)}
    strange = [text for text in texts if hashed(text) not in hashes]
    filled.problems += [f"{text!r} is no text of its config: no hash there is that of it" for text in strange]


def _leave_out(filled: Filled) -> None:
    """What decides no weight: names of sources, and prompts of pictures."""
    validation = filled.values.get("validation", {})
    for source in [*filled.values["data"]["sources"], *validation.get("sources", [])]:
        if is_hashed(source.get("name")):
            del source["name"]
    prompts = validation.get("prompts", [])
    kept = [each for each in prompts if not any(map(is_hashed, each.values() if isinstance(each, dict) else [each]))]
    if len(kept) < len(prompts):
        validation["prompts"] = kept
        filled.notes.append(
            f"validation.prompts: {len(prompts) - len(kept)} of {len(prompts)}, whose texts were not given; "
            "pictures decide no weight"
        )


def compare_data(config: "RunConfig", record: Record) -> Iterator[Compared]:
    """The images and captions of each source; UserError where some cannot be trained on."""
    from .gather import gather  # brings Pillow

    images = gather(config.data, progress=True)
    for number, (found, then) in enumerate(zip(images, record.data["sources"], strict=True)):
        what = f"data.sources.{number}"
        if found is None:
            yield Compared(what, None, "class images, which the run makes")
            continue
        same, count = found.fingerprint() == then["sha256"], len(found.kept)
        words = f"{count} images and their captions" if same else f"{count} images here, {then['images']} in the run"
        yield Compared(
            what, same, words if same or count != then["images"] else f"{words}, with other bytes or captions"
        )
    for number, _ in enumerate(config.validation.sources):
        yield Compared(f"validation.sources.{number}", None, "held-out images, of which the record has no hash")


def compare_base(config: "RunConfig", record: Record) -> Iterator[Compared]:
    """The weights of the base, and the adapters with which training began; UserError where one is not there."""
    from ..models.base import check_base
    from .base_key import base_key
    from .preflight import check_adapter_files

    if problems := [*check_base(config.model.base), *check_adapter_files(config)]:
        raise UserError(problems)
    then, now = record.base["weights"], base_key(config)
    if "hub" in now and "hub" not in then:
        yield Compared("model.base", None, f"{config.model.base} is not on this machine yet")
        then, now = ({part: found for part, found in each.items() if " " in part} for each in (then, now))
    other = sorted(part for part in then | now if then.get(part) != now.get(part))
    if other:
        yield Compared("model.base", False, f"other weights of {', '.join(other)}")
    elif then:
        yield Compared("model.base", True, f"the weights of {', '.join(sorted(then))}")
    began = record.base.get("start_from")
    if began is not None and (start := config.adapter.start_from) is not None:
        same = file_hash(start) == began
        yield Compared("adapter.start_from", same, f"{start}{'' if same else ' is another file'}")


def differing_versions(record: Record) -> Iterator[str]:
    """One line for each library that is not the one of the run."""
    here = installed()
    for library, then in record.versions.items():
        if here.get(library) != then:
            yield f"{library} was {then} in the run and is {here.get(library, 'not known')} here: bits may differ"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="loraloom reproduce",
        description=HELP,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    texts = {"action": "append", "default": [], "metavar": "TEXT"}
    parser.add_argument(
        "file", type=path_text, metavar="FILE", help="adapter file in any format, or a folder of PEFT's"
    )
    parser.add_argument(
        "--data",
        type=path_text,
        action="append",
        default=[],
        metavar="DIR",
        help="images of a source (or dataset, or shards)",
    )
    parser.add_argument("--base", type=path_text, help="the base, where it was not one of the hub or `pocket`")
    parser.add_argument("--caption", **texts, help="a caption, trigger word, class prompt or prompt of the config")
    parser.add_argument("--token", **texts, help="a new word of the config, or the words that it begins with")
    parser.add_argument(
        "--adapter",
        type=path_text,
        action="append",
        default=[],
        metavar="FILE",
        help="an adapter that the run began with",
    )
    parser.add_argument(
        "--out", type=path_text, metavar="FILE", help="the config (NAME.yaml, by the name of the adapter)"
    )
    parser.add_argument("--force", action="store_true", help=FORCE)
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
