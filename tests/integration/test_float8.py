"""Float8, emulated, in the whole trainer: the losses stay near those of float32, however the job is spread out."""

import pytest

from tests.helpers.launch import launch

NUM_STEPS = 5
# Rounding noise of about 4 percent per matmul averages out in the losses and less so in the gradient norm. Largest gaps
# measured over these cases: 0.0013 in a loss, 0.009 in the norm.
LOSS_TOLERANCE, NORM_TOLERANCE = 0.005, 0.03
FLOAT8 = {"model__converters": "float8", "float8__emulate": True}
TWO_RANKS = {"world_size": 2, "parallelism__expert_parallel_degree": 2}


def assert_near(run, reference, tag, tolerance):
    ours, theirs = run.scalars(tag), reference.scalars(tag)
    for step in range(1, NUM_STEPS + 1):
        assert abs(ours[step] - theirs[step]) <= tolerance * theirs[step], (tag, step)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"float8__recipe": "rowwise", "compile__enable": True, "compile__backend": "aot_eager"},
        {
            **TWO_RANKS,
            "activation_checkpoint__mode": "selective",
            "activation_checkpoint__selective_ac_option": "op",
        },
        {
            **TWO_RANKS,
            "training__mixed_precision_param": "bfloat16",
            "activation_checkpoint__mode": "full",
        },
    ],
    ids=["one process", "rowwise compiled", "two processes selective", "two processes bf16 full"],
)
def test_losses_stay_near_those_of_float32(tmp_path, demo, reference, options):
    run = launch(tmp_path, demo, training__steps=NUM_STEPS, **FLOAT8, **options)
    assert run.status == 0, run.text[-3000:]
    assert "float8, emulated: 21 linear layers" in run.text and "4 groups of experts" in run.text
    for tag in ("loss/text", "loss/flow"):
        assert_near(run, reference, tag, LOSS_TOLERANCE)
    assert_near(run, reference, "grad_norm/all", NORM_TOLERANCE)
    assert run.scalars("grad_norm/all")[1] != reference.scalars("grad_norm/all")[1]


def test_checkpoint_of_a_float32_run_resumes_in_float8(tmp_path, demo):
    first = launch(tmp_path, demo, training__steps=2)
    second = launch(tmp_path, demo, training__steps=3, **FLOAT8)
    assert first.status == second.status == 0, second.text[-3000:]
    assert "Training starts at step 3" in second.text


def test_float8_without_a_gpu_and_without_emulation_is_refused_in_one_line(tmp_path, demo):
    run = launch(tmp_path, demo, training__steps=1, model__converters="float8")
    assert run.status == 2 and "Traceback" not in run.text
    assert "float8.emulate = true" in run.text
