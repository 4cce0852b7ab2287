"""The processes that a launcher has started one command as: who says what went wrong, and how all of them end.

Each has a thread that looks at the others once a second. What ends one is told in a store that all reach, so that the
first to go wrong says it and the others are silent; a process that dies without a word is found by its number, on the
same machine. The launcher is looked at too: accelerate's leaves its process alone when it is told to end.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from .errors import TRAINING_FAILED, TrainingError, UserError
from .plain import plain

WORLD = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
"""Variables in which launchers say how many there are, and which one this is."""
LAUNCHERS = (
    "accelerate",
    "torchrun",
    "torch.distributed.run",
    "torch.distributed.launch",
    "accelerate.commands.launch",
)
LOOK = 1.0  # seconds between two looks at the others
SHORT = 3.0  # seconds in which a process can end by itself after another one has said why
GRACE = 10.0  # seconds in which a process can end by itself: what waits for others is told that they are gone
OF_OTHERS = (
    "gloo",
    "nccl",
    "connection closed",
    "connection reset",
    "process group",
    "timed out",
    "socket",
    "tcpstore",
)
"""Words of the errors of a process whose partner is gone."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How the first process ended that went wrong."""

    rank: int
    code: int
    lines: list[str]
    said: bool = True  # or it died without a word


class SaidElsewhere(UserError):
    """Another process has gone wrong and says why; there is nothing to add."""

    def __init__(self, first: Ended):
        super().__init__([])
        self.exit_code, self.first = first.code, first

    def __str__(self) -> str:
        return "\n".join(self.first.lines)


