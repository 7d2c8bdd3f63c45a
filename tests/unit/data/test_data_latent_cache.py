"""Rows from a cache of latents must be those of encoding on the fly; what was made differently must be refused."""

import io
import json
import shutil
import tarfile
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from symbiotic_titan.codecs.batch import BatchEncoder
from symbiotic_titan.codecs.codec import build_codec
from symbiotic_titan.codecs.flux import autoencoder_module
from symbiotic_titan.config.data import Data, DataSource
from symbiotic_titan.config.generation import Latents
from symbiotic_titan.data.latent_cache import MANIFEST, encoding_of, folder_of
from symbiotic_titan.data.latent_writer import CacheWriter
from symbiotic_titan.data.latents import TargetImages
from symbiotic_titan.data.pipeline import indexed
from symbiotic_titan.sequence.geometry import ImageGeometry

TABLE = "[[data.sources]]"
ROWS = 12
# 4 channels, stride 2, patch 2.
FLUX_GEOMETRY = ImageGeometry(4, 2, 3, 4, 2, 2)


class Killed(BaseException):
    """What ends a process in the middle of its work."""


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    module = autoencoder_module()
    sizes = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "z_channels": 4}
    path = tmp_path_factory.mktemp("flux") / "ae.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(module.AutoEncoder(module.AutoEncoderParams(**sizes)).state_dict(), path)
    return Latents(codec="flux", path=str(path), patch=2)


def write(out, config, latents, geometry, *, rank=0, num_ranks=1, kill_after=None):
    """Cache the images of the T2I sources of ``config``; with ``kill_after`` the process ends behind so many samples."""
    done = 0

    def advance(count, bad):
        nonlocal done
        done += count
        if kill_after is not None and done >= kill_after:
            raise Killed

    for source in config.sources:
        if source.task not in ("t2i", "t2i_long"):
            continue
        shards, listed = indexed(config, source, TABLE)
        writer = CacheWriter(
            config=config,
            source=source,
            listed=listed,
            targets=TargetImages(config, latents, geometry, [source]),
            codec=build_codec(latents),
            dtype=getattr(torch, latents.dtype),
            advance=advance,
        )
        encoding = encoding_of(config, latents, geometry)
        writer.write(folder_of(out, TABLE, source), encoding, shards, rank, num_ranks)
    return out


@pytest.fixture(scope="module")
def pixel_cache(tmp_path_factory, demo_config, geometry):
    return write(tmp_path_factory.mktemp("pixel"), demo_config, Latents(), geometry)


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        for name, tensor in a.tensors().items():
            assert torch.equal(tensor, getattr(b, name)), name


def test_rows_from_cached_pixels_are_bitwise_those_made_on_the_fly(make_loader, pixel_cache):
    cached = make_loader(latents=Latents(cache=str(pixel_cache)))
    assert_same(islice(cached, ROWS), islice(make_loader(), ROWS))


def test_rows_from_cached_latents_are_those_encoded_on_the_fly(
    make_loader, demo_config, flux, tmp_path
):
    settings = {"geometry": FLUX_GEOMETRY, "local_batch_size": 2}
    write(tmp_path, demo_config, flux, FLUX_GEOMETRY)
    cached = make_loader(latents=replace(flux, cache=str(tmp_path)), **settings)
    encoder = BatchEncoder(build_codec(flux), FLUX_GEOMETRY)
    num_images = 0
    for a, raw in islice(zip(cached, make_loader(latents=flux, **settings), strict=False), 6):
        assert raw.latents.dtype == torch.uint8 and raw.latents.shape[-1] == 48
        b = encoder(raw)
        assert a.latents.dtype == b.latents.dtype == torch.float32
        assert torch.allclose(a.latents, b.latents, atol=1e-5)
        assert_same([replace(a, latents=a.tokens)], [replace(b, latents=b.tokens)])
        num_images += sum(len(row[row >= 0].unique()) for row in a.vae_image)
    assert num_images > 6


def test_a_run_without_images_to_generate_carries_latents_whatever_the_codec(
    make_loader, demo_config, flux
):
    sources = [replace(s, weight=float(s.task == "lm")) for s in demo_config.sources]
    row = next(iter(make_loader({"sources": sources}, latents=flux, geometry=FLUX_GEOMETRY)))
    assert row.latents.dtype == torch.float32 and row.latents.shape[-1] == 16


