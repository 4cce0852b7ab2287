"""Stable Diffusion 2.x: OpenCLIP's text encoder without its last layer; the 768 px models predict v."""

from ..base import PipelineFiles
from ..family import Parts
from ..stable_diffusion import StableDiffusion


class SD2(StableDiffusion):
    """Its files have the layers of OpenCLIP ViT-H/14 up to the penultimate one, so none is skipped here."""

    name = "sd2"
    kohya_version = "sd_v2"

    def detect(self, files: PipelineFiles) -> bool:
        return files.kind == self.pipelines["text_to_image"] and bool(files.config("unet").get("use_linear_projection"))

    def architecture(self, parts: Parts) -> str:
        predicts_v = parts["scheduler"].config.prediction_type == "v_prediction"
        return "stable-diffusion-v2-768-v" if predicts_v else "stable-diffusion-v2-512"


FAMILY = SD2()
