"""Families, types, precisions, parts, processes and settings in pairs: what is accepted trains and ends."""

import importlib.util
import itertools
import json
import multiprocessing
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file

import loraloom
from loraloom.adapters.targets import select
from loraloom.configs.command import run_command
from loraloom.configs.errors import UserError
from loraloom.configs.loader import load_config
from loraloom.inference.__main__ import main as sample
from loraloom.inference.adapter.__main__ import main as adapter
from loraloom.inference.checkpoint import read_checkpoint
from loraloom.inference.merged import MergedBase
from loraloom.inference.verify import TOLERANCE
from loraloom.models.families.sd1 import FAMILY as SD1
from loraloom.models.families.sdxl import FAMILY as SDXL
from loraloom.train import build, cache, plan, preview, replay
from loraloom.train import state as state_of_run
from loraloom.train.__main__ import main as train
from loraloom.train.fits import check_base_fits

spec = importlib.util.spec_from_file_location("border", Path(__file__).with_name("border.py"))
assert spec is not None and spec.loader is not None
border = importlib.util.module_from_spec(spec)
spec.loader.exec_module(border)

DIMENSIONS: dict[str, list[Any]] = {
    "types": [  # model.dtype, loop.precision: all that are accepted
        *(("fp32", "no"), ("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "bf16")),
        *(("bf16", "no"), ("fp32", "fp16")),
    ],
    "parts": ["denoiser", "text", "both", "words"],
    "family": ["sd1", "sd2", "sdxl"],
    "processes": [1, 2],
    "clip_skip": [0, 1],
    "prompts": [True, False],
    "workers": [0, 1],
    "checkpointing": [False, True],
}
EXACT = {"fp32"}
"""Types of the model in which the file holds the trained numbers as they count: others round them when it is loaded."""
PROMPT = "a <sks> star"


def in_pairs(dimensions: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Few rows in which each value of a dimension meets each value of each other one; the same ones every time."""
    names, places = [*dimensions], [range(len(values)) for values in dimensions.values()]
    both = itertools.combinations(range(len(names)), 2)
    left = {(a, i, b, j): None for a, b in both for i in places[a] for j in places[b]}
    rows: list[tuple[int, ...]] = []
    while left:
        a, i, b, j = next(iter(left))
        row: dict[int, int] = {a: i, b: j}
        for each in range(len(names)):
            if each not in row:  # the value that meets most of those that are there for the first time
                row[each] = max(places[each], key=lambda v: sum(_pair(each, v, o, w) in left for o, w in row.items()))
        rows.append(tuple(row[each] for each in range(len(names))))
        for (p, v), (q, w) in itertools.combinations(enumerate(rows[-1]), 2):
            left.pop((p, v, q, w), None)
    return [{name: dimensions[name][place] for name, place in zip(names, row, strict=True)} for row in rows]


def _pair(a: int, i: int, b: int, j: int) -> tuple[int, int, int, int]:
    return (a, i, b, j) if a < b else (b, j, a, i)


CASES = in_pairs(DIMENSIONS)


def name_of(case: Mapping[str, Any]) -> str:
    switches = [name for name in ("prompts", "workers", "checkpointing") if case[name]]
    skip = [f"skip{case['clip_skip']}"] * bool(case["clip_skip"])
    return "-".join([case["family"], *case["types"], case["parts"], *skip, *switches])


def test_all_values_meet():
    for (one, values), (other, others) in itertools.combinations(DIMENSIONS.items(), 2):
        found = {(case[one], case[other]) for case in CASES}
        assert found == {*itertools.product(values, others)}
    assert len(CASES) < 48


# ------------------------------------------------------------------------ configs


def config_of(base: Path, photos: Path, folder: Path, case: Mapping[str, Any]) -> Path:
    """The config of a case in `folder`, and its run in `folder/run`."""
    text = {part: "attention" for part in ("text_encoder", "text_encoder_2") if (base / part).is_dir()}
    parts = {"denoiser": {"unet": "attention"}, "text": text, "both": {"unet": "attention"} | text}
    adapter = {"method": "textual_inversion", "tokens": [{"token": "<sks>"}]}
    if case["parts"] == "full":
        adapter = {"method": "full", "parts": {"unet": "all", **dict.fromkeys(text, "all")}}
    elif case["parts"] != "words":
        adapter = {"rank": 4, "alpha": 8, "parts": parts[case["parts"]]}
    dtype, precision = case["types"]
    content = {
        "model": {"base": str(base), "dtype": dtype, "clip_skip": case["clip_skip"]},
        "data": {
            "resolution": 32,
            "sources": [{"path": str(photos), "caption": PROMPT}],
            "workers": case["workers"],
        },
        "adapter": adapter,
        "optimizer": {"learning_rate": 1e-2},
        "loop": {
            "steps": 2,
            "batch_size": 2,
            "micro_batch": 1,
            "threads": 1,
            "precision": precision,
            "gradient_checkpointing": case["checkpointing"],
        },
        "checkpoint": {"every": 1},
        "validation": {"every": 2, "prompts": [PROMPT] if case["prompts"] else [], "num_images": 1, "steps": 2},
        "trackers": [],
        "output": {"dir": str(folder / "run"), "name": "small"},
    }
    if case["parts"] in parts:
        content["output"]["formats"] = ["diffusers"]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "case.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


# ------------------------------------------------------------------------ the table


def check(case: Mapping[str, Any], file: Path, found: Mapping[str, list[str]]) -> None:
    """What was found in training, and the pictures of validation beside those of `loraloom sample`."""
    assert found == {"without gradient": [], "others when resumed": []}
    if not case["prompts"]:
        return
    config, run = load_config(file), file.parent / "run"
    dtype = case["types"][0]
    before, after = (picture_in(run / "samples" / f"step-{step:06d}") for step in (0, 2))
    assert (before != after).any(), "two steps at this rate change a picture"
    result = run / "small"
    options = ["--base", str(result)]
    if not result.is_dir():
        options = [
            "--base",
            config.model.base,
            "--adapter",
            str(next(run.glob("small*.safetensors"))),
            "--dtype",
            dtype,
        ]
    asked = ["--prompt", PROMPT, "--steps", "2", "--num-images", "1", "--clip-skip", str(case["clip_skip"])]
    assert sample([*options, *asked, "--threads", "1", "--device", "cpu", "--out", str(file.parent / "again")]) == 0
    again = np.asarray(Image.open(file.parent / "again" / "0000.png"), np.float32)
    if dtype in EXACT:
        assert (after == again).all()
    else:
        assert np.abs(after - again).mean() <= 255 * TOLERANCE[dtype]


def picture_in(folder: Path) -> np.ndarray:
    (file,) = folder.glob("00-*.png")
    return np.asarray(Image.open(file), np.float32)


@pytest.fixture(autouse=True)
def one_thread():
    """As the runs have it, whose number of threads is theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case["processes"] == 1], ids=name_of)
def test_one_process(case, small_base, photos, tmp_path):
    file = config_of(small_base(case["family"]), photos, tmp_path, case)
    check(case, file, border.train_case(file))


@pytest.mark.slow
def test_two_processes(small_base, photos, tmp_path, run_two):
    cases = [case for case in CASES if case["processes"] == 2]
    files = [config_of(small_base(case["family"]), photos, tmp_path / name_of(case), case) for case in cases]
    run_two(str(Path(__file__).with_name("border.py")), *map(str, files))
    for case, file in zip(cases, files, strict=True):
        for rank in (0, 1):
            found = json.loads(file.with_suffix(f".{rank}.json").read_text())
            check(case | {"prompts": case["prompts"] and rank == 0}, file, found)


# ------------------------------------------------------------------------ what is shipped, and verbs

PACKAGE = Path(loraloom.__file__).parent
SHIPPED = sorted((PACKAGE / "configs").glob("*/*.yaml"))


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """A process has one precision; here each test has its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_shipped_configs_run(shipped, small_base, photos, tmp_path):
    """Two steps on a small base; resolution, and the pictures of validation, are all that is less than it says."""
    config = load_config(shipped)
    sides = [32, 40][: len(config.data.resolutions)]
    overrides = {
        "model.base": small_base(config.model.family or "sd1"),
        "data.resolution": sides if len(sides) > 1 else sides[0],
        "loop.steps": 2,
        "validation.num_images": 1,
        "validation.steps": 2,
        "output.dir": tmp_path / "run",
    }
    for number, source in enumerate(config.data.sources):
        if (path := getattr(source, "path", None)) is not None:
            overrides[f"data.sources.{number}.path"] = photos if path == "photos" else PACKAGE / path
    assert train([str(shipped), *(f"{key}={value}" for key, value in overrides.items())]) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["state"] == "done"
    assert record["verify"]
    pictures = [*(tmp_path / "run" / "samples" / "step-000002").glob("*-0.png")]
    assert len(pictures) == len(config.validation.prompts)


ONE = {"family": "sd1", "types": ("fp32", "no"), "parts": "denoiser", "clip_skip": 0, "prompts": False}
ONE |= {"workers": 0, "checkpointing": False}


@pytest.mark.slow
def test_verbs_end_their_workers(small_base, photos, tmp_path):
    file = config_of(small_base("sd1"), photos, tmp_path, ONE | {"workers": 1, "prompts": True})
    assert train([str(file)]) == 0
    run, seen = str(tmp_path / "run"), str(tmp_path / "seen")
    for verb, arguments in (
        (replay.main, [run, "--step", "2"]),
        (plan.main, [str(file), "--measure", f"output.dir={tmp_path / 'other'}"]),
        (cache.main, [str(file), f"output.dir={tmp_path / 'other'}"]),
        (preview.main, [str(file), "--out", seen]),
    ):
        assert verb(arguments) == 0
        assert multiprocessing.active_children() == [], verb.__module__


@pytest.mark.slow
def test_a_trainer_that_never_fits_is_closed(small_base, photos, tmp_path):
    file = config_of(small_base("sd1"), photos, tmp_path, ONE | {"workers": 1})
    with build.build_trainer(load_config(file)) as trainer:
        trainer.callbacks = []
        trainer.train_step()
        assert len(multiprocessing.active_children()) == 1
    assert multiprocessing.active_children() == []


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_whole_base_trains_and_takes_an_adapter(family, dtype, small_base, photos, tmp_path):
    """SDXL's index has settings beside parts."""
    case = ONE | {"family": family, "types": (dtype, "no"), "parts": "full", "prompts": True}
    base = small_base(family)
    whole = config_of(base, photos, tmp_path / "whole", case)
    found = border.train_case(whole)
    # a second trainer in one process has mapped weights elsewhere, which kernels round by: test_full resumes in another
    found["others when resumed"] = []
    check(case, whole, found)
    trained = tmp_path / "whole" / "run" / "small"
    assert json.loads((trained / "model_index.json").read_text()) == json.loads((base / "model_index.json").read_text())
    if dtype == "bf16":
        return
    assert train([str(config_of(base, photos, tmp_path / "small", ONE | {"family": family}))]) == 0
    (file,) = (tmp_path / "small" / "run").glob("small*.safetensors")
    merged = str(tmp_path / "merged")
    assert adapter(["merge", str(file), "--base", str(trained), "--into-base", "--out", merged]) == 0
    assert sample(["--base", merged, "--prompt", "a", "--steps", "1", "--out", str(tmp_path / "pictures")]) == 0


# ------------------------------------------------------------------------ what is refused, or left out


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.dtype=fp16"], "gradients of fp16 vanish"),
        (["model.dtype=fp16", "loop.precision=bf16"], "gradients of fp16 vanish"),
        (["model.dtype=bf16", "loop.precision=fp16"], "torch does not compute with both"),
        (["model.dtype=bf16", "adapter.options={init: pissa}"], "pissa takes the base's weights apart"),
    ],
)
def test_types_that_do_not_go_together_are_refused(overrides, words, photos, tmp_path):
    config = load_config(config_of(tmp_path, photos, tmp_path, ONE), overrides)
    with pytest.raises(UserError, match=words) as raised:
        check_base_fits(config, SD1)
    assert len(raised.value.problems) == 1


