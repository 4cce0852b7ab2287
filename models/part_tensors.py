"""The tensors of a pipeline's parts: what their configs say, where a single-file checkpoint has them, their types."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..configs.errors import UserError
from .original_names import TEXT_ENCODERS, Original, Shape, current_name, original_tensors

if TYPE_CHECKING:
    from torch import Tensor
    from torch import dtype as DType


def meta_model(part: str, config: dict[str, Any]) -> Any:
    """The model that a part's config describes, with shapes and no numbers."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        if part == "unet":
            return UNet2DConditionModel.from_config(config)
        if part == "vae":
            return AutoencoderKL.from_config(config)
        kinds = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}
        return kinds[config["architectures"][0]](CLIPTextConfig(**config))


def tensors_of(kind: str, contents: Mapping[str, Any]) -> dict[str, dict[str, tuple[Original, Shape]]]:
    """Part -> tensor, as diffusers names it -> where a file has it, and its shape in the folder."""
    found = {}
    for part in ("unet", "vae", *TEXT_ENCODERS[kind]):
        shapes = expected_shapes(part, contents[f"{part}/config.json"])
        places = original_tensors(kind, part, shapes)
        found[part] = {name: (places[name], shape) for name, shape in shapes.items()}
    return found


def expected_shapes(part: str, config: dict[str, Any]) -> dict[str, Shape]:
    """Of a part's tensors, by their names; a text encoder's have `text_model.`, as older libraries want them."""
    model = meta_model(part, config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if "position_ids" not in name}
    return {current_name(part, name): shape for name, shape in shapes.items()}


def weights_name(part: str) -> str:
    """The file with a part's tensors, in its folder."""
    return "model.safetensors" if part.startswith("text_encoder") else "diffusion_pytorch_model.safetensors"


def differences(part: str, tensors: Mapping[str, tuple[Original, Shape]], found: Mapping[str, Shape]) -> Iterator[str]:
    """What a file lacks of a part; `found` are its shapes by their standard names."""
    if missing := sorted(name for name, (original, _) in tensors.items() if original.name not in found):
        first = f"{missing[0]} (in the file: {tensors[missing[0]][0].name})"
        yield f"its {part} lacks {len(missing)} of {len(tensors)} tensors, first {first}"
    odd = {
        original.name: original.shape(shape)
        for original, shape in tensors.values()
        if original.name in found and not same_numbers(found[original.name], original.shape(shape))
    }
    if odd:
        name = min(odd)
        yield f"its {part} has {len(odd)} tensors of another shape: {name} is {found[name]}, not {odd[name]}"


def same_numbers(one: Shape, other: Shape) -> bool:
    """Whether two shapes differ in nothing but ones at the end, as linear layers and convolutions of 1 x 1 do."""
    return _without_ones(one) == _without_ones(other)


def _without_ones(shape: Shape) -> Shape:
    return _without_ones(shape[:-1]) if shape[-1:] == (1,) else shape


def cast(name: str, tensor: "Tensor", dtype: "DType | None") -> "Tensor":
    """A tensor in another type, if it has one for numbers with a fraction; UserError where that cannot hold them."""
    if dtype is None or not tensor.is_floating_point():
        return tensor
    result = tensor.to(dtype)
    if tensor.isfinite().all() and not result.isfinite().all():
        raise UserError(f"{name} has numbers that {str(dtype).removeprefix('torch.')} cannot hold; take bf16 or fp32")
    return result


def pixels_of_a_latent(vae: Mapping[str, Any]) -> int:
    """How many pixels in a row one of its latents stands for."""
    return 2 ** (len(vae["block_out_channels"]) - 1)
