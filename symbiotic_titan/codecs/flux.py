"""The Flux autoencoder: torchtitan's network around a safetensors file of the released layout."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from symbiotic_titan.codecs.codec import Autoencoder, CodecInfo, weights_path
from symbiotic_titan.config.generation import Latents

# Of the released Flux autoencoder: its file holds weights only.
FLUX_SCALE, FLUX_SHIFT = 0.3611, 0.1159

# Inside torchtitan. Importing it by name would run the package's __init__, which needs transformers and datasets.
_MODULE = "models/flux/model/autoencoder.py"


class FluxCodec(Autoencoder):
    """``latents.path`` is the file ae.safetensors of a Flux release, or one with the same tensors in other sizes."""

    @classmethod
    def describe(cls, latents: Latents) -> CodecInfo:
        path = weights_path(latents, "a safetensors file")
        sizes = flux_sizes(path)
        return CodecInfo(
            channels=sizes.channels,
            stride=2 ** (len(sizes.multiples) - 1),
            scale=FLUX_SCALE if latents.scale is None else latents.scale,
            shift=FLUX_SHIFT if latents.shift is None else latents.shift,
            weights=path,
        )

    @classmethod
    def load(cls, info: CodecInfo, device: torch.device | str, dtype: torch.dtype) -> "FluxCodec":
        """Raises ValueError: tensors are missing, of another shape, or unknown."""
        assert info.weights is not None
        model = _load(info.weights).to(device, dtype)
        # The module's own encode would draw from the global generator; its decode would scale once more.
        encoder, decoder = model.get_submodule("encoder"), model.get_submodule("decoder")
        return cls(info, device, dtype, lambda images: encoder(images).chunk(2, dim=1)[0], decoder)


@dataclass(frozen=True)
class FluxSizes:
    """Sizes of an autoencoder of the Flux kind, read from its tensors."""

    width: int
    multiples: tuple[int, ...]
    blocks_per_level: int
    channels: int


def flux_sizes(path: Path) -> FluxSizes:
    """Sizes of the Flux autoencoder in the safetensors file ``path``; raises ValueError where there is none."""
    shapes = _tensor_shapes(path)
    conv = "encoder.down.{}.block.{}.conv1.weight"
    try:
        width = shapes["encoder.conv_in.weight"][0]
        num_levels = next(i for i in range(len(shapes)) if conv.format(i, 0) not in shapes)
        num_blocks = next(i for i in range(len(shapes)) if conv.format(0, i) not in shapes)
        widths = [shapes[conv.format(i, 0)][0] for i in range(num_levels)]
        channels = shapes["encoder.conv_out.weight"][0] // 2
    except KeyError as error:
        raise ValueError(
            f"latents.path = '{path}': holds no Flux autoencoder, for it has no tensor {error}; name the file ae.safetensors of a "
            "Flux release, or choose another latents.codec"
        ) from None
    return FluxSizes(width, tuple(w // width for w in widths), num_blocks, channels)


def _tensor_shapes(path: Path) -> dict[str, list[int]]:
    if not path.is_file():
        raise ValueError(f"latents.path = '{path}': there is no such file")
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"latents.path = '{path}': is no complete safetensors file ({error})"
        ) from error


def autoencoder_module() -> ModuleType:
    """torchtitan's module with ``AutoEncoder`` and ``AutoEncoderParams``, loaded from its file."""
    package = importlib.util.find_spec("torchtitan")
    assert package is not None and package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0]) / _MODULE
    spec = importlib.util.spec_from_file_location("torchtitan_flux_autoencoder", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _load(path: Path) -> nn.Module:
    sizes, module = flux_sizes(path), autoencoder_module()
    with torch.device("meta"):
        model = module.AutoEncoder(
            module.AutoEncoderParams(
                ch=sizes.width,
                ch_mult=sizes.multiples,
                num_res_blocks=sizes.blocks_per_level,
                z_channels=sizes.channels,
            )
        )
    try:
        model.load_state_dict(load_file(path), strict=True, assign=True)
    except RuntimeError as error:
        details = " ".join(str(error).split())
        raise ValueError(f"latents.path = '{path}': is no Flux autoencoder ({details})") from error
    return model.eval().requires_grad_(False)
