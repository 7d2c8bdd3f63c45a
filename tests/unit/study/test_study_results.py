"""What is read from a study's folder, and that what is not there is named."""

import math
import re
import socket

import pytest

from symbiotic_titan.study.record import read_record, recorded
from symbiotic_titan.study.results import Measure, SystemRun, read_study
from tests.helpers.written_studies import write_system

LANGUAGE, TAG = "heldout/by_task/lm_text", "validation/by_task/lm_text"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two seeds: ``a`` is whole, ``b`` has no scores in seed 7, ``c`` does not exist, ``split`` is measured at step 0."""
    out = tmp_path_factory.mktemp("study")
    for seed, value in ((7, 1.0), (2, 3.0)):
        place = out / f"seed-{seed}"
        curve = {TAG: {step: value + step for step in range(10, 210, 10)}}
        whole = {"before": {"text": value}, "scores": {LANGUAGE: value}, "curves": curve}
        write_system(
            place / "a",
            **whole,
            gradients={"norm": 2 * value, "unit": "x"},
            alone={LANGUAGE: 7.0},
            first={LANGUAGE: 5.0},
        )
        write_system(place / "b", **whole if seed == 2 else {"before": {"text": value}})
        write_system(place / "split", before={"text": value})
        columns = {"original": {"text": value - 1}, "shared_only": {"text": value + 1}}
        write_system(place / "symbiotic", before={"text": value}, columns=columns)
        write_system(place / "vlm", scores={LANGUAGE: value - 2})
        (place / "start").mkdir()
    (out / "settings.json").write_text('{"steps": 200}')
    return read_study(out, trained=("a", "b", "c"), untrained=("split", "shared_only"))


def test_seeds_are_in_order_and_folders_without_results_are_no_systems(study):
    assert study.seeds == (2, 7) and study.settings == {"steps": 200}
    found = {"a", "b", "split", "symbiotic", "original", "shared_only", "vlm"}
    assert set(study.runs) == found


def test_what_is_missing_is_named(study):
    assert study.missing == (
        "seed 2, c: was not run",
        "seed 7, b: has no curves (tb/), no scores (scores.json): not finished",
        "seed 7, c: was not run",
    )


@pytest.mark.parametrize(
    ("measure", "values"),
    [
        (Measure("scores", "scores", LANGUAGE), {2: 3.0, 7: 1.0}),
        (Measure("before", "before", "text"), {2: 3.0, 7: 1.0}),
        (Measure("gradients", "gradients", "norm"), {2: 6.0, 7: 2.0}),
        (Measure("start", "start", TAG), {2: 13.0, 7: 11.0}),
        (Measure("end", "end", TAG), {2: 198.0, 7: 196.0}),  # the mean of the last two of twenty
        (Measure("change", "change", TAG), {2: 185.0, 7: 185.0}),
        (Measure("peak", "peak", TAG), {2: 203.0, 7: 201.0}),
        (Measure("late", "start", TAG, after=55), {2: 63.0, 7: 61.0}),
        (Measure("too late", "start", TAG, after=500), {}),
        (Measure("alone", "alone", LANGUAGE), {2: 7.0, 7: 7.0}),
        (Measure("first", "first", LANGUAGE), {2: 5.0, 7: 5.0}),
        (Measure("less", "scores", LANGUAGE, minus=LANGUAGE), {2: 0.0, 7: 0.0}),
        (Measure("no text", "gradients", "unit"), {}),
        (Measure("absent", "end", "no/tag"), {}),
        (Measure("absent", "scores", LANGUAGE, minus="no/score"), {}),
    ],
)
def test_a_measure_is_a_number_of_each_seed(study, measure, values):
    assert study.values("a", measure) == values


def test_several_scores_are_one_by_the_numbers_of_their_samples():
    scores = {
        "answers/digit": {"score": 1.0, "number": 10},
        "answers/word": {"score": 0.25, "number": 40},
    }
    run = SystemRun(scores=scores)
    digits = Measure("reading", "scores", "answers/digit", also=("answers/word",))
    assert run.value(digits) == pytest.approx((10 + 10) / 50)
    absent = Measure("reading", "scores", "answers/digit", also=("answers/number",))
    assert run.value(absent) is None


def test_columns_of_the_split_models_report_are_systems(study):
    text = Measure("text", "before", "text")
    assert study.values("original", text) == {2: 2.0, 7: 0.0}
    assert study.values("shared_only", text) == {2: 4.0, 7: 2.0}
    assert study.difference("original", "symbiotic", text).mean == -1.0


def test_the_original_answers_before_the_first_step_as_the_model_that_all_begin_with(study):
    first = Measure("first", "first", LANGUAGE)
    assert study.values("original", first) == {2: 1.0, 7: -1.0}
    assert study.values("vlm", Measure("scores", "scores", LANGUAGE)) == {2: 1.0, 7: -1.0}
    assert study.values("shared_only", first) == {}


def test_one_seed_of_a_system_has_a_value_and_no_interval(study):
    score = Measure("score", "scores", LANGUAGE)
    assert study.values("b", score) == {2: 3.0}
    assert study.estimate("b", score) is None and study.difference("a", "b", score) is None


def test_a_score_that_is_not_finite_is_none_and_is_named(tmp_path):
    for seed in range(2):
        scores = {"x": math.nan if seed else 1.0, "y": 1.0}
        curves = {TAG: {1: 1.0}}
        folder = tmp_path / f"seed-{seed}/a"
        write_system(folder, before={"text": 1.0}, scores=scores, curves=curves)
    study = read_study(tmp_path, trained=("a",))
    assert study.missing == ("seed 1, a: has no finite x",)
    assert study.values("a", Measure("x", "scores", "x")) == {0: 1.0}
    assert SystemRun(before={"text": math.inf}).value(Measure("t", "before", "text")) is None


def test_only_systems_that_were_asked_for_are_missed(tmp_path):
    for seed in range(2):
        write_system(tmp_path / f"seed-{seed}/a", before={"text": 1.0})
    (tmp_path / "settings.json").write_text('{"systems": ["b"]}')
    study = read_study(tmp_path, trained=("a",), untrained=("b",))
    assert study.missing == ("seed 0, b: was not run", "seed 1, b: was not run")


def test_every_start_of_a_study_is_recorded_also_one_that_failed(tmp_path):
    with recorded(tmp_path, at_once=2):
        pass
    with pytest.raises(KeyboardInterrupt), recorded(tmp_path, at_once=4):
        raise KeyboardInterrupt
    found = read_record(tmp_path)
    assert found["starts"] == 2 and found["at_once"] == [2, 4] and found["seconds"] >= 0
    (commit,), (machine,) = found["commits"], found["machines"]
    assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?|unknown", commit)
    assert "cores, Python 3." in machine and socket.gethostname() not in machine


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {},
            "no study .no folder seed-0, seed-1, ....; run symbiotic reproduce, or name its --out",
        ),
        ({"seed-3/a/x": ""}, "at least 2 seeds, got seed 3 alone; run more of them"),
        ({"seed-0/a/before.json": "{", "seed-1/a/x": ""}, "before.json is not JSON"),
        ({"seed-0/a/scores.json": "{}", "seed-1/a/x": ""}, "scores.json is no evaluation"),
        ({"settings.json": "[1]", "seed-0/x": "", "seed-1/x": ""}, "settings.json holds no JSON"),
        ({"record.json": "{}", "seed-0/x": "", "seed-1/x": ""}, "record.json is no study record"),
        ({"settings.json": "{", "seed-0/x": "", "seed-1/x": ""}, "settings.json is not JSON"),
    ],
)
def test_what_cannot_be_read_is_told_in_one_line(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_study(tmp_path, trained=("a",))
    assert "\n" not in str(error.value)
