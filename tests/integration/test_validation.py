"""Validation inside real runs: it changes nothing, gives the same numbers however the run is spread out, and can be stopped."""

import pytest

from tests.helpers import launch as runs
from tests.helpers.launch import NUM_STEPS

TRAINING = ("loss/text", "loss/flow", "loss/balance", "grad_norm/all")
VALIDATION = (
    "validation/text", "validation/flow", "validation/by_task/lm_text", "validation/by_task/t2i_flow",
    "validation/accuracy/lm", "validation/accuracy/mmu",
)  # fmt: skip
# As for the training losses; an answer is right or wrong, and none sits on the edge here.
TOLERANCE = 1e-5

SECTION = """
[validation]
enable = true
freq = 8
steps = 2
"""
SOURCE = """
[[validation.sources]]
name = "{task}"
task = "{task}"
format = "{format}"
path = "{folder}/heldout/{task}/*"
"""


def with_validation(patch, demo):
    """Let every run that is launched while ``patch`` is in force validate every 8 steps on the held-out demo data."""
    arguments_of = runs.arguments_of
    formats = {"lm": "jsonl", "mmu": "webdataset", "t2i": "webdataset"}

    def extended(folder, demo, settings):
        arguments = arguments_of(folder, demo, settings)
        with open(folder / "job.toml", "a") as file:
            file.write(SECTION)
            for task, kind in formats.items():
                file.write(SOURCE.format(task=task, format=kind, folder=demo))
        return arguments

    patch.setattr(runs, "arguments_of", extended)


@pytest.fixture
def validated(monkeypatch, demo):
    with_validation(monkeypatch, demo)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, demo):
    """One process, all steps, with validation."""
    with pytest.MonkeyPatch.context() as patch:
        with_validation(patch, demo)
        return runs.launch(
            tmp_path_factory.mktemp("uninterrupted"), demo, training__steps=NUM_STEPS
        )


def assert_same(run, reference, tags, steps, rtol=0.0):
    assert run.status == 0, run.text[-3000:]
    for tag in tags:
        ours, theirs = run.scalars(tag), reference.scalars(tag)
        for step in steps:
            assert ours[step] == pytest.approx(theirs[step], rel=rtol, abs=0.0), (tag, step)


def test_training_is_bitwise_the_same_with_and_without(uninterrupted, reference):
    assert_same(uninterrupted, reference, TRAINING, range(1, NUM_STEPS + 1))
    assert sorted(uninterrupted.scalars("validation/text")) == [0, 8, 16, NUM_STEPS]
    assert not reference.scalars("validation/text")


def test_held_out_losses_fall(uninterrupted):
    for tag in ("validation/text", "validation/flow"):
        values = uninterrupted.scalars(tag)
        assert values[NUM_STEPS] < 0.8 * values[0]
    accuracy = uninterrupted.scalars("validation/accuracy/lm")
    assert accuracy[0] < 0.05 < accuracy[NUM_STEPS]


def test_resume_is_bitwise_and_measures_nothing_twice(
    tmp_path, demo, validated, uninterrupted, reference
):
    first = runs.launch(tmp_path, demo, training__steps=13)
    assert first.status == 0 and sorted(first.scalars("validation/text")) == [0, 8, 13]
    second = runs.launch(tmp_path, demo, training__steps=NUM_STEPS)
    assert "Training starts at step 14" in second.text
    assert "validation at step 0" not in second.text
    assert_same(second, uninterrupted, VALIDATION, [0, 8, 16, NUM_STEPS])
    assert_same(second, reference, TRAINING, range(1, NUM_STEPS + 1))


@pytest.mark.parametrize(
    ("expert_parallel", "settings"),
    [
        pytest.param(2, {}, id="ep"),
        pytest.param(
            2,
            {"activation_checkpoint__mode": "full", "compile__enable": True},
            id="ep_full_compile",
            marks=pytest.mark.matrix,
        ),
        pytest.param(
            1,
            {"parallelism__fsdp_reshard_after_forward": "never"},
            id="fsdp_never_reshards",
            marks=pytest.mark.matrix,
        ),
    ],
)
def test_two_processes_measure_what_one_does(
    tmp_path, demo, validated, uninterrupted, expert_parallel, settings
):
    if "compile__enable" in settings:
        settings = settings | {"compile__backend": "aot_eager"}
    run = runs.launch(
        tmp_path,
        demo,
        world_size=2,
        training__steps=8,
        parallelism__expert_parallel_degree=expert_parallel,
        **settings,
    )
    assert_same(run, uninterrupted, VALIDATION, [0, 8], TOLERANCE)
    assert_same(run, uninterrupted, TRAINING, range(1, 9), TOLERANCE)


def test_a_signal_to_one_rank_during_a_validation_stops_all(tmp_path, demo, validated):
    """It comes in the validation before the first step, which would last for minutes."""
    settings = {"training.steps": 100, "parallelism.expert_parallel_degree": 2}
    arguments = runs.arguments_of(tmp_path, demo, settings)
    config = tmp_path / "job.toml"
    config.write_text(config.read_text().replace("steps = 2\n", "steps = 60\n"))
    statuses, texts = runs.stop_one_of_two(tmp_path, arguments)
    assert statuses == [0, 0], texts[1][-3000:]
    for text in texts:
        assert "validation at step 0 interrupted by a stop signal" in text
        assert "stopped before the first step" in text.splitlines()[-1]
    assert not (tmp_path / "checkpoint").exists()


def test_a_missing_held_out_file_is_told_in_one_line(tmp_path, demo, validated, monkeypatch):
    arguments_of = runs.arguments_of

    def broken(folder, demo, settings):
        arguments = arguments_of(folder, demo, settings)
        file = folder / "job.toml"
        file.write_text(file.read_text().replace("heldout/mmu/*", "heldout/mmu/nothing-*"))
        return arguments

    monkeypatch.setattr(runs, "arguments_of", broken)
    run = runs.launch(tmp_path, demo, training__steps=1)
    assert run.status == 2 and "Traceback" not in run.text
    assert "[[validation.sources]] #2 (mmu): no file matches path" in run.text
