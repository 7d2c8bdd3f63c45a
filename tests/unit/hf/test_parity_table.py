"""The table of parity has all architectures, and what it says is within the bar; what transformers saves comes back bit for bit."""

import json

import pytest
import torch

from symbiotic_titan.hf.export import export_understanding
from symbiotic_titan.hf.import_model import import_model
from symbiotic_titan.hf.model import HuggingFaceModel, open_model
from symbiotic_titan.hf.release_files import RELEASE_FILES
from tests.helpers import parity_table


def test_every_architecture_is_within_1e_5_of_transformers(monkeypatch, capsys):
    monkeypatch.setattr(parity_table, "SEEDS", range(1))
    parity_table.main()
    worst = json.loads(capsys.readouterr().out.splitlines()[-1])["worst"]
    sizes = {"aria at 490 pixels", "aria at 980 pixels"}
    names = {"qwen3_vl_moe", "qwen3_omni_moe_thinker", "glm4v_moe", "ernie4_5_vl_moe"}
    names |= {"aria", "hunyuan_v1_moe"}
    assert set(worst) == names | sizes
    for model_type, values in worst.items():
        assert ("image_gap" in values) == (model_type != "hunyuan_v1_moe")
        assert all(value < 1e-5 for key, value in values.items() if key.endswith("_gap"))
        assert all(value > 1 for key, value in values.items() if key.endswith("_logit"))
        assert all(value == 1 for key, value in values.items() if key.endswith("_choices"))


@pytest.mark.parametrize(
    "one",
    [one for one in parity_table.CASES if not one.name],
    ids=lambda one: one.config["model_type"],
)
def test_what_transformers_saves_comes_back_with_the_same_logits_bit_for_bit(one, tmp_path):
    """Saved by transformers, imported, exported, loaded by transformers."""
    theirs = parity_table.random_release(one.config, seed=0)
    theirs.save_pretrained(tmp_path / "saved")
    release, imported = HuggingFaceModel(tmp_path / "saved"), tmp_path / "imported"
    import_model(release, imported)
    files, out = imported / RELEASE_FILES, tmp_path / "back"
    export_understanding(open_model(imported), release.args, files, out, shard_bytes=10**9)
    again = type(theirs).from_pretrained(out, dtype=torch.float32, attn_implementation="eager")
    for _, inputs in parity_table.rows_of(one, release.args, seed=0).values():
        with torch.no_grad():
            logits, expected = again.eval()(**inputs).logits, theirs(**inputs).logits
        assert (logits - expected).abs().max() == 0.0
        assert expected.std() > 0.1