def test_a_cache_of_bfloat16_keeps_what_a_bfloat16_codec_makes(demo_config, flux, tmp_path):
    half = replace(flux, dtype="bfloat16")
    write(tmp_path / "half", demo_config, half, FLUX_GEOMETRY)
    write(tmp_path / "full", demo_config, flux, FLUX_GEOMETRY)
    sizes = [sum(map(len, files_of(tmp_path / name).values())) for name in ("half", "full")]
    assert sizes[0] < sizes[1]


def test_an_interrupted_cache_is_refused_then_finished_with_the_same_bytes(
    make_loader, demo_config, geometry, pixel_cache, tmp_path
):
    with pytest.raises(Killed):
        write(tmp_path, demo_config, Latents(), geometry, kill_after=8)
    folder = folder_of(tmp_path, TABLE, demo_config.sources[0])
    [finished] = folder.glob("*.tar")
    (folder / "00001-t2i-0001.tar.partial").write_bytes(b"what a killed process leaves")
    with pytest.raises(ValueError, match="is not finished: 2 of 3 shards are missing, the first"):
        make_loader(latents=Latents(cache=str(tmp_path)))
    before = finished.stat()
    write(tmp_path, demo_config, Latents(), geometry)
    after = finished.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert files_of(tmp_path) == files_of(pixel_cache)


def test_processes_share_the_shards_and_write_what_one_would(
    demo_config, geometry, pixel_cache, tmp_path
):
    for rank in range(2):
        write(tmp_path, demo_config, Latents(), geometry, rank=rank, num_ranks=2)
        assert (files_of(tmp_path) == files_of(pixel_cache)) == (rank == 1)


def test_a_cache_made_with_other_settings_is_refused_with_both_named(
    make_loader, demo_config, geometry, pixel_cache, flux
):
    cache = {"cache": str(pixel_cache)}
    with pytest.raises(ValueError) as error:
        make_loader(latents=replace(flux, **cache), geometry=FLUX_GEOMETRY)
    made = encoding_of(demo_config, Latents(), geometry)
    now = encoding_of(demo_config, flux, FLUX_GEOMETRY)
    assert f"were made with codec {made.codec}, images" in str(error.value)
    assert f"this run has codec {now.codec}, images" in str(error.value)
    for change, text in (
        ({"vae_pixels": 256}, "this run has codec .* at most 256 pixels"),
        ({"max_aspect": 1.5}, "this run has codec .* aspect 1.5"),
    ):
        with pytest.raises(ValueError, match=text):
            make_loader(change, latents=Latents(**cache))
    other = replace(geometry, latent_patch=8)
    with pytest.raises(ValueError, match="this run has codec .* in steps of 8 pixels"):
        make_loader(latents=Latents(patch=8, **cache), geometry=other)


def test_the_writer_does_not_mix_two_codecs_in_one_folder(
    demo_config, geometry, pixel_cache, flux, tmp_path
):
    shutil.copytree(pixel_cache, tmp_path, dirs_exist_ok=True)
    with pytest.raises(
        ValueError, match="holds latents made with codec pixel-.*now it is codec fl"
    ):
        write(tmp_path, demo_config, flux, FLUX_GEOMETRY)
    assert files_of(tmp_path) == files_of(pixel_cache)


def test_a_missing_or_damaged_manifest_is_named(make_loader, tmp_path, pixel_cache):
    with pytest.raises(
        ValueError, match=r"#1 \(t2i\): latents.cache has no .*symbiotic cache-latents"
    ):
        make_loader(latents=Latents(cache=str(tmp_path)))
    shutil.copytree(pixel_cache, tmp_path, dirs_exist_ok=True)
    (tmp_path / "data" / "t2i" / MANIFEST).write_text("{}")
    with pytest.raises(ValueError, match="is no manifest of cached latents"):
        make_loader(latents=Latents(cache=str(tmp_path)))


# ---- sources of other shapes ----------------------------------------------------------------------------------------------


