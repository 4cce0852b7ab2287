"""loraloom trains adapters (LoRA and relatives, DreamBooth) on diffusion models, and uses them."""

__version__ = "0.1.0"
