"""Runs that share a folder, go back, are killed and begin anew, compared with one that nothing happened to."""

import shutil
import signal

from tests.helpers.launch import arguments_of, launch, read_scalars, start_ranks

LOSSES = ("loss/text", "loss/flow", "grad_norm/all")
OTHER_RATE = {"optimizer.lr": 2e-3}


def names(folder):
    return sorted(path.name for path in (folder / "checkpoint").iterdir())


def assert_same(folder, other, steps):
    for tag in LOSSES:
        ours, theirs = read_scalars(folder, tag), read_scalars(other, tag)
        assert {step: ours[step] for step in steps} == {step: theirs[step] for step in steps}


def test_a_branch_is_locked_killed_and_resumed_and_equals_one_that_was_not_disturbed(
    tmp_path, demo, reference
):
    folder, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(reference.folder / "checkpoint", folder / "checkpoint")
    shutil.copytree(folder / "checkpoint" / "step-7", other / "checkpoint" / "step-7")
    assert names(folder) == ["step-14", "step-20", "step-7"]
    settings = {"checkpoint.interval": 1, "checkpoint.lock_timeout": 0, **OTHER_RATE}
    back = {"checkpoint.load_step": 7, "training.steps": 100_000}
    first = start_ranks(folder, arguments_of(folder, demo, settings | back))
    text = first.wait_for("step:  9")
    for step in (14, 20):
        assert (
            f"the run went back to step 7: {folder}/checkpoint/step-{step} is now abandoned-{step}"
            in text
        )

    second = launch(folder, demo, training__steps=9, checkpoint__lock_timeout=0)
    assert second.status == 2 and "Traceback" not in second.text
    process = first.processes[0].pid
    assert f"another run writes into {folder}/checkpoint (process {process} on" in second.text

    first.send(signal.SIGKILL)
    first.wait(60)
    newest = max(int(path.parent.name[5:]) for path in folder.glob("checkpoint/step-*/.metadata"))
    third = launch(folder, demo, training__steps=newest + 2, **with_underscores(settings))
    assert third.status == 0, third.text[-3000:]
    assert f"Training starts at step {newest + 1}" in third.text
    last = range(newest, newest + 3)
    assert names(folder) == sorted(f"step-{step}" for step in last)

    settings |= {"checkpoint.async_mode": "async", "checkpoint.keep_latest_k": 2}
    whole = launch(other, demo, training__steps=newest + 2, **with_underscores(settings))
    assert whole.status == 0, whole.text[-3000:]
    assert names(other) == sorted(f"step-{step}" for step in last[1:])
    assert_same(folder, other, range(8, newest + 3))


def with_underscores(settings):
    return {key.replace(".", "__"): value for key, value in settings.items()}


def test_a_first_save_that_was_cut_off_is_renamed_and_the_run_begins_with_its_initial_weights(
    tmp_path, demo, reference
):
    begun = tmp_path / "checkpoint" / "step-8"
    shutil.copytree(reference.folder / "checkpoint" / "step-7", begun)
    for name in (".metadata", "lineage.json"):
        (begun / name).unlink()
    run = launch(
        tmp_path,
        demo,
        training__steps=9,
        checkpoint__initial_load_path=reference.folder / "checkpoint" / "step-7",
        checkpoint__initial_load_model_only=False,
    )
    assert run.status == 0, run.text[-3000:]
    assert "step-8 is skipped and renamed to damaged-8: it has no .metadata" in run.text
    assert "no save into" in run.text and "has ever finished: the run begins anew" in run.text
    assert names(tmp_path) == ["damaged-8", "step-9"]
    assert_same(tmp_path, reference.folder, (8, 9))
