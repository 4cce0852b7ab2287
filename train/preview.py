"""loraloom preview CONFIG: what the model will see of the images, before anything is trained."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..configs.arguments import Parser, add_config, path_text, positive
from ..configs.command import run_command
from ..configs.imports import importing
from ..configs.loader import load_config
from ..configs.words import counted

HELP = """\
Write a page that shows what the model will see of the images: how each is cut and scaled for
its bucket, where masks let it look, and the captions with all rules applied. Nothing is
trained, and no weights are loaded."""
EXAMPLES = """\
It writes preview.html, one file to open in a browser, and sheet-WIDTHxHEIGHT.png for each
bucket: its first 48 images at a glance. The image folder and the run folder stay as they are.

Look for heads that are cut off, captions that say something else than you meant, buckets with
a single image, and small images that are enlarged. What to change then:
  data.crop=random data.variants=8   other places than the middle
  data.resolution=768                more, or less, of the details
  data.buckets.step=32               finer buckets cut less away

examples:
  loraloom preview my-dog.yaml
  loraloom preview my-dog.yaml data.buckets.step=32 --num-images 200 --out finer"""


def main(arguments: Sequence[str]) -> int:
    """Writes page and sheets and says where they are; exit code 2 with all problems if the run could not start."""
    options = _parser().parse_intermixed_args(list(arguments))
    config = load_config(options.config, options.overrides)
    folder = Path(options.out or f"{Path(config.output.dir)}-preview")
    with importing():
        from .preview_files import write_preview

    preview = write_preview(config, folder, options.num_images)
    shown = sum(len(bucket.views) for bucket in preview.buckets)
    sheets = counted(len(preview.buckets), "contact sheet")
    print(f"{shown} of {counted(preview.num_images, 'image')}: open {folder / 'preview.html'}")
    print(f"{sheets} beside it: {', '.join(bucket.sheet for bucket in preview.buckets)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="loraloom preview",
        description=HELP,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config(parser, example="data.crop=random")
    parser.add_argument("--num-images", metavar="N", type=positive, default=48, help="on the page, evenly taken (48)")
    parser.add_argument(
        "--out", type=path_text, metavar="FOLDER", help="where to write (beside the run folder: <output.dir>-preview)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
