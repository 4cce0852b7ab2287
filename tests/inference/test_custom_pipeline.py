"""Custom pipelines: who may run code, nothing runs before that is settled, and the base's parts are handed over."""

import py_compile
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, __version__
from diffusers.utils import dynamic_modules_utils

from loraloom.configs.errors import UserError
from loraloom.inference.custom_pipeline import load_pipeline
from loraloom.inference.engine import Engine
from loraloom.inference.pipeline_code import MIRROR, pipeline_class
from loraloom.inference.pipelines.one_step_unet import OneStepUNetPipeline

TEMPLATE = Path(__file__).parents[2] / "examples/custom_pipeline"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TRUST = {"trust_remote_code": True}

CODE = """
from pathlib import Path
from diffusers import DiffusionPipeline
from .neighbour import NUMBER
Path({mark!r}).touch()

class {name}(DiffusionPipeline):
    def __init__(self, unet, scheduler, number=None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
    def __call__(self):
        return NUMBER
"""


@pytest.fixture(scope="module")
def engine(tiny_base) -> Engine:
    return Engine.load(str(tiny_base))


@pytest.fixture
def mark(tmp_path) -> Path:
    """A file that is there when the code of `folder` has run."""
    return tmp_path / "mark"


def write(folder: Path, mark: Path, name: str = "Foreign", number: int = 1, file: str = "pipeline.py") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(CODE.format(mark=str(mark), name=name))
    (folder / "neighbour.py").write_text(f"NUMBER = {number}")
    return folder


@pytest.fixture
def folder(tmp_path, mark) -> Path:
    return write(tmp_path / "foreign", mark)