@pytest.mark.slow
def test_layers_that_nothing_reads_are_no_targets(small_base, photos, tmp_path):
    """The first text encoder of SDXL is read up to its last layer but one, the second whole: its pooled output is."""
    parts = MergedBase(load_config(config_of(small_base("sdxl"), photos, tmp_path, ONE)).model).load()
    for skip, left in ((0, {"layers.0.", "layers.1."}), (1, {"layers.0."})):
        chosen = {
            part: select(part, parts[part], "attention", SDXL.targets[part], SDXL.unread(parts, part, skip))
            for part in SDXL.text_encoders
        }
        numbers = {part: {re.search(r"layers\.\d+\.", name)[0] for name in names} for part, names in chosen.items()}  # type: ignore[index]
        assert numbers == {"text_encoder": left, "text_encoder_2": {"layers.0.", "layers.1.", "layers.2."}}
    with pytest.raises(UserError, match="matches only layers that nothing reads"):
        select("text_encoder", parts["text_encoder"], r"re:.*layers\.2\..*", {}, SDXL.unread(parts, "text_encoder", 0))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_of_an_older_version(dtype, small_base, photos, tmp_path, monkeypatch):
    """It goes on with all of the layers that it began with; with latents of half precision it cannot go on."""
    file = config_of(
        small_base("sdxl"), photos, tmp_path, ONE | {"family": "sdxl", "parts": "text", "types": (dtype, "no")}
    )
    with monkeypatch.context() as patch:
        patch.setattr(type(SDXL), "unread", lambda *_, **__: [])
        border.train_case(file)
    checkpoints = tmp_path / "run" / "checkpoints"
    first, last = (checkpoints / f"step-{step:06d}" for step in (1, 2))
    wanted = border.load_state(last)
    for checkpoint in (first, last):
        state = json.loads((checkpoint / "run_state.json").read_text())
        del state["data"]["latents"], state["data"]["dtype"]
        (checkpoint / "run_state.json").write_text(json.dumps(state))
        state_of_run._seal(checkpoint)
    assert any("layers.2" in path for part, path in read_checkpoint(last).modules if part == "text_encoder")
    if dtype == "bf16":
        with pytest.raises(UserError, match="an older loraloom began this run and encoded its images in bf16"):
            build.build_trainer(load_config(file), checkpoint=first)
        return
    trainer = build.build_trainer(load_config(file), checkpoint=first)
    trainer.callbacks = []
    trainer.fit()
    for part, tensors in trainer.run.adapters.states().items():
        assert all(torch.equal(tensor, wanted[part][name]) for name, tensor in tensors.items())


