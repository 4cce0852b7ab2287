"""Training programs that take turns on one machine (A B A B …), so that what else the machine does falls on all."""

import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm, trange

RUNNER = Path(__file__).with_name("turn_taker.py")
QUIET = 0.05
"""Share of the processors that other programs may take in a turn; a round with more is repeated."""
REPEATS = 3  # of a round
TURN = 0.5  # seconds: what slows a machine for longer than a round slows all
FEWEST = 2  # steps of a turn
MOST = 3  # times that all programs are started, for as many rounds each


class Contestant:
    """A way to train: a program with its arguments, its environment, and the log that it writes."""

    def __init__(self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str]):
        """`command` begins with the interpreter."""
        self.name, self.command, self.log, self.environment = name, command, log, environment


@dataclass(frozen=True, slots=True)
class Turn:
    """Some steps of one contestant."""

    seconds: Sequence[float]  # of each step
    others: float  # share of the processors that other programs took
    peak: Mapping[str, int]  # bytes


class Player:
    """A running contestant, which waits for its turn."""

    def __init__(self, contestant: Contestant, process: "subprocess.Popen[bytes]", orders: IO[str], reports: IO[str]):
        self.contestant, self.process, self.orders, self.reports = contestant, process, orders, reports

    def report(self) -> dict[str, Any]:
        """The next line that it says. RuntimeError where it ended instead."""
        if line := self.reports.readline():
            return json.loads(line)
        code, said = self.process.wait(), self.contestant.log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{self.contestant.name} ended with {code}; the end of {self.contestant.log}:\n{said}")

    def turn(self, steps: int) -> Turn:
        """So many steps, by the clock of the program; one on a GPU counts as the mean of its turn."""
        started, busy = time.perf_counter(), _busy()
        told = self.tell(str(steps))
        wall, all_busy = time.perf_counter() - started, _busy() - busy
        others = max(0.0, all_busy - told["processor"]) / (wall * (os.cpu_count() or 1))
        on_device = "device" in told["peak"]
        seconds = [told["wall"] / steps] * steps if on_device else told["seconds"]
        return Turn(seconds, others, told["peak"])

    def tell(self, order: str) -> dict[str, Any]:
        """Gives an order and waits for what comes of it."""
        self.orders.write(order + "\n")
        self.orders.flush()
        return self.report()


@contextmanager
def playing(contestant: Contestant) -> Iterator[tuple[Player, dict[str, Any]]]:
    """A player after its first step, and what it said then; it is ended, not waited for."""
    with tempfile.TemporaryDirectory() as folder, contestant.log.open("wb") as log, ExitStack() as stack:
        pipes = [f"{folder}/orders", f"{folder}/reports"]
        for pipe in pipes:
            os.mkfifo(pipe)
        python, *rest = contestant.command
        command = [python, str(RUNNER), *pipes, *rest]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=dict(contestant.environment))
        stack.callback(process.wait)
        stack.callback(process.kill)
        with _opened(pipes[0], "w", process) as orders, _opened(pipes[1], "r", process) as reports:
            player = Player(contestant, process, orders, reports)
            yield player, player.report()


@contextmanager
def _opened(pipe: str, mode: str, process: "subprocess.Popen[bytes]") -> Iterator[IO[str]]:
    """A pipe; opening one blocks until the other side is there, which it never is where the program fails at once."""
    if mode == "w":
        deadline = time.monotonic() + 60
        while True:
            try:
                handle = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{process.args} did not start") from None
                time.sleep(0.02)
        os.set_blocking(handle, True)
    else:
        handle = os.open(pipe, os.O_RDONLY)
    with os.fdopen(handle, mode) as stream:
        yield stream


def take_turns(
    contestants: Sequence[Contestant],
    rounds: int,
    enough: Callable[[Mapping[str, Sequence[Turn]]], bool] = lambda turns: True,
    warm_up: int = 3,
) -> dict[str, list[Turn]]:
    """The turns of each: `rounds` rounds, and again with programs started anew, up to MOST times, until it is `enough`.

    Two processes of one program may differ by some percent for as long as they live, by where their memory happens to
    lie; none of the turns is thrown away. Who begins changes from round to round. All make as many steps in a turn:
    those that take the first of them about TURN seconds. A round during which other programs took more than QUIET of
    the processors is repeated, up to REPEATS times.
    """
    turns: dict[str, list[Turn]] = {each.name: [] for each in contestants}
    for sitting in range(MOST):
        if sitting and enough(turns):
            break
        with ExitStack() as stack:
            players: list[Player] = []
            steps = 0
            for contestant in tqdm(contestants, desc="starting", unit="program"):
                player, _ = stack.enter_context(playing(contestant))
                tried = player.turn(warm_up)
                steps = steps or max(FEWEST, round(TURN / min(tried.seconds)))
                players.append(player)
            for number in trange(rounds, desc="in turn", unit="round"):
                for name, turn in _round(players if number % 2 else players[::-1], steps).items():
                    turns[name].append(turn)
    return turns


def _round(players: Sequence[Player], steps: int) -> dict[str, Turn]:
    found: dict[str, Turn] = {}
    for _ in range(1 + REPEATS):
        found = {player.contestant.name: player.turn(steps) for player in players}
        if max(turn.others for turn in found.values()) <= QUIET:
            break
    return found


@dataclass(frozen=True, slots=True)
class Whole:
    """A training from its start to its exit, in seconds."""

    to_first_step: float
    after_last_step: float
    peak: Mapping[str, int]  # bytes, until the second step


def whole(contestant: Contestant, steps: int) -> Whole:
    """Runs a contestant, whose command trains `steps` steps, undisturbed."""
    started = time.time()
    with playing(contestant) as (player, first):
        times = [first["time"]]
        second = player.tell("1")
        times.append(second["time"])
        player.orders.write("free\n")
        player.orders.flush()
        times += [player.report()["time"] for _ in range(steps - 2)]
        if player.process.wait():
            raise RuntimeError(f"{contestant.name} ended with {player.process.returncode}: see {contestant.log}")
        return Whole(first["time"] - started, time.time() - times[-1], second["peak"])


def middle(turns: Sequence[Turn]) -> float:
    """Median seconds of a step."""
    return statistics.median(second for turn in turns for second in turn.seconds)


def ratio(turns: Sequence[Turn], *others: Sequence[Turn]) -> float:
    """Median over the rounds: a step beside the mean of the others' in the same round."""
    beside = (statistics.mean(middle([turn]) for turn in row) for row in zip(*others, strict=True))
    return statistics.median(middle([turn]) / other for turn, other in zip(turns, beside, strict=True))


def _busy() -> float:
    """Seconds that all processors together have worked for anybody since the machine started, other guests included."""
    with open("/proc/stat") as stat:
        user, nice, system, _, _, irq, softirq, steal, *_ = (int(each) for each in stat.readline().split()[1:])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
