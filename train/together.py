"""What all processes do at the same time: an error of one is raised on each, so that none waits for one that left."""

import atexit
import functools
import gc
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from ..configs.errors import UserError
from ..configs.processes import Ended, SaidElsewhere, launched
from .launched import check_environment

if TYPE_CHECKING:
    from accelerate import Accelerator


LONGEST_WAIT = timedelta(hours=12)  # of the other processes while the main one makes class images or pictures
SHORT_WAIT = timedelta(minutes=10)  # within a step, where each waits for each


def shards(accelerator: "Accelerator") -> bool:
    """Whether weights are spread over the processes, so that all have to run the model together."""
    from accelerate.utils import DistributedType

    return accelerator.distributed_type == DistributedType.FSDP


def start_processes() -> None:
    """Brings the processes of a launcher together; UserError where accelerate does not see as many as it started."""
    from accelerate.state import PartialState
    from accelerate.utils import parse_flag_from_env

    check_environment()
    leave_in_peace()
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=LONGEST_WAIT)
    check_world(state.num_processes)


def check_world(seen: int) -> None:
    """UserError where a launcher started more processes than know of each other: each would train the same."""
    rank, world = launched()
    if world != seen:
        words = (
            f"the launcher has started {world} processes, and accelerate sees {seen}: without a GPU for each, "
            "set ACCELERATE_USE_CPU=true; in one process, start it without the launcher"
        )
        raise UserError(words) if rank == 0 else SaidElsewhere(Ended(0, UserError.exit_code, [words]))


@contextmanager
def not_for_long(accelerator: "Accelerator") -> Iterator[None]:
    """Within, who waits for the others longer than SHORT_WAIT raises an error: one of them is lost."""
    from torch.distributed.distributed_c10d import _set_pg_timeout, get_backend

    if accelerator.num_processes == 1 or not any(known in get_backend() for known in ("gloo", "nccl")):
        yield
        return
    _set_pg_timeout(SHORT_WAIT)
    try:
        yield
    finally:
        _set_pg_timeout(LONGEST_WAIT)


def check_shared(accelerator: "Accelerator", folders: Mapping[str, Path]) -> None:
    """UserError where machines that train together do not see the same folders, each under the name of its setting."""
    if accelerator.num_processes == 1:
        return
    from accelerate.utils import broadcast_object_list, gather_object

    if len(set(gather_object([socket.gethostname()]))) == 1:
        return
    for setting, folder in folders.items():
        with ExitStack() as stack:
            names = [""]

            def leave_mark(folder: Path = folder, stack: ExitStack = stack, names: list[str] = names) -> None:
                if accelerator.is_main_process:
                    folder.mkdir(parents=True, exist_ok=True)
                    mark = stack.enter_context(tempfile.NamedTemporaryFile(dir=folder, prefix=".loraloom-shared-"))
                    names[0] = Path(mark.name).name

            def look(setting: str = setting, folder: Path = folder, names: list[str] = names) -> None:
                if not (folder / names[0]).is_file():
                    raise UserError(
                        f"{setting} {folder} is not the same folder on {socket.gethostname()} as on the first machine: "
                        "all machines need one that they share"
                    )

            together(accelerator, leave_mark)
            broadcast_object_list(names)
            together(accelerator, look)


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


@functools.cache
def leave_in_peace() -> None:
    """Before Python ends, the threads of gloo get the time to let go of the tensors of their last work.

    One that does so later finds no interpreter and takes its process down with SIGABRT, after everything went well
    (pytorch/pytorch pull request 179291).
    """

    @atexit.register
    def wait() -> None:
        gc.collect()  # groups that nobody has end their threads themselves
        time.sleep(0.1)  # device meshes live in caches, and so do their groups
