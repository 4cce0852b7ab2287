"""Damaged files of every kind that is read, to every verb: python -m loraloom.benchmarks.hostile --minutes 20

Each case is a copy of sound files of which one is mutated, and a command line on it, in a process of its own with the
libraries imported. Asked of all: one line for what is wrong, never a traceback or the last net, at most 20 s and 1 GiB
beside the libraries, and nothing changed outside of the folder of the case. A case is made of (seed, number) alone:
`--case NUMBER` runs it again and shows what was said.
"""

import argparse
import hashlib
import importlib
import os
import random
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..configs.arguments import positive
from ..configs.command import run_command
from ..configs.errors import UserError
from .hostile_files import SHORT, TARGETS, WITHOUT_RUN, Target, make_sound, mutate, sound_png

SECONDS, MEMORY = 20.0, 2**30
FAULTS = ("net reached", "traceback", "hang", "memory", "killed", "changed something else")
CLASSES = ("done", "refused in a line", "other exit code", *FAULTS)
PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
BEGIN, END = "<!-- hostile: begin -->", "<!-- hostile: end -->"
_PRELOADED = (
    *("torch", "diffusers", "transformers", "peft", "accelerate", "datasets", "pyarrow.parquet", "PIL.Image"),
    *("loraloom.launch.cli", "loraloom.train.build", "loraloom.train.plan", "loraloom.train.preflight"),
    *("loraloom.train.preview", "loraloom.train.replay", "loraloom.train.runs", "loraloom.train.push"),
    *("loraloom.train.reproduce", "loraloom.inference.__main__", "loraloom.inference.grid", "loraloom.launch.init"),
    *("loraloom.inference.adapter.__main__", "loraloom.inference.convert", "loraloom.inference.pictures.sampler"),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a case ended."""

    number: int
    target: str
    how: str  # what was done to which file
    command: str
    result: str  # one of CLASSES
    code: int
    seconds: float
    said: str


def main(arguments: Sequence[str]) -> int:
    """Prints the summary as Markdown; exit code 3 if a promise was broken."""
    options = _parser().parse_args(list(arguments))
    targets = [target for target in TARGETS if not options.kinds or any(kind in target.name for kind in options.kinds)]
    if not targets:
        raise UserError(f"--kinds: there are {', '.join(target.name for target in TARGETS)}")
    with tempfile.TemporaryDirectory(prefix="hostile-") as temporary:
        bench = Bench(Path(temporary).resolve(), options.seed, targets)
        if options.case is not None:
            found = bench.run(options.case)
            print(f"{found.target}: {found.how}\nloraloom {found.command}\n{found.said}")
            print(f"{found.result}, exit code {found.code}, {found.seconds:.1f} s")
            return 3 if found.result in FAULTS else 0
        outcomes, until = [], time.monotonic() + 60 * options.minutes
        number = options.first
        while time.monotonic() < until and (options.cases is None or number < options.first + options.cases):
            outcomes.append(bench.run(number))
            if outcomes[-1].result in FAULTS:
                found = outcomes[-1]
                print(
                    f"case {number}: {found.result}: {found.target}, {found.how}: loraloom {found.command}", flush=True
                )
                print("    " + found.said.strip()[-600:].replace("\n", "\n    "), flush=True)
            number += 1
    text = summary(outcomes, options.seed, options.first)
    print(text)
    if options.docs:
        page = PAGE.read_text("utf-8")
        begin, end = page.index(BEGIN) + len(BEGIN), page.index(END)
        PAGE.write_text(f"{page[:begin]}\n{text}\n{page[end:]}", "utf-8")
    return 3 if any(found.result in FAULTS for found in outcomes) else 0


class Bench:
    """Sound files, and cases made of them."""

    def __init__(self, folder: Path, seed: int, targets: Sequence[Target]):
        self.folder, self.seed, self.targets = folder, seed, targets
        self.sound, self.canary = folder / "sound", folder / "canary"
        quiet = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        os.environ |= quiet | {"HOME": str(self.canary), "HF_HOME": str(folder / "hub"), "LORALOOM_CACHE": "cache"}
        self.canary.mkdir()
        for name in ("notes.txt", ".profile"):
            (self.canary / name).write_text("mine")
        for module in _PRELOADED:
            importlib.import_module(module)
        make_sound(self.sound)
        if any(target.name not in WITHOUT_RUN for target in targets):
            self._make_run()
        self.base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _make_run(self) -> None:
        """A run of two steps with its caches, files in another format, a base, a saved dataset, a single file."""
        from datasets import Dataset

        from ..models import pocket

        log = self.folder / "log"
        for command in (
            "train sound.yaml",
            "adapter convert run/ad.safetensors --to peft --base pocket --out peft",
        ):
            code, *_ = self._in_a_child(command, self.sound, log, 300)
            if code:
                raise UserError(
                    f"the sound files cannot be made: {command}: exit code {code}: {log.read_text()[-800:]}"
                )
        shutil.copytree(self.sound / "run", self.sound / "run2")
        shutil.copytree(pocket.FOLDER, self.sound / "base")
        rows = [{"image": file.read_bytes(), "text": "a"} for file in sorted((self.sound / "photos").glob("p*.[pjw]*"))]
        self._call(lambda: Dataset.from_list(rows).save_to_disk(self.sound / "saved"))
        sound_png(self.sound / "again.png", {"prompt": "a", "steps": 1, "adapters": [{"file": "run/ad.safetensors"}]})
        shutil.copy(self.sound / "run/ad.safetensors", self.sound / "one.safetensors")

    def run(self, number: int) -> Outcome:
        """One case, by its number."""
        draw = random.Random(f"{self.seed}:{number}")
        target = draw.choice(self.targets)
        place = self.folder / "case"
        shutil.copytree(self.sound, place, symlinks=True, copy_function=_linked)
        try:
            if target.before:
                self._make_again(target, place)
            kinds = (sorted(file for file in place.glob(pattern) if file.is_file()) for pattern in target.files)
            file = draw.choice(draw.choice([files for files in kinds if files]))
            content = file.read_bytes()
            file.unlink()
            file.write_bytes(content)  # no longer the same file as the sound one
            how = f"{file.relative_to(place)}: {mutate(file, draw)}"
            command = _command(draw.choice(target.commands), file.relative_to(place))
            before, log = self._outside(), self.folder / "log"
            code, seconds, memory = self._in_a_child(command, place, log, SECONDS)
            said = log.read_bytes().decode("utf-8", "replace")
            result = _class(code, said, memory - self.base, before == self._outside())
            return Outcome(number, target.name, how, command, result, code, seconds, said)
        finally:
            _remove(place)

    def _make_again(self, target: Target, place: Path) -> None:
        """Files that hold for the folder of the case, in the place of those that hold for that of the sound files."""
        for pattern in target.files:
            for file in place.glob(pattern):
                if file.parent.parent.name == "cache":
                    file.unlink()
        log = self.folder / "log"
        code, *_ = self._in_a_child(_command(target.before, place), place, log, 60)
        if code:
            raise UserError(f"{target.before}: exit code {code}: {log.read_text()[-800:]}")

    def _outside(self) -> str:
        """What must not change: the sound files, and the home folder."""
        digest = hashlib.sha256()
        for folder in (self.sound, self.canary):
            for path in sorted(folder.rglob("*")):
                status = path.lstat()
                digest.update(f"{path} {status.st_mode} {status.st_size} {status.st_mtime_ns}".encode())
        return digest.hexdigest()

    def _in_a_child(self, command: str, place: Path, log: Path, limit: float) -> tuple[int, float, int]:
        """(exit code, or minus a signal, or -100 for too long; seconds; bytes of memory at most)."""
        start = time.monotonic()
        child = os.fork()
        if not child:
            _become(command, place, log)
        while True:
            found, status, usage = os.wait4(child, os.WNOHANG)
            took = time.monotonic() - start
            if found:
                return os.waitstatus_to_exitcode(status), took, usage.ru_maxrss * 1024
            if took > limit:
                os.killpg(child, signal.SIGKILL)
                *_, usage = os.wait4(child, 0)
                return -100, took, usage.ru_maxrss * 1024
            time.sleep(0.005)

    def _call(self, work: Callable[[], object]) -> None:
        """In a child, so that nothing of it stays here."""
        child = os.fork()
        if not child:
            try:
                work()
                os._exit(0)
            finally:
                os._exit(1)
        os.waitpid(child, 0)


def _become(command: str, place: Path, log: Path) -> None:
    """The command, in this process, which ends with it."""
    code = 99
    try:
        os.setsid()
        os.chdir(place)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(out, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        from ..launch.cli import run

        try:
            code = run_command(run, shlex.split(command))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 2
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _command(template: str, file: Path) -> str:
    command = template.replace("FILE", shlex.quote(str(file))).replace("NAME", file.parent.name)
    command = command.replace("{}", SHORT).replace("{c}", "sound.yaml").replace("{{", "{").replace("}}", "}")
    return " ".join(shlex.quote(word) if word[:1] != "-" and "[{" in word else word for word in _words(command))


def _words(command: str) -> list[str]:
    """Split at spaces, but for those within brackets."""
    words, depth = [""], 0
    for letter in command:
        depth += (letter in "[{") - (letter in "]}")
        if letter == " " and not depth:
            words.append("")
        else:
            words[-1] += letter
    return words


def _class(code: int, said: str, memory: int, unchanged: bool) -> str:
    if not unchanged:
        return "changed something else"
    if code == -100:
        return "hang"
    if code == 70:
        return "net reached"
    if "Traceback (most recent call last)" in said or code == 99:
        return "traceback"
    if code < 0:
        return "killed"
    if memory > MEMORY:
        return "memory"
    return {0: "done", 2: "refused in a line"}.get(code, "other exit code")


def _linked(source: str, target: str) -> None:
    """Large weights are linked, as only the mutated file is written."""
    if os.path.getsize(source) > 1_000_000:
        os.link(source, target)
    else:
        shutil.copy2(source, target)


def _remove(folder: Path) -> None:
    """The folder of a case, which this program has made."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        shutil.rmtree(folder)


def summary(outcomes: Sequence[Outcome], seed: int, first: int) -> str:
    """As Markdown."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for found in outcomes:
        counts[found.target][found.result] += 1
    total = Counter(found.result for found in outcomes)
    shown = [name for name in CLASSES if total[name] or name in FAULTS]
    longest, minutes = max((f.seconds for f in outcomes), default=0), sum(f.seconds for f in outcomes) / 60
    lines = [
        f"{len(outcomes):,} cases (seed {seed}, from number {first}), {minutes:.0f} minutes of commands, "
        f"the longest {longest:.1f} s.",
        "",
        "| what is mutated | cases | " + " | ".join(shown) + " |",
        "|---|--:|" + "--:|" * len(shown),
    ]
    for target, row in sorted(counts.items()):
        lines.append(f"| {target} | {row.total()} | " + " | ".join(str(row[name]) for name in shown) + " |")
    lines.append(f"| all | {total.total()} | " + " | ".join(str(total[name]) for name in shown) + " |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loraloom.benchmarks.hostile", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--cases", type=positive, help="no more than so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--case", type=int, help="run this one alone, and show what was said")
    parser.add_argument("--kinds", nargs="+", help="only files of these kinds, such as `config` or `run`")
    parser.add_argument("--docs", action="store_true", help="write the summary into docs/reliability.md")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