@pytest.fixture
def hub(tmp_path, mark, monkeypatch) -> None:
    """What the hub has given before: a repository and the community's mirror, at COMMIT; no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    write(tmp_path / f"hub/models--owner--name/snapshots/{COMMIT}", mark, number=2)
    mirror = tmp_path / f"hub/datasets--{MIRROR.replace('/', '--')}/snapshots/{COMMIT}"
    write(mirror / f"v{__version__}", mark, number=3, file="star.py")


def test_ours_take_the_parts_of_an_engine_and_share_them(engine):
    pipeline = load_pipeline(engine, "one_step_unet")
    assert isinstance(pipeline, OneStepUNetPipeline)
    assert pipeline.unet is engine.parts["unet"]
    words = torch.zeros(2, 77, 32)
    assert pipeline(words, generator=torch.Generator().manual_seed(0)).images.shape == (2, 4, 4, 4)


def test_a_base_is_loaded_by_its_name_and_keeps_what_the_engine_settled(tiny_base, engine):
    pipeline = load_pipeline(str(tiny_base), "diffusers:StableDiffusionPipeline")
    assert isinstance(pipeline, StableDiffusionPipeline)
    assert pipeline.config["requires_safety_checker"] is False
    assert type(pipeline.scheduler) is type(engine.pipeline.scheduler)


def test_given_components_come_first(engine):
    scheduler = DDIMScheduler.from_config(engine.pipeline.scheduler.config)
    assert load_pipeline(engine, "diffusers:StableDiffusionPipeline", scheduler=scheduler).scheduler is scheduler


def test_components_that_are_missing_or_unknown_are_named(engine):
    with pytest.raises(UserError, match=r"ClipGuidedPipeline needs more .* give clip=\.\.\., clip_tokenizer=\.\.\.$"):
        load_pipeline(engine, "clip_guided")
    with pytest.raises(UserError, match=r'no component .clipp. \(did you mean "clip"'):
        load_pipeline(engine, "clip_guided", clipp=None)


@pytest.mark.parametrize(
    ("custom", "words"),
    [
        ("clip_guide", 'did you mean "clip_guided".*one_step_unet.*package.module:Class'),
        ("./nowhere", "no pipeline.py"),
        ("nothing_here.module:Class", "is it installed"),
        (":", "should be package.module:Class"),
        ("diffusers:UNet2DModel", "no DiffusionPipeline of this name"),
        ("diffusers:Nothing", "no DiffusionPipeline of this name"),
        ("community:../../x", "is named as its file"),
    ],
)
def test_what_names_nothing_is_one_line(engine, custom, words):
    with pytest.raises(UserError, match=words) as caught:
        load_pipeline(engine, custom, **TRUST)
    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_runs_when_that_is_allowed_and_not_before(tiny_base, folder, mark):
    with pytest.raises(UserError, match=rf"would run {folder}/pipeline.py.* give trust_remote_code=True$"):
        load_pipeline(str(tiny_base), str(folder))
    with pytest.raises(UserError, match="is not from the hub and has no revision"):
        load_pipeline(str(tiny_base), str(folder), revision=COMMIT, **TRUST)
    with pytest.raises(UserError, match="there is no such folder"):
        load_pipeline("./nowhere", str(folder), **TRUST)
    assert not mark.exists()
    assert load_pipeline(str(tiny_base), str(folder), **TRUST)() == 1
    assert mark.exists()


@pytest.mark.parametrize("custom", ["owner/name", "community:star"])
def test_code_of_the_hub_runs_at_a_commit_that_was_given_and_not_before(engine, hub, mark, custom):
    for asked, words in (
        ({}, "would run .*py of .* give trust_remote_code=True and revision=<the 40 digits"),
        ({"revision": COMMIT}, "give trust_remote_code=True$"),
        (TRUST, r"give revision=<.*\(the newest can change\)$"),
        (TRUST | {"revision": "main"}, "a branch or tag can change"),
        (TRUST | {"revision": COMMIT[:12]}, "a branch or tag can change"),
        (TRUST | {"revision": COMMIT[::-1]}, "the hub did not give"),
    ):
        with pytest.raises(UserError, match=words):
            load_pipeline(engine, custom, **asked)
    assert not mark.exists()
    pipeline = load_pipeline(engine, custom, **TRUST, revision=COMMIT)
    assert pipeline() == {"owner/name": 2, "community:star": 3}[custom]


def test_a_branch_that_is_named_like_a_commit_is_refused(engine, hub, mark, tmp_path, monkeypatch):
    """Only a hub that can be reached resolves a branch: its answer is played here."""
    snapshot = tmp_path / f"hub/models--owner--name/snapshots/{COMMIT}"
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    with pytest.raises(UserError, match=f"the name of something else there, the commit {COMMIT}"):
        load_pipeline(engine, "owner/name", **TRUST, revision=COMMIT[::-1])
    assert not mark.exists()


@pytest.mark.parametrize("value", ["1", "true", "ON"])
def test_the_switch_of_diffusers_forbids_foreign_code_and_only_that(engine, folder, hub, mark, monkeypatch, value):
    monkeypatch.setenv("DIFFUSERS_DISABLE_REMOTE_CODE", value)
    for custom, revision in ((str(folder), None), ("owner/name", COMMIT), ("community:star", COMMIT)):
        with pytest.raises(UserError, match="DIFFUSERS_DISABLE_REMOTE_CODE forbids"):
            load_pipeline(engine, custom, **TRUST, revision=revision)
    assert not mark.exists()
    assert isinstance(load_pipeline(engine, "one_step_unet"), OneStepUNetPipeline)


def test_a_changed_file_is_read_again_and_another_folder_is_another_module(tmp_path, folder, mark, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    first = pipeline_class(str(folder), **TRUST)
    write(folder, mark, name="Changed")  # of the same size, within the second: Python's cache cannot tell
    assert pipeline_class(str(folder), **TRUST).__name__ == "Changed"
    other = pipeline_class(str(write(tmp_path / "other", mark, name="Other")), **TRUST)
    assert (first.__name__, other.__name__) == ("Foreign", "Other")
    assert not (folder / "__pycache__").exists()


def test_compiled_code_beside_the_file_does_not_run(tmp_path, folder, mark):
    bad = tmp_path / "bad.py"
    bad.write_text(f"from pathlib import Path; Path({str(mark)!r} + '2').touch(); NUMBER = 66")
    target = folder / f"__pycache__/neighbour.{sys.implementation.cache_tag}.pyc"
    py_compile.compile(str(bad), str(target), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    assert pipeline_class(str(folder), **TRUST)(None, None)() == 1
    assert not Path(f"{mark}2").exists()


def test_there_must_be_one_pipeline_in_the_file(folder):
    text = (folder / "pipeline.py").read_text()
    (folder / "pipeline.py").write_text(text + "class Second(Foreign): pass")
    with pytest.raises(UserError, match="found: Foreign, Second"):
        pipeline_class(str(folder), **TRUST)


def picture(pipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline("a red star", num_inference_steps=2, generator=generator, output_type="np").images


@pytest.fixture
def modules_cache(tmp_path, monkeypatch):
    """diffusers copies custom code there and imports it."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.startswith("diffusers_modules")]:
        del sys.modules[name]


def test_the_template_works_in_plain_diffusers_and_in_ours(tiny_base, tmp_path, modules_cache):
    """And makes what Stable Diffusion makes with the same settings."""
    ours = load_pipeline(str(tiny_base), str(TEMPLATE), **TRUST)
    theirs = DiffusionPipeline.from_pretrained(tiny_base, custom_pipeline=str(TEMPLATE), **TRUST)
    official = StableDiffusionPipeline(
        **ours.components, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    assert type(theirs).__name__ == type(ours).__name__ == "MyPipeline"
    assert picture(ours).shape == (1, 32, 32, 3)
    np.testing.assert_allclose(picture(ours), picture(official), atol=1e-5)
    np.testing.assert_allclose(picture(theirs), picture(ours), atol=1e-4)


def test_a_template_saved_with_its_code_is_a_folder_for_plain_diffusers(tiny_base, tmp_path, modules_cache):
    pipeline = load_pipeline(str(tiny_base), str(TEMPLATE), **TRUST)
    pipeline.save_pretrained(tmp_path / "mine")
    (tmp_path / "mine/pipeline.py").write_text((TEMPLATE / "pipeline.py").read_text())
    again = DiffusionPipeline.from_pretrained(tmp_path / "mine", custom_pipeline="pipeline", **TRUST)
    assert type(again).__name__ == "MyPipeline"
    np.testing.assert_allclose(picture(again), picture(pipeline), atol=1e-4)
