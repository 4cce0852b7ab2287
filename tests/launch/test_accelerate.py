"""The launch settings that come with the package are ones that accelerate takes."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from loraloom import launch

FILES = sorted((Path(launch.__file__).parent / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_takes_it(file):
    found = load_config_from_file(str(file))
    assert found.mixed_precision == "no"  # the config of the run says it
    assert found.use_cpu == (file.stem == "cpu")
    assert (found.num_machines > 1) == (file.stem == "nodes")
    assert f"--config_file launch/accelerate/{file.name}" in file.read_text()
