"""A picture as a file asks for it: everything that decides its pixels, in YAML, on the command line and in a PNG."""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from ...configs.bounded import LARGEST, MIB, open_regular
from ...configs.document import Document, dotted, merge, read_document
from ...configs.dtypes import ChosenDType
from ...configs.errors import UserError
from ...configs.paths import looked_in
from ...configs.problems import explain, keys_of
from ...configs.section import AS_IT_IS, Denoising, PathText, Revision, Section, Seed, Threads, Words
from ...models.base import EMBEDDED, check_base
from ..weighted_file import AdapterFile

MOST_PICTURES = 100_000
"""Of one command: all of them are planned, and looked for, before the first is made."""
Side = Annotated[int, Field(ge=8, le=16_384)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class AdapterChoice(Section):
    """An adapter, and how strongly it counts."""

    file: PathText
    weight: float | dict[str, Any] = 1.0
    """A number, or numbers by component and block: `{unet: {down: 0.5, mid: 1.0}, text_encoder: 0.7}`."""
    start: Fraction = 0.0
    """Fraction of the denoising at which it comes into the denoiser."""
    end: Fraction = 1.0
    """Fraction of the denoising at which it goes out again."""
    sha256: str | None = None
    """Of the file; where it is given and differs, the picture is not made."""

    @classmethod
    def parse(cls, text: str) -> "AdapterChoice":
        """`path.safetensors` or `path.safetensors:0.8`."""
        asked = AdapterFile.parse(text)
        return cls(file=str(asked.file), weight=asked.weight)


class ControlChoice(Section):
    """A ControlNet, and the picture that it follows."""

    model: PathText
    """A folder, a `.safetensors` file, or a hub id with its commit, `owner/name@1f2e…`."""
    image: PathText
    scale: float = 1.0


class PictureRequest(Section):
    """Some pictures of one prompt. The seed of picture k is `seed + k`."""

    prompt: Words
    negative_prompt: Words = ""
    seed: Seed = 0
    num_images: Annotated[int, Field(ge=1, le=MOST_PICTURES)] = 1
    steps: Denoising = 20
    guidance: Annotated[float, Field(ge=-1000, le=1000)] = 4.0
    """Classifier-free guidance scale; 1 and below: none."""
    guidance_until: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of the steps after which it samples without guidance, at half the cost."""
    width: Side | None = None
    """Pixels; the base's own, or the image's, when it is not given."""
    height: Side | None = None
    scheduler: str = "dpmsolver++"
    base: PathText = "pocket"
    revision: Revision | None = None
    dtype: ChosenDType = "auto"
    """Type of the weights; `auto` is bf16 or fp16 on a GPU, and fp32 elsewhere."""
    device: str | None = None
    """`cpu`, `cuda`, `mps` or `xpu`; the best one there is when it is not given. The bits depend on it."""
    adapters: list[AdapterChoice] = []
    fuse: bool = False
    """Whether the adapters are added to the base's weights: faster, and other bits."""
    attention: str = "sdpa"
    """What computes attention: torch's own, `auto`, or a back-end of diffusers such as `flash` or `xformers`."""
    compile: bool = False
    """Whether the denoiser's repeated blocks are compiled: slow to begin, then faster, and other bits."""
    clip_skip: Annotated[int, Field(ge=0, le=64)] = 0
    token_windows: Annotated[int, Field(ge=1, le=64)] = 1
    """Windows of 75 tokens that a prompt may fill."""
    weighted: bool = False
    """Whether the prompt has weights in compel's syntax: `a (red)1.4 star`."""
    image: PathText | None = None
    """Image-to-image: the picture that it begins with."""
    mask: PathText | None = None
    """Where that picture may change, white."""
    strength: Annotated[float, Field(gt=0, le=1)] = 0.8
    """How much of the denoising that picture goes through."""
    controls: list[ControlChoice] = []
    micro_batch: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Pictures of one forward pass, which the bits depend on: 4 for small bases, 1 for others, when it is not given."""
    place: Annotated[int, Field(ge=0, le=LARGEST)] = 0
    """Of picture 0 in its forward pass; a PNG says it of its own."""
    inputs: dict[PathText, str] = {}
    """File -> SHA-256, of pictures and ControlNets; where one differs, the picture is not made."""
    base_mark: str | None = None
    """What the files of a local base were: names, sizes and times."""
    threads: Threads | None = None
    """CPU threads, which the bits depend on; all cores when it is not given."""

    def pinned(self, **facts: Any) -> dict[str, Any]:
        """What a PNG says of it: everything, with the hashes of all files, and `facts` that were open."""
        adapters = [a.model_copy(update={"sha256": file_hash(a.file)}) for a in self.adapters]
        inputs = {name: file_hash(name) for name in self.inputs_here()}
        update = {"adapters": adapters, "inputs": inputs, "base_mark": _mark(self.base), **facts}
        return self.model_copy(update=update).model_dump(exclude_none=True)

    def part(self, first: int, count: int, size: int) -> "PictureRequest":
        """Some of the pictures, with the places that they have in forward passes of `size`."""
        place = (self.place + first) % size
        return self.model_copy(update={"seed": self.seed + first, "num_images": count, "place": place})

    def files(self) -> list[str]:
        """The files of this machine that it needs, without the base."""
        return [*(a.file for a in self.adapters), *self.inputs_here()]

    def inputs_here(self) -> list[str]:
        """Those of them that are no adapters: pictures, and ControlNets that lie here."""
        nets = [control.model for control in self.controls if Path(control.model).exists()]
        named = [self.image, self.mask, *(control.image for control in self.controls), *nets]
        return [name for name in named if name]

    def check(self) -> None:
        """UserError for what can be seen before anything is loaded: files, and how the prompts are written."""
        if problems := self.changed_files():
            raise UserError(problems)
        if self.weighted:
            from ...models.weighted import check_syntax  # needs compel, which is an extra

            for prompt in (self.prompt, self.negative_prompt):
                check_syntax(prompt)

    def changed_files(self) -> list[str]:
        """One line for each file that is another one than was asked for."""
        asked = {a.file: a.sha256 for a in self.adapters if a.sha256} | self.inputs
        there = {name: digest for name, digest in asked.items() if Path(name).exists()}
        return [
            f"{name}: is another file than the one that was asked for (its hash differs)"
            for name, digest in there.items()
            if file_hash(name) != digest
        ]


def read_requests(file: Path, over: Mapping[str, Any]) -> list[PictureRequest]:
    """The requests of a YAML file: `requests:` is their list, what stands beside it holds for all of them.

    What is `over` the file holds for all, whatever it says. UserError with one line for each problem, as of a config.
    """
    document = read_document(file)
    values = dict(document.values)
    listed = values.pop("requests", None)
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{file}: should have a list `requests:`, each with a prompt at least")
    found, problems = [], list(document.problems)
    for index, own in enumerate(listed):
        if not isinstance(own, dict):
            problems.append(f"{document.where(('requests', index), str(file))}: should be a mapping with a prompt")
            continue
        merged = merge(values, own) | dict(over)
        request, words = _checked(merged, document, str(file), index)
        found += [] if request is None else [request]
        problems += words
    if problems:
        raise UserError(list(dict.fromkeys(problems)))
    return found


def _checked(
    values: Mapping[str, Any], document: Document, name: str, index: int
) -> tuple[PictureRequest | None, list[str]]:
    try:
        return PictureRequest.model_validate(values), []
    except ValidationError as error:
        problems = []
        for details in error.errors(include_url=False):
            path, words = explain(details, dict(keys_of(PictureRequest, ())))
            own = ("requests", index, *path)
            where = path if path[:1] in document.origins and own[:3] not in document.origins else own
            problems.append(f"{document.where(where, name)}: {dotted(where)}: {words}")
        return None, problems


def validated(kind: Any, values: Mapping[str, Any], name: str, *, literal: bool = False) -> Any:
    """A section from values that came from `name`; `literal`: its paths are as they are, since a program wrote them.

    UserError with one line for each problem.
    """
    try:
        return kind.model_validate(values, context=AS_IT_IS if literal else None)
    except ValidationError as error:
        found = [explain(details, dict(keys_of(kind, ()))) for details in error.errors(include_url=False)]
        raise UserError([f"{name}: {dotted(path)}: {words}" for path, words in found]) from error


def _mark(base: str) -> str | None:
    """Of a local base; other files under the same name make other pictures."""
    path = Path(base)
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    if base in EMBEDDED or not path.exists():
        return None
    found = [(str(each), each.stat().st_size, each.stat().st_mtime_ns) for each in files]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


@functools.cache
def file_hash(name: str) -> str:
    """SHA-256 of a file, or of all files of a folder. UserError where there is none."""
    file = Path(name)
    files = sorted(each for each in file.rglob("*") if each.is_file()) if file.is_dir() else [file]
    digest = hashlib.sha256()
    for each in files:
        try:
            with open_regular(each) as stream:
                for chunk in iter(lambda: stream.read(MIB), b""):
                    digest.update(chunk)
        except OSError as error:
            raise UserError(f"{each}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def missing_files(requests: Sequence[PictureRequest]) -> list[str]:
    """One line for each file that is not there, and for each base that cannot be one."""
    bases = [problem for base in dict.fromkeys(request.base for request in requests) for problem in check_base(base)]
    names = dict.fromkeys(name for request in requests for name in request.files())
    return bases + [f"{name}: no such file{looked_in(name)}" for name in names if not Path(name).exists()]
