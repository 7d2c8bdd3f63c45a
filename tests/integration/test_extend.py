"""Parts from outside, in a run as a user starts it: named in the config, and seen to act."""

import math

import pytest
from torch.distributed.checkpoint import FileSystemReader

from tests.helpers.launch import arguments_of, launch, train


@pytest.fixture(scope="module")
def run(tmp_path_factory, demo):
    run = launch(
        tmp_path_factory.mktemp("extended"),
        demo,
        experimental__custom_import="docs.examples.all_parts",
        shielding__ramp="cosine",
        shielding__steps=3,
        experts__score_function="softplus",
        optimizer__builder="sgd",
        training__steps=4,
    )
    assert run.status == 0, run.text[-3000:]
    return run


def test_the_shield_follows_the_registered_cosine(run):
    scales = run.scalars("shield/scale")
    rising = [0.05 * (1 - math.cos(math.pi * i / 3)) for i in range(3)]
    assert [scales[step] for step in (1, 2, 3, 4)] == pytest.approx([*rising, 0.1], abs=1e-7)


def test_the_router_and_the_optimizer_are_the_registered_ones(run, tmp_path, demo):
    ours = launch(tmp_path, demo, training__steps=1)
    assert ours.status == 0, ours.text[-3000:]
    # The same weights and batch: before the first update only the router's score differs.
    assert run.scalars("loss/balance")[1] != pytest.approx(ours.scalars("loss/balance")[1])
    saved = FileSystemReader(run.folder / "checkpoint" / "step-4").read_metadata()
    assert any("momentum_buffer" in key for key in saved.state_dict_metadata)
    assert not any("exp_avg" in key for key in saved.state_dict_metadata)


def test_a_module_that_does_not_exist_ends_the_run_with_one_line(tmp_path, demo):
    name = "docs.examples.absent"
    run = launch(tmp_path, demo, training__steps=1, experimental__custom_import=name)
    assert run.status == 2, run.text[-2000:]
    assert f"there is no module '{name}'" in run.text and "Traceback" not in run.text


@pytest.fixture(scope="module")
def described(tmp_path_factory, demo):
    """A run with a task and a loss term of a module that lies outside the repository."""
    folder = tmp_path_factory.mktemp("described")
    module = folder / "outside_parts.py"
    module.write_text("from docs.examples import describe_task, quadratic_decay, z_loss\n")
    arguments = arguments_of(
        folder / "run",
        demo,
        {
            "experimental.custom_import": "outside_parts",
            "losses.z": 1e-3,
            "losses.z_loss": 1e-2,
            "lr_scheduler.decay_type": "quadratic",
            "training.steps": 2,
        },
    )
    job = folder / "run" / "job.toml"
    source = f'[[data.sources]]\nname = "describe"\ntask = "describe"\nformat = "webdataset"\npath = "{demo}/train/t2i/t2i-*.tar"\n'
    job.write_text(f"{job.read_text()}\n{source}weight = 5\n")
    run = train(folder / "run", arguments, path=str(folder))
    assert run.status == 0, run.text[-3000:]
    return run


def test_a_task_from_outside_is_trained_and_logged(described):
    losses = described.scalars("loss/by_task/describe_text")
    assert losses and all(5 < loss < 8 for loss in losses.values())


def test_a_loss_term_from_outside_is_weighted_into_the_total(described):
    step = {name: described.scalars(f"loss/{name}")[1] for name in ("text", "flow", "balance", "z")}
    assert step["z"] > 1  # log(320) squared is 33
    routers = described.scalars("loss/z_loss")[1]
    expected = step["text"] + step["flow"] + 0.01 * step["balance"] + 1e-3 * step["z"]
    expected += 1e-2 * routers
    assert described.scalars("loss/total")[1] == pytest.approx(expected, rel=1e-5)
    assert described.scalars("loss/by_task/describe_z")[1] > 1


def test_the_z_loss_of_routers_is_logged_by_group(described):
    names = ("z_loss", "z_loss/understanding", "z_loss/generation")
    total, *groups = (described.scalars(f"loss/{name}")[1] for name in names)
    assert total == pytest.approx(sum(groups), rel=1e-5)
    assert all(group > 1 for group in groups)  # log(12) squared and log(4) squared are 6.2 and 1.9
