"""How to use what a run has written, as code: in diffusers where it can read the files, and with `loraloom sample`."""

import json
import shlex
from collections.abc import Iterator

from ...configs.headers import safetensors_header
from ...models.base import EMBEDDED, hub_id
from ..facts import at
from ..run_folder import RunFiles

REPOSITORY = "OWNER/NAME"
"""Stands for the repository on the hub until it is known; a folder with the files will do as well."""
NO_BASE = "the base model"
"""Stands for a base that is on no hub: where it lies on the machine that trained is nobody's business."""
WORD = "<word>"
"""A new word in prompts; whoever loads its vectors decides how it is written."""


def in_diffusers(run: RunFiles) -> str | None:
    """A program that makes an image; None where diffusers has no loader for what was written."""
    files = written(run)
    loading = [line for kind in files for line in _loading(run, kind, files[kind])]
    if not loading and "pipeline" not in files:
        return None
    return "\n".join([*_imports(run, loading), "", *_pipeline(run), *loading, "", *_call(run), ""])


def on_the_command_line(run: RunFiles) -> str:
    """The same with `loraloom sample`."""
    files = written(run)
    adapters = [file for kind, file in files.items() if kind != "pipeline"]
    words = ["loraloom", "sample", "--base", REPOSITORY if "pipeline" in files else _base(run)]
    words += ["--adapter", adapters[0]] if adapters else []
    words += ["--prompt", prompt_of(run), "--resolution", str(resolution_of(run))]
    for option, path, usual in (("--clip-skip", "model.clip_skip", 0), ("--token-windows", "data.token_windows", 1)):
        value = at(run.config, path) or usual
        words += [option, str(value)] if value != usual else []
    download = shlex.join(["hf", "download", REPOSITORY, adapters[0], "--local-dir", "."]) + "\n" if adapters else ""
    return download + shlex.join(words) + "\n"


def written(run: RunFiles) -> dict[str, str]:
    """Format, or "pipeline" -> name of the file, or of the folder."""
    return dict(zip(run.record.get("verify") or {}, run.record.get("files") or [], strict=False))


def prompt_of(run: RunFiles) -> str:
    """One of the run's own prompts where it may be told."""
    if tells_all(run) and (prompts := at(run.config, "validation.prompts")):
        return prompts[0] if isinstance(prompts[0], str) else prompts[0]["prompt"]
    return f"a picture of {word_of(run)}" if at(run.config, "adapter.tokens") else "your prompt"


def word_of(run: RunFiles) -> str:
    """How a new word is written."""
    return at(run.config, "adapter.tokens")[0]["token"] if tells_all(run) else WORD


def tells_all(run: RunFiles) -> bool:
    """Whether prompts and trigger words may be told."""
    return at(run.config, "output.metadata") == "full"


def resolution_of(run: RunFiles) -> int:
    """Side of the largest pictures that were trained."""
    resolution = at(run.config, "data.resolution") or 512
    return max(resolution) if isinstance(resolution, list) else resolution


def _loading(run: RunFiles, kind: str, file: str) -> Iterator[str]:
    """The lines that put one file into the pipeline: none where diffusers cannot, or where another file did."""
    if kind == "embedding":
        yield from _loading_words(run, file)
    elif kind == "diffusers" or (kind == "kohya" and "diffusers" not in written(run) and _is_plain_lora(run)):
        yield f"pipeline.load_lora_weights({_text(REPOSITORY)}, weight_name={_text(file)})"


def _is_plain_lora(run: RunFiles) -> bool:
    """What diffusers reads of kohya's format: it passes over the magnitudes of DoRA."""
    return at(run.config, "adapter.method") == "lora" and not at(run.config, "adapter.options.dora")


def _loading_words(run: RunFiles, file: str) -> Iterator[str]:
    """diffusers does not know a file with vectors for two text encoders: each gets its own."""
    token = f"token={_text(word_of(run))}"
    if not _has_two_encoders(run, file):
        yield f"pipeline.load_textual_inversion({_text(REPOSITORY)}, weight_name={_text(file)}, {token})"
        return
    yield f"vectors = load_file(hf_hub_download({_text(REPOSITORY)}, {_text(file)}))"
    for key, number in (("clip_l", ""), ("clip_g", "_2")):
        encoder = f"text_encoder=pipeline.text_encoder{number}, tokenizer=pipeline.tokenizer{number}"
        yield f"pipeline.load_textual_inversion(vectors[{_text(key)}], {token}, {encoder})"


def _has_two_encoders(run: RunFiles, file: str) -> bool:
    return "clip_g" in safetensors_header(run.folder / file).tensors


def _imports(run: RunFiles, loading: list[str]) -> Iterator[str]:
    yield "from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler"
    if any("hf_hub_download" in line for line in loading):
        yield "from huggingface_hub import hf_hub_download"
    if _base(run) in EMBEDDED and "pipeline" not in written(run):
        yield "from loraloom.models.pocket import FOLDER"
    if any("load_file" in line for line in loading):
        yield "from safetensors.torch import load_file"


def _pipeline(run: RunFiles) -> Iterator[str]:
    base = _base(run)
    place = _text(REPOSITORY if "pipeline" in written(run) else base)
    yield f"pipeline = DiffusionPipeline.from_pretrained({'FOLDER' if place == _text('pocket') else place})"
    schedule = "pipeline.scheduler.config"
    if at(run.config, "noise.zero_terminal_snr"):
        schedule += f", rescale_betas_zero_snr=True, timestep_spacing={_text('trailing')}"
    yield f"pipeline.scheduler = DPMSolverMultistepScheduler.from_config({schedule})"


def _call(run: RunFiles) -> Iterator[str]:
    side, usual = resolution_of(run), {"steps": 20, "guidance": 4.0}
    steps, guidance = ((at(run.config, "validation") or usual).get(key, value) for key, value in usual.items())
    yield f"prompt = {_text(prompt_of(run))}"
    yield (
        f"image = pipeline(prompt, num_inference_steps={steps}, guidance_scale={guidance}, "
        f"height={side}, width={side}).images[0]"
    )
    yield f"image.save({_text('image.png')})"


def _base(run: RunFiles) -> str:
    """How `from_pretrained` and --base call it."""
    base = str(at(run.config, "model.base"))
    return base if base in EMBEDDED or hub_id(base, at(run.config, "model.revision")) else NO_BASE


def _text(value: str) -> str:
    """As Python writes it, in double quotes."""
    return json.dumps(value, ensure_ascii=False)
