"""The model card of a run: `README.md` of its folder, made from the files in it, for people and for the hub.

By itself it tells nothing of the data: no prompt, caption, trigger word, name of a folder or path is in it.
`output.metadata: full` lets the prompts and trigger words in, and the validation images as a gallery.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...configs.ownership import enter_file, write_file
from ...configs.plain import plain, plain_lines
from ...models.base import EMBEDDED, hub_id
from ..facts import at, trigger_words
from ..footprint import CARD, CARD_MARK, RUN, adopt
from ..run_folder import Picture, RunFiles, is_our_card, read_pictures, read_run
from .told import adapter_of, batch_of, learning_rate_of, loss_of, time_of
from .usage import REPOSITORY, in_diffusers, on_the_command_line, resolution_of, tells_all, written
from .words import in_words, number

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

LICENSE = """\
No license is stated here; that of the base holds as well.
<!-- Its owner adds `license:` at the top: nothing here knows which one. -->"""
NO_BASE = "<!-- Its owner may say here which base that is: where it lay on the machine that trained is not told. -->"
KINDS = {
    "pipeline": "a diffusers pipeline",
    "diffusers": "for diffusers",
    "kohya": "the same for web UIs",
    "embedding": "the vectors of a new word; web UIs read it from their folder of embeddings",
    "loraloom": "loraloom's own format",
}
"""What a reader does with what was written."""


def write_card(run_folder: Path) -> Path | None:
    """Makes `README.md` from the files of a run folder; None where one stands that a person has written or changed.

    The repository is the one of `output.push_to`, or stays open. The same files give the same bytes.
    """
    card = run_folder / CARD
    if os.path.lexists(card) and not is_our_card(run_folder):
        return None
    adopt(run_folder)
    enter_file(card, run_folder, RUN)
    write_file(card, card_of(read_run(run_folder)).encode("utf-8", "replace"), run_folder, RUN)
    return card


def card_of(run: RunFiles) -> str:
    """The whole card."""
    parts = [introduction(run), usage(run), training(run), pictures(run), verification(run), LICENSE, CARD_MARK]
    text = "\n\n".join(part for part in parts if part)
    text = f"---\n{front_matter(run).to_yaml()}\n---\n\n{text}\n"
    return text.replace(REPOSITORY, at(run.config, "output.push_to") or REPOSITORY)


def front_matter(run: RunFiles) -> "ModelCardData":
    """What the hub reads. It has a base only if that is on the hub, too."""
    from huggingface_hub import ModelCardData

    base = hub_id(str(at(run.config, "model.base")), at(run.config, "model.revision"))
    relation = "finetune" if "pipeline" in written(run) else "adapter"
    return ModelCardData(
        base_model=base,
        base_model_relation=relation if base else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=list(_tags(run)),
        instance_prompt=trigger_words(run.config) if tells_all(run) else None,
        widget=_gallery(run) if tells_all(run) else None,
    )


def introduction(run: RunFiles) -> str:
    """What it is, and which files there are."""
    base, kinds = str(at(run.config, "model.base")), written(run)
    what = "A Stable Diffusion pipeline, trained from" if "pipeline" in kinds else "An adapter for"
    parts = [f"# {_cell(_name(run))}", f"{what} {_base(run)}, made with loraloom."]
    if base not in EMBEDDED and not hub_id(base, at(run.config, "model.revision")):
        parts.append(NO_BASE)
    if merged := at(run.config, "model.adapters"):
        parts.append(f"Merged into the base in training, and needed beside this: {len(merged)} more adapters.")
    parts.append("\n".join(f"* `{_line(file)}`: {_what_for(run, kind)}" for kind, file in kinds.items()))
    return "\n\n".join(part for part in parts if part)


def _what_for(run: RunFiles, kind: str) -> str:
    """Of a DoRA, other web UIs make something else."""
    if kind == "kohya" and at(run.config, "adapter.options.dora"):
        return "the same for LyCORIS and SD.Next; other web UIs compute DoRA otherwise"
    return KINDS.get(kind, _cell(kind))


def usage(run: RunFiles) -> str:
    """Code for each way to use it."""
    program = in_diffusers(run)
    parts = ["## Use"]
    parts += [f"With diffusers:\n\n{_code('python', program)}"] if program else []
    return "\n\n".join([*parts, f"With loraloom:\n\n{_code('bash', on_the_command_line(run))}"])


def training(run: RunFiles) -> str:
    """The settings and results that a reader would ask for."""
    config, record = run.config, run.record
    versions = ", ".join(f"{library} {version}" for library, version in (record.get("versions") or {}).items())
    parameters, best = record.get("trainable_parameters"), record.get("best") or {}
    facts = {
        "base": _base(run),
        "revision of the base": hub_id(str(at(config, "model.base")), at(config, "model.revision"))
        and at(config, "model.revision"),
        "method": adapter_of(run),
        "parts": _parts(config),
        "trained parameters": None if parameters is None else f"{parameters:,}",
        "steps": record.get("step"),
        "weights": record.get("weights"),
        "batch": batch_of(config),
        "resolution": resolution_of(run),
        "optimiser": at(config, "optimizer.name"),
        "learning rate": learning_rate_of(config),
        "precision": _precision(config),
        "seed": at(config, "loop.seed"),
        "loss": loss_of(run),
        "best held-out loss": f"{number(best['held_out'])} at step {best['step']}" if best else None,
        "time": time_of(run),
        "versions": versions,
    }
    rows = [f"| {name} | {_cell(str(fact))} |" for name, fact in facts.items() if fact not in (None, "")]
    return "\n".join(["## Training", "", "| | |", "|---|---|", *rows])


def pictures(run: RunFiles) -> str | None:
    """The grid of the last validation; its prompts where they may be told."""
    step = _step_of_pictures(run)
    if step is None:
        return None
    words = f"## Samples\n\n![samples of step {step}]({_folder_of(step)}/grid.png)"
    if not tells_all(run):
        return words
    prompts = [picture.prompt for picture in read_pictures(run.validations, [step])]
    rows = prompts[:: at(run.config, "validation.num_images") or 1]
    return "\n".join([words, "", "Each row is a prompt:", "", *(f"1. `{_line(prompt)}`" for prompt in rows)])


def verification(run: RunFiles) -> str | None:
    """What reloading the written files gave."""
    results = run.record.get("verify")
    if not results:
        return None
    columns = ("modules", "delta_difference", "prediction_difference", "tolerance")
    rows = [
        f"| {_cell(kind)} | " + " | ".join(in_words(found.get(column)) for column in columns) + " |"
        for kind, each in results.items()
        for found in [each if isinstance(each, dict) else {}]
    ]
    words = (
        "What was written was loaded again by the inference engine into a fresh base and compared with what was "
        "trained: the weights, and one prediction. Differences are relative to the largest number compared."
    )
    head = "| format | " + " | ".join(column.replace("_", " ") for column in columns) + " |"
    return "\n".join(["## Verification", "", words, "", head, "|---" * (len(columns) + 1) + "|", *rows])


def _precision(config: dict[str, Any]) -> str:
    """'bf16 (mixed)' or 'fp32', and the type of the base."""
    mixed = at(config, "loop.precision")
    words = "fp32" if mixed in ("no", None, False) else f"{mixed} (mixed)"
    return f"{words}, base in {at(config, 'model.dtype')}"


def _tags(run: RunFiles) -> Iterator[str]:
    method = at(run.config, "adapter.method")
    yield from ("text-to-image", "diffusers", "loraloom")
    if method not in ("full", "textual_inversion"):
        yield method
    if at(run.config, "adapter.tokens"):
        yield "textual_inversion"
    if any("prior" in source for source in at(run.config, "data.sources") or []):
        yield "dreambooth"
    if "diffusers" in written(run) and method == "lora":
        yield "template:sd-lora"  # the hub's page for a LoRA, with a gallery


def _gallery(run: RunFiles) -> list[dict[str, Any]] | None:
    """The first picture of each prompt of the last validation, as the hub shows them."""
    step = _step_of_pictures(run)
    first: dict[str, Picture] = {}
    for picture in read_pictures(run.validations, [step]) if step is not None else ():
        first.setdefault(picture.prompt, picture)
    return [
        {"text": prompt or "(no words)", "output": {"url": f"{_folder_of(picture.step)}/{picture.file.name}"}}
        for prompt, picture in first.items()
    ] or None


def _step_of_pictures(run: RunFiles) -> int | None:
    """The newest validation; that of the base before training shows nothing of what was learnt."""
    steps = run.validations.keys() - {0}
    best = (run.record.get("best") or {}).get("step")
    if run.record.get("weights") and best in steps:
        return best
    return max(steps, default=None)


def _folder_of(step: int) -> str:
    return f"samples/step-{step:06d}"


def _name(run: RunFiles) -> str:
    return str(at(run.config, "output.name") or "adapter")


def _base(run: RunFiles) -> str:
    """The base as it may be called in public."""
    base, family = str(at(run.config, "model.base")), run.record.get("family") or at(run.config, "model.family")
    if base in EMBEDDED:
        return f"`{base}`, the small model that comes with loraloom"
    if hub_id(base, at(run.config, "model.revision")):
        return f"[{base}](https://huggingface.co/{base})"
    return f"a base of the family {_cell(str(family))}" if family else "a base that is not on the hub"


def _parts(config: dict[str, Any]) -> str | None:
    """Part -> what of it was selected; None where the config leaves it to the method."""
    parts = at(config, "adapter.parts") or {}
    chosen = {part: [where] if isinstance(where, str) else where for part, where in parts.items()}
    return " · ".join(f"{part}: {', '.join(where)}" for part, where in chosen.items()) or None


def _code(language: str, text: str) -> str:
    """A block that nothing in it ends: its fence is longer than all that look like one."""
    fence = "`" * max(3, *(len(found) + 1 for found in re.findall("`+", text)), 3)
    return f"{fence}{language}\n{plain_lines(text)}{fence}"


def _cell(text: str) -> str:
    return re.sub(r"([|<])", r"\\\1", _line(text))


def _line(text: str) -> str:
    """On one line, and with nothing that ends a code span."""
    return plain(" ".join(text.replace("`", "'").split()))
