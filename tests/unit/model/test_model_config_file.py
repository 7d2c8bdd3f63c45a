"""A model config gives back the arguments it was written from, and its path is a flavor."""

import json
from dataclasses import replace

import pytest

from symbiotic_titan.model.flavors import FLAVORS
from symbiotic_titan.model.model_config import (
    read_model_config,
    write_model_config,
)
from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.sequence.modality import TEXT, VAE, VIT

SPLIT = (ExpertGroup("understanding", (TEXT, VIT), 12), ExpertGroup("generation", (VAE,), 4))


@pytest.mark.parametrize("flavor", FLAVORS)
def test_every_flavor_comes_back_equal(tmp_path, flavor):
    write_model_config(tmp_path / "model.json", FLAVORS[flavor])
    assert FLAVORS[str(tmp_path / "model.json")] == FLAVORS[flavor]


def test_groups_and_shield_are_written_by_name(tmp_path):
    args = replace(FLAVORS["debug"], groups=SPLIT, shield_modalities=(VAE,), shield_mode="weights")
    write_model_config(tmp_path / "model.json", args)
    assert read_model_config(tmp_path / "model.json") == args
    values = json.loads((tmp_path / "model.json").read_text())
    assert values["groups"][0]["modalities"] == ["text", "vit"]
    assert values["shield_modalities"] == ["vae"] and "_enforced" not in values


def test_sizes_of_a_groups_own_are_written_and_older_files_have_none(tmp_path):
    path = tmp_path / "model.json"
    own = (replace(SPLIT[0], top_k=4), replace(SPLIT[1], hidden_dim=40))
    write_model_config(path, replace(FLAVORS["debug"], groups=own))
    assert read_model_config(path).groups == own
    rows = json.loads(path.read_text())["groups"]
    assert [sorted(row.keys() & {"hidden_dim", "top_k"}) for row in rows] == [
        ["top_k"],
        ["hidden_dim"],
    ]
    write_model_config(path, replace(FLAVORS["debug"], groups=SPLIT))
    rows = json.loads(path.read_text())["groups"]
    assert all(row.keys() == {"name", "modalities", "num_experts"} for row in rows)


def test_files_that_cannot_be_used_are_named(tmp_path):
    path = tmp_path / "model.json"

    def message(**changes) -> str:
        write_model_config(path, FLAVORS["debug"])
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        with pytest.raises(ValueError) as caught:
            _ = FLAVORS[str(path)]
        assert str(path) in str(caught.value)
        return str(caught.value)

    assert "model.top_k: must be an integer, got 'two'" in message(top_k="two")
    assert "unknown key 'width'; " in message(width=3)
    assert "vit: unknown key 'colour'" in message(vit={"colour": 1})
    assert "model.dim: must be positive" in message(dim=-4)
    assert "unknown modality 'sound'" in message(shield_modalities=["sound"])
    assert "groups.modalities: must be a list" in message(groups=[{"name": "all"}])
    assert "groups: missing key 'name'" in message(groups=[{"modalities": [], "num_experts": 2}])
    assert "groups: must be a list" in message(groups=5)
    assert "groups[0]: must be a table" in message(groups=[5])
    for wrong in (None, [1]):
        assert "vit: must be a table" in message(vit=wrong)
    assert "shield_modalities: must be a list" in message(shield_modalities=3)
    assert "is no model shape but a partition plan" in message(kind="partition plan")
    with pytest.raises(ValueError, match="model shape: no such file: .*nothing.json"):
        _ = FLAVORS[str(tmp_path / "nothing.json")]
