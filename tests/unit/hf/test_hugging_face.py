"""A released model is read as one of ours, imported, and partitioned from where it lies."""

import copy
import json
import resource
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from symbiotic_titan.hf.import_model import import_model
from symbiotic_titan.hf.model import HuggingFaceModel, open_model
from symbiotic_titan.model.flavors import FLAVORS
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.partition.apply import partition_checkpoint
from symbiotic_titan.partition.profile import router_hash
from symbiotic_titan.sequence.modality import TEXT, VAE, VIT
from symbiotic_titan.weights import new_folder
from symbiotic_titan.weights.dcp import DistributedCheckpoint
from symbiotic_titan.weights.safetensors import TensorSlice
from tests.helpers.released_models import (
    ARIA,
    GLM,
    HUNYUAN,
    QWEN,
    TRANSPOSED,
    write_release,
)
from tests.helpers.stored_models import assert_equal_tensors, plan_for, values_of

GROUPS = (ExpertGroup("understanding", (TEXT, VIT), 5), ExpertGroup("generation", (VAE,), 3))


@pytest.fixture
def release(tmp_path):
    """(folder, its tensors)."""
    return tmp_path / "qwen", write_release(tmp_path / "qwen")


# ---- reading ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [{}, TRANSPOSED], ids=["released", "transposed"])
def test_both_layouts_of_experts_are_read_as_ours(tmp_path, layout):
    theirs = write_release(tmp_path / "qwen", layout=layout)
    stored = HuggingFaceModel(tmp_path / "qwen")
    for layer in range(2):
        at, ours = f"model.language_model.layers.{layer}.mlp", f"layers.{layer}.moe"
        gate_up, down = (theirs[f"{at}.experts.{n}_proj"] for n in ("gate_up", "down"))
        if not layout:
            gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        assert torch.equal(stored.read(f"{ours}.experts.all.w1"), gate_up[:, :24])
        assert torch.equal(stored.read(f"{ours}.experts.all.w3"), gate_up[:, 24:])
        assert torch.equal(stored.read(f"{ours}.experts.all.w2"), down)
        router = stored.read(f"{ours}.router.all.weight")
        assert torch.equal(router, theirs[f"{at}.gate.weight"])
    assert stored.step is None and stored.args.num_experts == 8


def test_a_single_file_without_index_is_read(tmp_path, release):
    folder, theirs = release
    for path in folder.glob("model*"):
        path.unlink()
    save_file(theirs, folder / "model.safetensors")
    stored = HuggingFaceModel(folder)
    assert torch.equal(stored.read("norm.weight"), theirs["model.language_model.norm.weight"])


def test_a_file_is_read_once_for_tensors_asked_for_in_a_row(release, monkeypatch):
    folder, theirs = release
    reads, read = [], TensorSlice.read
    monkeypatch.setattr(
        TensorSlice, "read", lambda place, *box: (reads.append(place), read(place, *box))[1]
    )
    stored = HuggingFaceModel(folder)
    assert not reads
    values_of(stored)
    assert len(reads) == len(set(reads)) == len(theirs)


def test_reading_into_a_model_casts_and_leaves_the_rest(release):
    folder, theirs = release
    args = HuggingFaceModel(folder).args
    model = SymbioticModel(args).bfloat16()
    model.init_weights()
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(("flow", "latent"))}
    HuggingFaceModel(folder).read_into(state)
    expected = theirs["lm_head.weight"].bfloat16()
    assert torch.equal(model.output.weight, expected)
    assert torch.equal(
        model.flow_head.output.weight, torch.zeros_like(model.flow_head.output.weight)
    )


# ---- importing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_imported_tensors_are_those_of_the_release(tmp_path, release, dtype):
    folder, _ = release
    stored = HuggingFaceModel(folder)
    watched = []
    import_model(
        stored,
        tmp_path / "out",
        dtype=dtype,
        progress=lambda done, total: watched.append((done, total)),
    )
    imported = open_model(tmp_path / "out")
    assert isinstance(imported, DistributedCheckpoint)
    expected = values_of(stored)
    assert_equal_tensors(
        values_of(imported), {n: t.to(dtype or t.dtype) for n, t in expected.items()}
    )
    assert router_hash(imported) == router_hash(open_model(folder)) or dtype
    sizes = [done for done, _ in watched]
    assert sizes == sorted(sizes) and watched[-1][0] == watched[-1][1]


