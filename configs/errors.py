"""What can go wrong, and the exit code of each kind: input that cannot be used is a UserError, one line each."""

from collections.abc import Sequence

INTERRUPTED = 130  # what shells expect after Ctrl-C: 128 + SIGINT
DONE, OWN_CODE, BAD_INPUT, TRAINING_FAILED, OUT_OF_MEMORY, STOPPED, AFTER_TRAINING, UNEXPECTED = *range(7), 70
"""Exit codes of every command (docs/architecture.md)."""


class UserError(ValueError):
    """Input that cannot be used; `problems` holds one line for each thing that is wrong."""

    exit_code = BAD_INPUT

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class TrainingError(UserError):
    """Training went wrong (loss is not a number, ...); whatever was saved before is still there."""

    exit_code = TRAINING_FAILED


class OutOfMemory(TrainingError):
    """A step, or the base, takes more memory than there is."""

    exit_code = OUT_OF_MEMORY


class AfterTrainingError(UserError):
    """The adapter is trained and saved, but a later step (verifying it, ...) failed."""

    exit_code = AFTER_TRAINING
