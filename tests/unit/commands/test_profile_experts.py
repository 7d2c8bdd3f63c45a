"""The tool says in one line what is wrong before it reads anything, and warns of what spoils a profile."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from symbiotic_titan.commands import convert, profile_experts
from symbiotic_titan.demo.write import (
    WorldSize,
    write_world,
)
from symbiotic_titan.hf.import_model import import_model
from symbiotic_titan.hf.model import HuggingFaceModel
from symbiotic_titan.model import model_config
from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.partition.profile import Profile
from symbiotic_titan.sequence.modality import TEXT, VAE, VIT
from tests.helpers.released_models import write_release
from tests.helpers.stored_models import make_model, save
from tests.helpers.stored_models import tiny_args as stored_args

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


def test_a_model_of_several_groups_is_profiled_divided_and_copied(tmp_path, capsys, imported):
    """The config already describes the new model: text keeps its group, input and generated images share out or copy the other."""
    groups = (
        ExpertGroup("text", (TEXT,), 8, top_k=3),
        ExpertGroup("vision", (VIT, VAE), 4, hidden_dim=8),
    )
    args = stored_args(vocab_size=320, groups=groups, num_experts=12)
    shape = tmp_path / "shape.json"
    model_config.write_model_config(shape, args)
    source = save(make_model(args).state_dict(), tmp_path / "released")
    text = (imported[0] / "debug.toml").read_text()
    start, end = text.index("[experts.partition"), text.index("[shielding]")
    rows = (
        '[experts.partition.text]\nmodalities = ["text"]\nnum_experts = 8\ntop_k = 3\nsource = "text"\n'
        '[experts.partition.vision]\nmodalities = ["vit"]\nnum_experts = 4\nhidden_dim = 8\nsource = "vision"\n'
        '[experts.partition.generation]\nmodalities = ["vae"]\nnum_experts = 4\nhidden_dim = 8\nsource = "vision"\ncopy = true\n'
    )
    copied, divided = tmp_path / "copied.toml", tmp_path / "divided.toml"
    copied.write_text(text[:start] + rows + text[end:])
    shared = rows.replace("copy = true\n", "").replace("num_experts = 4", "num_experts = 2")
    divided.write_text(text[:start] + shared + text[end:])

    def words(config, *more):
        return [*more, "--config", str(config), "--model.flavor", str(shape)]

    model = ["--checkpoint", str(source)]
    profile, plan, report = (str(tmp_path / f"{name}.json") for name in ("prof", "plan", "report"))
    batches = ["--batches", "1"]
    assert profile_experts.main(words(copied, *model, *batches, "--out", profile)) == 0
    assert "top-3 of 8 text + top-2 of 4 vision experts" in capsys.readouterr().out
    assert Profile.load(Path(profile)).model.groups == {"text": 8, "vision": 4}
    assert convert.main(words(divided, "plan", "--profile", profile, "--out", plan)) == 0
    given = ["--plan", plan, "--out", str(tmp_path / "divided")]
    assert convert.main(words(divided, "partition", *model, *given)) == 0
    to = ["--out", str(tmp_path / "out")]
    assert convert.main(words(copied, "partition", *model, *to)) == 0
    compared = ["--checkpoint", to[1], "--original", str(source), *batches, "--json", report]
    assert convert.main(words(copied, "check", *compared)) == 0
    inside = json.loads(Path(report).read_text())["inside"]
    assert inside["text"] == inside["vit"] == [1.0, 1.0]
    capsys.readouterr()
    assert convert.main(words(copied, "partition", *model, *given[:2], "--out", to[1] + "2")) == 2
    error = capsys.readouterr().err
    assert "the plan is of other groups than the config" in error and error.count("\n") == 1
