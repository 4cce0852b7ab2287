"""Running a command: what goes wrong becomes one line each on stderr, no traceback, and an exit code."""

import os
import sys
from collections.abc import Callable, Sequence

from .errors import INTERRUPTED, UserError
from .plain import plain
from .streams import lasting_streams, names_in_utf8


def run_command(main: Callable[[Sequence[str]], int], arguments: Sequence[str] | None = None) -> int:
    """Exit code of a command; any error, or Ctrl-C, becomes lines on stderr instead of a traceback.

    With `LORALOOM_TRACEBACK=1` the traceback of every error comes before them. Python's own faces raise.
    """
    if arguments is None:
        names_in_utf8()
    given = sys.argv[1:] if arguments is None else arguments
    with lasting_streams():  # the exit code tells it even where nobody can read
        try:
            return main(given)
        except Exception as error:
            if os.environ.get("LORALOOM_TRACEBACK", "0") not in ("", "0"):
                import traceback

                traceback.print_exception(error)
            if not isinstance(error, UserError):
                from .faults import tell

                return tell(error, _program(main), given)
            for problem in error.problems:
                print(f"error: {plain(problem)}", file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return INTERRUPTED
        except SystemExit as end:
            from .faults import as_error, tell

            if (error := as_error(end)) is None:
                raise
            return tell(error, _program(main), given)


def _program(main: Callable[[Sequence[str]], int]) -> str:
    """What was started: `loraloom`, or the module behind `python -m`."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = getattr(main, "__module__", "") if getattr(main, "__module__", "") != "__main__" else spec and spec.name
    name = str(name or "loraloom").removesuffix(".__main__")
    return "loraloom" if name.endswith("launch.cli") else name
