"""FSDP2 with two processes on the CPU: what one process trains, within rounding; resumed, the same bytes."""

import json
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from loraloom.configs.errors import UserError
from loraloom.train.__main__ import main
from loraloom.train.run_folder import read_history
from loraloom.train.sharding import set_up_sharding, wrap

pytestmark = pytest.mark.slow

SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
COMMON = {
    "loop": {"steps": 3, "batch_size": 4, "micro_batch": 2, "threads": 1},
    "optimizer": {"learning_rate": 1e-3, "ema_decay": 0.9},
    "checkpoint": {"every": 2},
}
QUERIES = r"re:.*\.to_q"
SOME = ["re:conv_in", "re:conv_out", r"re:mid_block\..*"]
"""Inside and outside of the blocks that are sharded each; all layers would be slow, as DTensors are in Python."""


def config_of(write_config, name, adapter, photos):
    own = [{"path": str(photos), "caption": "a sks creature"}]
    pictures = {} if adapter.get("method") == "full" else {"prompts": ["a hill"], "num_images": 1, "steps": 2}
    images = {"every": 3, "sources": own, "timesteps": 1, **pictures}
    file = write_config(name, validation=images, **COMMON)
    content = yaml.safe_load(file.read_text())
    content["adapter"] = adapter
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


@pytest.mark.parametrize(
    ("adapter", "result"),
    [
        ({"method": "full", "parts": {"unet": SOME}}, "tiny/unet/diffusion_pytorch_model.safetensors"),
        ({"rank": 4, "alpha": 8, "parts": {"unet": QUERIES}, "options": {"dropout": 0.1}}, "tiny.safetensors"),
    ],
)
def test_two_shards_train_what_one_process_trains(run_two, write_config, photos, tmp_path, adapter, result):
    alone, sharded = (config_of(write_config, name, adapter, photos) for name in ("one", "two"))
    assert main([str(alone)]) == 0
    run_two("loraloom.train", str(sharded), environment=SHARDED)
    states = [load_file(tmp_path / name / result) for name in ("one", "two")]
    assert states[0].keys() == states[1].keys()
    moved = [name for name in states[0] if "lora_A" not in name]  # which hides B by its size
    one, other = (torch.cat([state[name].flatten() for name in moved]) for state in states)
    assert (one - other).norm() <= 1e-2 * one.norm()  # Adam makes whole steps of rounding where gradients are tiny
    losses = [
        [entry["loss"] for entry in read_history(tmp_path / name / "logs/history.jsonl")] for name in ("one", "two")
    ]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-5, atol=0)
    record = json.loads((tmp_path / "two/run.json").read_text())
    assert (record["state"], record["processes"]) == ("done", 2)
    assert all(found["prediction_difference"] < 1e-5 for found in record["verify"].values())
    curves = [
        [json.loads(line)["held_out"] for line in (tmp_path / name / "logs/held_out.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=1e-4, atol=0)
    saved = tmp_path / "two/checkpoints/step-000003"
    assert "text_encoder" not in " ".join(file.name for file in saved.iterdir())
    trained = sum(tensor.numel() for tensor in load_file(saved / "adapter_unet.safetensors").values())
    assert trained == record["trainable_parameters"]

    wanted = (tmp_path / "two" / result).read_bytes()
    shutil.rmtree(saved)
    run_two("loraloom.train", "--resume", str(tmp_path / "two"), environment=SHARDED)
    assert (tmp_path / "two" / result).read_bytes() == wanted


def test_what_cannot_be_sharded_is_said():
    accelerator: Any = SimpleNamespace(distributed_type=DistributedType.FSDP)
    with pytest.raises(UserError, match="FSDP shards one part, and text_encoder and unet train here"):
        wrap(accelerator, {"text_encoder": None, "unet": None}, None, None, [])
    accelerator.distributed_type = DistributedType.DEEPSPEED
    with pytest.raises(UserError, match="deepspeed takes clipping and the optimiser's step into its own hands"):
        set_up_sharding(accelerator)
