"""Programs take turns: real processes with a real optimiser, which know nothing of it."""

import os
import sys

import pytest

from loraloom.benchmarks.turns import MOST, Contestant, middle, playing, take_turns, whole

PROGRAM = """
import sys, time, torch
weights = torch.nn.Parameter(torch.ones(100))
torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=1).step()  # tried out: not a step
optimizer = torch.optim.SGD([weights], lr=0.1)
for step in range(int(sys.argv[1])):
    time.sleep(float(sys.argv[2]))
    weights.sum().backward()
    optimizer.step()
open(sys.argv[3], "w").write(str(step + 1))
"""


@pytest.fixture
def contestant(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)

    def contestant(name: str, steps: int, pause: float) -> Contestant:
        command = [sys.executable, str(program), str(steps), str(pause), str(tmp_path / f"{name}.done")]
        return Contestant(name, command, tmp_path / f"{name}.log", os.environ)

    return contestant


@pytest.mark.slow
def test_turns_are_as_long_as_the_program_takes_and_nobody_goes_on_alone(contestant, tmp_path):
    quick, slow = contestant("quick", 10_000, 0.01), contestant("slow", 10_000, 0.03)
    turns = take_turns([quick, slow], rounds=2)
    assert {name: len(found) for name, found in turns.items()} == {"quick": 2, "slow": 2}
    assert 0.01 <= middle(turns["quick"]) < 0.03 <= middle(turns["slow"]) < 0.06
    assert not (tmp_path / "quick.done").exists()  # they were ended, not waited for
    assert all(turn.peak["process"] > 2**20 for found in turns.values() for turn in found)


@pytest.mark.slow
def test_programs_are_started_anew_until_it_is_enough(contestant):
    asked: list[int] = []

    def enough(turns):
        asked.append(len(turns["one"]))
        return len(asked) == 2

    turns = take_turns([contestant("one", 10_000, 0.01)], rounds=2, enough=enough)
    assert asked == [2, 4]
    assert len(turns["one"]) == 4
    ever = take_turns([contestant("one", 10_000, 0.01)], rounds=1, enough=lambda turns: False)
    assert len(ever["one"]) == MOST


def test_a_whole_training_comes_to_its_end(contestant, tmp_path):
    found = whole(contestant("alone", 4, 0.01), 4)
    assert (tmp_path / "alone.done").read_text() == "4"
    assert found.to_first_step > 0.01
    assert found.after_last_step > 0


def test_a_program_that_fails_is_named_with_what_it_said(contestant, tmp_path):
    broken = contestant("broken", 4, 0.01)
    broken.command = [sys.executable, str(tmp_path / "nothing.py")]
    with pytest.raises(RuntimeError, match=r"(?s)broken ended with 1.*nothing\.py"), playing(broken):
        pass
