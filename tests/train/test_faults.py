"""Bad input: one clear line each, exit code 2, no traceback, and found before any model is loaded."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState

from loraloom.configs.command import run_command
from loraloom.configs.errors import OWN_CODE, UNEXPECTED, TrainingError
from loraloom.configs.loader import load_config
from loraloom.configs.schema import Tracker
from loraloom.train import build
from loraloom.train.__main__ import main
from loraloom.train.build import build_trainer
from loraloom.train.callback import Callback
from loraloom.train.callbacks.export import Export
from loraloom.train.plan import main as plan
from loraloom.train.preflight import check_trackers
from loraloom.train.state import newest_sound_checkpoint
from loraloom.train.trainer import Trainer


def answer(config: Path, capsys, *arguments: str) -> list[str]:
    """The lines on stderr of a run that must be refused."""
    assert run_command(main, [str(config), *arguments]) == 2
    return capsys.readouterr().err.splitlines()


def test_an_empty_image_folder(write_config, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    config = write_config(data={"sources": [{"path": str(tmp_path / "empty"), "caption": "a dog"}]})
    lines = answer(config, capsys)
    assert len(lines) == 1
    assert "holds no images" in lines[0]


def test_every_bad_image_is_named_at_once(write_config, photos, tmp_path, capsys):
    folder = tmp_path / "bad"
    folder.mkdir()
    good = (photos / "0.png").read_bytes()
    (folder / "good.png").write_bytes(good)
    (folder / "cut.png").write_bytes(good[: len(good) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "page.jpg").write_text("<html>not found</html>")
    (folder / ".DS_Store").write_bytes(b"\0")
    (folder / "._good.png").write_bytes(b"\0")
    config = write_config(data={"sources": [{"path": str(folder), "caption": "a dog"}]})
    lines = answer(config, capsys)
    assert [Path(line.split(": ")[1]).name for line in lines] == ["cut.png", "empty.jpg", "page.jpg"]


def test_a_missing_base(write_config, tmp_path, capsys):
    (line,) = answer(write_config(model={"base": str(tmp_path / "nowhere")}), capsys)
    assert "nowhere" in line
    assert "pocket" in line


def test_a_folder_that_is_no_base(write_config, photos, capsys):
    (line,) = answer(write_config(model={"base": str(photos)}), capsys)
    assert "model_index.json" in line


def test_an_output_folder_below_a_file(write_config, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (line,) = answer(write_config(output={"dir": str(tmp_path / "file" / "run")}), capsys)
    assert "is a file" in line


def test_an_output_folder_that_is_a_file(write_config, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (line,) = answer(write_config(output={"dir": str(tmp_path / "file")}), capsys)
    assert "is a file" in line


def test_an_output_folder_that_cannot_be_written(write_config, capsys):
    """In /proc, where even root can make no folder."""
    (line,) = answer(write_config(output={"dir": "/proc/run"}), capsys)
    assert "output.dir /proc/run" in line
    assert "cannot be written" in line


def test_an_output_folder_inside_the_images(write_config, photos, capsys):
    (line,) = answer(write_config(output={"dir": str(photos / "run")}), capsys)
    assert "inside the images" in line


def test_all_problems_are_told_together(write_config, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    config = write_config(
        model={"base": str(tmp_path / "nowhere")},
        data={"sources": [{"path": str(tmp_path / "none"), "caption": "x"}]},
        output={"dir": str(tmp_path / "file" / "run")},
    )
    assert len(answer(config, capsys)) == 3


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"loop": {"precision": "fp16"}}, ["fp16", "bf16"]),
        ({"adapter": {"parts": {"unett": "attention"}}}, ["unett", 'did you mean "unet"']),
        ({"adapter": {"parts": {"unet": "atention"}}}, ["atention", "attention"]),
        ({"data": {"resolution": 36}}, ["36", "32", "40"]),
        ({"model": {"family": "sdxl"}}, ["sdxl", "sd1"]),
    ],
)
def test_what_only_the_model_can_tell(write_config, photos, capsys, sections, words):
    AcceleratorState._reset_state(True)
    folder = write_config().parent / "run"
    folder.mkdir()
    (folder / "run.json").write_text(
        json.dumps({"state": "done", "step": 1, "steps": 1, "versions": {"loraloom": "0.1.0"}})
    )
    sources = {"sources": [{"path": str(photos), "caption": "x"}, {"prior": "a creature", "count": 4}]}
    config = write_config(**sections | {"data": sources | sections.get("data", {})})
    (line,) = answer(config, capsys, "--overwrite")
    AcceleratorState._reset_state(True)
    assert all(word in line for word in words), line
    assert (folder / "run.json").exists(), "an old run was removed for one that cannot start"
    assert not list(folder.glob("prior-*")), "class images were made before the config was known to fit"


def test_a_tracker_that_is_not_installed(write_config, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (line,) = answer(write_config(trackers=["tensorboard"]), capsys)
    assert "not installed" in line


def test_trackers_are_those_of_accelerate():
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert set(get_args(Tracker)) == set(LOGGER_TYPE_TO_CLASS)
    (line,) = check_trackers(["tensorboard", "comet_ml"])
    assert "comet_ml is not installed; pip install comet-ml" in line


def test_a_caption_longer_than_the_window_is_said(write_config, photos, capsys):
    long = {"path": str(photos), "caption": "a red star on a blue background " * 20}
    assert main([str(write_config(data={"sources": [long]}, loop={"steps": 1}))]) == 0
    assert "only the first 75 are seen" in capsys.readouterr().err


def test_an_image_that_vanishes_ends_the_run_with_its_name(write_config, photos, tmp_path, capsys):
    class Vanish(Callback):
        def on_start(self, run):
            shutil.rmtree(folder)

    folder = Path(shutil.copytree(photos, tmp_path / "vanishing"))
    data = {"sources": [{"path": str(folder), "caption": "x"}], "cache": {"latents": False}}
    config = load_config(write_config(data=data))
    trainer = build_trainer(config)
    trainer.callbacks = [Vanish()]
    with pytest.raises(TrainingError, match=r"vanishing.*\.png"):
        trainer.fit()


def test_a_loss_that_is_not_a_number_ends_the_run_and_saves_no_adapter(write_config, capsys):
    config = write_config(optimizer={"learning_rate": 1e30}, loop={"steps": 8})
    assert run_command(main, [str(config)]) == 3
    folder = config.parent / "run"
    assert "learning rate" in capsys.readouterr().err
    assert not list(folder.glob("*.safetensors"))
    assert yaml.safe_load((folder / "run.json").read_text())["state"] == "failed"
    assert (folder / "report.html").exists()


def test_weights_are_those_before_a_step_that_failed(write_config, photos):
    trainer = build_trainer(load_config(write_config(), ["data.sources.0.loss_weight=1e38"]))
    trainer.callbacks = []
    before = [parameter.clone() for parameter in trainer.run.trained()]
    with pytest.raises(TrainingError, match=r"step 1:.*\.png"):
        trainer.fit()
    assert all(torch.equal(old, new) for old, new in zip(before, trainer.run.trained(), strict=True))


def broken_weights(run, where) -> torch.Tensor:
    """A trained tensor, or the average of it."""
    named = run.ema.averages if where == "average" else run.adapters.named_parameters()
    return next(iter(named["unet"].values())).data


@pytest.mark.parametrize(("where", "value"), [("weight", "nan"), ("weight", "inf"), ("average", "nan")])
def test_weights_that_are_not_finite_take_no_good_file_s_place(write_config, where, value, capsys, monkeypatch):
    class Break(Callback):
        def on_step(self, run):
            if run.step == 2:
                broken_weights(run, where)[0, 0] = float(value)

    whole = build._make_callbacks()
    monkeypatch.setattr(build, "_make_callbacks", lambda held_out: [Break(), *whole])
    config = write_config(optimizer={"ema_decay": 0.9}, loop={"steps": 3}, checkpoint={"every": 1, "keep": 1})
    assert run_command(main, [str(config)]) == 3
    folder = config.parent / "run"
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert re.search(r"step 2: 1 of \d+ trained tensors are not finite, first unet\.\S+lora_A", line), line
    assert "newest checkpoint is step-000001" in line
    assert newest_sound_checkpoint(folder)[0].name == "step-000001"
    assert not list(folder.glob("*.safetensors"))


def test_an_adapter_that_is_not_finite_is_not_written_over_a_good_one(write_config, monkeypatch, capsys):
    """The last look at it, should the weights break after the last checkpoint."""

    class Break(Callback):
        def on_end(self, run):
            file.write_bytes(b"a good one")
            broken_weights(run, "weight")[0, 0] = torch.nan

    monkeypatch.setattr(build, "_make_callbacks", lambda held_out: [Break(), Export()])
    config = write_config(loop={"steps": 1})
    file = config.parent / "run" / "tiny.safetensors"
    assert run_command(main, [str(config)]) == 6
    assert "hold NaN or Inf" in capsys.readouterr().err
    assert file.read_bytes() == b"a good one"


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 99 bytes"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_out_of_memory_is_one_line_of_advice(write_config, error, monkeypatch, capsys):
    def forward(self, batch):
        if self.run.step == 2:
            raise error
        return whole(self, batch)

    whole = Trainer.forward
    config = write_config(loop={"steps": 3}, checkpoint={"every": 1}, optimizer={"learning_rate": 1e-3})
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "forward", forward)
        assert run_command(main, [str(config)]) == 4
    folder = config.parent / "run"
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert line.startswith("error: step 3: out of memory (")
    assert f"`loraloom resume {folder} loop.gradient_checkpointing=true loop.micro_batch=1`" in line
    assert "a data.resolution below 32" in line
    assert yaml.safe_load((folder / "run.json").read_text())["exit_code"] == 4
    assert newest_sound_checkpoint(folder) == (folder / "checkpoints" / "step-000002", [])


@pytest.mark.slow
def test_a_run_that_was_out_of_memory_goes_on_with_less(write_config):
    config = write_config(loop={"steps": 1})
    assert main([str(config)]) == 0
    less = ["loop.gradient_checkpointing=true", "loop.micro_batch=1", "loop.steps=2"]
    assert main(["--resume", str(config.parent / "run"), *less]) == 0


@pytest.mark.slow
def test_an_error_of_ours_keeps_its_traceback(write_config, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("LORALOOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Trainer, "forward", lambda self, batch: torch.zeros(2) @ torch.zeros(3))
    assert run_command(main, [str(write_config())]) == UNEXPECTED
    (kept,) = (tmp_path / "cache" / "faults").iterdir()
    assert str(kept) in capsys.readouterr().err and "torch.zeros(2)" in kept.read_text()


OPTIMIZER = """
import torch

