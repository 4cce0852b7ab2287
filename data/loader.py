"""From positions to batches: latents and embeddings from the cache, or pixels from files where there is none."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from ..configs.errors import TrainingError, UserError
from .cache import Store
from .dataset import Dataset
from .order import Order, micro_batch_positions
from .sample import Batch, Sample
from .transforms import Geometry, mask_to_tensor, to_tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

PROMPTS_AT_HAND = 256  # embeddings of captions that are kept in memory, the last ones used
LATENTS_AT_HAND = 64  # the same of images: those of a subject, or 32 MiB of the largest that SDXL makes


@dataclass(frozen=True, slots=True)
class Cached:
    """What can be read instead of computed."""

    latents: Store | None = None
    prompts: Store | None = None
    prompt_key: "Callable[[str], str]" = str  # key of a caption in `prompts`


@dataclass(frozen=True, slots=True)
class Loaded:
    """One sample with its tensors."""

    sample: Sample
    image: "Tensor"  # (3, H, W) pixels, or (1 or 2, C, h, w) moments
    mask: "Tensor | None"  # (1, height, width)
    prompt: "dict[str, Tensor] | None"


class Samples(torch.utils.data.Dataset):
    """The endless sequence of samples; each can be asked for alone, in any process, and is the same to the bit."""

    def __init__(self, dataset: Dataset, order: Order, cached: Cached):
        self.dataset, self.order, self.cached = dataset, order, cached
        self._names = dataset.names
        self._weights = [images.section.loss_weight for images in dataset.images]
        self._keeps_base = [images.section.target == "base" for images in dataset.images]
        self._masked = any(images.mask != "none" for images in dataset.images)
        self._keep_at_hand()

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in ("_prompt", "_latents")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._keep_at_hand()

    def _keep_at_hand(self) -> None:
        self._prompt = lru_cache(PROMPTS_AT_HAND)(self._read_prompt)
        self._latents = lru_cache(LATENTS_AT_HAND)(self._read_latents)

    def __getitem__(self, position: int) -> Loaded:
        sample = self.dataset.sample(position, *self.order[position])
        prompt = None if self.cached.prompts is None else self._prompt(sample.caption)
        if self.cached.latents is None:
            picture, mask = self.dataset.pixels(sample.source, sample.image, sample.geometry)
            return Loaded(sample, to_tensor(picture), mask and mask_to_tensor(mask), prompt)
        entry = self._latents(sample.source, sample.image, sample.geometry)
        return Loaded(sample, entry["moments"], entry.get("mask"), prompt)

    def _read_prompt(self, caption: str) -> "dict[str, Tensor]":
        assert self.cached.prompts is not None
        return self.cached.prompts.get(self.cached.prompt_key(caption))

    def _read_latents(self, source: int, image: int, geometry: Geometry) -> "dict[str, Tensor]":
        assert self.cached.latents is not None
        return self.cached.latents.get(self.dataset.latent_key(source, image, geometry))

    def collate(self, items: Sequence[Loaded]) -> Batch:
        """A Batch from the samples of one micro-batch."""
        samples, images = [item.sample for item in items], torch.stack([item.image for item in items])
        cached = self.cached.latents is not None
        return Batch(
            samples=samples,
            pixels=None if cached else images,
            moments=images if cached else None,
            prompts=[item.prompt for item in items if item.prompt is not None] or None,
            masks=self._masks(items) if self._masked else None,
            loss_weights=torch.tensor([self._weights[sample.source] for sample in samples]),
            keeps_base=[self._keeps_base[sample.source] for sample in samples],
            sources=[self._names[sample.source] for sample in samples],
            files=[self.dataset.location(sample.source, sample.image) for sample in samples],
        )

    @staticmethod
    def _masks(items: Sequence[Loaded]) -> "Tensor":
        """Images without a mask are looked at everywhere."""
        return torch.stack(
            [torch.ones(1, *item.image.shape[-2:]) if item.mask is None else item.mask for item in items]
        )


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of the run's micro-batches a process takes."""

    batch_size: int  # samples of an optimiser step, all processes together
    micro_batch: int
    rank: int = 0
    world: int = 1

    def positions(self, step: int) -> Iterator[list[int]]:
        """Of each micro-batch of this process in a step."""
        for index in range(self.batch_size // (self.micro_batch * self.world)):
            yield list(micro_batch_positions(step, index, self.rank, self.world, self.batch_size, self.micro_batch))


def micro_batches(samples: Samples, share: Share, *, first_step: int, steps: int, workers: int = 0) -> Iterator[Batch]:
    """The micro-batches of one process from `first_step` to `steps`, in order."""
    groups = (positions for step in range(first_step, steps) for positions in share.positions(step))
    if workers == 0:  # not through a DataLoader, which costs more than reading a cached sample
        return (samples.collate([samples[position] for position in positions]) for positions in groups)
    return _through_workers(samples, groups, workers)


class _InWorker(torch.utils.data.Dataset):
    """What goes wrong in a worker is handed over: torch would make a long text of its traceback."""

    def __init__(self, samples: Samples):
        self.samples = samples

    def __getitems__(self, positions: list[int]) -> list[Loaded] | UserError:
        try:
            return [self.samples[position] for position in positions]
        except UserError as error:
            return error

    def collate(self, items: list[Loaded] | UserError) -> Batch | UserError:
        return items if isinstance(items, UserError) else self.samples.collate(items)


def _through_workers(samples: Samples, groups: Iterator[list[int]], workers: int) -> Iterator[Batch]:
    from torch.utils.data import DataLoader

    careful = _InWorker(samples)
    loader = DataLoader(
        careful,
        batch_sampler=groups,
        collate_fn=careful.collate,
        num_workers=workers,
        worker_init_fn=_outlive_signals,
    )
    batches = _begun(loader)
    try:
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:  # the last two where it was handing a batch over
                if "DataLoader worker" not in str(error) and not _codes(batches):
                    raise
                raise TrainingError(_words_of_end(batches)) from error
            if isinstance(batch, UserError):
                raise batch
            yield batch
    finally:
        _end(batches)


def _begun(loader: "Iterable[Batch | UserError]") -> "Iterator[Batch | UserError]":
    """The workers are started, and torch's handler of SIGCHLD taken away: it raises wherever the main thread stands.

    Without it the end of a worker is found within five seconds by who waits for its data.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)
    return batches


def _end(batches: object) -> None:
    """The workers leave now: an error keeps their loader until Python ends, which would wait for the others."""
    end = getattr(batches, "_shutdown_workers", None)
    if end is not None:
        end()


def _codes(batches: object) -> list[int]:
    """Exit codes of the workers that have ended and should not have; a signal's number is below 0."""
    workers = getattr(batches, "_workers", ())
    for worker in workers:
        worker.join(0.2)  # one that was killed a moment ago
    return [worker.exitcode for worker in workers if worker.exitcode]


def _words_of_end(batches: object) -> str:
    """What is known of a worker that was ended from outside."""
    codes = _codes(batches)
    how = f"by {signal.Signals(-codes[0]).name}" if codes and codes[0] < 0 else f"with code {codes[0]}" if codes else ""
    room = "; give /dev/shm more room, or set data.workers=0" if "SIGBUS" in how else ""
    words = "a data worker was ended from outside" + (f" ({how})" if how else "")
    return f"{words}{room}; `loraloom resume` goes on from the last checkpoint"


def _outlive_signals(worker: int) -> None:
    """Ctrl-C, clusters and a terminal that closes send signals to all: without its workers no step could be finished.

    They leave on a second TERM, by which torch ends those of a loader that nobody has closed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in ("SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, lambda *_: os._exit(0)))
