"""A partitioned checkpoint holds what slicing by hand gives, and never looks complete before it is."""

import json
import resource
from dataclasses import replace

import pytest
import torch

from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.partition.apply import (
    RECORD,
    partition_checkpoint,
    plan_of_checkpoint,
)
from symbiotic_titan.sequence.modality import TEXT, VAE, VIT
from symbiotic_titan.weights.compatibility import (
    check_is_model,
    tensors_of_model,
)
from symbiotic_titan.weights.dcp import DistributedCheckpoint
from tests.helpers.stored_models import BIMODAL, make_model, plan_for, save, tiny_args

SIGMOID = {"score_function": "sigmoid", "selection_bias": True}


@pytest.fixture
def vlm(tmp_path):
    """(model, folder of its checkpoint)."""
    model = make_model(tiny_args())
    return model, save(model.state_dict(), tmp_path / "vlm")


def read_model(args, folder) -> SymbioticModel:
    model = SymbioticModel(args)
    DistributedCheckpoint(folder).read_into(model.state_dict())
    return model


@pytest.mark.parametrize("switches", [{}, SIGMOID], ids=["softmax", "sigmoid with bias"])
def test_partitioned_checkpoint_is_what_slicing_by_hand_gives(tmp_path, switches):
    model = make_model(tiny_args(**switches))
    source = save(model.state_dict(), tmp_path / "vlm")
    plan = plan_for(source)
    args = tiny_args(groups=BIMODAL, **switches)
    partition_checkpoint(source, args, plan, tmp_path / "out")
    old, new = model.state_dict(), read_model(args, tmp_path / "out").state_dict()
    leaves = {"experts": ("w1", "w2", "w3"), "router": ("weight", *(("bias",) if switches else ()))}
    sliced = set()
    for layer, row in zip(plan.layers, plan.order, strict=True):
        for group, experts in zip(("understanding", "generation"), row.split([5, 3]), strict=True):
            for part, names in leaves.items():
                for leaf in names:
                    name = f"{layer}.moe.{part}.{group}.{leaf}"
                    assert torch.equal(new[name], old[f"{layer}.moe.{part}.all.{leaf}"][experts])
                    sliced.add(name)
    rest = new.keys() - sliced
    assert rest == {name for name in old if ".all." not in name}
    assert all(torch.equal(new[name], old[name]) for name in rest)


@pytest.mark.parametrize("switches", [{}, SIGMOID], ids=["softmax", "sigmoid with bias"])
def test_tokens_whose_top_k_is_inside_the_group_get_exactly_the_same_output(tmp_path, switches):
    """Each token by itself: how many rows an expert has may decide in which order a matmul adds, and with it the last bit."""
    model = make_model(tiny_args(**switches))
    source = save(model.state_dict(), tmp_path / "vlm")
    plan = plan_for(source)
    args = tiny_args(groups=BIMODAL, **switches)
    partition_checkpoint(source, args, plan, tmp_path / "out")
    split = read_model(args, tmp_path / "out")
    x_TD = torch.randn(80, 32)
    modality_T = torch.tensor([TEXT, VIT, VAE, TEXT]).repeat(20)
    for layer, row in zip(("1", "2"), plan.order, strict=True):
        whole, parts = model.layers[layer].moe, split.layers[layer].moe
        chosen_TK = whole.router(x_TD, modality_T).experts_TK
        is_generation = torch.isin(chosen_TK, row[5:])
        inside_T = torch.where(modality_T == VAE, is_generation.all(-1), (~is_generation).all(-1))
        assert 4 < int(inside_T.sum()) < 36
        before, after = (token_by_token(m, x_TD, modality_T) for m in (whole, parts))
        assert torch.equal(after[inside_T], before[inside_T])
        assert (after[~inside_T] != before[~inside_T]).any(-1).all()
        with torch.no_grad():
            together = parts(x_TD, modality_T, torch.ones(()))[0]
        torch.testing.assert_close(together[inside_T], before[inside_T], atol=1e-6, rtol=1e-6)


def token_by_token(layer, x_TD, modality_T) -> torch.Tensor:
    with torch.no_grad():
        rows = [
            layer(x_TD[i : i + 1], modality_T[i : i + 1], torch.ones(()))[0]
            for i in range(len(modality_T))
        ]
    return torch.cat(rows)


def test_partition_costs_no_parameter(tmp_path, vlm):
    model, source = vlm
    conversion = partition_checkpoint(
        source, tiny_args(groups=BIMODAL), plan_for(source), tmp_path / "out"
    )
    totals = conversion.totals()
    assert totals["before"] == totals["after"] == sum(p.numel() for p in model.parameters())
    assert totals["copied"] + totals["sliced"] == totals["after"]
    assert totals["new"] == totals["dropped"] == 0
    sliced = [row["tensor"] for row in conversion.rows() if row["what"] == "sliced"]
    assert "layers.*.moe.experts.understanding.w1" in sliced and len(sliced) == 8


