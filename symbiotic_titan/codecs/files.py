"""What a codec is, read from the headers of its files: no weight is loaded, so that every process can ask.

CodecInfo    shape and constants of the latents
fingerprint  what two codecs must share for their latents to be the same
"""

import json
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from symbiotic_titan.config.generation import Latents

# Of the released Flux autoencoder: its file holds weights only.
FLUX_SCALE, FLUX_SHIFT = 0.3611, 0.1159
KL_CONFIG, KL_WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class CodecInfo:
    """Latents have ``channels`` channels and one cell for ``stride`` x ``stride`` pixels: ``scale`` * (mean - ``shift``)."""

    channels: int
    stride: int
    scale: float
    shift: float
    weights: Path | None


@dataclass(frozen=True)
class FluxShape:
    """Sizes of an autoencoder of the Flux kind, as its tensors tell."""

    width: int
    multiples: tuple[int, ...]
    blocks_per_level: int
    channels: int


def codec_info(latents: Latents) -> CodecInfo:
    """What the codec of [latents] makes.

    Raises:
        ValueError: a key is missing or has no effect with this codec, or ``latents.path`` holds no such autoencoder.
    """
    if latents.codec == "pixel":
        _refuse_without_effect(latents)
        return CodecInfo(channels=3, stride=1, scale=1.0, shift=0.0, weights=None)
    if not latents.path:
        kind = "a safetensors file" if latents.codec == "flux" else "a folder that diffusers wrote"
        raise ValueError(f"latents.path: codec {latents.codec!r} needs its weights; name {kind}")
    return (_flux_info if latents.codec == "flux" else _kl_info)(latents)


def _refuse_without_effect(latents: Latents) -> None:
    for key, default in (("path", ""), ("scale", None), ("shift", None), ("dtype", "float32")):
        value = getattr(latents, key)
        if value != default:
            raise ValueError(
                f"latents.{key} = {value!r} has no effect with latents.codec = 'pixel'; remove it, or choose another codec"
            )


def _flux_info(latents: Latents) -> CodecInfo:
    shape = flux_shape(Path(latents.path))
    return CodecInfo(
        channels=shape.channels,
        stride=2 ** (len(shape.multiples) - 1),
        scale=FLUX_SCALE if latents.scale is None else latents.scale,
        shift=FLUX_SHIFT if latents.shift is None else latents.shift,
        weights=Path(latents.path),
    )


def flux_shape(path: Path) -> FluxShape:
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
    return FluxShape(width, tuple(w // width for w in widths), num_blocks, channels)


def _tensor_shapes(path: Path) -> dict[str, list[int]]:
    if not path.is_file():
        raise ValueError(f"latents.path = '{path}': there is no such file")
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"latents.path = '{path}': is no whole safetensors file ({error})"
        ) from error


def _kl_info(latents: Latents) -> CodecInfo:
    folder = Path(latents.path)
    for name in (KL_CONFIG, KL_WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(
                f"latents.path = '{folder}': there is no {name} in it; name the folder of the autoencoder itself "
                "(in a pipeline it is the one called vae)"
            )
    try:
        config: dict[str, Any] = json.loads((folder / KL_CONFIG).read_text())
        kind = config["_class_name"]
        channels, num_levels = config["latent_channels"], len(config["block_out_channels"])
        # An autoencoder without a shift has null there, or no such key.
        scale, shift = config["scaling_factor"], config.get("shift_factor") or 0.0
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"latents.path = '{folder}': its {KL_CONFIG} is no autoencoder's ({error!r})"
        ) from error
    if kind != "AutoencoderKL":
        raise ValueError(
            f"latents.path = '{folder}': holds a {kind}, but latents.codec is 'autoencoder_kl'"
        )
    return CodecInfo(
        channels=channels,
        stride=2 ** (num_levels - 1),
        scale=scale if latents.scale is None else latents.scale,
        shift=shift if latents.shift is None else latents.shift,
        weights=folder / KL_WEIGHTS,
    )


def fingerprint(latents: Latents) -> str:
    """The codec's name and 16 hexadecimal digits. Reads the weights file once (about a second per GB).

    Raises:
        ValueError: see ``codec_info``.
    """
    info = codec_info(latents)
    settings = asdict(info) | {"codec": latents.codec, "dtype": latents.dtype}
    settings["weights"] = _hash_file(info.weights) if info.weights else None
    digest = sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return f"{latents.codec}-{digest}"


def _hash_file(path: Path) -> str:
    digest = sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()
