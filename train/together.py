"""What all processes do at the same time: an error of one is raised on each, so that none waits for one that left."""

import atexit
import gc
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..configs.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator


def together(accelerator: "Accelerator", action: Callable[[], None]) -> None:
    """Does it on this process, and raises the UserError of the first process that had one, on every process.

    Nobody returns before all are done. Other errors end their process, and with it the launcher ends the rest.
    """
    outcome: list[UserError | None] = [_error_of(action)]
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        outcome = gather_object(outcome)
    for error in outcome:
        if error is not None:
            raise error


def _error_of(action: Callable[[], None]) -> UserError | None:
    try:
        action()
    except UserError as error:
        return error
    return None


def leave_in_peace() -> None:
    """Before Python ends, the threads of gloo get the time to let go of the tensors of their last work.

    One that does so later finds no interpreter and takes its process down with SIGABRT, after everything went well
    (pytorch/pytorch pull request 179291).
    """

    @atexit.register
    def wait() -> None:
        gc.collect()  # groups that nobody has end their threads themselves
        time.sleep(0.1)  # device meshes live in caches, and so do their groups
