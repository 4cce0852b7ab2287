"""python -m loraloom.inference: pictures from a base and adapters, as files that say how they were made."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..configs.arguments import Parser, path_text, positive
from ..configs.command import run_command
from ..configs.errors import UserError
from ..configs.imports import importing
from ..configs.processes import joined
from ..configs.words import counted
from .pictures.arguments import add_request, given, use_threads, writable

LARGEST_GRID = 400  # pictures on one
OUT = "folder for the images; without it runs/samples, or runs/again with --from, behind those that are there"
EPILOG = """\
examples:
  loraloom sample --adapter runs/demo/sks.safetensors:0.8 --prompt "a sks creature"
  loraloom sample --base sd15/ --adapter a.safetensors --adapter b.safetensors:0.5 --prompt "a sks dog" --fuse
  loraloom sample --prompt "a (sks:1.2) dog <lora:dog:0.8>" --weighted --adapter-folder loras
  loraloom sample requests.yaml --out runs/many          many requests; run it again to go on where it stopped
  loraloom sample --from runs/many/0007.png              the same picture again
  accelerate launch -m loraloom.inference requests.yaml --threads 8      the same pictures, by several processes

requests.yaml:
  base: pocket                                           # holds for all
  adapters: [{file: a.safetensors, weight: {unet: {down: 0.5, mid: 1.0}, text_encoder: 0.7}, start: 0.3}]
  requests:
    - {prompt: "a red star", num_images: 4, seed: 7}
    - {prompt: "a green heart", guidance: 6, scheduler: euler}
"""


def main(arguments: Sequence[str]) -> int:
    """Samples, writes the files as they come, and says where they are."""
    with joined():
        return _make(_parser().parse_args(list(arguments)))


def _make(options: argparse.Namespace) -> int:
    from .pictures.prompts import advise, with_named_adapters
    from .pictures.request import missing_files

    requests = with_named_adapters(_requests(options), options.adapter_folder)
    advise(requests)
    if problems := missing_files(requests):
        raise UserError(problems)
    folder = writable(options.out or ("runs/samples" if options.again is None else "runs/again"))
    with importing():  # all that can be known to be wrong without torch is known
        from .pictures.batch import announce, behind, check_sheet, make_together, pictures_of, sheet_of, work_of
        from .pictures.png import SHEET, image_grid, save_png
        from .pictures.sampler import Sampler

    use_threads(next((request.threads for request in requests if request.threads), None))
    sampler = Sampler()
    work = work_of(requests, sampler, folder)
    if options.out is None and not options.overwrite:
        work = behind(work, sampler)
    check_sheet(folder / sheet_of(work), "sample", options.overwrite)
    announce(sampler.words(requests))
    done = make_together(work, sampler, "sampling", options.overwrite)
    if done.is_main:
        count = sum(len(each.files) for each in work)
        images = [*pictures_of(work)] if count <= LARGEST_GRID else []
        columns = max(request.num_images for request in requests) if len(requests) > 1 else min(count, 8)
        same, sheet = len({image.size for image in images}) == 1, sheet_of(work)
        if same:
            grid = image_grid(images, columns)
            save_png(grid, folder / sheet, by="sample", over=options.overwrite, marks={SHEET: "sample"})
        there = (
            f" ({done.found} {'was' if done.found == 1 else 'were'} there already)"
            if done.found and done.processes == 1
            else ""
        )
        there += f", by {done.processes} processes" if done.processes > 1 else ""
        grid = f", all on {folder / sheet}" if same else ""
        first, last = work[0].files[0].name, work[-1].files[-1].name
        named = "" if options.out is not None else f" ({first})" if first == last else f" ({first} to {last})"
        print(f"{counted(count, 'image')} in {folder}{named}{there}{grid}")
    return 0


def _requests(options: argparse.Namespace) -> list[Any]:
    """From the YAML file, the picture, or the prompts; what is given on the command line holds over both."""
    from .pictures.png import request_in
    from .pictures.request import PictureRequest, read_requests, validated

    said = given(options)
    sources = [options.requests is not None, options.again is not None, bool(options.prompt)]
    if sum(sources) != 1:
        raise UserError("say what to sample by one of: a YAML file of requests, --from PICTURE, --prompt")
    if options.requests is not None:
        if options.num_images is not None:
            said["num_images"] = options.num_images
        return read_requests(Path(options.requests), over=said)
    if options.again is not None:
        said["num_images"] = options.num_images or 1
        asked = request_in(Path(options.again))
        asked |= {"device": "cpu"} if "threads" in asked and asked.get("device") is None else {}  # the same bits again
        return [validated(PictureRequest, asked | said, options.again, literal=True)]
    said["num_images"] = options.num_images or 4
    return [validated(PictureRequest, said | {"prompt": prompt}, "command line") for prompt in options.prompt]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="loraloom sample",
        description="Sample images from a base model with adapters. Every PNG holds its whole request.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("requests", type=path_text, nargs="?", metavar="REQUESTS.yaml", help="many requests in a file")
    parser.add_argument(
        "--from", type=path_text, dest="again", metavar="PICTURE", help="make a picture of ours again, from its PNG"
    )
    parser.add_argument("--prompt", action="append", default=[], help="may be given again: one row of the grid each")
    parser.add_argument("--num-images", type=positive, help="of each prompt (4)")
    add_request(parser)
    parser.add_argument("--out", type=path_text, help=OUT)
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
