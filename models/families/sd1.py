"""Stable Diffusion 1.x and models of its shape: one CLIP text encoder, which predicts noise."""

from ..base import PipelineFiles
from ..family import Parts
from ..stable_diffusion import StableDiffusion


class SD1(StableDiffusion):
    """Rombach et al. 2022, with OpenAI's CLIP ViT-L/14."""

    name = "sd1"
    kohya_version = "sd_v1"

    def detect(self, files: PipelineFiles) -> bool:
        return files.kind == self.pipelines["text_to_image"] and not files.config("unet").get("use_linear_projection")

    def architecture(self, parts: Parts) -> str:
        return "stable-diffusion-v1"


FAMILY = SD1()
