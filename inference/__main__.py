"""python -m loraloom.inference: pictures from a base and adapters, as files that say how they were made."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..configs.arguments import positive
from ..configs.errors import UserError, run_command
from .pictures.arguments import add_request, given, use_threads

LARGEST_GRID = 400  # pictures on one
EPILOG = """\
examples:
  loraloom sample --adapter runs/demo/sks.safetensors:0.8 --prompt "a sks creature"
  loraloom sample --base sd15/ --adapter a.safetensors --adapter b.safetensors:0.5 --prompt "a sks dog" --fuse
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
    options = _parser().parse_args(list(arguments))
    folder = writable(options.out)

    from .pictures.batch import make, pictures_of, process, wait_for_all, work_of
    from .pictures.png import image_grid
    from .pictures.request import missing_files
    from .pictures.sampler import Sampler

    requests = _requests(options)
    if problems := missing_files(requests):
        raise UserError(problems)
    use_threads(next((request.threads for request in requests if request.threads), None))
    rank, processes = process()
    sampler = Sampler(options.device)
    work = work_of(requests, sampler, folder)
    try:
        done = make(work, sampler, "sampling", rank, processes)
    except KeyboardInterrupt:
        print(f"what is done is in {folder}; the same command goes on from there", file=sys.stderr)
        raise
    if processes > 1:
        wait_for_all(options.device)
    if rank == 0:
        images = [*pictures_of(work)]
        columns = max(request.num_images for request in requests) if len(requests) > 1 else min(len(images), 8)
        same = len({image.size for image in images}) == 1 and len(images) <= LARGEST_GRID
        if same:
            image_grid(images, columns).save(folder / "grid.png")
        there = f" ({done.found} were there already)" if done.found else ""
        there += f", by {processes} processes" if processes > 1 else ""
        grid = f", all on {folder / 'grid.png'}" if same else ""
        print(f"{len(images)} images in {folder}{there}{grid}")
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
        return [validated(PictureRequest, request_in(Path(options.again)) | said, options.again)]
    said["num_images"] = options.num_images or 4
    return [validated(PictureRequest, said | {"prompt": prompt}, "command line") for prompt in options.prompt]


def writable(name: str) -> Path:
    """A folder that is there and can be written."""
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be made ({error.strerror})") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--out {folder}: cannot be written")
    return folder


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loraloom sample",
        description="Sample images from a base model with adapters. Every PNG holds its whole request.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("requests", nargs="?", metavar="REQUESTS.yaml", help="many requests in a file")
    parser.add_argument("--from", dest="again", metavar="PICTURE", help="make a picture of ours again, from its PNG")
    parser.add_argument("--prompt", action="append", default=[], help="may be given again: one row of the grid each")
    parser.add_argument("--num-images", type=positive, help="of each prompt (4)")
    add_request(parser)
    parser.add_argument("--out", default="runs/samples", help="folder for the images (runs/samples)")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
