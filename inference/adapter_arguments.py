"""Arguments of the verbs of `loraloom adapter`, apart from the verbs: read and checked before torch is imported."""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..configs.arguments import file_and_weight, path_text, positive
from ..configs.choices import did_you_mean
from ..configs.choices import names as choices
from ..configs.dtypes import AUTO, DTYPES
from ..configs.errors import UserError
from ..configs.paths import looked_in
from ..models.base import check_base


class Arguments(NamedTuple):
    """Of one verb."""

    add: Callable[[argparse.ArgumentParser], None]
    examples: Sequence[str]


HOW = {
    "concat": "the weighted sum without loss; the ranks add up",
    "svd": "the nearest to the weighted sum of --rank",
    "ties": "of each change the share --density that is largest, where signs agree (Yadav et al. 2023), at --rank",
    "dare": "a share --density of each change, drawn with --seed and scaled up (Yu et al. 2024), at --rank",
}
"""How several adapters become one."""


def check(verb: str, options: argparse.Namespace) -> None:
    """UserError with what is known to be wrong without torch: files and bases that are not there, weights, formats."""
    if problems := [*_missing(options, weighted=verb == "merge"), *_unknown(options)]:
        raise UserError(problems)


def _missing(options: argparse.Namespace, *, weighted: bool) -> Iterator[str]:
    given = vars(options)
    one_each = [given[name] for name in ("file", "one", "other") if name in given]
    for text in (*one_each, *given.get("files", [])):
        file = file_and_weight(text)[0] if weighted else text
        if not Path(file).exists():
            yield f"{file}: there is no such file{looked_in(file)}"
    for base in (given[name] for name in ("base", "tuned", "original") if given.get(name)):
        yield from check_base(base)


def _unknown(options: argparse.Namespace) -> Iterator[str]:
    form, known = getattr(options, "to", None), choices("adapters.formats")
    if form is not None and form not in known:
        yield f"--to {form}: is no format{did_you_mean(form, known)}; there are: {', '.join(known)}"


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", type=path_text, metavar="FILE", help="adapter file, folder of PEFT's, or checkpoint of a run"
    )
    parser.add_argument("--bake-dora", action="store_true", help="make plain LoRAs of DoRAs; tells what is lost")
    parser.add_argument("--rank", type=positive, default=32, help="of baked modules (32)")
    parser.add_argument("--scale", type=float, help="multiply the change with this")
    parser.add_argument(
        "--without", metavar="REGEX", help="leave out modules, such as ^text_encoder or up_blocks, or words: ^words"
    )
    add_output(parser)


def _add_diff(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("one", type=path_text, metavar="FILE")
    parser.add_argument("other", type=path_text, metavar="FILE")
    parser.add_argument("--base", type=path_text, help="their base, where the files do not tell one that is known")
    parser.add_argument("--json", action="store_true", help="for programs")


def _add_extract(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "tuned", type=path_text, metavar="TUNED", help="pipeline folder, .safetensors checkpoint or hub id"
    )
    parser.add_argument("original", type=path_text, metavar="ORIGINAL", help="the same of what it was trained from")
    parser.add_argument(
        "--min-change", type=float, default=0.0, help="leave layers whose numbers changed by no more (0)"
    )
    add_rank(parser)
    add_output(parser)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files",
        type=path_text,
        nargs="+",
        metavar="FILE",
        help="adapter file, folder of PEFT's, or checkpoint of a run",
    )
    parser.add_argument("--base", type=path_text, help="its base, where the file does not tell one that is known")
    parser.add_argument("--json", action="store_true", help="for programs")


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", type=path_text, nargs="+", metavar="FILE[:WEIGHT]", help="adapter files")
    parser.add_argument("--into-base", action="store_true", help="write the base with the adapters in its weights")
    how = "; ".join(f"{name}: {words}" for name, words in HOW.items())
    parser.add_argument("--how", choices=tuple(HOW), default="concat", help=f"{how} (concat)")
    parser.add_argument("--rank", type=positive, default=32, help="for all but concat (32)")
    parser.add_argument("--density", type=share, default=0.5, help="for ties and dare (0.5)")
    parser.add_argument("--seed", type=int, default=0, help="for dare (0)")
    add_output(parser)


