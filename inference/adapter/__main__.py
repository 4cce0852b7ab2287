"""python -m loraloom.inference.adapter VERB FILE…: what adapter files hold, and other files made of them."""

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType

from ...configs.choices import find, names
from ...configs.errors import UserError, run_command

VERBS = "inference.adapter"
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
  loraloom adapter merge my-dog.safetensors:0.8 --base runwayml/stable-diffusion-v1-5 --out merged/
"""


def main(arguments: Sequence[str]) -> int:
    """Does what the first argument says with the others."""
    verb, *rest = arguments or ("--help",)
    verbs = [name for name in names(VERBS) if name != "__main__"]
    if verb in ("-h", "--help", "help"):
        lines = (f"  {name:10}{find(VERBS, name).HELP}" for name in verbs)
        print(HELP.format(verbs="\n".join(lines)), end="")
        return 0
    if verb not in verbs:
        raise UserError(f"{verb!r} is no verb of loraloom adapter; there are: {', '.join(verbs)}")
    module = find(VERBS, verb)
    return module.run(_parser(verb, module).parse_intermixed_args(rest))


def _parser(verb: str, module: ModuleType) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"loraloom adapter {verb}",
        description=module.HELP[0].upper() + module.HELP[1:] + ".",
        epilog="examples:\n" + "\n".join(f"  {line}" for line in module.EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