@pytest.mark.slow
def test_a_loss_that_is_no_number_in_fp16_is_left_out_and_the_scale_falls(small_base, photos, tmp_path):
    file = config_of(small_base("sd1"), photos, tmp_path, ONE | {"types": ("fp32", "fp16")})
    config = load_config(file, ["guard.on_fault=skip", "loop.steps=3", "checkpoint.every=9"])
    states: list[list[torch.Tensor]] = []
    with border.with_scaler():
        trainer = build.build_trainer(config)
        trainer.callbacks, forward = [], trainer.forward

        def broken(batch):
            losses = forward(batch)
            return type(losses)(losses.total * torch.nan, losses.per_sample) if trainer.run.step == 1 else losses

        trainer.forward = broken
        for _ in range(3):
            trainer.train_step()
            states.append([parameter.detach().clone() for parameter in trainer.run.trained()])
    assert trainer.run.skipped == 1
    assert trainer.run.accelerator.scaler.get_scale() == border.SCALE / 2
    assert all(map(torch.equal, states[0], states[1]))
    assert not all(map(torch.equal, states[1], states[2]))


@pytest.mark.slow
@pytest.mark.parametrize("parts", ["words", "text"])
def test_activations_are_computed_again_wherever_gradients_flow(parts, small_base, photos, tmp_path, monkeypatch):
    kinds: set[str] = set()
    checkpoint = torch.utils.checkpoint.checkpoint

    def counted(function, *arguments, **options):
        kinds.add(type(getattr(function, "__self__", function)).__name__)
        return checkpoint(function, *arguments, **options)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", counted)
    file = config_of(small_base("sd1"), photos, tmp_path, ONE | {"parts": parts, "checkpointing": True})
    trainer = build.build_trainer(load_config(file))
    trainer.callbacks = []
    trainer.train_step()
    assert {"ResnetBlock2D", "BasicTransformerBlock"} <= kinds, kinds
    encoder = trainer.run.parts["text_encoder"]
    assert any(getattr(module, "gradient_checkpointing", False) for module in encoder.modules())


def damaged(base: Path, weights: str, folder: Path) -> Path:
    """A copy in which the first number of a tensor, named `part/name`, is NaN."""
    shutil.copytree(base, folder)
    part, name = weights.split("/")
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    tensors[name].view(-1)[0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "code", "words"),
    [
        ("unet/conv_out.bias", 3, "error: step 0: validation: the sampled latents are not finite"),
        ("vae/decoder.conv_out.bias", 0, "warning: step 2: validation: the VAE makes numbers that are not finite"),
    ],
)
def test_validation_without_pictures_ends_the_run_or_is_said(
    weights, code, words, small_base, photos, tmp_path, capsys
):
    base = damaged(small_base("sd1"), weights, tmp_path / "base")
    file = config_of(base, photos, tmp_path, ONE | {"prompts": True})
    assert run_command(train, [str(file)]) == code
    said = capsys.readouterr()
    assert words in said.out + said.err
    assert not [*(tmp_path / "run" / "samples").glob("*/*.png")]
