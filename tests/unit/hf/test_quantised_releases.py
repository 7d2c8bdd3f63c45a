"""Releases in FP8 are read as the bfloat16 values that they stand for; other quantised releases are refused in words."""

import copy
import json

import pytest
import torch

from symbiotic_titan.commands import convert
from symbiotic_titan.hf.model import HuggingFaceModel, open_model
from symbiotic_titan.hf.quantised import DequantizingReader, Quantization
from symbiotic_titan.weights.reader import TensorSpec
from symbiotic_titan.weights.safetensors import slices_in
from tests.helpers.fp8_releases import BLOCK, block_fp8, per_channel_fp8, quantise
from tests.helpers.released_models import (
    ARIA,
    GLM,
    GLM_BESIDE,
    HUNYUAN,
    QWEN,
    SINGLE_EXPERTS,
    random_besides,
    random_tensors,
    write_release,
)
from tests.helpers.stored_models import assert_equal_tensors, values_of

BF16 = torch.bfloat16
PLAIN = random_tensors(QWEN, {}, BF16)


def with_quantization(config, stated, table=None):
    out = copy.deepcopy(config)
    (out[table] if table else out)["quantization_config"] = stated
    return out


def of_block(shape):
    return BLOCK


def of_channel(shape):
    return 1, shape[-1]


def of_tensor(shape):
    return tuple(shape[-2:])


