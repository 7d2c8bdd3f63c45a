"""Two replicas, each sharded over two ranks that share the experts, give the losses of one process with the balance of each row.

With the balance of the whole step, with and without shared experts, test_parallel_matrix.py compares them.
"""

import pytest

from tests.helpers.launch import launch

NUM_STEPS = 5
LOSSES = ("loss/text", "loss/flow", "loss/balance", "grad_norm/all")
TOLERANCE = 2e-3  # as in test_training: sums are taken in another order
SETTINGS = {"training__steps": NUM_STEPS, "training__local_batch_size": 1}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, demo):
    run = launch(tmp_path_factory.mktemp("one_process"), demo, **SETTINGS)
    assert run.status == 0, run.text[-3000:]
    return run


def assert_same_losses(run, reference):
    assert run.status == 0, run.text[-3000:]
    for tag in LOSSES:
        ours, theirs = run.scalars(tag), reference.scalars(tag)
        assert set(ours) == set(range(1, NUM_STEPS + 1)), tag
        for step, value in ours.items():
            assert value == pytest.approx(theirs[step], rel=TOLERANCE), (tag, step)


def test_replicas_give_the_losses_of_one_process(tmp_path, demo, one_process):
    run = launch(
        tmp_path,
        demo,
        world_size=4,
        parallelism__data_parallel_replicate_degree=2,
        parallelism__expert_parallel_degree=2,
        **SETTINGS,
    )
    assert "2 x 2 ranks" in run.text
    assert_same_losses(run, one_process)
