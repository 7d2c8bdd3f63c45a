"""A codec from outside, and a task that is not registered, in runs as a user starts them."""

from tests.helpers.launch import arguments_of, launch, train


def test_a_codec_from_outside_makes_the_latents_of_target_images(tmp_path, demo, reference):
    run = launch(
        tmp_path,
        demo,
        training__steps=2,
        latents__codec="average",
        experimental__custom_import="docs.examples.average_codec",
    )
    assert run.status == 0, run.text[-3000:]
    flow = run.scalars("loss/flow")
    assert list(flow) == [1, 2]
    # Before the first update the runs differ in the latents alone.
    assert flow[1] != reference.scalars("loss/flow")[1]


def test_a_task_that_is_not_registered_ends_the_run_with_one_line(tmp_path, demo):
    arguments = arguments_of(tmp_path, demo, {"training.steps": 1})
    config = tmp_path / "job.toml"
    config.write_text(config.read_text().replace('task = "mmu"', 'task = "unknown"'))
    run = train(tmp_path, arguments)
    text = run.text
    assert run.status == 2, text[-2000:]
    assert ".task = 'unknown': nothing is registered under this name" in text
    assert "choose from lm, mmu, t2i, t2i_long, interleaved" in text
    assert "experimental.custom_import" in text and "Traceback" not in text
