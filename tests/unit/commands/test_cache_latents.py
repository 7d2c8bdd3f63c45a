"""The tool writes a cache of the config's sources, keeps what is finished and says what is wrong in one line."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from symbiotic_titan.commands import cache_latents

ROOT = Path(__file__).parents[3]


@pytest.fixture
def config(tmp_path):
    """The debug config with one source of four images, for training and for validation."""
    with tarfile.open(tmp_path / "some.tar", "w") as tar:
        for i in range(4):
            image = io.BytesIO()
            Image.new("RGB", (16, 16), (i, 0, 0)).save(image, "PNG")
            for extension, data in (("png", image.getvalue()), ("json", b'{"caption": "c"}')):
                member = tarfile.TarInfo(f"{i}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    debug = (ROOT / "train_configs" / "debug.toml").read_text()
    start, end = debug.index("[[data.sources]]"), debug.index("[checkpoint]")
    row = f'name = "own"\ntask = "t2i"\nformat = "webdataset"\npath = "{tmp_path}/some.tar"\n\n'
    sources = f"[[data.sources]]\n{row}[validation]\nenable = true\n[[validation.sources]]\n{row}"
    path = tmp_path / "config.toml"
    path.write_text(debug[:start] + sources + debug[end:])
    return str(path)


def test_every_source_gets_a_folder_and_a_second_call_keeps_it(config, tmp_path, capsys):
    out = tmp_path / "cache"
    assert cache_latents.main([config, "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{out}/{t}/own: 1 of 1 shards, 4 samples" for t in ("data", "validation")]
    manifest = json.loads((out / "data" / "own" / "manifest.json").read_text())
    assert [shard["num_samples"] for shard in manifest["shards"]] == [4]
    [shard] = (out / "data" / "own").glob("*.tar")
    before = shard.stat()
    assert cache_latents.main([config, "--out", str(out)]) == 0
    assert shard.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["--latents.codec", "flux"], "error: latents.path: codec 'flux' needs its weights"),
        (["--latents.codec", "flux", "--latents.path", "no"], "'no': there is no such file"),
        (["--data.vae_pixels", "256"], "were made with codec|now it is codec"),
    ],
)
def test_a_users_mistake_is_one_line(config, tmp_path, capsys, overrides, message):
    out = ["--out", str(tmp_path / "cache")]
    assert cache_latents.main([config, *out]) == 0
    assert cache_latents.main([config, *out, *overrides]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and any(part in error for part in message.split("|"))


def test_a_config_without_images_to_generate_is_refused(config, tmp_path, capsys):
    path = Path(config)
    path.write_text(path.read_text().replace('task = "t2i"', 'task = "mmu"'))
    assert cache_latents.main([config, "--out", str(tmp_path / "cache")]) == 2
    assert "none has the task t2i or t2i_long" in capsys.readouterr().err