def png(seed, height=16, width=24):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def lines_source(folder, num_samples=20):
    """JSONL beside a folder of images, under names of its own."""
    rows = []
    for i in range(num_samples):
        (folder / f"{i}.png").write_bytes(png(i))
        rows.append(json.dumps({"file": f"{i}.png", "meta": {"prompt": f"picture {i}"}}))
    (folder / "list.jsonl").write_text("\n".join(rows))
    keys = {"image": "file", "caption": "meta.prompt"}
    return {"format": "jsonl", "path": str(folder / "list.jsonl"), "keys": keys}


def tar_source(folder, num_samples=20, bad=()):
    """A tar with captions as plain text; the images numbered ``bad`` are damaged."""
    with tarfile.open(folder / "some.tar", "w") as tar:
        for i in range(num_samples):
            for name, data in (
                (f"a/{i:03d}.png", png(i)[: 60 if i in bad else None]),
                (f"a/{i:03d}.txt", f"picture {i}, ä".encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return {"format": "webdataset", "path": str(folder / "*.tar")}


def one_source(settings, **config):
    source = DataSource(name="own", task="t2i", **settings)
    return Data(sources=[source], lookahead=4, **config)


@pytest.mark.parametrize("make_source", [lines_source, tar_source])
def test_sources_with_names_of_their_own_are_cached_and_their_files_may_go(
    make_loader, geometry, tmp_path, make_source
):
    files = tmp_path / "files"
    files.mkdir()
    config = one_source(make_source(files))
    cache = write(tmp_path / "cache", config, Latents(), geometry)
    expected = list(islice(make_loader(vars(config)), ROWS))
    shutil.rmtree(files)
    cached = make_loader(vars(config), latents=Latents(cache=str(cache)))
    assert_same(islice(cached, ROWS), expected)


def test_other_files_than_those_that_were_cached_are_refused(make_loader, geometry, tmp_path):
    config = one_source(tar_source(tmp_path))
    cache = write(tmp_path / "cache", config, Latents(), geometry)
    tar_source(tmp_path, num_samples=40)
    with pytest.raises(ValueError, match="were made of other files than path .* now matches"):
        make_loader(vars(config), latents=Latents(cache=str(cache)))
    with pytest.raises(ValueError, match="holds latents of other files"):
        write(cache, config, Latents(), geometry)


def test_bad_images_are_skipped_and_counted_from_a_cache_as_on_the_fly(
    make_loader, geometry, tmp_path
):
    config = one_source(tar_source(tmp_path, bad=(3, 4, 11)), bad_samples="skip")
    cache = write(tmp_path / "cache", config, Latents(), geometry)
    cached = make_loader(vars(config), latents=Latents(cache=str(cache)))
    fresh = make_loader(vars(config))
    assert_same(islice(cached, ROWS), islice(fresh, ROWS))
    assert cached.num_skipped == fresh.num_skipped > 0


def test_a_bad_image_stops_the_writer_unless_it_is_to_be_skipped(geometry, tmp_path):
    config = one_source(tar_source(tmp_path, bad=(3,)))
    with pytest.raises(
        ValueError, match=r"some.tar: sample 'a/003': .*\(source 'own'\); repair it"
    ):
        write(tmp_path / "cache", config, Latents(), geometry)
    assert not list((tmp_path / "cache").rglob("*.tar*"))


def test_truncated_images_are_in_a_cache_that_was_made_to_keep_them(
    make_loader, geometry, tmp_path
):
    """The PNGs numbered ``bad`` break off after their first 60 bytes, which hold the header only."""
    settings = tar_source(tmp_path, bad=(3, 4))
    source = DataSource(name="own", task="t2i", truncated_images="decode", **settings)
    config = Data(sources=[source], lookahead=4)
    cache = write(tmp_path / "cache", config, Latents(), geometry)
    cached = make_loader(vars(config), latents=Latents(cache=str(cache)))
    fresh = make_loader(vars(config))
    assert_same(islice(cached, ROWS), islice(fresh, ROWS))
    assert cached.num_skipped == fresh.num_skipped == 0
    other = replace(config, sources=[replace(source, truncated_images="bad")])
    with pytest.raises(ValueError, match="were made with .*, also truncated ones"):
        make_loader(vars(other), latents=Latents(cache=str(cache)))
