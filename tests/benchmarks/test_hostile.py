"""Some cases of the fuzz programme keep all promises, and a case is the same whenever it is run."""

import random
import shutil
import subprocess
import sys

import pytest

from loraloom.benchmarks.hostile_files import TARGETS, WITHOUT_RUN, make_sound, mutate


def test_a_mutation_is_made_of_its_draw(tmp_path):
    make_sound(tmp_path / "sound")
    files = [
        file
        for target in TARGETS
        if target.name in WITHOUT_RUN
        for pattern in target.files
        for file in sorted((tmp_path / "sound").glob(pattern))
    ]
    assert len(files) > 10
    for number, file in enumerate(files * 3):
        said = []
        for copy in ("a", "b"):
            (tmp_path / copy).mkdir()
            shutil.copy(file, tmp_path / copy / file.name)
            said.append(mutate(tmp_path / copy / file.name, random.Random(number)))
        one, two = (tmp_path / copy / file.name for copy in ("a", "b"))
        assert said[0] == said[1] and (not one.is_file() or one.stat().st_rdev or one.read_bytes() == two.read_bytes())
        shutil.rmtree(tmp_path / "a")
        shutil.rmtree(tmp_path / "b")


@pytest.mark.slow
def test_two_dozen_cases_keep_all_promises():
    command = [sys.executable, "-m", "loraloom.benchmarks.hostile", "--cases", "24", "--minutes", "2", "--kinds"]
    done = subprocess.run([*command, *WITHOUT_RUN], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "| all | 24 |" in done.stdout
