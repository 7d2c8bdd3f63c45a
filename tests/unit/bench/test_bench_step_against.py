"""The step against transformers': equal weights, work and text, or no figures; and what the command line refuses."""

import json
import sys

import pytest
import step
import step_transformers
import torch

TOY = "rows=2,length=48,dim=32,layers=2,experts=8,top_k=2,hidden=16"
PAIR = {"transformers_autocast", "transformers_weights"}


def run(monkeypatch, *arguments):
    for name, value in (step.WAITING | step_transformers.ENVIRONMENT).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["step.py", *arguments])
    return step.main()


def test_both_dtypes_against_transformers(monkeypatch, capsys):
    shapes = [TOY, f"{TOY},dtype=bfloat16"]
    counts = ["--steps", "2", "--warmup", "0"]
    assert run(monkeypatch, "--against", "transformers", "--shapes", *shapes, *counts) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["over_transformers"].keys() == set(shapes)
    for name, others in zip(shapes, ({"transformers"}, PAIR), strict=True):
        result = found["transformers"][name]
        assert found["over_transformers"][name] == min(result["over"].values()) > 0
        assert result["over"].keys() == result["first_step_difference"].keys() == others
        assert result["times"].keys() == {"ours", *others}
        assert result["shape"]["dim"] == 32 and result["shape"]["vocab"] == 320
    first = found["transformers"][TOY]["first_step_difference"]["transformers"]
    assert first < 1e-5


def test_models_that_compute_different_things_are_not_timed(monkeypatch):
    their_model = step_transformers.their_model

    def changed(shape, ours):
        model = their_model(shape, ours)
        with torch.no_grad():
            model.lm_head.weight[3] += 0.1
        return model

    monkeypatch.setattr(step_transformers, "their_model", changed)
    name, shape = step_transformers.shape_of(TOY)
    with pytest.raises(SystemExit, match="models that compute different things are not timed"):
        step_transformers.compare_transformers(name, shape, steps=2, warmup=0)


def test_every_token_but_the_first_of_a_row_is_a_label():
    _, shape = step_transformers.shape_of(TOY)
    batch = step_transformers.make_batch(shape, 0)
    assert batch.tokens.shape == (2, 48) and int(batch.num_labels()) == 2 * 47
    assert torch.equal(batch.labels[:, :-1], batch.tokens[:, 1:])
    assert not torch.equal(batch.tokens, step_transformers.make_batch(shape, 1).tokens)


def test_the_shapes_of_the_comparison_are_those_of_its_figures():
    sizes = {
        name: (s.rows, s.length, s.dim, s.layers, s.experts, s.top_k, s.hidden, s.dtype)
        for name, s in step_transformers.SHAPES.items()
    }
    assert sizes == {
        "mini_float32": (2, 1024, 256, 8, 32, 4, 192, "float32"),
        "mini_bfloat16": (2, 1024, 256, 8, 32, 4, 192, "bfloat16"),
        "wide_bfloat16": (1, 2048, 512, 6, 64, 8, 256, "bfloat16"),
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "no-such-commit", "debug.toml"], "--against no-such-commit: no commit, branch or tag"),
        (["--against", "HEAD", "--against", "HEAD~1", "debug.toml"], "one commit at a time, got HEAD and HEAD~1"),
        (["--against", "HEAD"], "name the TOML file of at least one config"),
        ([], "name the TOML file of at least one config"),
        (["--against", "transformers", "debug.toml"], "has shapes of its own; leave out debug.toml"),
        (["--against", "HEAD", "debug.toml", "--compare"], "two benchmarks; choose one"),
        (["debug.toml", "--shapes", "mini_float32"], "--shapes has no effect without --against transformers"),
        (["debug.toml", "--variants", "ema"], "--variants has no effect without --compare"),
        (["debug.toml", "--own-config"], "--own-config has no effect without --against GITREF"),
        (["debug.toml", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["debug.toml", "--warmup", "-1"], "--warmup must be at least 0, got -1"),
        (["debug.toml", "--steps", "1"], "--steps must be at least 2 to have a spread, got 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_told_in_one_line(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *arguments)
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("step.py: error: ") and message in last


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("experts=4,top_k=8", "top_k = 8 does not fit into num_experts = 4"),
        ("dim=100", "dim must be a multiple of 8 (16 bytes), got 100"),
        ("dim=256,heads=24", "dim must be a multiple of 192 (24 heads of a multiple of 8 channels), got 256"),
        ("heads=8,kv_heads=3", "num_heads: must be a multiple of num_kv_heads = 3, got 8"),
        ("layers=0", "layers must be at least 1, got 0"),
        ("vocab=100", "vocab must be at least 264, got 100"),
        ("dtype=float16", "dtype must be float32 or bfloat16, got float16"),
        ("dim=large", "dim must be a whole number, got 'large'"),
        ("large", "'large' is neither one of mini_float32, mini_bfloat16, wide_bfloat16 nor KEY=VALUE"),
    ],
)  # fmt: skip
def test_a_shape_that_cannot_be_built_is_told_in_one_line(monkeypatch, capsys, shape, message):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--against", "transformers", "--shapes", shape)
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("step.py: error: argument --shapes: ") and message in last


def test_without_its_extra_the_comparison_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match=r"pip install 'symbiotic_titan\[bench\]'") as stop:
        run(monkeypatch, "--against", "transformers")
    assert "\n" not in str(stop.value.code)
