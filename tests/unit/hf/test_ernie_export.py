"""A release that is partitioned itself: its pools go out as they came in, also from a model with a third group."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration

from symbiotic_titan.hf.export import (
    export_understanding,
    exported_groups,
    find_release_files,
)
from symbiotic_titan.hf.import_model import import_model
from symbiotic_titan.hf.model import HuggingFaceModel, open_model
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.sequence.modality import TEXT, VAE, VIT
from symbiotic_titan.weights.safetensors import slices_in
from tests.helpers.decoder_parity import make_random, run
from tests.helpers.image_rows import image_row, released_inputs
from tests.helpers.released_models import ERNIE, args_of, write_release
from tests.helpers.stored_models import assert_equal_tensors, save

DOCUMENT = [3, (2, 3), 2, (1, 4), 4]
THREE = (
    ExpertGroup("text", (TEXT,), 8),
    ExpertGroup("vision", (VIT,), 8, hidden_dim=12),
    ExpertGroup("generation", (VAE,), 8, hidden_dim=12),
)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """(what transformers saves of a model in bfloat16, its routers in float32; its import)."""
    folder = tmp_path_factory.mktemp("ernie")
    values = {key: value for key, value in ERNIE.items() if key != "model_type"}
    theirs = Ernie4_5_VLMoeForConditionalGeneration(Ernie4_5_VLMoeConfig(**values))
    make_random(theirs, gain=1.0).to(torch.bfloat16)
    theirs.save_pretrained(folder / "saved")
    theirs = Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(folder / "saved")
    theirs.save_pretrained(folder / "release")
    import_model(HuggingFaceModel(folder / "release"), folder / "imported")
    return folder / "release", folder / "imported"


def tensors_in(folder):
    return {name: place.read() for name, place in slices_in(folder).items()}


def export(checkpoint, args, out):
    source = find_release_files(checkpoint, "debug")
    return export_understanding(open_model(checkpoint), args, source, out, shard_bytes=10_000)


def loaded(folder):
    """The model that transformers loads, in float32, which its experts of these widths need."""
    model, report = Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[problem]
    return model


def logits_of(model, args):
    row = image_row(args, DOCUMENT, 90, torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.eval()(**released_inputs(args, DOCUMENT, row)).logits


def test_what_transformers_saved_comes_back_with_the_same_logits_bit_for_bit(tmp_path, released):
    release, imported = released
    args = HuggingFaceModel(release).args
    done = export(imported, args, tmp_path / "back")
    assert not done.left_out and not done.missing
    assert_equal_tensors(tensors_in(tmp_path / "back"), tensors_in(release))
    kinds = {t.dtype for name, t in tensors_in(release).items() if ".gate.weight" in name}
    assert kinds == {torch.float32}
    logits, again = (logits_of(loaded(folder), args) for folder in (release, tmp_path / "back"))
    assert (logits - again).abs().max() == 0.0
    assert logits.std() > 0.1


def test_a_model_with_a_third_group_gives_back_the_pools_of_the_release(tmp_path, released):
    """The third group and the latent parts stay behind; the config is the release's."""
    release, imported = released
    args = replace(args_of(ERNIE), groups=THREE, num_experts=24)
    model = SymbioticModel(args)
    model.init_weights()
    open_model(imported).read_into(
        {n: t for n, t in model.state_dict().items() if n in open_model(imported).tensors}
    )
    with torch.no_grad():
        model.layers["1"].moe.experts["vision"].w2.mul_(2)
    folder = save(model.state_dict(), tmp_path / "trained")
    source = find_release_files(imported, "debug")
    done = export_understanding(
        open_model(folder), args, source, tmp_path / "half", shard_bytes=10_000
    )
    left = {name for name in done.left_out if ".generation." in name}
    assert len(left) == 2 * 5
    assert {name.split(".")[0] for name in done.left_out.keys() - left} == {
        "latent_embedding",
        "flow_head",
    }
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["text_config"] == {
        **json.loads((release / "config.json").read_text())["text_config"],
        "dtype": "float32",
    }
    theirs = loaded(tmp_path / "half")
    row = image_row(args, DOCUMENT, 90, torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        run(model.eval(), row)[0], logits_of(theirs, args), atol=1e-5, rtol=1e-5
    )


def test_groups_of_other_names_or_sizes_cannot_be_written_back():
    released = args_of(ERNIE)
    text, vision, generation = THREE

    def model(*groups, **changes):
        number = sum(group.num_experts for group in groups)
        return replace(released, groups=groups, num_experts=number, **changes)

    assert exported_groups(model(*THREE), released) == {"text": text, "vision": vision}
    other = replace(vision, name="images")
    with pytest.raises(
        ValueError,
        match="vit tokens route in the group images, in the released model in vision; .*--part whole",
    ):
        exported_groups(model(text, other, generation), released)
    wide = replace(vision, hidden_dim=16)
    with pytest.raises(ValueError, match="group vision has {'hidden_dim': 16, .*has {'hidden_dim'"):
        exported_groups(model(text, wide, generation), released)
    together = replace(text, modalities=(TEXT, VIT))
    with pytest.raises(ValueError, match="vit tokens route in the group text, in the released"):
        exported_groups(model(together, replace(generation, num_experts=8)), released)


def test_a_flat_release_comes_back_in_its_own_form(tmp_path):
    """With code of its own: one table, the image encoder beside the decoder."""
    text = ERNIE["text_config"]
    flat = {key: value for key, value in text.items() if key not in ("dtype", "rope_parameters")}
    flat |= {
        "model_type": "ernie4_5_moe_vl",
        "moe_num_experts": [8, 8],
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": [1, 1],
        "moe_layer_end_index": [3, 2],
        "rms_norm_eps": 1e-5,
        "rope_scaling": {"mrope_section": [1, 1, 2], "type": "default"},
        "rope_theta": 500_000,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "vision_config": {"embed_dim": 24, "hidden_size": 24, "depth": 2, "num_heads": 2}
        | {"patch_size": 4, "mlp_ratio": 2},
    }
    written = write_release(tmp_path / "flat", flat, layout={"vision_model.ln.weight": (24,)})
    assert "vision_model.patch_embed.proj.weight" in written
    stored = HuggingFaceModel(tmp_path / "flat")
    nested = copy.deepcopy(ERNIE)
    nested["vision_config"]["intermediate_size"] = 48
    assert stored.args == args_of(nested)
    import_model(stored, tmp_path / "imported")
    export(tmp_path / "imported", stored.args, tmp_path / "back")
    assert_equal_tensors(tensors_in(tmp_path / "back"), written)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == flat