def test_an_imported_model_is_a_flavor_of_its_own(tmp_path, release):
    folder, _ = release
    stored = HuggingFaceModel(folder)
    import_model(stored, tmp_path / "out")
    flavor = str(tmp_path / "out" / "model.json")
    assert FLAVORS[flavor] == stored.args and flavor in FLAVORS
    assert str(tmp_path / "none.json") not in FLAVORS


def test_small_files_come_along_and_code_does_not(tmp_path, release, monkeypatch):
    folder, _ = release
    (folder / "huge.json").write_text("x" * 100)
    monkeypatch.setattr("symbiotic_titan.hf.release_files.LARGEST", 99_999)
    (folder / "huge.json").write_text("x" * 100_000)
    import_model(HuggingFaceModel(folder), tmp_path / "out", shape_only=True)
    names = {path.name for path in (tmp_path / "out" / "hugging_face").iterdir()}
    assert names == {
        *("config.json", "tokenizer.json", "preprocessor_config.json", "LICENSE", "layout.json"),
    }
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"hugging_face", "model.json", new_folder.MANIFEST}


def test_a_shape_alone_may_be_replaced_by_the_model(tmp_path, release):
    stored = HuggingFaceModel(release[0])
    import_model(stored, tmp_path / "out", shape_only=True)
    with pytest.raises(ValueError, match="out exists; choose another --out"):
        import_model(stored, tmp_path / "out")
    import_model(stored, tmp_path / "out", overwrite=True)
    assert open_model(tmp_path / "out").tensors.keys() == stored.tensors.keys()


def test_partition_from_the_release_equals_partition_from_its_import(tmp_path, release):
    folder, _ = release
    stored = HuggingFaceModel(folder)
    import_model(stored, tmp_path / "imported")
    args = replace(stored.args, groups=GROUPS)
    plan = replace(plan_for(folder), groups=GROUPS, layers=("layers.0", "layers.1"))
    for source, out in ((folder, "a"), (tmp_path / "imported", "b")):
        conversion = partition_checkpoint(source, args, plan, tmp_path / out)
        assert (tmp_path / out / "hugging_face" / "layout.json").is_file()
        assert FLAVORS[str(tmp_path / out / "model.json")] == args
        assert conversion.totals()["new"] > 0 == conversion.totals()["dropped"]
    assert_equal_tensors(
        values_of(open_model(tmp_path / "a")), values_of(open_model(tmp_path / "b"))
    )


