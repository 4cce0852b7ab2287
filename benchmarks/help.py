"""Seconds until `loraloom --help`, and the help of each verb, is there: the best of five.

python -m loraloom.benchmarks.help
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from ..configs.command import run_command
from ..launch.cli import VERBS

TRIES = 5


def main(arguments: Sequence[str]) -> int:
    """Prints a table."""
    del arguments
    print("| command | seconds |\n|---|---|")
    for verb in tqdm(["", *VERBS], desc="asking for help", unit="command", leave=False):
        words = [*([verb] if verb else []), "--help"]
        print(f"| `loraloom {' '.join(words)}` | {min(_timed(words) for _ in range(TRIES)):.2f} |", flush=True)
    return 0


def _timed(words: Sequence[str]) -> float:
    program = "import sys; from loraloom.launch.cli import main; sys.exit(main())"
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", program, *words], check=True, stdout=subprocess.DEVNULL, env=os.environ)
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(run_command(main))