def test_training_checkpoint_gives_the_model_alone(tmp_path, vlm):
    model, _ = vlm
    state = {
        **model.state_dict(),
        "optimizer": {"state.norm.weight.exp_avg": torch.zeros(32), "param_groups.x.lr": 0.1},
        "lr_scheduler": {"last_epoch": 3},
        "dataloader": {"state": "{}"},
        "train_state": {"step": 12, "tokens_seen": torch.zeros(3)},
    }
    source = save(state, tmp_path / "step-12")
    assert DistributedCheckpoint(source).step == 12
    partition_checkpoint(source, tiny_args(), None, tmp_path / "out")
    assert DistributedCheckpoint(tmp_path / "out").tensors.keys() == model.state_dict().keys()
    assert DistributedCheckpoint(tmp_path / "out").step is None
    assert json.loads((tmp_path / "out" / RECORD).read_text())["step"] == 12


def test_shared_expert_is_dropped_where_the_config_has_none(tmp_path, vlm):
    _, source = vlm
    args = tiny_args(shared_hidden_dim=0)
    conversion = partition_checkpoint(source, args, None, tmp_path / "out")
    assert conversion.totals()["dropped"] == 2 * 3 * 16 * 32
    assert all(".shared_experts." in name for name in conversion.dropped)
    check_is_model(DistributedCheckpoint(tmp_path / "out"), tensors_of_model(SymbioticModel(args)))


def test_missing_latent_modules_get_their_initial_values(tmp_path, vlm):
    model, _ = vlm
    state = {
        name: tensor.bfloat16()
        for name, tensor in model.state_dict().items()
        if not name.startswith(("latent_embedding.", "flow_head."))
    }
    source = save(state, tmp_path / "bare")
    args = tiny_args(groups=BIMODAL, init_seed=3)
    conversion = partition_checkpoint(source, args, plan_for(source), tmp_path / "out")
    fresh, written = make_model(args, seed=3).state_dict(), DistributedCheckpoint(tmp_path / "out")
    new = [name for name, origin in conversion.origins.items() if origin.kind == "new"]
    assert new and all(name.startswith(("latent_embedding.", "flow_head.")) for name in new)
    for name in new:
        assert torch.equal(written.read(name), fresh[name].bfloat16())
    assert not written.read("flow_head.output.weight").any()
    totals = conversion.totals()
    assert totals["after"] == totals["before"] + totals["new"]


def test_every_old_tensor_is_read_once_and_never_two_at_a_time(tmp_path, vlm, monkeypatch):
    _, source = vlm
    plan, reads = plan_for(source), []
    read = DistributedCheckpoint.read
    monkeypatch.setattr(
        DistributedCheckpoint, "read", lambda self, n: (reads.append(n), read(self, n))[1]
    )
    conversion = partition_checkpoint(source, tiny_args(groups=BIMODAL), plan, tmp_path / "out")
    of_tensors = [name for name in reads if ".router." not in name]  # routers are hashed besides
    assert len(of_tensors) == len(set(of_tensors))
    assert set(reads) == {origin.name for origin in conversion.origins.values()}


def test_plan_lies_in_the_checkpoint(tmp_path, vlm):
    _, source = vlm
    plan = plan_for(source)
    partition_checkpoint(source, tiny_args(groups=BIMODAL), plan, tmp_path / "out")
    assert torch.equal(plan_of_checkpoint(tmp_path / "out").order, plan.order)
    assert plan_of_checkpoint(source) is None


# ---- interruptions ----------------------------------------------------------------------------------------------------------


def fail_at(number: int, error: BaseException, monkeypatch) -> None:
    """The ``number``-th tensor read raises."""
    read, calls = DistributedCheckpoint.read, []

    def failing(self, name):
        calls.append(name)
        if len(calls) == number:
            raise error
        return read(self, name)

    monkeypatch.setattr(DistributedCheckpoint, "read", failing)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk gone"), ValueError("no")])
