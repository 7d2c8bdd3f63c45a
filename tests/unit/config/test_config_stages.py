"""[[data.stages]]: what the rows mean, and one line for each mistake in them."""

import pytest

from symbiotic_titan.config.data import Data, used_sources
from symbiotic_titan.config.stages import rates_by_stage

ROW = {"format": "jsonl", "path": "x"}
SOURCES = [
    {**ROW, "name": "text", "task": "lm", "weight": 2},
    {**ROW, "name": "questions", "task": "mmu", "weight": 0},
    {**ROW, "name": "images", "task": "t2i", "weight": 0},
]


def data(*stages, **settings):
    return Data(sources=SOURCES, stages=list(stages), **settings)


def test_what_a_stage_does_not_name_stays_as_it_was_in_the_stage_before():
    config = data(
        {"from_step": 10, "weights": {"questions": 1}},
        {"from_step": 20, "lr": {"new": 1e-4}},
        {"from_step": 30, "weights": {"text": 0.5}, "lr": {"new": 1e-5, "old": 1e-6}},
    )
    first, second = (
        {"text": 2, "questions": 0, "images": 0},
        {"text": 2, "questions": 1, "images": 0},
    )
    third = {"text": 0.5, "questions": 1, "images": 0}
    assert config.weights_by_stage == [(1, first), (10, second), (20, second), (30, third)]
    steps = (0, 1, 9, 10, 29, 30, 1000)
    assert [config.weights_at(s) for s in steps] == [first, first, first, second, second, third, third]  # fmt: skip
    assert rates_by_stage(config.stages) == {"new": [(20, 1e-4), (30, 1e-5)], "old": [(30, 1e-6)]}


def test_a_source_of_a_later_stage_is_read_and_its_images_have_room_from_the_start():
    config = data({"from_step": 10, "weights": {"questions": 1}})
    assert [s.name for s in used_sources(config.sources, config.stages)] == ["text", "questions"]
    assert [s.name for s in used_sources(config.sources)] == ["text"]
    assert data().seen_pixels is None and config.seen_pixels == config.vit_pixels


@pytest.mark.parametrize(
    "stages, message",
    [
        ([3], "[[data.stages]] #1: must be a table, got 3"),
        ([{"weights": {"text": 1}}], "[[data.stages]] #1: missing key 'from_step'"),
        ([{"from_step": 2.5}], "[[data.stages]] #1.from_step: must be an integer, got 2.5"),
        (
            [{"from_step": 2, "weight": {}}],
            "[[data.stages]] #1: unknown key 'weight'; did you mean 'weights'?",
        ),
        (
            [{"from_step": 2, "weights": {"text": "1"}}],
            "[[data.stages]] #1.weights.text: must be a number, got '1'",
        ),
        (
            [{"from_step": 2, "weights": {"text": float("nan")}}],
            "[[data.stages]] #1.weights.text: must be a finite number, got nan",
        ),
        (
            [{"from_step": 1, "weights": {"text": 1}}],
            "[[data.stages]] #1.from_step: must be at least 2, [[data.sources]] has the weights from step 1 on, got 1",
        ),
        (
            [{"from_step": 9, "weights": {"text": 1}}, {"from_step": 9, "weights": {"text": 3}}],
            "[[data.stages]] #2.from_step: must be above 9, the from_step of the stage before; sort the stages by their first "
            "steps, got 9",
        ),
        (
            [{"from_step": 2}],
            "[[data.stages]] #1: changes nothing; give it weights or lr, or remove it",
        ),
        (
            [{"from_step": 2, "weights": {"txt": 1}}],
            "[[data.stages]] #1.weights: no source is named 'txt'; choose from text, questions, images",
        ),
        (
            [{"from_step": 2, "weights": {"text": -1}}],
            "[[data.stages]] #1.weights.text: must be zero or positive, got -1",
        ),
        (
            [{"from_step": 2, "lr": {"new": -1e-4}}],
            "[[data.stages]] #1.lr.new: must be zero or positive, got -0.0001",
        ),
        (
            [{"from_step": 2, "weights": {"images": 1}}, {"from_step": 3, "weights": {"text": 0, "images": 0}}],
            "[[data.stages]] #2: the weights of all sources are zero from here on; give at least one source a positive weight",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_told_in_one_line(stages, message):
    with pytest.raises(ValueError) as error:
        data(*stages)
    assert str(error.value) == message


def test_shares_of_a_row_are_checked_for_every_stage():
    stage = {"from_step": 10, "weights": {"images": 6}}
    settings = {"max_row_share": {"images": 0.5}, "mixture_by": "tokens"}
    with pytest.raises(ValueError, match="max_row_share.images: no source has this task"):
        data(stage, **settings)
    settings["max_row_share"] = {"t2i": 0.5}
    assert data(**settings).max_row_share == {"t2i": 0.5}  # a source of weight 0 may return
    with pytest.raises(
        ValueError,
        match="t2i: 0.5 is less than the task's share of the tokens from step 10 on, 0.75",
    ):
        data(stage, **settings)
    stage["weights"] |= {"text": 0}
    with pytest.raises(
        ValueError,
        match="the tasks may take 0.5 of a row together from step 10 on, so none could be",
    ):
        data(stage, max_row_share={"t2i": 0.5})
