"""Several adapters on one pipeline: loaded, weighed, switched, fused and taken out again without a trace.

`engine.adapters` is the `Mixing` of an engine. The pipeline's own methods (`set_adapters`, `get_list_adapters`, …) work
on the same adapters; docs/lora-api.md says which of them is which.
"""

import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..adapters import active
from ..adapters.artifact import AdapterArtifact
from ..adapters.format import read
from ..adapters.peft_adapters import install
from ..adapters.titles import title_of
from ..adapters.weighing import Weight, check_rotations, weights_of
from ..configs.choices import did_you_mean
from ..configs.errors import UserError
from ..models.family import ModelFamily, Parts
from .adapter_file import format_names
from .checkpoint import is_checkpoint, read_checkpoint
from .fused import Fused
from .hotswap import prepare, swap
from .words import Words, named_words

_A_MODULE, _SOME_PARAMETERS = nn.ModuleDict(), nn.ParameterDict()


class Mixing:
    """The adapters of one pipeline, by name."""

    def __init__(self, family: ModelFamily, parts: Parts, replace_part: Callable[[str, Any], None]):
        """`replace_part` puts another tokenizer into the pipelines."""
        self.family, self.parts = family, parts
        self.weights: dict[str, Weight] = {}
        """As they were set last; adapters that the pipeline loaded itself count fully until they are set here."""
        self._words = Words(family, parts, replace_part)
        self._fused: Fused | None = None
        self._target_rank: int | None = None
        self.exact = False
        """Whether adapters keep the float32 in which they trained on a base of half precision: to verify them."""

    def __repr__(self) -> str:
        active = self.get_active_adapters()
        names = ", ".join(f"{name}{'' if name in active else ' (off)'}" for name in self.get_names())
        return f"<Mixing of {names or 'no adapters'}{', fused' if self.is_fused else ''}>"

    # ------------------------------------------------------------------------ loading

    def load_adapter(self, file: str | Path, adapter_name: str | None = None, weight: Weight = 1.0) -> AdapterArtifact:
        """Loads a file of any format, or a run's checkpoint, active beside what is there with this weight.

        Its name is by default the file's.

        UserError for a file that does not fit this base, or a name that is taken.
        """
        self._check_not_fused()
        file = Path(file)
        name = adapter_name or self._free_name(file)
        if not re.fullmatch(r"\w+", name):
            raise UserError(f"the name {name!r}: should be letters, digits and _ (PEFT keeps adapters by it)")
        if _is_attribute(name):
            raise UserError(f"the name {name!r} is one of PyTorch's own words; take another, such as {name}_1")
        if name in self.get_names():
            raise UserError(f"there is an adapter {name!r} already; give the new one another name, or delete it first")
        artifact = named_words(self._read(file), title_of(file))
        _check_weight(file, artifact, weight)
        held = active.switches([*self.models().values()])  # PEFT activates the new one alone
        try:
            self._words.install(name, artifact)
            install(artifact, self.parts, name, exact=self.exact)
        except (RuntimeError, ValueError) as error:
            self._take_out([name])
            active.switch(held)
            raise UserError(f"{file}: does not fit this base ({str(error).splitlines()[0]})") from error
        if artifact.modules:
            if self._target_rank is not None:
                prepare(self.parts[self.family.denoiser], self._target_rank)
            active.switch(held)
            resolved = weights_of(weight, self._keys(name))
            for part, model in self._carriers().items():
                active.add(part, model, name, resolved)
            self.weights[name] = weight
        return artifact

    def check_adapter(self, file: str | Path, weight: Weight = 1.0) -> None:
        """UserError for a file that `load_adapter` would refuse, as far as reading it tells; nothing is loaded."""
        _check_weight(Path(file), self._read(Path(file)), weight)

    def _read(self, file: Path) -> AdapterArtifact:
        return read_checkpoint(file) if is_checkpoint(file) else read(file, format_names(self.family, self.parts))

    def _free_name(self, file: Path) -> str:
        """PEFT keeps adapters in module dictionaries, whose keys hold no dot."""
        stem = re.sub(r"\W+", "_", title_of(file)) or "_"
        taken, names = self.get_names(), itertools.chain([stem], (f"{stem}_{k}" for k in itertools.count(1)))
        return next(name for name in names if name not in taken and not _is_attribute(name))

    def hotswap(self, file: str | Path, adapter_name: str) -> None:
        """Puts the weights of a file in the place of an adapter, in the same memory: a compiled UNet stays compiled.

        Only LoRA in the denoiser, in the modules that the present one has; for other ranks say `enable_hotswap` before
        the first adapter is loaded. UserError for adapters with a text encoder, which diffusers cannot swap either.
        """
        self._check_not_fused()
        self._check_known([adapter_name])
        denoiser = self.family.denoiser
        artifact = self._read(Path(file))
        carriers = [part for part, names in self.get_list_adapters().items() if adapter_name in names]
        if carriers != [denoiser] or adapter_name in self._words.adapters:
            raise UserError(
                f"{adapter_name!r} is more than layers of the {denoiser}, and only those can be hot-swapped: "
                "text encoders are not compiled, so delete it and load the new one"
            )
        swap(denoiser, self.parts[denoiser], artifact, Path(file), adapter_name)

    def enable_hotswap(self, target_rank: int) -> None:
        """From the next adapter on, all have this rank (filled up with zeros) and scales that can change in place."""
        if self.get_names():
            raise UserError("say enable_hotswap before the first adapter is loaded")
        self._target_rank = target_rank

    # ------------------------------------------------------------------------ switching

    def set_adapters(self, weights: Mapping[str, Weight]) -> None:
        """These adapters count, and no others, each with a weight for all of it, by component or by block."""
        self._check_not_fused()
        self._check_known(list(weights))
        carriers = self._carriers()
        resolved = {name: weights_of(weight, self._keys(name)) for name, weight in weights.items()}
        for name, own in resolved.items():
            rotated = [key for part, model in carriers.items() for key in active.rotated_keys(part, model, name)]
            check_rotations(repr(name), own, rotated)
        for part, model in carriers.items():
            active.activate(part, model, resolved)
        self.weights |= weights

    @contextmanager
    def weighted(self, weights: Mapping[str, Weight]) -> Iterator[None]:
        """`set_adapters` for the length of a block; afterwards everything is as before, also after an exception."""
        held = dict(self.weights)
        with active.as_before([*self._carriers().values()]):
            try:
                self.set_adapters(weights)
                yield
            finally:
                self.weights = held

    def disable(self) -> None:
        """The base alone counts until `enable`. New words stay known."""
        self._check_not_fused()
        for model in self._carriers().values():
            active.set_enabled(model, False)

    def enable(self) -> None:
        """What was active before `disable` is so again."""
        self._check_not_fused()
        for model in self._carriers().values():
            active.set_enabled(model, True)

    # ------------------------------------------------------------------------ asking

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Component -> its adapters, fused ones too."""
        carried = self._fused.carried if self._fused else {}
        found = {part: carried.get(part, active.adapter_names(model)) for part, model in self.models().items()}
        return {part: names for part, names in found.items() if names}

    def get_names(self) -> list[str]:
        """All adapters, with those that are nothing but words."""
        return list(dict.fromkeys([*self.get_names_with_layers(), *self._words.adapters]))

    def get_names_with_layers(self) -> list[str]:
        """Those that can have a weight."""
        return list(dict.fromkeys(name for names in self.get_list_adapters().values() for name in names))

    def get_active_adapters(self) -> list[str]:
        """Those that count at the moment in some component; of a fused pipeline those that are fused."""
        if self._fused:
            return self._fused.adapter_names
        return list(dict.fromkeys(name for model in self._carriers().values() for name in active.active_names(model)))

    @property
    def is_fused(self) -> bool:
        return self._fused is not None

    # ------------------------------------------------------------------------ fusing

    def fuse(self, base_weights: Any = None) -> None:
        """Adds the active adapters, as they are weighed, to the base's weights, and takes the layers that carried them
        out of the way: sampling costs what the base alone costs.

        The base's weights are kept beside the fused ones, or, where `base_weights` (such as `Layers(base).weight`) can
        give them again, dropped and read when `unfuse` needs them.
        """
        self._check_not_fused()
        if not self.get_active_adapters():
            raise UserError("no adapter is active that could be fused; load one, or set_adapters")
        self._fused = Fused(self._carriers(), self.get_active_adapters(), base_weights)

    def unfuse(self) -> None:
        """The base's weights are what they were, bit for bit; the adapters are beside them again."""
        if self._fused is None:
            raise UserError("nothing is fused here; what the pipeline's fuse_lora did, its unfuse_lora takes back")
        self._fused.undo()
        self._fused = None

    # ------------------------------------------------------------------------ taking out

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Takes adapters out with their words; those that are left stay as they are."""
        self._check_not_fused()
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._check_known(names)
        self._take_out(names)

    def _take_out(self, names: Sequence[str]) -> None:
        for model in self._carriers().values():
            active.remove(model, names)
        self._words.forget(names)
        for name in names:
            self.weights.pop(name, None)

    def unload(self) -> None:
        """Takes all of them out; the pipeline is the base's, to the bit."""
        if self._fused:
            self.unfuse()
        if names := self.get_names():
            self.delete_adapters(names)

    # ------------------------------------------------------------------------ parts

    def models(self) -> dict[str, nn.Module]:
        """The parts that can carry adapters, by name."""
        known = (self.family.denoiser, *self.family.text_encoders)
        return {part: self.parts[part] for part in known if part in self.parts}

    def _carriers(self) -> dict[str, nn.Module]:
        return {part: model for part, model in self.models().items() if active.adapter_names(model)}

    def _keys(self, name: str) -> list[Any]:
        return [key for part, model in self._carriers().items() for key in active.keys_of(part, model, name)]

    def _check_known(self, names: Collection[str]) -> None:
        known = self.get_names()
        if unknown := [name for name in names if name not in known]:
            there = ", ".join(known) or "none"
            raise UserError(f"no adapter {unknown[0]!r} here{did_you_mean(unknown[0], known)}; there are: {there}")

    def _check_not_fused(self) -> None:
        if self._fused:
            raise UserError("the adapters are fused into the base, where they cannot be changed; unfuse first")


def _is_attribute(name: str) -> bool:
    """Whether the dictionaries in which PEFT keeps adapters have something of this name already, such as `pop`."""
    return hasattr(_A_MODULE, name) or hasattr(_SOME_PARAMETERS, name)


def adapter_title(index: int) -> str:
    """The name under which `Engine.attach` gives the adapter at this place of its list to the pipeline."""
    return f"adapter_{index}"


def _check_weight(file: Path, artifact: AdapterArtifact, weight: Weight) -> None:
    if artifact.embeddings and not artifact.modules and weight != 1:
        raise UserError(f"{file}: a word has no weight: leave out {weight}")
    rotated = [key for key, weights in artifact.modules.items() if weights.method == "oft"]
    check_rotations(str(file), weights_of(weight, artifact.modules), rotated)
