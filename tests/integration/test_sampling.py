"""Sampling inside real runs: it changes nothing, its pictures are in the log, and it can be stopped."""

import pytest

from tests.helpers import launch as runs
from tests.integration.test_validation import TRAINING, assert_same

SAMPLING = {"sampling__enable": True, "sampling__freq": 2, "sampling__steps": 4}


def grid_steps(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = (run.folder / "tb").glob("*/events*")
    events = EventAccumulator(str(file), size_guidance={"images": 0})
    events.Reload()
    if "sampling/pictures" not in events.Tags()["images"]:
        return []
    return [event.step for event in events.Images("sampling/pictures")]


def test_training_is_bitwise_the_same_with_and_without(tmp_path, demo, reference):
    run = runs.launch(tmp_path, demo, training__steps=5, **SAMPLING)
    assert_same(run, reference, TRAINING, range(1, 6))
    assert grid_steps(run) == [0, 2, 4, 5] and not grid_steps(reference)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "settings",
    [
        {"parallelism__expert_parallel_degree": 2},
        {
            "parallelism__expert_parallel_degree": 2,
            "activation_checkpoint__mode": "full",
            "compile__enable": True,
            "compile__backend": "aot_eager",
        },
    ],
    ids=["ep", "ep_full_compile"],
)
def test_two_processes_train_bitwise_the_same_with_and_without(tmp_path, demo, settings):
    settings = {"world_size": 2, "training__steps": 3, **settings}
    without = runs.launch(tmp_path / "without", demo, **settings)
    run = runs.launch(tmp_path / "with", demo, **settings, **SAMPLING)
    assert_same(run, without, TRAINING, range(1, 4))
    assert grid_steps(run) == [0, 2, 3]


def test_a_signal_to_one_rank_during_sampling_stops_all(tmp_path, demo):
    """It comes before the first step, in a grid of more steps than the test would wait for."""
    settings = {"training.steps": 100, "parallelism.expert_parallel_degree": 2}
    settings |= {"sampling.enable": True, "sampling.steps": 10_000}
    arguments = runs.arguments_of(tmp_path, demo, settings)
    statuses, texts = runs.stop_one_of_two(tmp_path, arguments)
    assert statuses == [0, 0], texts[1][-3000:]
    for text in texts:
        assert "sampling at step 0 interrupted by a stop signal" in text
        assert "stopped before the first step" in text.splitlines()[-1]
    assert not (tmp_path / "checkpoint").exists()