def _add_resize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", type=path_text, metavar="FILE", help="adapter file, folder of PEFT's, or checkpoint of a run"
    )
    add_rank(parser)
    add_output(parser)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=path_text, metavar="FILE", help="adapter file, or folder of PEFT's")
    parser.add_argument(
        "--base",
        type=path_text,
        help="pocket, a pipeline folder, a .safetensors checkpoint or a hub id, where the file does not tell it",
    )
    parser.add_argument("--device", default=AUTO, help="cpu, cuda, mps or xpu (auto: the best one there is), in fp32")


def add_output(parser: argparse.ArgumentParser) -> None:
    """The options that every verb has which writes an adapter."""
    formats = ", ".join(choices("adapters.formats"))
    parser.add_argument("--to", metavar="FORMAT", help=f"{formats} (as the file is)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="type of the tensors (fp32)")
    parser.add_argument(
        "--out", type=path_text, metavar="PATH", help="where it is written (beside FILE, named after the format)"
    )
    parser.add_argument("--base", type=path_text, help="its base, where the file does not tell one that is known")
    parser.add_argument(
        "--force", "--overwrite", action="store_true", help="replace what loraloom wrote and nobody changed"
    )


def add_rank(parser: argparse.ArgumentParser) -> None:
    """How many singular values stay; one of these is needed."""
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--rank", type=positive, help="the same for every module")
    group.add_argument("--energy", type=share, help="as few as hold this share of the squared singular values")
    group.add_argument("--norm", type=share, help="as few as hold this share of the Frobenius norm")


def share(text: str) -> float:
    """The type of a number above 0 and up to 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and up to 1")
    return value


ARGUMENTS: Mapping[str, Arguments] = {
    "convert": Arguments(
        _add_convert,
        [
            "loraloom adapter convert my-dog.safetensors --to kohya",
            "loraloom adapter convert web-ui.safetensors --to peft --out my-dog.peft",
            "loraloom adapter convert runs/my-dog/checkpoints/step-000080 --to kohya",
            "loraloom adapter convert dora.safetensors --to diffusers --bake-dora --rank 32 --base sd15/",
            "loraloom adapter convert my-dog.safetensors --to diffusers --without ^text_encoder --out unet.safetensors",
        ],
    ),
    "diff": Arguments(
        _add_diff,
        [
            "loraloom adapter diff rank-4.safetensors rank-16.safetensors",
            "loraloom adapter diff a.safetensors a.peft",
        ],
    ),
    "extract": Arguments(
        _add_extract,
        [
            "loraloom adapter extract runs/full/dog owner/base --rank 64 --out dog.safetensors",
            "loraloom adapter extract tuned.safetensors base.safetensors --energy 0.99 --to kohya --out x.safetensors",
        ],
    ),
    "inspect": Arguments(
        _add_inspect,
        [
            "loraloom adapter inspect my-dog.safetensors",
            "loraloom adapter inspect downloads/*.safetensors --json",
            "loraloom adapter inspect of-a-small-base.safetensors --base pocket",
        ],
    ),
    "merge": Arguments(
        _add_merge,
        [
            "loraloom adapter merge dog.safetensors:0.8 style.safetensors --base sd15/ --into-base --out merged/",
            "loraloom adapter merge dog.safetensors --base model.safetensors --into-base --out merged.safetensors",
            "loraloom adapter merge dog.safetensors:0.8 style.safetensors:0.5 --out both.safetensors",
            "loraloom adapter merge a.safetensors b.safetensors --how ties --density 0.5 --rank 32 --out m.safetensors",
        ],
    ),
    "resize": Arguments(
        _add_resize,
        [
            "loraloom adapter resize my-dog.safetensors --rank 8 --out my-dog-8.safetensors",
            "loraloom adapter resize my-dog.safetensors --norm 0.95 --out small.safetensors",
            "loraloom adapter resize loha.safetensors --energy 0.99 --base pocket --to diffusers --out l.safetensors",
        ],
    ),
    "verify": Arguments(_add_verify, ["loraloom adapter verify my-dog.safetensors --base pocket"]),
}
"""By verb."""
