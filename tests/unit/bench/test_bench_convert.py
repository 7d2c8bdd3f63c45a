"""The benchmark of import makes a release that the importer takes, and measures what it says it measures."""

import pytest

from symbiotic_titan.hf.model import HuggingFaceModel
from tools.bench import convert


def test_what_it_makes_is_a_release_of_about_the_size_asked_for(tmp_path):
    convert.make(tmp_path / "release", 0.03, 0.008, narrow=32)
    files = [path.stat().st_size for path in (tmp_path / "release").glob("*.safetensors")]
    assert 0.9 * 0.03e9 < sum(files) < 1.1 * 0.03e9
    assert len(files) > 3
    model = HuggingFaceModel(tmp_path / "release")
    assert model.args.num_experts == 128 and model.args.num_layers > 1
    name = "layers.0.moe.experts.all.w2"
    assert model.read(name).shape == model.tensors[name].shape


def test_a_process_that_fails_is_told():
    with pytest.raises(RuntimeError, match="import nothing failed"):
        convert.run("-c", "import nothing")


@pytest.mark.slow
def test_import_takes_less_than_twice_the_largest_file(tmp_path):
    result = convert.bench(tmp_path / "scratch", 2.6, 0.8, narrow=1)
    assert result["peak_over_shard"] < convert.BAR
    assert result["gigabytes"] > 2 and not (tmp_path / "scratch").exists()
