import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from symbiotic_titan.codecs import codec as codec_module
from symbiotic_titan.codecs.codec import build_codec
from symbiotic_titan.codecs.flux import autoencoder_module
from symbiotic_titan.config.generation import Latents

SIZES = [(8, 12), (16, 8), (8, 12), (8, 8), (8, 12)]


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, *size, generator=generator) * 2 - 1 for size in SIZES]


@pytest.fixture(scope="module")
def flux(flux_file):
    return build_codec(Latents(codec="flux", path=flux_file))


def test_pixels_are_their_own_latents(images):
    codec = build_codec(Latents())
    for image, latents in zip(images, codec.encode(images), strict=True):
        assert torch.equal(image, latents)
    assert torch.equal(codec.decode([images[0] * 3])[0], (images[0] * 3).clamp(-1, 1))


def test_latents_and_images_have_the_sizes_that_the_stride_says(flux, images):
    latents = flux.encode(images)
    assert [tuple(z.shape) for z in latents] == [(4, h // 2, w // 2) for h, w in SIZES]
    assert all(z.dtype == torch.float32 and not z.requires_grad for z in latents)
    decoded = flux.decode(latents)
    assert [tuple(x.shape) for x in decoded] == [(3, h, w) for h, w in SIZES]
    assert all(x.min() >= -1 and x.max() <= 1 for x in decoded)
    assert flux.encode([]) == []


def test_flux_latents_are_the_scaled_means_of_torchtitans_autoencoder(flux, flux_file, images):
    module = autoencoder_module()
    params = module.AutoEncoderParams(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=4)
    reference = module.AutoEncoder(params)
    reference.load_state_dict(load_file(flux_file))
    reference.reg.sample = False  # the mean in place of a draw
    with torch.no_grad():
        expected = reference.encode(images[0][None])
        assert torch.allclose(flux.encode(images[:1])[0], expected[0], atol=1e-6)
        decoded = reference.decode(expected).clamp(-1, 1)
        assert torch.allclose(flux.decode([expected[0]])[0], decoded[0], atol=1e-6)


def test_encoding_draws_nothing_and_repeats_bitwise(flux, images):
    before = torch.random.get_rng_state()
    first, second = flux.encode(images), flux.encode(images)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("pixels_at_once", [1, 200, 2**20])
def test_images_encoded_together_are_as_those_encoded_alone(
    flux, images, pixels_at_once, monkeypatch
):
    alone = [flux.encode([image])[0] for image in images]
    monkeypatch.setattr(codec_module, "PIXELS_AT_ONCE", pixels_at_once)
    for a, b in zip(alone, flux.encode(images), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    for a, b in zip(flux.decode(alone), flux.decode(alone[::-1])[::-1], strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_bfloat16_latents_are_near_and_survive_a_bfloat16_cache(flux, flux_file, images):
    half = build_codec(Latents(codec="flux", path=flux_file, dtype="bfloat16"))
    for a, b in zip(flux.encode(images), half.encode(images), strict=True):
        assert b.dtype == torch.float32 and not torch.equal(a, b)
        assert (a - b).abs().max() < 0.05
        assert torch.equal(b, b.bfloat16().float())


def test_missing_and_unknown_tensors_are_named(flux_file, tmp_path):
    weights = load_file(flux_file)
    gone = weights.pop("decoder.conv_out.bias")
    path = str(tmp_path / "ae.safetensors")
    save_file(weights, path)
    with pytest.raises(ValueError, match='is no Flux autoencoder .*"decoder.conv_out.bias"'):
        build_codec(Latents(codec="flux", path=path))
    save_file(weights | {"decoder.conv_out.bias": gone, "more": gone.clone()}, path)
    with pytest.raises(ValueError, match='is no Flux autoencoder .*"more"'):
        build_codec(Latents(codec="flux", path=path))


@pytest.fixture
def kl_latents(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"_class_name": "AutoencoderKL", "latent_channels": 3, "block_out_channels": [8, 8], '
        '"scaling_factor": 2.0, "shift_factor": 0.25}'
    )
    save_file({"a": torch.ones(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    return Latents(codec="autoencoder_kl", path=str(tmp_path))


def test_a_missing_diffusers_says_how_to_install_it(kl_latents, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"pip install 'symbiotic_titan\[diffusers\]'"):
        build_codec(kl_latents)


class HalvingAutoencoder(torch.nn.Module):
    """Stands in for diffusers' class: the mean of 2 x 2 pixels there, repetition back."""

    @classmethod
    def from_pretrained(cls, folder, *, torch_dtype, local_files_only, use_safetensors):
        assert local_files_only and use_safetensors
        if "refused" in str(folder):
            raise OSError("no such model")
        return cls()

    def encode(self, images):
        mean = torch.nn.functional.avg_pool2d(images, 2)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: mean))

    def decode(self, latents):
        return SimpleNamespace(sample=latents.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_kl_latents_are_the_scaled_modes_of_diffusers_autoencoder(kl_latents, images, monkeypatch):
    diffusers = ModuleType("diffusers")
    diffusers.AutoencoderKL = HalvingAutoencoder
    monkeypatch.setitem(sys.modules, "diffusers", diffusers)
    codec = build_codec(kl_latents)
    [latents] = codec.encode(images[:1])
    mean = torch.nn.functional.avg_pool2d(images[0], 2)
    assert torch.allclose(latents, 2.0 * (mean - 0.25))
    [decoded] = codec.decode([latents])
    assert torch.allclose(decoded, mean.repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_an_installed_diffusers_loads_and_agrees(tmp_path, images):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        scaling_factor=0.5,
        shift_factor=0.1,
    )
    model.save_pretrained(tmp_path)
    codec = build_codec(Latents(codec="autoencoder_kl", path=str(tmp_path)))
    assert (codec.info.channels, codec.info.stride) == (4, 2)
    with torch.no_grad():
        mean = model.encode(images[0][None]).latent_dist.mean
        picture = model.decode(mean).sample.clamp(-1, 1)
    [latents] = codec.encode(images[:1])
    assert torch.allclose(latents, 0.5 * (mean[0] - 0.1), atol=1e-5)
    assert torch.allclose(codec.decode([latents])[0], picture[0], atol=1e-4)
