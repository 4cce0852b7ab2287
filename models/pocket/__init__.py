"""pocket: the embedded base, a tiny Stable Diffusion 1.x model of a drawn world, for demos and tests.

`scenes` draws the world, `build` trains the model on it, `measure` looks at pictures, `check` scores the model.
"""

from pathlib import Path

FOLDER = Path(__file__).parent / "weights"
"""The pipeline folder, as `diffusers.StableDiffusionPipeline.from_pretrained` reads it."""
