"""A shared expert folded into the routed experts computes what it did beside them."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.hf.architectures.qwen3_vl_moe import QWEN3_VL_MOE
from symbiotic_titan.hf.converter import ConverterStep, TensorConverter
from symbiotic_titan.hf.export import export_understanding
from symbiotic_titan.hf.fold import FoldingReader, folded
from symbiotic_titan.hf.model import HuggingFaceModel, open_model
from symbiotic_titan.model.flavors import model_args
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.moe.experts import PartitionedMoE
from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.partition.apply import partition_checkpoint
from symbiotic_titan.sequence.modality import TEXT, VAE, VIT
from symbiotic_titan.weights.compatibility import tensors_of_model
from symbiotic_titan.weights.reader import TensorSpec
from tests.helpers.decoder_parity import run
from tests.helpers.forked import ROOT
from tests.helpers.image_rows import image_row, released_inputs, released_marked
from tests.helpers.released_configs import QWEN
from tests.helpers.released_models import QWEN as TINY_QWEN
from tests.helpers.released_models import THINKER, write_release
from tests.helpers.stored_models import make_model, plan_for, save, tiny_args

UNEQUAL = (
    ExpertGroup("understanding", (TEXT, VIT), 5),
    ExpertGroup("generation", (VAE,), 3, hidden_dim=12, top_k=1),
)


class StateReader:
    """The tensors of a model in memory."""

    def __init__(self, state):
        self._state = state
        self.tensors = {name: TensorSpec.of(tensor) for name, tensor in state.items()}

    def read(self, name):
        return self._state[name]


def outputs(moe: PartitionedMoE, x_TD, modality_T):
    with torch.no_grad():
        return moe(x_TD, modality_T, torch.ones(()))[0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"route_scale": 2.5},
        {"score_function": "sigmoid", "selection_bias": True, "route_scale": 1.5},
        {"groups": UNEQUAL},
    ],
    ids=["softmax", "scaled", "sigmoid", "unequal groups"],
)
def test_the_outputs_are_the_same(changes):
    args = tiny_args(shared_hidden_dim=40, **changes)
    model = make_model(args)
    names = [group.name for group in args.groups]
    reader = FoldingReader(StateReader(model.state_dict()), names, args.route_scale)
    wide = SymbioticModel(folded(args))
    wide.load_state_dict({name: reader.read(name) for name in reader.tensors})
    assert reader.tensors == tensors_of_model(wide)
    x_TD, modality_T = torch.randn(30, 32), torch.tensor([TEXT, VIT, VAE]).repeat(10)
    for number in ("1", "2"):
        moe = model.layers[number].moe
        expected = outputs(moe, x_TD, modality_T)
        found = outputs(wide.layers[number].moe, x_TD, modality_T)
        torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
        moe.shared_experts = None
        assert (outputs(moe, x_TD, modality_T) - expected).abs().max() > 0.1 * expected.abs().max()
    assert reader.folding.shared_dim == 40
    assert (
        reader.folding.added == 2 * (8 - 1) * 3 * 40 * 32
    )  # eight copies instead of one, in two layers


@pytest.mark.parametrize(
    ("config", "of_transformers", "inputs_of", "opening", "unused"),
    [
        (TINY_QWEN, "Qwen3VLMoeForConditionalGeneration", released_inputs, None, ()),
        (
            THINKER,
            "Qwen3OmniMoeThinkerForConditionalGeneration",
            released_marked,
            THINKER["vision_start_token_id"],
            ("model.audio_tower.",),  # this small release has none
        ),
    ],
    ids=["qwen3_vl", "qwen3_omni"],
)
def test_transformers_computes_our_logits_of_images(
    tmp_path, config, of_transformers, inputs_of, opening, unused
):
    """From a release without a shared expert to an export of a model that was given one, with weights other than zero."""
    import transformers

    write_release(tmp_path / "release", config)
    release = HuggingFaceModel(tmp_path / "release")
    groups = (ExpertGroup("understanding", (TEXT, VIT), 5), ExpertGroup("generation", (VAE,), 3))
    args = replace(release.args, groups=groups, shared_hidden_dim=release.args.expert_hidden_dim)
    plan = plan_for(tmp_path / "release", groups)
    plan = replace(plan, layers=("layers.0", "layers.1"), shared=torch.tensor([[3], [1]]))
    partition_checkpoint(tmp_path / "release", args, plan, tmp_path / "start")
    model = SymbioticModel(args).eval()
    open_model(tmp_path / "start").read_into(model.state_dict())
    for layer in model.layers.values():
        torch.nn.init.normal_(layer.moe.shared_experts.w2.weight, std=0.3)
    reader = open_model(save(model.state_dict(), tmp_path / "step-1"))
    out = tmp_path / "half"
    export_understanding(reader, args, tmp_path / "release", out, shard_bytes=10**6)
    theirs, report = getattr(transformers, of_transformers).from_pretrained(
        out, output_loading_info=True
    )
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    assert not [name for name in report["missing_keys"] if not name.startswith(unused)]
    document = [3, (2, 3), 2, (1, 4), 4]
    row = image_row(args, document, 120, torch.Generator().manual_seed(3), opening)
    with torch.no_grad():
        found = theirs.eval()(**inputs_of(args, document, row)).logits
    expected = run(model, row)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for layer in model.layers.values():
        layer.moe.shared_experts = None
    assert (run(model, row)[0] - expected).abs().max() > 1


def test_mixed_dtypes_keep_the_finer_one():
    model = make_model(tiny_args())
    state = {
        n: t if ".shared_experts." in n else t.bfloat16() for n, t in model.state_dict().items()
    }
    reader = FoldingReader(StateReader(state), ["all"], 1.0)
    w2 = reader.read("layers.1.moe.experts.all.w2")
    assert w2.dtype == torch.float32 == reader.tensors["layers.1.moe.experts.all.w2"].dtype
    assert torch.equal(w2[3, :, 16:], state["layers.1.moe.shared_experts.w2.weight"])
    assert torch.equal(w2[3, :, :16], state["layers.1.moe.experts.all.w2"][3].float())


def test_the_shipped_config_has_the_shapes_that_transformers_asks_for(monkeypatch):
    """By shapes alone: the model has 30 billion parameters."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    monkeypatch.chdir(ROOT)
    config = load_job_config(
        ["--job.config_file", str(Path("train_configs") / "qwen3_vl_30b_a3b.toml")]
    )
    args = model_args(config)
    assert args.shared_hidden_dim == 768
    with torch.device("meta"):
        reader = StateReader(SymbioticModel(args).state_dict())
        fold = FoldingReader(reader, ["understanding"], args.route_scale)
        group = args.groups[0]
        half = folded(replace(args, num_experts=group.num_experts, groups=()))
        exported = QWEN3_VL_MOE.config(copy.deepcopy(QWEN), half)
        theirs = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(**exported))
    expected = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    text = exported["text_config"]
    assert (text["moe_intermediate_size"], text["num_experts"]) == (1536, group.num_experts)
    steps = [
        ConverterStep(
            tuple(name.replace(".all.", f".{group.name}.") for name in m.ours), m.theirs, m.save
        )
        for m in QWEN3_VL_MOE.weight_map(half, expected)
    ]
    specs = TensorConverter(steps, fold.tensors, fold.read).specs
    assert {name: spec.shape for name, spec in specs.items()} == expected
    narrow = replace(half, expert_hidden_dim=768)
    with torch.device("meta"):
        before = tensors_of_model(SymbioticModel(narrow))
    written, alone = (
        sum(
            spec.num_values
            for n, spec in tensors.items()
            if "latent" not in n and "flow_head" not in n
        )
        for tensors in (specs, before)
    )
    assert written - alone == 48 * group.num_experts * 3 * 768 * 2048
    assert 1.8 < written / alone < 2.0