def test_interrupted_conversion_leaves_nothing(tmp_path, vlm, monkeypatch, error):
    _, source = vlm
    fail_at(20, error, monkeypatch)
    with pytest.raises(type(error)):
        partition_checkpoint(source, tiny_args(), None, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["vlm"]


def test_full_disk_is_told_and_leaves_nothing(tmp_path, vlm):
    """A limit on the size of a file stands in for the end of the disk."""
    _, source = vlm
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(
            OSError, match="writing .*out failed: .*too large; nothing of it was kept"
        ):
            partition_checkpoint(source, tiny_args(), None, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["vlm"]


def test_failed_replacement_leaves_the_old_checkpoint(tmp_path, vlm, monkeypatch):
    _, source = vlm
    partition_checkpoint(source, tiny_args(), None, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with monkeypatch.context() as patch:
        fail_at(20, OSError("disk gone"), patch)
        with pytest.raises(OSError, match="disk gone"):
            partition_checkpoint(source, tiny_args(), None, tmp_path / "out", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    partition_checkpoint(
        source, tiny_args(shared_hidden_dim=0), None, tmp_path / "out", overwrite=True
    )
    assert not [
        n for n in DistributedCheckpoint(tmp_path / "out").tensors if ".shared_experts." in n
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "vlm"]


# ---- bad input --------------------------------------------------------------------------------------------------------------


def test_existing_targets_are_refused(tmp_path, vlm):
    _, source = vlm
    with pytest.raises(ValueError, match="vlm exists; choose another --out, or .* --overwrite"):
        partition_checkpoint(source, tiny_args(), None, source)
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="papers was not written by symbiotic convert"):
        partition_checkpoint(source, tiny_args(), None, tmp_path / "papers", overwrite=True)


def test_sources_that_are_no_checkpoint_are_named(tmp_path, vlm):
    _, source = vlm

    def message_of(folder) -> str:
        with pytest.raises(ValueError) as caught:
            partition_checkpoint(folder, tiny_args(), None, tmp_path / "out")
        return str(caught.value)

    assert "no such folder" in message_of(tmp_path / "nothing")
    source.rename(tmp_path / "step-5")
    assert "it is a folder of checkpoints; name one of them" in message_of(tmp_path)
    data = next((tmp_path / "step-5").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-10])
    assert "bytes instead of" in message_of(tmp_path / "step-5")
    (tmp_path / "hf").mkdir()
    assert "it has no .metadata: the save did not finish" in message_of(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").touch()
    assert "hf has no config.json" in message_of(tmp_path / "hf")


def test_plans_that_do_not_fit_are_refused(tmp_path, vlm):
    _, source = vlm
    plan, args, out = plan_for(source), tiny_args(groups=BIMODAL), tmp_path / "out"
    with pytest.raises(ValueError, match="--plan must say which expert goes where"):
        partition_checkpoint(source, args, None, out)
    with pytest.raises(ValueError, match="--plan has no effect: the config has no"):
        partition_checkpoint(source, tiny_args(), plan, out)
    other = (replace(BIMODAL[0], num_experts=4), replace(BIMODAL[1], num_experts=4))
    with pytest.raises(ValueError, match="understanding 5 .* has understanding 4 \\+ generation 4"):
        partition_checkpoint(source, tiny_args(groups=other), plan, out)
    stranger = save(make_model(tiny_args(), seed=8).state_dict(), tmp_path / "stranger")
    with pytest.raises(ValueError, match="the plan is of another model: its routers have hash"):
        partition_checkpoint(stranger, args, plan, out)
    assert not out.exists()


def test_sources_of_other_models_are_refused(tmp_path, vlm):
    model, source = vlm
    out = tmp_path / "out"

    def refused(args, message, folder=source, plan=None):
        with pytest.raises(ValueError, match=message):
            partition_checkpoint(folder, args, plan, out)

    refused(tiny_args(dim=64), "of another model: tok_embeddings.weight has shape")
    refused(
        replace(tiny_args(), vocab_size=128),
        "the checkpoint has 64 embeddings, the config's model 128; set model.vocab_size = 64: ",
    )
    refused(tiny_args(num_layers=4), "it lacks layers.3.attention_norm.weight, .* and 12 more")
    refused(tiny_args(num_layers=2), "the config's model has no layers.2.attention_norm.weight")
    state = {k: v for k, v in model.state_dict().items() if ".shared_experts." not in k}
    bare = save(state, tmp_path / "bare")
    refused(tiny_args(), "has no shared expert .* set experts.shared = false", bare)
    plan = plan_for(source)
    partition_checkpoint(source, tiny_args(groups=BIMODAL), plan, tmp_path / "split")
    refused(
        tiny_args(groups=BIMODAL),
        "already partitioned into generation, understanding",
        tmp_path / "split",
        plan,
    )


def test_loading_names_what_differs(tmp_path, vlm):
    model, source = vlm
    stored = DistributedCheckpoint(source)

    def refused(args, message):
        with pytest.raises(ValueError, match=message):
            check_is_model(stored, tensors_of_model(SymbioticModel(args)))

    refused(tiny_args(groups=BIMODAL), "expert groups all, the config's model generation, under")
    refused(tiny_args(dim=64), r"has shape \(64, 32\) in it and \(64, 64\) here")
    refused(tiny_args(num_layers=4), "it lacks layers.3.attention_norm.weight")
    refused(tiny_args(num_layers=2), "it has layers.2.attention_norm.weight, .*model lacks")
    check_is_model(stored, tensors_of_model(model))
    check_is_model(stored, tensors_of_model(SymbioticModel(tiny_args(shared_hidden_dim=0))))
