"""What an export writes is what transformers loads, and what came in goes out bit for bit."""

import copy
import json
import resource
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from symbiotic_titan.hf.export import (
    export_understanding,
    export_whole,
    find_release_files,
    understanding_group,
)
from symbiotic_titan.hf.import_model import import_model
from symbiotic_titan.hf.model import (
    HuggingFaceModel,
    open_model,
)
from symbiotic_titan.hf.release_files import RELEASE_FILES
from symbiotic_titan.model.args import one_pool
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.partition.apply import partition_checkpoint
from symbiotic_titan.sequence.modality import TEXT, VAE, VIT
from symbiotic_titan.weights.digests import SUMS
from symbiotic_titan.weights.new_folder import MANIFEST
from symbiotic_titan.weights.safetensors import (
    SafetensorsModel,
    slices_in,
)
from tests.helpers.decoder_parity import run
from tests.helpers.image_rows import image_row, released_inputs, released_squares
from tests.helpers.released_models import (
    ARIA,
    ARIA_BESIDE,
    ERNIE,
    GLM,
    GLM_BESIDE,
    OMNI,
    OMNI_BESIDE,
    QWEN,
    TRANSPOSED,
    WHOLE_OMNI,
    random_besides,
    write_release,
)
from tests.helpers.stored_models import assert_equal_tensors, plan_for, save, values_of

GROUPS = (ExpertGroup("understanding", (TEXT, VIT), 5), ExpertGroup("generation", (VAE,), 3))
TRIPARTITE = (
    ExpertGroup("text", (TEXT,), 3),
    ExpertGroup("vit", (VIT,), 3),
    ExpertGroup("vae", (VAE,), 2),
)
SHARDS = {"shard_bytes": 10_000}


def tensors_in(folder) -> dict[str, torch.Tensor]:
    return {name: place.read() for name, place in slices_in(folder).items()}


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """(folder of the checkpoint, its args, tensors of the release)."""
    tmp_path = tmp_path_factory.mktemp("imported")
    theirs = write_release(tmp_path / "qwen")
    stored = HuggingFaceModel(tmp_path / "qwen")
    import_model(stored, tmp_path / "imported")
    return tmp_path / "imported", stored.args, theirs


@pytest.fixture(scope="module")
def split(tmp_path_factory, imported):
    """(folder of the partitioned checkpoint, its args)."""
    tmp_path = tmp_path_factory.mktemp("split")
    folder, args, _ = imported
    plan = replace(plan_for(folder), groups=GROUPS, layers=("layers.0", "layers.1"))
    args = replace(args, groups=GROUPS)
    partition_checkpoint(folder, args, plan, tmp_path / "split")
    return tmp_path / "split", args


def export(folder, args, out, **settings):
    source = find_release_files(folder, "debug")
    return export_understanding(open_model(folder), args, source, out, **{**SHARDS, **settings})


# ---- a whole release --------------------------------------------------------------------------------------------------------


