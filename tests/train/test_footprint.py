"""What a run takes for its own in its folder, where somebody has edited it."""

import pytest

from loraloom.configs.ownership import why_foreign, write_file
from loraloom.train.footprint import POINTER, RUN, _record, adopt


@pytest.mark.parametrize(
    ("content", "is_ours"), [("step-000001\n", True), ("", True), ("step-000001 mine", False), ("x" * 100, False)]
)
def test_a_pointer_that_was_edited_and_is_still_one_is_ours(tmp_path, content, is_ours):
    (tmp_path / "checkpoints").mkdir()
    for name, text in (("config.yaml", "a: 1"), (POINTER, "step-000002")):
        write_file(tmp_path / name, text, tmp_path, RUN)
    (tmp_path / POINTER).write_text(content)
    (tmp_path / "latest").write_text(content)  # of which no record says that it is ours
    assert (_record(tmp_path).why_foreign(tmp_path / POINTER, RUN) is None) == is_ours
    assert why_foreign(tmp_path / POINTER, tmp_path, RUN) is not None  # until it is entered
    adopt(tmp_path)
    assert (why_foreign(tmp_path / POINTER, tmp_path, RUN) is None) == is_ours
    assert _record(tmp_path).why_foreign(tmp_path / "latest", RUN) is not None
