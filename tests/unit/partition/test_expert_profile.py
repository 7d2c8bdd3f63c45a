"""Profiles: what they say about a model, and what is refused."""

import json
import re
from dataclasses import replace

import pytest
import torch

from symbiotic_titan.partition.profile import (
    ModelIdentity,
    Profile,
    layer_statistics,
    router_hash,
    too_few_tokens,
)
from symbiotic_titan.weights.dcp import DistributedCheckpoint
from tests.helpers.stored_models import make_model, save, tiny_args

MODEL = ModelIdentity("tiny", 3, "abc", {"all": 4}, 2)


def profile_of(text, vit, tokens=1000) -> Profile:
    counts = torch.tensor([[text, vit, [0] * len(text)]])
    model = replace(MODEL, groups={"all": len(text)})
    return Profile(model, ("layers.1",), counts, {"text": tokens, "vit": tokens, "vae": 0}, {})


def test_profile_survives_its_file(tmp_path):
    profile = profile_of([1, 2, 3, 4], [4, 3, 2, 1])
    profile.save(tmp_path / "deep" / "profile.json")
    loaded = Profile.load(tmp_path / "deep" / "profile.json")
    assert torch.equal(loaded.counts, profile.counts)
    assert (loaded.model, loaded.layers, loaded.tokens) == (MODEL, ("layers.1",), profile.tokens)


def test_statistics_of_a_layer():
    text, vit = [9, 0, 0, 9, 1, 1, 1, 1], [0, 0, 5, 7, 1, 1, 1, 1]
    (row,) = layer_statistics(profile_of(text, vit))
    assert row["layer"] == "layers.1"
    assert row["imbalance_text"] == pytest.approx(9 / 2.75) and row["imbalance_vit"] == 3.5
    assert row["deviation_vit"] == pytest.approx(torch.tensor(vit).double().std(correction=0) / 2)
    # Of the two most used, 0 and 3 for text, 2 and 3 for ViT, one is in both; of the least used, 1 and 2 against 0 and 1, one.
    assert (row["top_2_in_both"], row["bottom_2_in_both"]) == (1, 1)


def test_statistics_without_a_modality_are_left_open():
    (row,) = layer_statistics(profile_of([10, 0, 0, 10], [0, 0, 0, 0]))
    assert row["imbalance_vit"] is None and row["top_1_in_both"] is None
    assert row["imbalance_text"] == 2.0


def test_too_few_tokens_are_counted():
    # 4 experts, top-2: 200 tokens give 100 choices per expert.
    assert too_few_tokens(profile_of([1] * 4, [1] * 4, tokens=200)) is None
    warning = too_few_tokens(profile_of([1] * 4, [1] * 4, tokens=199))
    assert warning and "only 199 text, 199 vit tokens" in warning and "fewer than 200" in warning
    assert "no text" not in warning and "vae" not in warning


@pytest.mark.parametrize(
    ("tokens", "named", "others"),
    [
        ({"text": 1000, "vit": 0, "vae": 0}, "no vit tokens were read", "text tokens"),
        ({"text": 0, "vit": 1000, "vae": 5}, "no text tokens were read", "vit tokens"),
        ({"text": 1000}, "no vit tokens were read", "text tokens"),
        ({"text": 7, "vit": 0}, "vit alone are arbitrary.*; only 7 text tokens were read", "vae"),
    ],
)
def test_a_modality_without_tokens_is_told(tokens, named, others):
    warning = too_few_tokens(replace(profile_of([1] * 4, [0] * 4), tokens=tokens))
    assert warning and re.search(named, warning) and others not in warning


def test_router_hash_sees_routers_and_nothing_else(tmp_path):
    state = make_model(tiny_args()).state_dict()
    first = router_hash(DistributedCheckpoint(save(state, tmp_path / "a")))
    state["norm.weight"] = state["norm.weight"] + 1
    assert router_hash(DistributedCheckpoint(save(state, tmp_path / "b"))) == first
    state["layers.2.moe.router.all.weight"][0, 0] += 1e-3
    assert router_hash(DistributedCheckpoint(save(state, tmp_path / "c"))) != first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("counts"), "lacks counts"),
        (lambda v: v.update(kind="partition plan"), "is no expert profile but a partition plan"),
        (lambda v: v.update(counts=[[["x"]]]), r"damaged \(counts.* must be an integer, got 'x'"),
        (lambda v: v.update(counts=[[[2**70]]]), r"profile.json is damaged"),
        (lambda v: v["counts"][0].pop(), r"counts of shape \(1, 2, 4\) for"),
        (lambda v: v["counts"][0][0].pop(), r"profile.json is damaged"),
        (lambda v: v["counts"][0][0].__setitem__(0, -1), "counts: must be at least 0"),
        (lambda v: v.update(tokens=[3]), r"damaged \(tokens: must be a table"),
        (lambda v: v["tokens"].update(text="many"), "tokens.text: must be an integer, got 'many'"),
        (lambda v: v.update(layers=7), r"damaged \(layers: must be a list"),
        (lambda v: v.update(layers=["one"]), "layers: must be names such as layers.3, each once"),
        (lambda v: v.update(model=[]), "model: must be a table"),
        (lambda v: v["model"].pop("top_k"), "model: missing key 'top_k'"),
        (lambda v: v["model"].update(top_k="2"), "model.top_k: must be an integer, got '2'"),
        (lambda v: v["model"].update(top_k=0), "model: top_k must be at least 1, got 0"),
        (lambda v: v["model"].update(groups=[4]), "model.groups: must be a table"),
        (lambda v: v["model"]["groups"].update(all="4"), "model.groups.all: must be an integer"),
        (lambda v: v.update(data=None), "data: must be a table"),
        (lambda v: v.update(layers=["layers.1", "layers.2"]), r"counts of shape \(1, 3, 4\) for"),
    ],
)
def test_a_file_that_is_no_profile_is_refused(tmp_path, change, message):
    path = tmp_path / "profile.json"
    profile_of([1, 2, 3, 4], [4, 3, 2, 1]).save(path)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message) as caught:
        Profile.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_garbled_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="expert profile: no such file: .*none.json"):
        Profile.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        Profile.load(tmp_path / "bad.json")
