"""Pipelines with all kinds of layers and few of each; three layers of CLIP, so that two can be left out."""

from typing import Any

from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers import UNet2DConditionModel as UNet
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from loraloom.models.pocket.tokenizer import build_tokenizer


def pipeline_of(family: str) -> Any:
    """Of `sd1`, `sd2` (which predicts v) or `sdxl`; 32 px, with the random weights of torch's generator."""
    tokenizer, widths = build_tokenizer(), {"sd1": 16, "sd2": 24, "sdxl": 16 + 24}
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    small = {"intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": len(tokenizer)}

    def clip(width: int, **options: Any) -> CLIPTextConfig:
        return CLIPTextConfig(hidden_size=width, **small, **tokens, **options)

    further: dict[str, Any] = {"use_linear_projection": family != "sd1"}
    if family == "sdxl":
        further |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
        further |= {"projection_class_embeddings_input_dim": 24 + 6 * 8, "transformer_layers_per_block": [2, 1]}
    unet = UNet(
        sample_size=4,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=widths[family],
        norm_num_groups=4,
        attention_head_dim=2,
        **further,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        sample_size=32,
        scaling_factor=0.13025 if family == "sdxl" else 0.18215,
    )
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    predicts = "v_prediction" if family == "sd2" else "epsilon"
    shared = {"vae": vae, "unet": unet, "tokenizer": tokenizer}
    shared["scheduler"] = DDPMScheduler(clip_sample=False, prediction_type=predicts, **betas)
    if family == "sdxl":
        second = CLIPTextModelWithProjection(clip(24, hidden_act="gelu", projection_dim=24))
        first = CLIPTextModel(clip(16))
        return StableDiffusionXLPipeline(text_encoder=first, text_encoder_2=second, tokenizer_2=tokenizer, **shared)
    text_encoder = CLIPTextModel(clip(widths[family], hidden_act="gelu" if family == "sd2" else "quick_gelu"))
    no = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(text_encoder=text_encoder, **shared, **no)
