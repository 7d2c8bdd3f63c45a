import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from symbiotic_titan.codecs.codec import codec_info, fingerprint
from symbiotic_titan.codecs.flux import flux_sizes
from symbiotic_titan.config.generation import Latents

KL = {
    "_class_name": "AutoencoderKL",
    "latent_channels": 4,
    "block_out_channels": [8, 8, 8, 8],
    "scaling_factor": 0.18,
    "shift_factor": None,
}


@pytest.fixture
def kl_folder(tmp_path):
    def write(**changes):
        (tmp_path / "config.json").write_text(json.dumps(KL | changes))
        save_file({"a": torch.ones(3)}, tmp_path / "diffusion_pytorch_model.safetensors")
        return str(tmp_path)

    return write


def test_sizes_of_a_flux_autoencoder_are_read_off_its_tensors(write_flux):
    path = write_flux(ch=64, ch_mult=(1, 2, 1), num_res_blocks=2, z_channels=6)
    shape = flux_sizes(Path(path))
    assert (shape.width, shape.multiples) == (64, (1, 2, 1))
    assert (shape.blocks_per_level, shape.channels) == (2, 6)
    info = codec_info(Latents(codec="flux", path=path))
    assert (info.channels, info.stride, info.scale, info.shift) == (6, 4, 0.3611, 0.1159)


def test_shape_and_constants_of_a_kl_autoencoder_are_those_of_its_config(kl_folder):
    info = codec_info(Latents(codec="autoencoder_kl", path=kl_folder()))
    assert (info.channels, info.stride, info.scale, info.shift) == (4, 8, 0.18, 0.0)
    latents = Latents(codec="autoencoder_kl", path=kl_folder(shift_factor=0.5), scale=2.0)
    assert (codec_info(latents).scale, codec_info(latents).shift) == (2.0, 0.5)


def test_fingerprint_is_that_of_weights_and_settings(write_flux, flux_file):
    base = fingerprint(Latents(codec="flux", path=flux_file))
    assert base.startswith("flux-") and base == fingerprint(Latents(codec="flux", path=flux_file))
    others = [
        Latents(codec="flux", path=write_flux(seed=1)),
        Latents(codec="flux", path=flux_file, scale=1.0),
        Latents(codec="flux", path=flux_file, shift=0.0),
        Latents(codec="flux", path=flux_file, dtype="bfloat16"),
        Latents(),
    ]
    assert len({base, *map(fingerprint, others)}) == 6
    assert fingerprint(Latents(codec="flux", path=write_flux())) == base  # the same file elsewhere
    assert fingerprint(Latents(codec="flux", path=flux_file, patch=2)) == base


def test_another_patch_is_the_same_codec():
    assert fingerprint(Latents(patch=2)) == fingerprint(Latents(patch=8))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"path": "x"}, "latents.path = 'x' has no effect with latents.codec = 'pixel'"),
        ({"scale": 2.0}, "latents.scale = 2.0 has no effect"),
        ({"dtype": "bfloat16"}, "latents.dtype = 'bfloat16' has no effect"),
        ({"codec": "flux"}, "codec 'flux' needs its weights; name a safetensors file"),
        ({"codec": "autoencoder_kl"}, "needs its weights; name a folder that diffusers wrote"),
        ({"codec": "flux", "path": "no/ae.safetensors"}, "there is no such file"),
        ({"codec": "autoencoder_kl", "path": "no"}, "there is no config.json in it; name the"),
    ],
)
def test_a_key_that_is_missing_or_has_no_effect_is_named(settings, message):
    with pytest.raises(ValueError) as error:
        codec_info(Latents(**settings))
    assert message in str(error.value)


def test_files_of_something_else_are_refused(tmp_path, kl_folder):
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="no Flux autoencoder, for it has no tensor 'encoder.conv"):
        codec_info(Latents(codec="flux", path=str(path)))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="is no complete safetensors file"):
        codec_info(Latents(codec="flux", path=str(path)))
    with pytest.raises(ValueError, match="holds a VQModel, but latents.codec is 'autoencoder_kl'"):
        codec_info(Latents(codec="autoencoder_kl", path=kl_folder(_class_name="VQModel")))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="its config.json is no autoencoder's"):
        codec_info(Latents(codec="autoencoder_kl", path=str(tmp_path)))


@pytest.mark.parametrize(
    "settings, message",
    [({"patch": 0}, "latents.patch: must be at least 1"), ({"scale": 0.0}, "must not be zero")],
)
def test_a_number_out_of_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Latents(**settings)