class Broken(torch.optim.SGD):
    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        self.done = 0

    def step(self, closure=None):
        self.done += 1
        if any(p.numel() > 4 for g in self.param_groups for p in g["params"]):
            raise KeyError("mine")
"""


@pytest.mark.slow
def test_an_error_of_the_users_optimizer_is_shown_as_theirs(write_config, monkeypatch, tmp_path, capsys):
    (tmp_path / "mine_optim.py").write_text(OPTIMIZER)
    monkeypatch.syspath_prepend(tmp_path)
    config = write_config(optimizer={"name": "mine_optim.Broken"})
    assert run_command(main, [str(config)]) == OWN_CODE
    said = capsys.readouterr().err
    assert "code of yours, " + str(tmp_path / "mine_optim.py") in said and "trainer.py" not in said


def test_bad_images_are_refused_without_importing_torch(write_config, tmp_path):
    (tmp_path / "empty").mkdir()
    config = write_config(data={"sources": [{"path": str(tmp_path / "empty"), "caption": "a dog"}]})
    script = (
        "import sys; from loraloom.train.__main__ import main; from loraloom.configs.command import run_command;"
        f"code = run_command(main, [{str(config)!r}]); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (f"output.name={'n' * 230}", "output.name"),
        (f"output.name={'犬' * 81}", "is 243 bytes long"),
        (f"output.dir=/{'/'.join(['abcdefghi'] * 380)}", "leaves no room for checkpoints"),
        ("output.dir=~nobody-of-this-name/x", "no user"),
        ("data.cache.dir=/dev/null/x", "data.cache.dir /dev/null/x: Not a directory"),
    ],
    ids=lambda text: text[:20],
)
def test_a_name_that_cannot_be_written_is_known_before(write_config, capsys, setting, words):
    for command in (plan, main):
        assert run_command(command, [str(write_config()), setting]) == 2
        said = capsys.readouterr().err
        assert any(words in line for line in said.splitlines() if line.startswith("error: "))
        assert "Traceback" not in said
