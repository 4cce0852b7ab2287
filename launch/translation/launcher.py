"""What stands before a script: flags of `accelerate launch` or torchrun, most of which ours take as well."""

from .peer import NOTHING, Outcome, Rule, Settings, needless, own
from .values import whole

PREFIX = "launcher."
"""Before the names of these flags, some of which scripts have too."""
AGAIN = "one for `accelerate launch … -m loraloom.train CONFIG` too"


def processes(settings: Settings) -> int:
    """How many train together, as far as the command line says."""
    for name in ("num_processes", "nproc_per_node"):
        if settings.find(PREFIX + name):
            return max(1, settings.value(PREFIX + name, whole, 1))
    return 1


def _processes(value: int, settings: Settings) -> Outcome:
    words = f"start it with accelerate launch --num_processes {value} -m loraloom.train CONFIG"
    return Outcome(differs=words) if value > 1 else NOTHING


PROCESSES = own(whole, _processes, "loop.batch_size", "`loop.batch_size` counts the samples of all processes")
RULES: dict[str, Rule] = {
    "launcher.num_processes": PROCESSES,
    "launcher.nproc_per_node": PROCESSES,
    "launcher.num_cpu_threads_per_process": needless("`loop.threads` says how many; all cores where it does not"),
}
"""Flags with a meaning here; all others are for our launcher as well."""


def rule_of(name: str) -> Rule:
    """The rule of a launcher's flag."""
    return RULES.get(name, needless(AGAIN))
