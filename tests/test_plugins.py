"""A package from outside: the files of docs/plugins.md, installed into a folder, train a tiny base."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loraloom.configs.choices import GROUPS, find, names
from loraloom.configs.errors import UserError
from loraloom.configs.loader import load_config
from loraloom.launch.doctor import plug_ins
from loraloom.train.build import build_trainer

PAGE = Path(__file__).parent.parent / "docs" / "plugins.md"
OFFERS = {
    "models.families": {"mine": "my_package.mine"},
    "adapters.methods": {"half_rank": "my_package.half_rank"},
    "train.losses": {"absolute": "my_package.absolute"},
}


def install(folder: Path, name: str, offers: dict[str, dict[str, str]]) -> None:
    """What pip leaves of a package: its metadata with its entry points."""
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    sections = [
        f"[loraloom.{group}]\n" + "".join(f"{own} = {module}\n" for own, module in entries.items())
        for group, entries in offers.items()
    ]
    (about / "entry_points.txt").write_text("\n".join(sections))


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """A folder of installed packages with the one of the page."""
    folder = tmp_path / "site"
    install(folder, "my-package", OFFERS)
    (folder / "my_package").mkdir()
    (folder / "my_package" / "__init__.py").touch()
    blocks = re.findall(r"```python\n# my_package/(\w+\.py)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert {name for name, _ in blocks} == {"absolute.py", "half_rank.py", "mine.py", "watch.py"}
    for name, text in blocks:
        (folder / "my_package" / name).write_text(text)
    monkeypatch.syspath_prepend(folder)
    yield folder
    for module in [name for name in sys.modules if name.split(".")[0] == "my_package"]:
        del sys.modules[module]


@pytest.mark.slow
def test_a_family_a_method_a_loss_and_callbacks_from_outside_train(site, base_of, tmp_path, write_config):
    base = tmp_path / "base"
    shutil.copytree(base_of("sd1"), base)
    (base / "mine.txt").touch()
    file = write_config(
        model={"base": str(base)},
        adapter={"method": "half_rank", "rank": 4, "alpha": 4.0},
        loss={"kind": "absolute", "options": {"factor": 2.0}},
        loop={"steps": 2},
        validation={"prompts": ["a star"], "num_images": 1, "steps": 3, "callbacks": ["my_package.watch:Count"]},
        callbacks=[{"use": "my_package.watch:Watch", "options": {"name": "watched.txt"}}],
    )
    with build_trainer(load_config(file)) as trainer:
        trainer.fit()
    run = trainer.run
    assert run.family.name == "mine" and (run.folder / "watched.txt").read_text() == "2 steps"
    artifact = run.adapters.artifact()
    assert artifact is not None and {weights.rank for weights in artifact.modules.values()} == {2}
    assert find("train.losses", "absolute").__name__ == "my_package.absolute"
    assert sys.modules["my_package.watch"].Count.steps == 3 * 2  # before the first step, and at the end
    record = json.loads((run.folder / "run.json").read_text())
    assert record["state"] == "done" and record["verify"]


def test_what_is_offered_is_listed_checked_and_answered(site, write_config):
    assert "absolute" in names("train.losses") and "mse" in names("train.losses")
    found = {(each["package"], each["name"], each["from"], each["problem"]) for each in plug_ins()}
    assert found == {(group, name, "my-package 1.0", "") for group, own in OFFERS.items() for name in own}
    with pytest.raises(UserError, match=r'loss.kind: "absolut" is unknown \(did you mean "absolute"'):
        load_config(write_config(loss={"kind": "absolut"}))
    with pytest.raises(UserError, match=r"loss\.options\.facto"):
        load_config(write_config(loss={"kind": "absolute", "options": {"facto": 2}}))


def test_a_name_that_two_packages_offer_is_refused_with_both(site, monkeypatch):
    other = site.parent / "other"
    install(other, "their-package", {"train.losses": {"absolute": "their_package.x", "mse": "their_package.mse"}})
    monkeypatch.syspath_prepend(other)
    with pytest.raises(UserError, match=r"their-package 1\.0 and by my-package 1\.0"):
        find("train.losses", "absolute")
    with pytest.raises(UserError, match=r"loraloom and by their-package 1\.0"):
        find("train.losses", "mse")
    problems = {each["name"]: each["problem"] for each in plug_ins() if each["package"] == "train.losses"}
    assert "my-package" in problems["absolute"] and problems["mse"] == "also offered by loraloom"


def test_what_cannot_be_imported_is_one_line(site, write_config):
    install(site.parent / "broken", "broken", {"train.losses": {"nothing": "no_such_module"}})
    sys.path.insert(0, str(site.parent / "broken"))
    try:
        with pytest.raises(UserError, match=r"'nothing' of train.losses, from broken 1\.0: cannot be imported"):
            find("train.losses", "nothing")
    finally:
        sys.path.remove(str(site.parent / "broken"))
    for use, words in (
        ("no_such_module:X", "there is no module 'no_such_module'"),
        ("my_package.watch:No", "no Callback of this name"),
        ("my_package.absolute:Options", "no Callback of this name"),
    ):
        with pytest.raises(UserError, match=words):
            build_trainer(load_config(write_config(callbacks=[use])))
    with pytest.raises(UserError, match="does not take its options"):
        build_trainer(load_config(write_config(callbacks=[{"use": "my_package.watch:Watch", "options": {"x": 1}}])))


def test_the_groups_are_packages_of_ours():
    root = Path(__file__).parent.parent
    assert all((root / group.replace(".", "/")).is_dir() for group in GROUPS)
    assert {f"loraloom.{group}" for group in GROUPS} == set(re.findall(r"`(loraloom\.\w+\.\w+)` \|", PAGE.read_text()))


def test_help_asks_no_package():
    program = "import sys; from loraloom.launch.cli import run; run([]); print('importlib.metadata' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
