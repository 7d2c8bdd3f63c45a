"""The files of a model are found as downloads and trainers leave them, or what is wrong is told in one line."""

import json

import pytest
import torch
from safetensors.torch import save_file

from symbiotic_titan.weights.safetensors import slices_in
from symbiotic_titan.weights.weight_files import has_weights

TENSORS = {f"t{i}": torch.full((2,), float(i)) for i in range(3)}


def write_files(folder, *names):
    """A file of each name with one of the tensors."""
    for name, (key, tensor) in zip(names, TENSORS.items(), strict=False):
        save_file({key: tensor}, folder / name)


def numbered(count, stem="model", first=1):
    last = count if first else count - 1
    return [f"{stem}-{n:05d}-of-{count:05d}.safetensors" for n in range(first, last + 1)]


@pytest.mark.parametrize(
    "names",
    [
        numbered(1),
        numbered(3),
        numbered(2, first=0),
        ["consolidated.safetensors"],
        ["diffusion_pytorch_model.safetensors"],
        [*numbered(2), "consolidated.safetensors"],
        ["model.safetensors", "consolidated.safetensors"],
    ],
    ids=lambda names: " ".join(names),
)
def test_a_model_without_an_index_is_read_whatever_its_files_are_called(tmp_path, names):
    write_files(tmp_path, *names)
    beside = "consolidated.safetensors" in names and len(names) > 1
    expected = dict(list(TENSORS.items())[: len(names) - beside])
    found = slices_in(tmp_path)
    assert found.keys() == expected.keys() and has_weights(tmp_path)
    assert all(torch.equal(found[name].read(), tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("name", ["diffusion_pytorch_model", "consolidated"])
def test_an_index_of_another_name_is_used(tmp_path, name):
    files = numbered(3, stem=name)
    write_files(tmp_path, *files)
    index = {"weight_map": dict(zip(TENSORS, files, strict=True))}
    (tmp_path / f"{name}.safetensors.index.json").write_text(json.dumps(index))
    assert slices_in(tmp_path).keys() == TENSORS.keys()
    (tmp_path / files[1]).unlink()
    with pytest.raises(ValueError, match=f"lacks 1 of the 3 files that {name}.safetensors.index.j"):
        slices_in(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (numbered(3)[1:], "lacks 1 of the 3 files that its names count: model-00001-of-00003.safe.*; fetch"),
        (numbered(9)[:2], "lacks 7 of the 9 files .*: model-00003-of-00009.safetensors, .* and 4 more; fetch"),
        (["a.safetensors", "b.safetensors"], r"has 2 safetensors files \(a.safetensors, b.safe.*no model"),
        ([*numbered(1), *numbered(2)], "has 3 safetensors files"),
        (["adapter_model.safetensors"], "holds a LoRA adapter, not a model; merge the adapter into its base"),
    ],
)  # fmt: skip
def test_files_that_are_no_whole_model_are_told(tmp_path, names, message):
    write_files(tmp_path, *names)
    with pytest.raises(ValueError, match=f"^{tmp_path} {message}") as caught:
        slices_in(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["pytorch_model.bin"], "has no safetensors, only pytorch_model.bin: pickled tensors; load .* save_p"),
        (
            ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
            "only pytorch_model-00001-of-00002.bin and 1 more: pickled",
        ),
        (["consolidated.00.pth", "optimizer.pt"], "only consolidated.00.pth: pickled tensors"),
        (["optimizer.bin", "training_args.bin"], "has neither model.safetensors.index.json nor"),
        (["model-Q4_K_M.gguf"], "only model-Q4_K_M.gguf: a quantised format for inference; use the release"),
        (["tf_model.h5"], "only tf_model.h5: weights of TensorFlow or JAX"),
        (["adapter_config.json", "adapter_model.bin"], "holds a LoRA adapter"),
        ([], "has neither model.safetensors.index.json nor model.safetensors"),
    ],
)  # fmt: skip
def test_other_formats_are_told_with_the_remedy(tmp_path, names, message):
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    assert not has_weights(tmp_path)
    with pytest.raises(ValueError, match=f"^{tmp_path} .*{message}"):
        slices_in(tmp_path)


def test_a_tensor_in_two_files_is_told(tmp_path):
    write_files(tmp_path, *numbered(2))
    save_file(TENSORS, tmp_path / numbered(2)[1])
    with pytest.raises(
        ValueError, match="00002.safetensors holds t0, which model-00001-of-00002.saf"
    ):
        slices_in(tmp_path)
