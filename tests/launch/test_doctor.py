"""`loraloom doctor` tells what works from what only seems to."""

import json
import os
from pathlib import Path

import pytest

from loraloom.configs.errors import UserError
from loraloom.launch import doctor
from loraloom.launch.doctor import Outcome, as_text, is_below, main, package_row, required_floors, try_packages


def test_a_table_of_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["numpy", "pyyaml"]) == 0
    text = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert rows["pyyaml"][2:] == [">=6.0", "usable"]
    assert rows["numpy"][3:] == ["usable"]
    assert text.endswith("everything that is required works\n")


def test_json_has_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "pillow", "tqdm"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert [(row["name"], row["state"]) for row in report["packages"]] == [("pillow", "usable"), ("tqdm", "usable")]


def fake(folder: Path, name: str, files: dict[str, str]) -> None:
    """An installed package that behaves as a broken one was seen to behave."""
    info = folder / f"{name}-9.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.0\n")
    for file, code in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(code)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_a_torchvision_of_another_torch_is_explained(packages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake(packages, "torchvision", {"torchvision/__init__.py": "raise RuntimeError('operator torchvision::nms')"})
    assert main(["torchvision", "tqdm"]) == 0  # it is not required
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "broken   RuntimeError: operator torchvision::nms; built for another torch" in rows["torchvision"]
    assert "pip uninstall torchvision" in rows["torchvision"]
    assert "usable" in rows["tqdm"]


def test_xformers_that_only_imports_is_broken_and_torch_tells_its_devices(packages: Path) -> None:
    kernel = "def memory_efficient_attention(*tensors): raise NotImplementedError('no operator found')"
    fake(packages, "xformers", {"xformers/__init__.py": "", "xformers/ops.py": kernel})
    outcomes = try_packages(["torch", "xformers"])
    assert outcomes["xformers"].reason == "NotImplementedError: no operator found"
    assert outcomes["torch"].reason == ""
    assert outcomes["torch"].found["devices"][-1] == "CPU"
    assert outcomes["torch"].found["attention"]["CPU"]["fp32"] == ["flash", "math"]  # the others are for GPUs
    report = {"loraloom": "1", "python": "3", "platform": "x", "cores": 2, "packages": [], "ok": True}
    text = as_text(report | {"torch": outcomes["torch"].found})
    assert "\ntorch: " in text
    assert "\nattention on CPU: fp32 flash (or math), bf16 flash (or math), fp16 flash (or math)\n" in text


def test_nothing_of_the_current_folder_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("json", "contextlib", "tqdm", "numpy", "wandb"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w'); raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    assert main(["tqdm"]) == 0
    assert not (tmp_path / "ran").exists()


def test_what_a_broken_torchvision_breaks_points_to_it() -> None:
    outcomes = {"torchvision": Outcome("RuntimeError: nms"), "transformers": Outcome("ImportError: CLIPTextModel")}
    row = package_row("transformers", "9.0", "5.0", True, outcomes)
    assert (row.state, row.advice) == ("broken", "ImportError: CLIPTextModel; first see torchvision")


def test_a_required_package_that_is_broken_or_old_is_exit_code_2(
    packages: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(packages, "tqdm", {"tqdm/__init__.py": "raise ImportError('no bar')"})
    assert main(["tqdm"]) == 2
    assert "broken   ImportError: no bar; pip install --force-reinstall tqdm" in capsys.readouterr().out
    metadata = packages / "tqdm-9.0.dist-info" / "METADATA"
    metadata.write_text("Metadata-Version: 2.1\nName: tqdm\nVersion: 1.0\n")
    assert main(["tqdm"]) == 2
    assert f'too old  pip install "tqdm>={required_floors()["tqdm"]}"' in capsys.readouterr().out


def test_a_package_that_kills_the_interpreter_does_not_hide_the_others(packages: Path) -> None:
    (packages / "killer.py").write_text("print('noise'); import os; os._exit(7)")
    outcomes = try_packages(["tqdm", "killer", "pyyaml"], {**os.environ, "PYTHONPATH": str(packages)})
    assert outcomes == {
        "tqdm": Outcome(),
        "killer": Outcome("took the interpreter down with it (exit code 7)"),
        "pyyaml": Outcome(),
    }


def test_a_package_that_hangs_is_given_up(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TIMEOUT", 0.5)
    (packages / "sleeper.py").write_text("import time; time.sleep(60)")
    outcome = try_packages(["sleeper"], {**os.environ, "PYTHONPATH": str(packages)})["sleeper"]
    assert "no answer in" in outcome.reason


def test_unknown_packages_are_said() -> None:
    with pytest.raises(UserError, match="numpie: not used by loraloom; it uses: torch, "):
        main(["numpie"])


@pytest.mark.parametrize(
    ("version", "floor", "below"),
    [("2.13.0+cpu", "2.6", False), ("2.5.1+cu124", "2.6", True), ("2.6", "2.6.0", False), ("10.0", "9.1", False)],
)
def test_versions_are_compared_as_numbers(version: str, floor: str, below: bool) -> None:
    assert is_below(version, floor) is below


def test_floors_come_from_the_package_s_metadata() -> None:
    floors = required_floors()
    assert {"torch", "diffusers", "transformers", "peft", "pydantic"} <= set(floors)
    assert not {"wandb", "bitsandbytes"} & set(floors)
