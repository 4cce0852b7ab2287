"""The command `loraloom`: a table of verbs, each a module that is imported when its verb is used."""

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from ..configs.command import run_command
from ..configs.errors import UserError


class Verb(NamedTuple):
    """`module.main(arguments) -> int` does the work."""

    module: str
    help: str


VERBS = {
    "init": Verb("loraloom.launch.init", "write a config: a small one for a folder of images, or another trainer's"),
    "plan": Verb("loraloom.train.plan", "show everything that a config would do; trains nothing"),
    "preview": Verb(
        "loraloom.train.preview", "show what the model will see of the images: crops, buckets, masks, captions"
    ),
    "cache": Verb("loraloom.train.cache", "compute latents and prompt embeddings of a config ahead of its training"),
    "train": Verb("loraloom.train.__main__", "train an adapter: CONFIG.yaml [key=value ...]"),
    "resume": Verb("loraloom.train.__main__", "go on with a run from its newest sound checkpoint: RUN_FOLDER"),
    "replay": Verb("loraloom.train.replay", "run one step of a run again and show its images, captions and losses"),
    "runs": Verb("loraloom.train.runs", "list runs, and compare some of them: config, losses, curves, images"),
    "reproduce": Verb("loraloom.train.reproduce", "write the config of an adapter file again, from its header"),
    "sample": Verb("loraloom.inference.__main__", "make images with a base model and adapters"),
    "grid": Verb("loraloom.inference.grid", "compare pictures: checkpoint x weight x prompt x seed …, on one picture"),
    "adapter": Verb(
        "loraloom.inference.adapter.__main__", "look into adapter files, convert, merge, extract, resize, verify them"
    ),
    "convert": Verb("loraloom.inference.convert", "turn a web UI's single file into a pipeline folder, or back"),
    "push": Verb("loraloom.train.push", "upload files and model card of a finished run to the Hugging Face hub"),
    "slurm": Verb("loraloom.launch.slurm", "write a batch script for a cluster that saves, requeues and resumes"),
    "schema": Verb("loraloom.launch.schema", "print the JSON schema of a config, for editors"),
    "doctor": Verb("loraloom.launch.doctor", "what is installed, on which devices, and what is broken"),
}

HELP = """\
loraloom trains adapters (LoRA and relatives, DreamBooth) on diffusion models, and uses them.
One small YAML file is one experiment.

usage: loraloom VERB [arguments]
       loraloom VERB --help | help VERB | --version

{verbs}

examples:
  loraloom init --data photos/ --class "a dog" --name my-dog      writes my-dog.yaml
  loraloom train my-dog.yaml loop.steps=500 loop.seed=1           trains it, with two values changed
  loraloom sample --base pocket --adapter runs/my-dog/my-dog.safetensors:0.8 --prompt "a sks dog"
"""


def main() -> int:
    """The console script. Exit codes: `configs.errors`, and 130 after Ctrl-C."""
    return run_command(run)


def run(arguments: Sequence[str]) -> int:
    """Do what the first argument says with the others."""
    verb, *rest = arguments or ("--help",)
    if verb == "help" and rest and rest[0] not in ("--help", "-h", "help"):
        verb, rest = rest[0], [*rest[1:], "--help"]
    if verb in ("-h", "--help", "help"):
        print(HELP.format(verbs="\n".join(f"  {name:11}{entry.help}" for name, entry in VERBS.items())), end="")
        return 0
    if verb == "--version":
        from .. import __version__

        print(f"loraloom {__version__}")
        return 0
    if verb not in VERBS:
        raise UserError(_unknown(verb))
    return importlib.import_module(VERBS[verb].module).main(_resuming(rest) if verb == "resume" else rest)


def _unknown(verb: str) -> str:
    from ..configs.choices import did_you_mean  # difflib is not needed for anything else here

    return f"{verb!r} is no verb{did_you_mean(verb, VERBS)}; there are: {', '.join(VERBS)} (see loraloom --help)"


def _resuming(arguments: Sequence[str]) -> list[str]:
    """`loraloom resume RUN_FOLDER` is `loraloom train --resume RUN_FOLDER`."""
    if not arguments:
        raise UserError("resume which run? loraloom resume RUN_FOLDER, such as runs/my-dog")
    return ["--resume", *arguments]


if __name__ == "__main__":
    sys.exit(main())
