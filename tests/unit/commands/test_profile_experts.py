"""The tool says in one line what is wrong before it reads anything, and warns of what spoils a profile."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from symbiotic_titan.commands import profile_experts
from symbiotic_titan.demo.write import (
    WorldSize,
    write_world,
)
from symbiotic_titan.hf.import_model import import_model
from symbiotic_titan.hf.model import HuggingFaceModel
from symbiotic_titan.model import model_config
from symbiotic_titan.partition.profile import Profile
from tests.helpers.released_models import write_release

DEBUG = Path(__file__).parents[3] / "train_configs" / "debug.toml"
# A text model, whose vocabulary holds the bytes.
HUNYUAN = {
    "model_type": "hunyuan_v1_moe",
    **{"vocab_size": 320, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 16},
    **{"moe_topk": 2, "num_shared_expert": 1, "tie_word_embeddings": True},
    "rope_theta": 10_000.0,
}


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """(folder of an imported text model, with a small encoder as its shape; words that name it and the config)."""
    folder = tmp_path_factory.mktemp("imported")
    write_world(folder / "demo", 0, WorldSize(4, 8, 100, 60, train_shards=1))
    text = DEBUG.read_text().replace("demo_data/", f"{folder}/demo/")
    (folder / "debug.toml").write_text(text)
    write_release(folder / "hunyuan", HUNYUAN)
    stored = HuggingFaceModel(folder / "hunyuan")
    import_model(stored, folder / "import")
    vit = replace(stored.args.vit, dim=16, num_layers=1, num_heads=2, hidden_dim=32)
    shape = folder / "import" / model_config.FILE_NAME
    model_config.write_model_config(shape, replace(stored.args, vit=vit))
    return folder, ["--config", str(folder / "debug.toml"), "--model.flavor", str(shape)]


def run(imported, checkpoint, out) -> int:
    words = [*imported[1], "--checkpoint", str(imported[0] / checkpoint), "--batches", "1"]
    return profile_experts.main([*words, "--out", str(out)])


@pytest.mark.parametrize("checkpoint", ["hunyuan", "import"])
def test_a_text_model_is_profiled_by_its_text(tmp_path, capsys, imported, checkpoint):
    assert run(imported, checkpoint, tmp_path / "profile.json") == 0
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 3 and all(line.startswith("warning: ") for line in warnings)
    file = imported[0] / checkpoint / ("hugging_face" * (checkpoint == "import")) / "tokenizer.json"
    assert f"has a tokenizer, {file}, but tokenizer.kind = 'bytes' reads" in warnings[0]
    assert "set tokenizer.kind and tokenizer.path to" in warnings[0]
    assert "has no vit.* tensors" in warnings[1] and "no vit tokens were read" in warnings[2]
    profile = Profile.load(tmp_path / "profile.json")
    assert profile.tokens["vit"] == 0 < profile.tokens["text"]
    assert not profile.counts[:, 1].any() and profile.counts[:, 0].all(0).any()
    assert (profile.data["tokenizer"], profile.data["vit_pixels"]) == ("bytes", 1024)


def test_no_tokenizer_no_warning(tmp_path, capsys, imported):
    shutil.copytree(imported[0] / "import", imported[0] / "without", dirs_exist_ok=True)
    (imported[0] / "without" / "hugging_face" / "tokenizer.json").unlink()
    assert run(imported, "without", tmp_path / "profile.json") == 0
    assert "tokenizer" not in capsys.readouterr().err


@pytest.mark.parametrize("out", ["", "file/profile.json"], ids=["a folder", "below a file"])
def test_a_file_that_cannot_be_written_is_told_first(tmp_path, capsys, imported, monkeypatch, out):
    (tmp_path / "file").touch()
    monkeypatch.setattr(profile_experts, "open_model", lambda folder: pytest.fail("it was read"))
    assert run(imported, "import", tmp_path / out) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --out: ") and error.count("\n") == 1
    assert "cannot be written" in error and str(tmp_path / out) in error


def test_an_older_profile_says_nothing_of_the_tokenizer(tmp_path, imported):
    assert run(imported, "import", tmp_path / "profile.json") == 0
    values = json.loads((tmp_path / "profile.json").read_text())
    for key in ("tokenizer", "vit_pixels"):
        del values["data"][key]
    (tmp_path / "profile.json").write_text(json.dumps(values))
    assert Profile.load(tmp_path / "profile.json").data == values["data"]