RELEASES = pytest.mark.parametrize(
    ("release", "layout", "besides"),
    [
        (QWEN, {}, {}),
        (QWEN, TRANSPOSED, {}),
        (OMNI, WHOLE_OMNI, OMNI_BESIDE),
        (GLM, {}, GLM_BESIDE),
        (ARIA, {}, ARIA_BESIDE),
        (ERNIE, {}, {}),
    ],
    ids=["qwen", "qwen as transformers saves it", "omni", "glm", "aria", "ernie"],
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@RELEASES
def test_a_release_comes_back_bit_for_bit(tmp_path, release, layout, besides, dtype):
    more = random_besides(besides, dtype)
    theirs = write_release(tmp_path / "release", release, layout=layout, dtype=dtype, more=more)
    stored = HuggingFaceModel(tmp_path / "release")
    import_model(stored, tmp_path / "imported")
    done = export(tmp_path / "imported", stored.args, tmp_path / "back")
    assert stored.unmapped.tensors.keys() == more.keys() <= done.written.keys() and not done.missing
    assert_equal_tensors(tensors_in(tmp_path / "back"), theirs)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    expected, name = copy.deepcopy(release), str(dtype).removeprefix("torch.")
    text = expected.get("thinker_config", expected)["text_config"]
    expected["dtype"] = text["dtype" if "dtype" in text else "torch_dtype"] = name
    assert config == expected
    names = {path.name for path in (tmp_path / "back").iterdir()} - set(
        path.name for path in (tmp_path / "back").glob("model-*.safetensors")
    )
    assert names == {
        *("config.json", "tokenizer.json", "preprocessor_config.json", "LICENSE"),
        *("model.safetensors.index.json", MANIFEST, SUMS),
    }
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1


def test_a_training_checkpoint_is_exported_beside_the_flavor_it_was_trained_with(
    tmp_path, imported
):
    folder, args, theirs = imported
    state = {
        **values_of(open_model(folder)),
        **{n: t for n, t in SymbioticModel(args).state_dict().items() if n.startswith("flow_head")},
        "optimizer": {"state.norm.weight.exp_avg": torch.zeros(32)},
        "train_state": {"step": 12},
    }
    step = save(state, tmp_path / "step-12")
    with pytest.raises(ValueError, match="no hugging_face/config.json in .*step-12: nothing says"):
        find_release_files(step, "debug")
    source = find_release_files(step, str(folder / "model.json"))
    done = export_understanding(open_model(step), args, source, tmp_path / "back", **SHARDS)
    assert_equal_tensors(tensors_in(tmp_path / "back"), theirs)
    assert done.left_out and all(name.startswith("flow_head.") for name in done.left_out)


def test_another_dtype_is_told_in_the_config(tmp_path, imported):
    folder, args, theirs = imported
    export(folder, args, tmp_path / "back", dtype=torch.bfloat16)
    expected = {name: tensor.bfloat16() for name, tensor in theirs.items()}
    assert_equal_tensors(tensors_in(tmp_path / "back"), expected)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"


@RELEASES
def test_a_release_that_was_not_imported_comes_back_too(tmp_path, release, layout, besides):
    more = random_besides(besides, torch.float32)
    theirs = write_release(tmp_path / "release", release, layout=layout, more=more)
    stored = HuggingFaceModel(tmp_path / "release")
    import_model(stored, tmp_path / "shape", shape_only=True)
    source = find_release_files(tmp_path / "release", str(tmp_path / "shape" / "model.json"))
    done = export_understanding(stored, stored.args, source, tmp_path / "back", **SHARDS)
    assert_equal_tensors(tensors_in(tmp_path / "back"), theirs)
    assert not done.missing


# ---- the understanding half -------------------------------------------------------------------------------------------------


def test_the_understanding_half_is_a_model_of_transformers_with_the_same_logits(tmp_path, split):
    from transformers import Qwen3VLMoeForConditionalGeneration

    folder, args = split
    done = export(folder, args, tmp_path / "half")
    theirs, report = Qwen3VLMoeForConditionalGeneration.from_pretrained(
        tmp_path / "half", output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[problem]
    assert theirs.config.text_config.num_experts == 5
    ours = SymbioticModel(args)
    open_model(folder).read_into(ours.state_dict())
    document = [3, (2, 3), 2, (1, 4), 4]
    row = image_row(args, document, 120, torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = theirs.eval()(**released_inputs(args, document, row)).logits
    found, choices = run(ours.eval(), row)
    assert all(int(chosen.max()) < 5 for chosen in choices)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.1
    parts = {name.split(".")[0] for name in done.left_out if ".generation." not in name}
    assert parts == {"latent_embedding", "flow_head"}
    generation = [name for name in done.left_out if ".generation." in name]
    assert len(generation) == 2 * 4


def test_the_understanding_half_of_aria_is_one_too(tmp_path):
    from transformers import AriaForConditionalGeneration

    norm = random_besides(ARIA_BESIDE, torch.float32)
    write_release(tmp_path / "aria", ARIA, more=norm)
    stored = HuggingFaceModel(tmp_path / "aria")
    import_model(stored, tmp_path / "imported")
    plan = plan_for(tmp_path / "imported")
    plan = replace(plan, groups=GROUPS, layers=("layers.0", "layers.1"))
    args = replace(stored.args, groups=GROUPS)
    partition_checkpoint(tmp_path / "imported", args, plan, tmp_path / "split")
    export(tmp_path / "split", args, tmp_path / "half")
    theirs, report = AriaForConditionalGeneration.from_pretrained(
        tmp_path / "half", output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[problem]
    found = theirs.model.vision_tower.post_layernorm.state_dict()
    assert_equal_tensors(found, {name.split(".")[-1]: tensor for name, tensor in norm.items()})
    assert theirs.config.text_config.moe_num_experts == 5
    ours = SymbioticModel(args)
    open_model(tmp_path / "split").read_into(ours.state_dict())
    document = [3, (4, 3), 2, (1, 4), 4]
    row = image_row(args, document, 9, torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = theirs.eval()(**released_squares(args, document, row)).logits
    torch.testing.assert_close(run(ours.eval(), row)[0], expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.1


def test_the_exported_half_is_itself_a_release(tmp_path, split):
    folder, args = split
    export(folder, args, tmp_path / "half")
    half = HuggingFaceModel(tmp_path / "half")
    assert half.args.num_experts == 5 and half.args.groups == one_pool(5)
    w2 = open_model(folder).read("layers.1.moe.experts.understanding.w2")
    assert torch.equal(half.read("layers.1.moe.experts.all.w2"), w2)


# ---- the whole under our names ----------------------------------------------------------------------------------------------


def test_the_whole_comes_back_bit_for_bit_through_our_own_loader(tmp_path, split):
    folder, args = split
    stored = open_model(folder)
    done = export_whole(stored, args, tmp_path / "whole", **SHARDS)
    back = open_model(tmp_path / "whole")
    assert isinstance(back, SafetensorsModel) and not done.left_out
    assert_equal_tensors(values_of(back), values_of(stored))
    assert find_release_files(tmp_path / "whole", "debug").is_dir()
    model = SymbioticModel(args)
    back.read_into(model.state_dict())
    assert torch.equal(model.flow_head.output.weight, stored.read("flow_head.output.weight"))
    export(tmp_path / "whole", args, tmp_path / "half")
    export(folder, args, tmp_path / "half of the checkpoint")
    assert_equal_tensors(
        tensors_in(tmp_path / "half"), tensors_in(tmp_path / "half of the checkpoint")
    )


def test_selection_biases_stay_in_float32(tmp_path):
    from tests.helpers.stored_models import make_model, tiny_args

    args = tiny_args(score_function="sigmoid", selection_bias=True)
    model = make_model(args)
    stored = open_model(save(model.state_dict(), tmp_path / "vlm"))
    export_whole(stored, args, tmp_path / "whole", dtype=torch.bfloat16, **SHARDS)
    back = open_model(tmp_path / "whole")
    name = "layers.1.moe.router.all.bias"
    assert torch.equal(back.read(name), model.get_buffer(name))
    others = {kind.dtype for n, kind in back.tensors.items() if not n.endswith("router.all.bias")}
    assert others == {torch.bfloat16}


# ---- bad input --------------------------------------------------------------------------------------------------------------


def test_groups_that_no_regular_model_has_are_refused():
    assert understanding_group(GROUPS).name == "understanding"
    assert understanding_group(one_pool(8)).name == "all"
    with pytest.raises(
        ValueError,
        match="text tokens route in the group text and ViT tokens in vit; a regular .* --part whole writes any model",
    ):
        understanding_group(TRIPARTITE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shared_gate": True}, "shared_gate = true: .* cannot be folded into the routed experts"),
        ({"normalize_weights": False}, "normalize_weights = false: .* have no constant sum"),
        (
            {"shared_hidden_dim": 0, "qkv_bias": True},
            "qkv_bias = True, but config.json .* has False",
        ),
    ],
)
def test_a_model_that_the_backbone_cannot_be_is_refused(tmp_path, imported, changes, message):
    folder, args, _ = imported
    args = replace(args, **{"shared_hidden_dim": 24, **changes})
    state = {**SymbioticModel(args).state_dict(), **values_of(open_model(folder))}
    other = save(state, tmp_path / "other")
    source = find_release_files(folder, "debug")
    with pytest.raises(ValueError, match=f"{message}.*; --part whole writes"):
        export_understanding(open_model(other), args, source, tmp_path / "out", **SHARDS)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_config_is_refused(tmp_path, split):
    folder, args = split
    with pytest.raises(ValueError, match="has the expert groups generation, understanding"):
        export(folder, replace(args, groups=()), tmp_path / "out")
    with pytest.raises(ValueError, match="is of another model: tok_embeddings.weight has"):
        export(folder, replace(args, dim=64), tmp_path / "out")
    with pytest.raises(ValueError, match=f"set model.vocab_size = {args.vocab_size}: "):
        export(folder, replace(args, vocab_size=args.vocab_size + 64), tmp_path / "out")
    with pytest.raises(ValueError, match="split exists; choose another --out"):
        export(folder, args, folder)


def test_a_model_without_the_backbones_encoder_is_refused(tmp_path, imported):
    folder, args, _ = imported
    state = values_of(open_model(folder))
    blind = save({n: t for n, t in state.items() if not n.startswith("vit.")}, tmp_path / "blind")
    source = find_release_files(folder, "debug")
    with pytest.raises(ValueError, match="blind lacks vit.*and .* more; --part whole writes"):
        export_understanding(open_model(blind), args, source, tmp_path / "out", **SHARDS)


@pytest.mark.parametrize("part", ["understanding", "whole"])
def test_a_full_disk_leaves_nothing_that_looks_complete(tmp_path, split, part):
    folder, args = split
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, hard))
    try:
        with pytest.raises(
            OSError, match="writing .*out failed: .*too large; nothing of it was kept"
        ):
            if part == "whole":
                export_whole(open_model(folder), args, tmp_path / "out", shard_bytes=10**6)
            else:
                export(folder, args, tmp_path / "out", shard_bytes=10**6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([], "shapes: must be a table"),
        ({"lm_head.weight": 3}, "shapes.lm_head.weight: must be a list"),
        ({"lm_head.weight": ["3"]}, r"shapes.lm_head.weight\[0\]: must be an integer"),
    ],
)
def test_a_damaged_layout_is_named(tmp_path, imported, shapes, message):
    folder, args, _ = imported
    source = shutil.copytree(folder / RELEASE_FILES, tmp_path / RELEASE_FILES)
    layout = json.loads((source / "layout.json").read_text())
    (source / "layout.json").write_text(json.dumps(layout | {"shapes": shapes}))
    with pytest.raises(ValueError, match=f"layout.json: {message}"):
        export_understanding(open_model(folder), args, source, tmp_path / "out", **SHARDS)
    assert not (tmp_path / "out").exists()


def test_an_unfinished_export_is_no_model(tmp_path, split):
    folder, args = split
    whole = tmp_path / "whole"
    export_whole(open_model(folder), args, whole, **SHARDS)
    with pytest.raises(ValueError, match='whole and needs no import: .*flavor = ".*model.json"'):
        HuggingFaceModel(whole)
    (whole / "model.safetensors.index.json").unlink()  # written last
    files = sorted(whole.glob("*.safetensors"))
    assert load_file(files[0])
    files[-1].unlink()
    with pytest.raises(
        ValueError, match=f"whole lacks 1 of the {len(files)} files .*: {files[-1].name}"
    ):
        open_model(whole)
    (whole / "model.json").unlink()
    with pytest.raises(ValueError, match="whole, but has no model.json; write or copy it again"):
        open_model(whole)
