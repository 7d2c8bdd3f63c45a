"""Names and layouts of released tensors: other prefixes, one tensor per expert, tied output projections, what is computed anyway."""

import copy

import pytest
import torch

from symbiotic_titan.commands import convert
from symbiotic_titan.hf.export import export_understanding, find_release_files
from symbiotic_titan.hf.import_model import import_model
from symbiotic_titan.hf.model import HuggingFaceModel, open_model
from symbiotic_titan.hf.tensor_names import names_by_architecture
from symbiotic_titan.weights.safetensors import slices_in
from tests.helpers.released_models import (
    ARIA,
    GLM,
    GLM_BESIDE,
    QWEN,
    SINGLE_EXPERTS,
    random_besides,
    random_tensors,
    write_release,
)
from tests.helpers.stored_models import assert_equal_tensors, values_of

TENSORS = random_tensors(QWEN, {}, torch.float32)
DECODER, VISION = "model.language_model.", "model.visual."
OUTPUT = "lm_head.weight"


def there_and_back(folder):
    """The tensors that an export of the imported release holds."""
    out = folder.parent / f"{folder.name}_out"
    stored = HuggingFaceModel(folder)
    import_model(stored, out / "imported")
    source = find_release_files(out / "imported", "debug")
    reader = open_model(out / "imported")
    export_understanding(reader, stored.args, source, out / "back", shard_bytes=20_000)
    return {name: piece.read() for name, piece in slices_in(out / "back").items()}


def message_of(folder) -> str:
    with pytest.raises(ValueError) as caught:
        open_model(folder)
    assert str(caught.value).startswith(f"{folder}: ") and "\n" not in str(caught.value)
    return str(caught.value)


# ---- prefixes ---------------------------------------------------------------------------------------------------------------

PREFIXED = {
    "no language_model": lambda n: n.replace(DECODER, "model.").replace(VISION, "visual."),
    "language_model.model": lambda n: (
        f"language_model.{n}" if n == OUTPUT else n.replace(DECODER, "language_model.model.")
    ),
    "model.language_model.model": lambda n: n.replace(DECODER, f"{DECODER}model."),
    "PEFT, merged": lambda n: f"base_model.model.{n}",
    "DDP": lambda n: f"module.{n}",
    "compiled": lambda n: f"_orig_mod.{n}",
    "compiled layers": lambda n: n.replace(".layers.0.", ".layers.0._orig_mod."),
    "FSDP in DDP": lambda n: f"module._fsdp_wrapped_module.{n}",
    "bare": lambda n: n.replace(DECODER, "").replace(VISION, "visual."),
}


@pytest.mark.parametrize("prefix", PREFIXED)
def test_only_another_prefix_is_read(tmp_path, prefix):
    renamed = {PREFIXED[prefix](name): tensor for name, tensor in TENSORS.items()}
    assert len(renamed) == len(TENSORS) and renamed.keys() != TENSORS.keys()
    write_release(tmp_path / "renamed", QWEN, tensors=renamed)
    write_release(tmp_path / "plain", QWEN, tensors=TENSORS)
    assert_equal_tensors(
        values_of(open_model(tmp_path / "renamed")), values_of(open_model(tmp_path / "plain"))
    )


@pytest.mark.parametrize(
    ("config", "besides"), [(GLM, GLM_BESIDE), (ARIA, {})], ids=["glm", "aria"]
)
def test_every_architecture_reads_them_and_writes_its_own(tmp_path, config, besides):
    plain = random_tensors(config, {}, torch.float32) | random_besides(besides, torch.float32)
    renamed = {f"base_model.model.{name}": tensor for name, tensor in plain.items()}
    write_release(tmp_path / "renamed", config, tensors=renamed)
    assert_equal_tensors(there_and_back(tmp_path / "renamed"), plain)


def test_the_layout_that_transformers_holds_aria_in_stays_as_it_is(tmp_path):
    shapes = {"model.language_model.norm.weight": (32,)}
    plain = random_tensors(ARIA, shapes, torch.float32)
    assert "model.language_model.norm.weight" in plain
    write_release(tmp_path / "aria", ARIA, tensors=plain)
    assert_equal_tensors(there_and_back(tmp_path / "aria"), plain)


def test_names_of_other_parts_are_left_alone():
    expected = ["thinker.model.layers.0.w", "thinker.visual.w", "thinker.lm_head.weight"]
    names = ["model.layers.0.w", "visual.w", "lm_head.weight", "talker.model.layers.0.w", "x"]
    assert names_by_architecture(names, expected) == {
        **dict(zip(names[:3], expected, strict=True)),
        **{name: name for name in names[3:]},
    }
    with pytest.raises(
        ValueError, match="holds model.layers.0.w and module.layers.0.w, which diff"
    ):
        names_by_architecture([names[0], "module.layers.0.w"], expected)


def test_what_differs_in_more_than_a_prefix_is_told_exactly(tmp_path):
    gate = "model.language_model.layers.1.mlp.gate.weight"
    other = dict(TENSORS)
    other["module.layers.1.mlp.switch.weight"] = other.pop(gate)
    write_release(tmp_path / "other", QWEN, tensors=other)
    found = message_of(tmp_path / "other")
    assert f"lacks {gate}, which config.json asks for; it holds model.language_model.lay" in found
    assert "1.mlp.switch.weight, which config.json does not ask for" in found
    lora = {f"{gate[:-7]}.lora_A.default.weight": torch.ones(2, 2)}
    write_release(tmp_path / "lora", QWEN, tensors=TENSORS | lora)
    assert "lora_A.default.weight of a LoRA adapter; merge the ad" in message_of(tmp_path / "lora")


