"""Without the remarks of libraries that are of no use here: on a torchvision that nothing needs, on long prompts."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging


@contextmanager
def quietly() -> Iterator[None]:
    """transformers and diffusers say errors only, for the length of a block."""
    with ExitStack() as stack:
        for logging in (transformers_logging, diffusers_logging):
            stack.callback(logging.set_verbosity, logging.get_verbosity())
            logging.set_verbosity_error()
        yield
