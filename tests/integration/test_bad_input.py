"""A user's mistake ends the run before training, with exit status 2 and one clear message, no traceback."""

import pytest
from tests.integration.launch import launch


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model__flavor": "huge"}, "flavor"),
        ({"parallelism__tensor_parallel_degree": 2}, "parallelism.tensor_parallel_degree = 2 is not supported"),
        ({"parallelism__expert_parallel_degree": 2}, "expert_parallel_degree = 2 does not divide the 1 ranks"),
        ({"training__global_batch_size": 5}, "training.global_batch_size = 5 must be a multiple of"),
        ({"training__seq_len": 48}, "training.seq_len"),
        ({"data__num_lanes": 3, "training__dataloader__num_workers": 2}, "num_workers"),
        ({"shielding__modalities": "vea"}, "shielding.modalities: unknown modality 'vea'"),
        ({"experts__shared": False}, "[shielding] has no effect with experts.shared = false"),
        ({"compile__enable": True}, "compile.enable = True is not supported"),
        ({"checkpoint__async_mode": "async_with_pinned_mem"}, "needs an accelerator; use 'async'"),
    ],
)
def test_bad_overrides(tmp_path, demo, overrides, message):
    run = launch(tmp_path, demo, training__steps=1, **overrides)
    assert run.status == 2, run.text[-2000:]
    assert message in run.text
    assert "Traceback" not in run.text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("t2i-*.tar", "nothing-*.tar", "[[data.sources]] #1 (t2i)"),
        ("num_experts = 12", "num_experts = 10", "experts.partition"),
        ('modalities = ["vae"]', 'modalities = ["vea"]', "unknown modality 'vea'"),
        ('modalities = ["vae"]', 'modalities = ["vae", "text"]', "text"),
        ("num_experts = 4", "num_experts = 1", "experts.partition"),
        ("[flow]", "[flows]", "unknown key 'flows'; did you mean 'flow'?"),
        ("weight = 3", "weight = 0\n#", None),
    ],
)
def test_bad_files(tmp_path, demo, old, new, message, monkeypatch):
    from tests.integration import launch as module

    arguments = module.arguments_of

    def changed(folder, demo, settings):
        result = arguments(folder, demo, settings)
        path = folder / "job.toml"
        path.write_text(path.read_text().replace(old, new))
        return result

    monkeypatch.setattr(module, "arguments_of", changed)
    run = launch(tmp_path, demo, training__steps=1)
    if message is None:  # some sources may weigh nothing, as long as one has a weight
        assert run.status == 0, run.text[-2000:]
        return
    assert run.status == 2, run.text[-2000:]
    assert message in run.text and "Traceback" not in run.text