def test_what_is_computed_from_the_config_is_not_read(tmp_path):
    more = {f"{DECODER}layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    more[f"{VISION}embeddings.position_ids"] = torch.arange(4)
    write_release(tmp_path / "older", QWEN, tensors=TENSORS | more)
    assert_equal_tensors(there_and_back(tmp_path / "older"), TENSORS)


# ---- one tensor per expert --------------------------------------------------------------------------------------------------


def one_tensor_per_expert(tensors, gate_up_end, down_end):
    """Of (E, D, 2F) and (E, F, D), as both architectures have them on the Hub."""
    out = dict(tensors)
    for name in tensors:
        if not name.endswith(gate_up_end) or tensors[name].dim() != 3:
            continue
        experts = name.removesuffix(gate_up_end)
        gate_up, down = out.pop(name), out.pop(experts + down_end)
        half = gate_up.shape[2] // 2
        for i in range(len(gate_up)):
            out |= {
                f"{experts}.{i}.gate_proj.weight": gate_up[i, :, :half].T.contiguous(),
                f"{experts}.{i}.up_proj.weight": gate_up[i, :, half:].T.contiguous(),
                f"{experts}.{i}.down_proj.weight": down[i].T.contiguous(),
            }
    return out


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
    ("config", "ends"),
    [(QWEN, (".gate_up_proj", ".down_proj")), (ARIA, (".fc1.weight", ".fc2.weight"))],
    ids=["qwen", "aria"],
)
def test_one_tensor_per_expert_is_read_and_written_as_transformers_loads_it(
    tmp_path, config, ends, prefix
):
    """In the one tensor of the release: of these two architectures, transformers would give a model new experts otherwise."""
    fused = random_tensors(config, {}, torch.float32)
    single = one_tensor_per_expert(fused, *ends)
    assert len(single) == len(fused) + 2 * (3 * 8 - 2)
    renamed = {prefix + name: tensor for name, tensor in single.items()}
    write_release(tmp_path / "single", config, tensors=renamed)
    write_release(tmp_path / "fused", config, tensors=fused)
    assert_equal_tensors(
        values_of(open_model(tmp_path / "single")), values_of(open_model(tmp_path / "fused"))
    )
    assert_equal_tensors(there_and_back(tmp_path / "single"), fused)


def test_transformers_loads_what_had_one_tensor_per_expert(tmp_path):
    from transformers import Qwen3VLMoeForConditionalGeneration

    single = one_tensor_per_expert(TENSORS, ".gate_up_proj", ".down_proj")
    write_release(tmp_path / "single", QWEN, tensors=single)
    there_and_back(tmp_path / "single")
    theirs, report = Qwen3VLMoeForConditionalGeneration.from_pretrained(
        tmp_path / "single_out" / "back", output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[problem]
    experts = theirs.model.language_model.layers[1].mlp.experts
    down = single["model.language_model.layers.1.mlp.experts.6.down_proj.weight"]
    found = experts.down_proj[6]
    assert torch.equal(found if found.shape == down.shape else found.T, down)


def test_an_expert_that_is_missing_is_named(tmp_path):
    name = "model.language_model.layers.1.mlp.experts.5.up_proj.weight"
    single = random_tensors(QWEN, SINGLE_EXPERTS, torch.float32)
    del single[name]
    write_release(tmp_path / "single", QWEN, tensors=single)
    assert f"lacks {name}, which config.json asks for" in message_of(tmp_path / "single")


# ---- output projections -----------------------------------------------------------------------------------------------------


def tied(config):
    out = copy.deepcopy(config)
    out["tie_word_embeddings"] = True
    return out


@pytest.mark.parametrize("config", [QWEN, GLM, ARIA], ids=["qwen", "glm", "aria"])
def test_a_copy_of_the_embeddings_as_tied_output_is_accepted(tmp_path, config):
    tensors = random_tensors(config, {}, torch.float32)
    table = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    output = next(name for name in tensors if name.endswith(OUTPUT))
    del tensors[output]
    write_release(tmp_path / "plain", tied(config), tensors=tensors)
    write_release(tmp_path / "twice", tied(config), tensors=tensors | {output: tensors[table] + 0})
    expected = values_of(open_model(tmp_path / "plain"))
    assert torch.equal(expected["output.weight"], tensors[table])
    assert_equal_tensors(values_of(open_model(tmp_path / "twice")), expected)
    assert_equal_tensors(there_and_back(tmp_path / "twice"), tensors)


def test_a_tied_output_with_values_of_its_own_is_refused(tmp_path, capsys):
    write_release(tmp_path / "qwen", tied(QWEN), tensors=TENSORS)
    words = ["from-hf", "--hf", str(tmp_path / "qwen"), "--out", str(tmp_path / "out")]
    assert convert.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "config.json ties the output projection to the embeddings (tie_word_embeddings)" in line
    assert f"but {OUTPUT} differs from {DECODER}embed_tokens.weight; set tie_word_emb" in line
    assert not (tmp_path / "out").exists()


def test_a_missing_output_is_told_with_the_setting_that_would_explain_it(tmp_path):
    tensors = {name: tensor for name, tensor in TENSORS.items() if name != OUTPUT}
    write_release(tmp_path / "qwen", QWEN, tensors=tensors)
    assert f"lacks {OUTPUT}, the output projection, although config.json does not tie it" in (
        message_of(tmp_path / "qwen")
    )
