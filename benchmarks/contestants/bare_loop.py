"""The bare loop: what one would write by hand, with nothing but the denoiser, PEFT's LoRA and AdamW.

    python bare_loop.py BASE INPUTS RANK DTYPE THREADS STEPS OUT

Noisy latents, targets, timesteps and embeddings of every step lie in a file, so that not even noise is drawn. OUT gets
the loss of each step in `losses.json` and the adapter in `adapter.safetensors`.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file


def main() -> None:
    base, inputs_file, rank, dtype, threads, steps, out = sys.argv[1:]
    torch.set_num_threads(int(threads))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet", torch_dtype=types[dtype])
    unet.to(device).requires_grad_(False)  # type: ignore[arg-type]
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    inject_adapter_in_model(LoraConfig(r=int(rank), lora_alpha=int(rank), target_modules=targets), unet)
    inputs = {name: tensor.to(device) for name, tensor in load_file(inputs_file).items()}
    start = {name.removeprefix("start/"): inputs.pop(name) for name in list(inputs) if name.startswith("start/")}
    set_peft_model_state_dict(unet, start)
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01)
    unet.train()
    losses = []
    for step in range(int(steps)):
        row = {name: tensor[step % len(tensor)] for name, tensor in inputs.items()}
        added = {"text_embeds": row["pooled_prompt_embeds"], "time_ids": row["sizes"]} if "sizes" in row else None
        noisy, words = row["noisy"].to(unet.dtype), row["prompt_embeds"].to(unet.dtype)
        predicted = unet(noisy, row["timesteps"], words, added_cond_kwargs=added).sample
        loss = F.mse_loss(predicted.float(), row["target"].float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    Path(out).mkdir(parents=True, exist_ok=True)
    save_file(
        {f"unet.{name}": tensor for name, tensor in get_peft_model_state_dict(unet).items()},
        f"{out}/adapter.safetensors",
    )
    Path(out, "losses.json").write_text(json.dumps(torch.stack(losses).tolist()))


if __name__ == "__main__":
    main()
