"""What `import loraloom` offers, and every block of docs/python.md, run one after the other."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import loraloom

PAGE = Path(__file__).parent.parent / "docs" / "python.md"
CONFIG = {
    "model": {"base": "pocket"},
    "data": {"resolution": 64, "sources": [{"path": "photos", "caption": "a sks creature"}]},
    "adapter": {"rank": 2},
    "loop": {"steps": 3, "batch_size": 2},
    "checkpoint": {"every": 2},
    "trackers": [],
    "output": {"dir": "runs/my-dog", "name": "my-dog"},
}


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.mark.slow
def test_every_block_of_the_page_runs(tmp_path, photos, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("photos").symlink_to(photos)
    Path("my-dog.yaml").write_text(yaml.safe_dump(CONFIG))
    threads = torch.get_num_threads()
    space: dict = {}
    try:
        for number, block in enumerate(blocks()):
            exec(compile(block, f"{PAGE.name}, block {number + 1}", "exec"), space)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    said = capsys.readouterr().out
    assert "runs/my-dog 4" in said and "stopped" in said and "lora" in said
    assert len(space["watch"].losses) == 3
    assert space["trainer"].run.step < 500
    assert {file.name for file in Path().glob("*.safetensors")} == {"for-a-web-ui.safetensors"}
    assert repr(space["engine"]) == "<Engine pocket, adapters: dog, squares>"
    assert "<Mixing of dog, squares>" in said
    assert space["image"].size == (64, 64) and len(space["images"]) == 2


def test_every_name_of_the_face_is_there_and_none_is_imported_before():
    assert set(loraloom.__all__) == set(loraloom._PLACES) == set(dir(loraloom)) - {"__version__"}
    typed = {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(Path(loraloom.__file__).read_text()))
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    assert typed == set(loraloom.__all__)
    for name in loraloom.__all__:
        assert getattr(loraloom, name).__doc__, name
    with pytest.raises(AttributeError, match="Engines"):
        loraloom.Engines  # noqa: B018


def test_nothing_heavy_comes_with_it():
    program = (
        "import sys, loraloom; print([m for m in ('torch', 'diffusers', 'pydantic', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