CASES = {
    "blocks, a tensor per expert": (QWEN, SINGLE_EXPERTS, block_fp8(), of_block, {}),
    "blocks, experts in one tensor": (QWEN, {}, block_fp8(), of_block, {}),
    "blocks, scales in bfloat16": (GLM, {}, block_fp8(), of_block, {"scale_dtype": BF16}),
    "blocks, scales as exponents": (
        *(HUNYUAN, {}, block_fp8(), of_block),
        {"scale_dtype": torch.float8_e8m0fnu},
    ),
    "channels of compressed-tensors": (
        *(GLM, {}, per_channel_fp8(), of_channel),
        {"suffix": "_scale", "scale_dtype": BF16},
    ),
    "channels, one dim": (
        *(QWEN, {}, per_channel_fp8(), of_channel),
        {"suffix": "_scale", "squeeze": True},
    ),
    "a scale per expert or tensor": (
        *(ARIA, {}, {"quant_method": "modelopt", "quant_algo": "FP8"}, of_tensor),
        {"suffix": "_scale"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_fp8_release_is_its_values_in_bfloat16(tmp_path, case):
    config, layout, stated, blocks_of, options = CASES[case]
    more = random_besides(GLM_BESIDE, BF16) if config is GLM else {}
    plain = random_tensors(config, layout, BF16) | more
    stored, values = quantise(plain, blocks_of, **options)
    assert len(stored) - len(values) > 10 and any(t.dtype.itemsize == 1 for t in stored.values())
    write_release(tmp_path / "fp8", with_quantization(config, stated), tensors=stored)
    write_release(tmp_path / "plain", config, tensors=values)
    assert_equal_tensors(
        values_of(open_model(tmp_path / "fp8")), values_of(open_model(tmp_path / "plain"))
    )
    besides = HuggingFaceModel(tmp_path / "fp8").unmapped
    assert_equal_tensors(
        {name: besides.read(name) for name in besides.tensors},
        {name: values[name] for name in more},
    )


@pytest.mark.parametrize("layout", [{}, SINGLE_EXPERTS], ids=["one tensor", "a tensor each"])
def test_what_comes_back_of_an_fp8_release_is_a_plain_one(tmp_path, layout, capsys):
    stored, values = quantise(random_tensors(QWEN, layout, BF16), of_block)
    # Scales of activations, as static schemes have, are of no use in bfloat16.
    stored["model.language_model.layers.0.self_attn.q_proj.input_scale"] = torch.ones(1)
    release = tmp_path / "fp8"
    write_release(release, with_quantization(QWEN, block_fp8()), tensors=stored)
    words = ["from-hf", "--hf", str(release), "--out", str(tmp_path / "imported")]
    assert convert.main(words) == 0
    words = ["to-hf", "--checkpoint", str(tmp_path / "imported"), "--part", "understanding"]
    assert convert.main([*words, "--out", str(tmp_path / "back")]) == 0
    back = slices_in(tmp_path / "back")
    write_release(tmp_path / "plain", QWEN, tensors=values)
    assert_equal_tensors(
        values_of(open_model(tmp_path / "back")), values_of(open_model(tmp_path / "plain"))
    )
    assert back.keys() == PLAIN.keys()
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    expected = copy.deepcopy(QWEN)
    expected["dtype"] = expected["text_config"]["dtype"] = "bfloat16"
    assert config == expected
    assert "symbiotic convert partition" in capsys.readouterr().out


@pytest.mark.parametrize("table", [None, "text_config"])
@pytest.mark.parametrize("stated", [None, {}, block_fp8()], ids=["null", "empty", "left over"])
def test_a_setting_without_fp8_weights_changes_nothing(tmp_path, stated, table):
    write_release(tmp_path / "plain", QWEN, tensors=PLAIN)
    write_release(tmp_path / "noted", with_quantization(QWEN, stated, table), tensors=PLAIN)
    assert_equal_tensors(
        values_of(open_model(tmp_path / "noted")), values_of(open_model(tmp_path / "plain"))
    )


def test_scales_are_found_without_the_setting_where_their_shape_tells_what_they_are_for(tmp_path):
    stored, values = quantise(PLAIN, of_channel)
    write_release(tmp_path / "channels", QWEN, tensors=stored)
    write_release(tmp_path / "plain", QWEN, tensors=values)
    assert_equal_tensors(
        values_of(open_model(tmp_path / "channels")), values_of(open_model(tmp_path / "plain"))
    )
    stored, _ = quantise(PLAIN, of_block)
    write_release(tmp_path / "blocks", QWEN, tensors=stored)
    with pytest.raises(
        ValueError, match="weight_scale_inv has shape .* does not fit .*config.json"
    ):
        open_model(tmp_path / "blocks")


def test_the_files_are_read_a_tensor_at_a_time(tmp_path):
    """A scale by two reads 0.5, -3.0 and the largest value as twice that, whatever comes before."""
    weight = torch.tensor([[0.5, -3.0, 448.0]]).to(torch.float8_e4m3fn)
    reads = []

    class Stored:
        tensors = {
            "w": TensorSpec((1, 3), torch.float8_e4m3fn),
            "w_scale": TensorSpec((1,), torch.uint8),
            "v": TensorSpec((1, 3), torch.float8_e4m3fn),
        }

        def read(self, name, box=None):
            reads.append(name)
            return torch.tensor([128], dtype=torch.uint8) if name == "w_scale" else weight

    reader = DequantizingReader(Stored(), Quantization(None))
    assert reader.tensors == {"w": TensorSpec((1, 3), BF16), "v": Stored.tensors["v"]}
    assert not reads
    assert torch.equal(reader.read("w"), torch.tensor([[1.0, -6.0, 896.0]], dtype=BF16))
    assert reads == ["w", "w_scale"]
    assert torch.equal(reader.read("v").float(), weight.float())


# ---- refused ----------------------------------------------------------------------------------------------------------------


def channel_weights(**changes):
    stated = per_channel_fp8()
    stated["config_groups"]["group_0"]["weights"].update(changes)
    return stated


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantised release of kind gptq .bits 4.; .*; use the release in bfloat16"),
        ({"quant_method": "awq"}, "of kind awq; "),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "of kind bitsandbytes; "),
        ({"quant_method": "mxfp4"}, "of kind mxfp4; "),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "of kind modelopt .quant_algo NVFP4.; "),
        ({"load_in_8bit": True}, "of kind unknown; "),
        (channel_weights(num_bits=4, type="int", strategy="group"), r"group_0: .*\(4-bit int per group\)"),
        (channel_weights(type="int"), r"compressed-tensors float-quantized \(8-bit int per channel\)"),
        ({**per_channel_fp8(), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        ({**per_channel_fp8(), "config_groups": {"group_0": 3}}, "group_0: must be a table with"),
        ("fp8", "quantization_config: must be a table, got 'fp8'"),
        (block_fp8((128,)), "weight_block_size: must be two positive numbers, .*got .128.$"),
        ({**block_fp8(), "weight_block_size": "a"}, "weight_block_size: must be a list"),
    ],
)  # fmt: skip
def test_a_kind_that_is_not_read_is_told_in_words(tmp_path, capsys, stated, message):
    write_release(tmp_path / "release", with_quantization(QWEN, stated), tensors=PLAIN)
    words = ["from-hf", "--hf", str(tmp_path / "release"), "--out", str(tmp_path / "out")]
    assert convert.main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "config.json: quantization_config" in lines[0]
    with pytest.raises(ValueError, match=message):
        open_model(tmp_path / "release")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("end", "kind"),
    [(".qweight", "gptq or awq"), (".weight_packed", "compressed-tensors"), (".weight.absmax", "bits")],
)  # fmt: skip
def test_a_kind_that_only_the_tensors_tell_is_told_in_words(tmp_path, end, kind):
    name = "model.language_model.layers.0.self_attn.q_proj"
    tensors = dict(PLAIN)
    tensors[name + end] = torch.ones(3, dtype=torch.int32)
    del tensors[f"{name}.weight"]
    write_release(tmp_path / "release", QWEN, tensors=tensors)
    with pytest.raises(
        ValueError, match=f"holds {name}{end}, as in quantised releases of kind {kind}"
    ):
        open_model(tmp_path / "release")


def test_fp8_without_scales_or_with_others_is_refused_by_name(tmp_path):
    stored, _ = quantise(PLAIN, of_block)
    config = with_quantization(QWEN, block_fp8())
    name = "model.language_model.layers.1.mlp.experts.down_proj"
    scale = stored.pop(f"{name}_scale_inv")
    write_release(tmp_path / "without", config, tensors=stored)
    with pytest.raises(
        ValueError, match=f"without: {name} is float8_e4m3fn, as in quantised models"
    ):
        open_model(tmp_path / "without")
    for other in (scale[:, :, :-1].clone(), scale.to(torch.int32)):
        folder = tmp_path / f"other_{other.dtype}"
        write_release(folder, config, tensors=stored | {f"{name}_scale_inv": other})
        expected = rf"{name}_scale_inv has shape .* which does not fit {name} of shape .* of blocks of 10 x 12"
        with pytest.raises(ValueError, match=expected):
            open_model(folder)


def test_a_truncated_fp8_file_is_one_line(tmp_path):
    stored, _ = quantise(PLAIN, of_block)
    write_release(tmp_path / "fp8", with_quantization(QWEN, block_fp8()), tensors=stored)
    path = sorted((tmp_path / "fp8").glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"^{path} is cut off: it has"):
        open_model(tmp_path / "fp8")