def launched(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(rank, processes) as the launcher says; (0, 1) without one. UserError for what is no number."""
    world = _number(environment, WORLD, 1)
    return (_number(environment, RANK, 0) if world > 1 else 0), world


def _number(environment: Mapping[str, str], names: tuple[str, ...], default: int) -> int:
    name = next((name for name in names if environment.get(name)), None)
    if name is None:
        return default
    text = environment[name]
    if not text.isascii() or not text.isdigit():
        raise UserError(
            f"{name}={text!r}: the launcher's variable should be a number; unset it to train in one process"
        )
    return int(text)


@contextmanager
def joined(begin: Callable[[], object] | None = None) -> "Iterator[Others]":
    """Within, this process knows of the others; `begin` brings all together where the launcher has no store for them.

    The first error of all is raised in its own process; the others raise SaidElsewhere with the same exit code.
    """
    rank, world = launched()
    parent = launcher()
    if world == 1 and parent is not None:
        _check_asked(parent)
    others = Others(rank, world)
    try:
        with _parent_watched(parent):
            others.begin(begin)
            yield others
    except Exception as error:
        answer = others.answer(error)
        if answer is error:
            raise
        raise answer from error
    finally:
        others.leave()


class Others:
    """What a process knows of the other ones."""

    def __init__(self, rank: int, world: int):
        self.rank, self.world = rank, world
        self.before_end: Callable[[SaidElsewhere], object] = lambda error: None  # what is to be written down
        self._answered: dict[int, Exception] = {}
        self._pids: dict[int, int] = {}  # of those on this machine, by rank
        self._over = threading.Event()
        self._store: Any = None
        self._agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

    @property
    def stands_in(self) -> bool:
        """Whether this process writes for the main one, which is dead."""
        return self.rank > 0 and 0 in self._pids and self._first_living() == self.rank

    def _first_living(self) -> int:
        """The lowest rank that is alive, of those on this machine."""
        return min((r for r, pid in self._pids.items() if r == self.rank or is_alive(pid)), default=0)

    def begin(self, begin: Callable[[], object] | None) -> None:
        """Joins the others; nothing for a process that is alone."""
        if self.world == 1:
            return
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else it prints its stack where a partner has gone
        if self._agent:
            self._store = _connect()
        try:
            if begin is not None:
                begin()
        except UserError:
            raise
        except Exception as error:
            words = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"process {self.rank} of {self.world} cannot join the others ({words})") from error
        if self._store is None and begin is not None:  # then the first process has one
            with suppress(RuntimeError, KeyError, OSError):
                self._store = _connect()
        if self._store is not None:
            self._pids = self._exchange()
            watch = _connect()
            threading.Thread(target=self._look, args=(watch,), daemon=True, name="loraloom-others").start()

    def answer(self, error: Exception) -> Exception:
        """The error as this process should raise it: SaidElsewhere where another one was the first, or died."""
        if isinstance(error, SaidElsewhere) or self.world == 1:
            return error
        if id(error) not in self._answered:
            _undisturbed()
            answer = self._answered[id(error)] = self._answer(error)
            self._answered[id(answer)] = answer
        return self._answered[id(error)]

    def _answer(self, error: Exception) -> Exception:
        if self._store is None:
            return error
        if not isinstance(error, UserError) and any(words in str(error).lower() for words in OF_OTHERS):
            first = self._first_trouble(seconds=5.0)
            if first is None:
                words = str(error).strip().splitlines()[0]
                error = TrainingError(f"process {self.rank} of {self.world} has lost the others ({words})")
            elif first.said:
                return SaidElsewhere(first)
            else:
                error = TrainingError(first.lines)
        from .faults import code_of

        lines = error.problems if isinstance(error, UserError) else [f"{type(error).__name__}: {error}"]
        code = code_of(error)
        said = self._claim(self._store, Ended(self.rank, code, lines))
        return error if said is None else SaidElsewhere(said)

    def leave(self) -> None:
        """This process ends, and its end is no fault; one that has the store stays until all have gone."""
        self._over.set()
        if self._store is None:
            return
        with suppress(RuntimeError):
            self._store.set(f"left/{self.rank}", "")
            until = time.monotonic() + GRACE
            while not self._agent and self.rank == 0 and time.monotonic() < until and self._present():
                time.sleep(0.05)

    def _present(self) -> list[int]:
        """Ranks that have not left and are alive, as far as this machine can tell."""
        others = (r for r in range(self.world) if r != self.rank and (r not in self._pids or is_alive(self._pids[r])))
        return [r for r in others if not self._has_left(r)]

    def _has_left(self, rank: int) -> bool:
        return self._store.check([f"left/{rank}"])

    def _exchange(self) -> dict[int, int]:
        """The process numbers of those on this machine that can be seen from here."""
        own = [socket.gethostname(), _boot(), os.getpid()]
        self._store.set(f"process/{self.rank}", json.dumps(own))
        found = {}
        for rank in range(self.world):
            host, boot, pid = json.loads(self._store.get(f"process/{rank}"))
            if [host, boot] == own[:2] and (rank == self.rank or is_alive(pid)):
                found[rank] = pid
        return found

    def _look(self, store: Any) -> None:
        """In a thread: ends the process where the main thread waits for somebody who is gone."""
        while not self._over.wait(LOOK):
            first = self._trouble(store)
            if first is None:
                continue
            if self._over.wait(2 * GRACE if first.rank == self.rank else SHORT if first.said else GRACE):
                return
            error = SaidElsewhere(first)
            with suppress(Exception):
                self.before_end(error)
            if not first.said and self._claim(store, replace(first, said=True)) is None:
                say(first.lines)
            with suppress(Exception):
                sys.stdout.flush()
            os._exit(first.code)

    def _first_trouble(self, seconds: float) -> Ended | None:
        until = time.monotonic() + seconds
        while True:
            first = self._trouble(self._store)
            if first is not None or time.monotonic() > until:
                return first
            time.sleep(0.1)

    def _trouble(self, store: Any) -> Ended | None:
        """What has ended the first process that went wrong, or who died without a word."""
        try:
            if store.check(["ended"]):
                return Ended(**json.loads(store.get("ended")))
            for rank, pid in self._pids.items():
                if rank != self.rank and not is_alive(pid) and not store.check([f"left/{rank}"]):
                    return self._died(rank)
        except RuntimeError:  # with the process that had the store, or with the launcher
            return self._died(0) if 0 in self._pids and self.rank and not is_alive(self._pids[0]) else None
        return None

    def _died(self, rank: int) -> Ended:
        words = f"process {rank} of {self.world} has died without a word (killed, or out of memory); the run ends"
        return Ended(rank, TRAINING_FAILED, [words], said=False)

    def _claim(self, store: Any, ended: Ended) -> Ended | None:
        """None where this process is the first that says something; else what the first one said."""
        try:
            if store.add("told", 1) == 1:
                store.set("ended", json.dumps(asdict(ended)))
                return None
            return Ended(**json.loads(store.get("ended")))
        except RuntimeError:  # the store went with the process that had it, which stays until all others have left
            self._store = None
            return None if self._first_living() == self.rank else ended


def _undisturbed() -> None:
    """A launcher ends the others as soon as one has gone: what they have to say and to write down comes first."""
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)


def say(lines: list[str]) -> None:
    """As `run_command` says errors."""
    with suppress(OSError, ValueError):
        for line in lines:
            print(f"error: {plain(line)}", file=sys.stderr, flush=True)


def _connect() -> Any:
    """A connection of its own to the store of the launcher, or of the first process."""
    from torch.distributed import PrefixStore, TCPStore

    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(*place, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))
    attempt = [os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RUN_ID", "RESTART_COUNT")]
    return PrefixStore("/".join(("loraloom", *attempt)), store)


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; one that has ended and was not fetched does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    return True


def _boot() -> str:
    """Tells machines, and containers with process numbers of their own, apart; "" where that cannot be known."""
    with suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return ""


def launcher() -> list[str] | None:
    """The command of the launcher that has started this process; None without one, or where it cannot be seen."""
    with suppress(OSError):
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
        names = [os.path.basename(word) if index < 2 else word for index, word in enumerate(words[:4])]
        if any(name.removesuffix(".exe") in LAUNCHERS for name in names):
            return words
    return None


def _check_asked(command: list[str]) -> None:
    """UserError where accelerate was asked for several processes and has started this one alone, as it does on CPUs."""
    words = [part for word in command for part in word.replace("_", "-").split("=")]
    option = next((words[k + 1] for k, word in enumerate(words[:-1]) if word == "--num-processes"), None)
    place = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    several = option != "1" if option is not None else place == ("127.0.0.1", "29500")  # as accelerate sets them then
    if several and "LOCAL_RANK" not in os.environ and any("accelerate" in word for word in command[:4]):
        raise UserError(
            "accelerate was asked for several processes and has started one, as it does with --cpu: start them with "
            "`ACCELERATE_USE_CPU=true torchrun --nproc_per_node N -m …`, or ask for one with --num_processes 1"
        )


@contextmanager
def _parent_watched(command: list[str] | None) -> Iterator[None]:
    """Within, a launcher that ends asks this process to save and stop, as TERM does."""
    if command is None:
        yield
        return
    over, parent = threading.Event(), os.getppid()

    def look() -> None:
        while not over.wait(LOOK):
            if os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    threading.Thread(target=look, daemon=True, name="loraloom-launcher").start()
    try:
        yield
    finally:
        over.set()
