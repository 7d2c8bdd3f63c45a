"""A user's mistake ends the run with exit status 2 and one clear message, no traceback, wherever it is found."""

import pytest

from tests.helpers import launch as runs


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[flow]", "[flows]", "config file: unknown key 'flows'; did you mean 'flow'?"),
        ("t2i-*.tar", "nothing-*.tar", "[[data.sources]] #1 (t2i)"),
        ("seq_len = 384", "seq_len = 48", "training.seq_len"),
    ],
    ids=["config", "missing shard", "row too short"],
)
def test_mistakes_are_told_in_one_line(tmp_path, demo, monkeypatch, old, new, message):
    arguments_of = runs.arguments_of

    def changed(folder, demo, settings):
        arguments = arguments_of(folder, demo, settings)
        path = folder / "job.toml"
        path.write_text(path.read_text().replace(old, new))
        return arguments

    monkeypatch.setattr(runs, "arguments_of", changed)
    run = runs.launch(tmp_path, demo, training__steps=1)
    assert run.status == 2, run.text[-2000:]
    assert message in run.text and "Traceback" not in run.text


def test_corrupt_image_follows_the_policy(tmp_path, demo):
    """Overwriting a stretch of a shard breaks its images: ``raise`` names shard and sample, ``skip`` counts them."""
    import shutil

    world = tmp_path / "world"
    shutil.copytree(demo, world)
    for shard in (world / "train" / "t2i").glob("*.tar"):
        data = bytearray(shard.read_bytes())
        start = data.find(b"IDAT")
        while start != -1:
            data[start + 4 : start + 24] = bytes(20)
            start = data.find(b"IDAT", start + 4)
        shard.write_bytes(data)
    stopped = runs.launch(tmp_path / "raise", world, training__steps=4)
    assert stopped.status == 2 and "t2i-" in stopped.text and "Traceback" not in stopped.text
    limited = runs.launch(
        tmp_path / "skip",
        world,
        training__steps=4,
        data__bad_samples="skip",
        data__max_bad_samples=3,
    )
    assert limited.status == 2 and "max_bad_samples" in limited.text
