"""The main job on a user's own files: other formats, other names, cached latents. Same samples in the same order, same bits."""

import json
import re
import subprocess
import sys
import tarfile
from collections import defaultdict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers import launch as runs
from tests.helpers.launch import ROOT, arguments_of

STEPS = 6
LOSSES = ("loss/text", "loss/flow", "loss/balance", "grad_norm/all")

# Source -> format and what the files below call its fields.
FORMATS = {
    "t2i": ("parquet", {"image": "picture", "caption": "about.words"}),
    "t2i_long": ("jsonl", {"image": "file", "caption": "meta.prompt"}),
    "lm": ("parquet", {"text": "content"}),
    "mmu": ("parquet", {"image": "picture.bytes", "question": "q", "answer": "a"}),
}


def samples_of(shard):
    """(image or None, JSON object) of each sample, in the order of the shard's index."""
    if shard.suffix == ".jsonl":
        return [(None, json.loads(line)) for line in shard.read_text().splitlines() if line.strip()]
    samples = defaultdict(dict)
    with tarfile.open(shard) as archive:
        for member in archive:
            key, _, extension = member.name.partition(".")
            samples[key][extension] = archive.extractfile(member).read()
    return [(s.get("png", s.get("jpg")), json.loads(s["json"])) for s in samples.values()]


def write_as_a_users_own(name, shard, folder):
    """The samples of ``shard`` in the format and with the names of FORMATS: one file, in Parquet one row group."""
    samples = samples_of(shard)
    images = [image for image, _ in samples]
    if name == "t2i_long":
        (folder / "images").mkdir(parents=True, exist_ok=True)
        lines = []
        for i, (image, values) in enumerate(samples):
            path = f"images/{shard.stem}-{i}.img"
            (folder / path).write_bytes(image)
            lines.append(json.dumps({"file": path, "meta": {"prompt": values["caption"]}, "n": i}))
        (folder / f"{shard.stem}.jsonl").write_text("\n".join(lines))
        return
    columns = {
        "t2i": {"picture": images, "about": [{"words": v.get("caption")} for _, v in samples]},
        "lm": {"content": [v.get("text") for _, v in samples]},
        "mmu": {
            "picture": [{"bytes": image, "path": None} for image in images],
            "q": [v.get("question") for _, v in samples],
            "a": [v.get("answer") for _, v in samples],
        },
    }[name]
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns | {"n": range(len(samples))}), folder / f"{shard.stem}.parquet")


@pytest.fixture(scope="module")
def own_files(tmp_path_factory, demo):
    """A config that reads the demo data in the formats above."""
    folder = tmp_path_factory.mktemp("own")
    text = (ROOT / "train_configs" / "debug.toml").read_text()
    for name, (form, keys) in FORMATS.items():
        for shard in sorted((demo / "train" / name).iterdir()):
            write_as_a_users_own(name, shard, folder / name)
        inline = ", ".join(f'{field} = "{key}"' for field, key in keys.items())
        row = f'format = "{form}"\npath = "{folder}/{name}/*.{form}"\nkeys = {{{inline}}}'
        old = re.compile(rf'(name = "{name}"\n.*\n)format = .*\npath = .*')
        text, count = old.subn(lambda found, row=row: found[1] + row, text)
        assert count == 1
    config = folder / "own.toml"
    config.write_text(text)
    return config


def train(config, folder, demo, **overrides):
    settings = {key.replace("__", "."): value for key, value in overrides.items()}
    arguments = arguments_of(folder, demo, {"training.steps": STEPS} | settings)
    arguments[arguments.index("--job.config_file") + 1] = str(config)
    return runs.train(folder, arguments)


def assert_same_bits(run, reference):
    assert run.status == 0, run.text[-3000:]
    for tag in LOSSES:
        theirs = reference.scalars(tag)
        assert run.scalars(tag) == {step: theirs[step] for step in range(1, STEPS + 1)}, tag


def test_parquet_and_jsonl_with_other_names_give_the_losses_of_the_demo_shards(
    own_files, tmp_path, demo, reference
):
    cache = tmp_path / "cache"
    run = train(own_files, tmp_path / "run", demo, data__cache_folder=cache)
    assert_same_bits(run, reference)
    assert cache.is_dir() and all(".jsonl." in path.name for path in cache.iterdir())


def test_cached_latents_give_the_losses_of_those_encoded_on_the_fly(
    own_files, tmp_path, demo, reference
):
    latents = tmp_path / "latents"
    done = subprocess.run(
        [sys.executable, "tools/cache_latents.py", str(own_files), "--out", str(latents)],
        cwd=ROOT,
        env=runs.environments(1)[0],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for image in (own_files.parent / "t2i_long" / "images").iterdir():
        image.unlink()  # nobody looks at it any more
    run = train(own_files, tmp_path / "run", demo, latents__cache=latents)
    assert_same_bits(run, reference)
