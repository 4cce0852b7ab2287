"""python -m loraloom.inference.adapter VERB FILE…: what adapter files hold, and other files made of them."""

import argparse
import sys
from collections.abc import Sequence

from ...configs.arguments import Parser
from ...configs.choices import find
from ...configs.command import run_command
from ...configs.errors import UserError
from ...configs.imports import importing
from ..adapter_arguments import ARGUMENTS, check

VERBS = {
    "convert": "write the same adapter in another format or type",
    "diff": "compare two adapters by the changes that they make, whatever their formats and ranks",
    "extract": "make a LoRA of the difference between two checkpoints",
    "inspect": "show what a file holds: method, ranks, blocks and how strong they are, metadata",
    "merge": "put adapters into a base, or several into one adapter",
    "resize": "make a LoRA of another rank, fixed or by how much of it shall stay",
    "verify": "prove that a file does in its base what it says",
}
"""The modules beside this one, each imported when its verb is used."""

HELP = """\
Look into adapter files, convert them, mix them, and prove what they hold.

usage: loraloom adapter VERB [arguments]
       loraloom adapter VERB --help

{verbs}

A file may be in any format that loraloom reads (diffusers, kohya and LyCORIS, PEFT's folders, its own), and is never
changed. Pickles (.bin, .pt, .ckpt) are never opened.

examples:
  loraloom adapter inspect my-dog.safetensors
  loraloom adapter convert my-dog.safetensors --to kohya
  loraloom adapter merge my-dog.safetensors:0.8 --base stable-diffusion-v1-5/stable-diffusion-v1-5 --out merged/
"""


def main(arguments: Sequence[str]) -> int:
    """Does what the first argument says with the others."""
    verb, *rest = arguments or ("--help",)
    if verb == "help" and rest and rest[0] in VERBS:
        verb, rest = rest[0], ["--help"]
    if verb in ("-h", "--help", "help"):
        print(HELP.format(verbs="\n".join(f"  {name:10}{line}" for name, line in VERBS.items())), end="")
        return 0
    if verb not in VERBS:
        raise UserError(f"{verb!r} is no verb of loraloom adapter; there are: {', '.join(VERBS)}")
    options = _parser(verb).parse_intermixed_args(rest)
    check(verb, options)
    with importing():
        module = find("inference.adapter", verb)
    return module.run(options)


def _parser(verb: str) -> argparse.ArgumentParser:
    arguments = ARGUMENTS[verb]
    parser = Parser(
        prog=f"loraloom adapter {verb}",
        description=VERBS[verb][0].upper() + VERBS[verb][1:] + ".",
        epilog="examples:\n" + "\n".join(f"  {line}" for line in arguments.examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
