"""`python -m loraloom VERB …`: the same as the command `loraloom`."""

import sys

from .launch.cli import main

if __name__ == "__main__":
    sys.exit(main())