def test_a_plan_of_other_layers_is_refused(tmp_path, release):
    folder, _ = release
    args = replace(HuggingFaceModel(folder).args, groups=GROUPS)
    plan = replace(plan_for(folder), groups=GROUPS, layers=("layers.1", "layers.2"))
    with pytest.raises(ValueError, match="of other layers than the model: layers.0, layers.2 have"):
        partition_checkpoint(folder, args, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_partition_reads_every_tensor_of_a_release_once(tmp_path, release, monkeypatch):
    folder, theirs = release
    plan = replace(plan_for(folder), groups=GROUPS, layers=("layers.0", "layers.1"))
    args = replace(HuggingFaceModel(folder).args, groups=GROUPS)
    reads, read = [], TensorSlice.read
    monkeypatch.setattr(
        TensorSlice, "read", lambda place, *box: (reads.append(place), read(place, *box))[1]
    )
    partition_checkpoint(folder, args, plan, tmp_path / "out")
    of_tensors = [
        place for place in reads if place.spec.shape != (8, 32)
    ]  # routers: hashed besides
    assert len(of_tensors) == len(set(of_tensors)) == len(theirs) - 2


def test_what_a_text_only_release_lacks_is_new(tmp_path):
    write_release(tmp_path / "hunyuan", HUNYUAN)
    stored = HuggingFaceModel(tmp_path / "hunyuan")
    assert not [name for name in stored.tensors if name.startswith("vit.")]
    args = replace(stored.args, vit=replace(stored.args.vit, dim=16, num_layers=1, num_heads=2))
    conversion = partition_checkpoint(tmp_path / "hunyuan", args, None, tmp_path / "out")
    new = {row["tensor"].split(".")[0] for row in conversion.rows() if row["what"] == "new"}
    assert new == {"vit", "latent_embedding", "flow_head"}
    written = values_of(open_model(tmp_path / "out"))
    assert torch.equal(written["output.weight"], written["tok_embeddings.weight"])
    assert written["vit.patch_embedding.weight"].std() > 0


# ---- bad input --------------------------------------------------------------------------------------------------------------


def message_of(folder) -> str:
    with pytest.raises(ValueError) as caught:
        open_model(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_configs_that_cannot_be_used_are_named(release):
    folder, _ = release

    def message(content) -> str:
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / "config.json").write_text(text)
        return message_of(folder)

    assert "config.json is not JSON" in message("{")
    assert "config.json must hold a table, got list" in message([])
    assert "model_type = 'llama'" in message({"model_type": "llama"})
    assert "qwen3_vl_moe" in message({})
    config = copy.deepcopy(QWEN)
    config["text_config"]["hidden_act"] = "relu"
    assert "text_config.hidden_act = 'relu' is not supported" in message(config)
    config = copy.deepcopy(QWEN)
    config["text_config"]["num_hidden_layers"] = 3
    assert "lacks model.language_model.layers.2." in message(config)
    config["text_config"]["num_hidden_layers"] = 1
    assert "holds model.language_model.layers.1." in message(config)
    config = copy.deepcopy(QWEN)
    config["text_config"]["vocab_size"] = 64
    assert "tok_embeddings.weight has shape (128, 32) in its files, (64, 32) by" in message(config)
    (folder / "config.json").unlink()
    assert "has no config.json" in message_of(folder)


def test_weights_that_cannot_be_used_are_named(release):
    folder, _ = release
    first, second, third = sorted(folder.glob("model-*"))
    data = first.read_bytes()
    first.write_bytes(data[:-5])
    assert f"{first} is cut off" in message_of(folder)
    first.write_bytes(data[:50])
    assert f"{first} is cut off or not a safetensors file" in message_of(folder)
    tensors = load_file(second)
    save_file(tensors | {next(iter(tensors)): torch.ones(2, dtype=torch.int8)}, second)
    first.write_bytes(data)
    assert "is int8, as in quantised models" in message_of(folder)
    second.unlink()
    assert f"lacks 1 of the 3 files that model.safetensors.index.json names: {second.name}" in (
        message_of(folder)
    )


@pytest.mark.parametrize(
    ("config", "name", "change", "message"),
    [
        (
            QWEN,
            "model.visual.patch_embed.proj.weight",
            lambda t: t.flatten(),
            r"has shape \(2304,\); vit.patch_embedding.weight cannot be made",
        ),
        (
            ARIA,
            "language_model.model.layers.1.mlp.experts.fc1.weight",
            lambda t: t.flatten(),
            r"has shape \(10240,\); layers.1.moe.experts.all.w1 cannot be made",
        ),
        (
            ARIA,
            "language_model.model.layers.1.mlp.experts.fc1.weight",
            lambda t: t[..., :1],
            r"has shape \(8, 32, 1\); layers.1.moe.experts.all.w1 cannot be made",
        ),
        (
            GLM,
            "model.language_model.layers.2.mlp.experts.5.up_proj.weight",
            lambda t: t[:-1],
            r"has shape \(19, 32\) and the others like it \(20, 32\); layers.2.moe",
        ),
    ],
    ids=["a flat convolution", "flat experts", "narrow experts", "one expert"],
)
def test_a_tensor_of_another_shape_is_named(tmp_path, config, name, change, message):
    theirs = write_release(tmp_path / "release", config)
    write_release(tmp_path / "other", config, more={name: change(theirs[name]).contiguous()})
    with pytest.raises(ValueError, match=f"^{tmp_path}/other: {name} {message}") as caught:
        HuggingFaceModel(tmp_path / "other")
    assert "\n" not in str(caught.value)


def test_a_full_disk_leaves_nothing_that_looks_complete(tmp_path, release):
    stored = HuggingFaceModel(release[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(OSError, match="writing .*out failed: .*nothing of it was kept"):
            import_model(stored, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["qwen"]


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, release, monkeypatch):
    stored = HuggingFaceModel(release[0])
    size = sum(spec.num_bytes for spec in stored.tensors.values())
    usage = type("Usage", (), {"free": size - 1})
    monkeypatch.setattr(new_folder.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=f"out takes {size:,} bytes, but {size - 1:,} are free in"):
        import_model(stored, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["qwen"]
