"""Which counts figures 7 and 8 show, and what they say about them."""

import json

import numpy as np
import pytest

from symbiotic_titan.plots.expert_figures import overlap_words
from symbiotic_titan.plots.expert_use import from_profile, from_run
from symbiotic_titan.plots.logs import read_run
from symbiotic_titan.plots.style import running_mean
from symbiotic_titan.sequence.modality import TEXT, VAE, VIT
from tests.helpers.written_runs import Log, counts_of


@pytest.fixture
def run(tmp_path):
    Log(tmp_path).scalars("a", {1: 1.0}).counts(1, 100, 200).close()
    return read_run(tmp_path, "r")


def test_the_last_logged_counts_are_summed_or_one_step_is_chosen(run):
    last = from_run(run, step=None, window=2)
    assert (last.counts_YME == (counts_of(100) + counts_of(200)).numpy()).all()
    assert last.period == "2 logged steps, 100 to 200"
    one = from_run(run, step=100, window=2)
    assert (one.counts_YME == counts_of(100).numpy()).all() and one.period == "step 100"
    with pytest.raises(ValueError, match="--step 7: r logged counts at 1, 100, 200"):
        from_run(run, step=7, window=2)


def test_a_run_without_counts_has_no_expert_use(tmp_path):
    Log(tmp_path).scalars("a", {1: 1.0}).close()
    assert from_run(read_run(tmp_path, "r"), step=None, window=1) is None


def test_experts_out_of_reach_do_not_count_as_idle(run):
    use = from_run(run, step=100, window=1)
    assert use.imbalance(VAE).tolist() == [1, 1, 1]
    assert use.imbalance(TEXT) == pytest.approx([8 / 4.5] * 3)
    assert use.deviation(TEXT) == pytest.approx([np.std(np.arange(1, 9)) / 4.5] * 3)
    assert use.reachable(VIT).shape == (3, 8)


def test_extremes_carry_the_experts_numbers_and_all_that_are_tied(run):
    use = from_run(run, step=100, window=1)
    assert [x.tolist() for x in use.extremes(TEXT, 2)] == [[0, 1], [6, 7]]
    assert [x.tolist() for x in use.extremes(VIT, 2)] == [[6, 7], [0, 1]]
    assert [x.tolist() for x in use.extremes(VAE, 2)] == 2 * [[8, 9, 10, 11]]  # four equal ones
    assert overlap_words(use, 2) == "top 2 in common: 0 (-); bottom 2 in common: 0 (-)"


def test_layers_are_chosen_by_their_number_in_parameter_names(run):
    use = from_run(run, step=100, window=1)
    assert use.choose_layer(None) == 2 and use.choose_layer(3) == 3
    with pytest.raises(ValueError, match="--layer 0: r has the MoE layers 1 to 3"):
        use.choose_layer(0)


def write_profile(path, **keys):
    path.write_text(json.dumps(keys))
    return path


def test_a_profile_shows_raw_deviations_over_all_experts(tmp_path):
    counts = [[[4, 2, 2, 0], [1, 1, 1, 5], [0, 0, 0, 0]]]
    use = from_profile(write_profile(tmp_path / "p.json", counts=counts))
    assert use.label == "p" and use.layers == (0,)
    assert use.deviation(TEXT) == pytest.approx([np.std([4, 2, 2, 0])])
    assert not use.has_tokens(VAE)
    # Of text's one least used expert, the fourth, and three of ViT's that are tied, none is the same.
    assert overlap_words(use, 0) == (
        "top 1 in common: 0 (-); bottom 1 in common: 0.0 (mean over ties)"
    )


def test_a_profile_of_a_partitioned_model_keeps_groups_apart(tmp_path):
    counts = [[[4, 2, 0, 0], [1, 1, 0, 0], [0, 0, 3, 0]]]
    path = write_profile(
        tmp_path / "p.json",
        counts=counts,
        layers=["layers.7"],
        model={"groups": {"und": 2, "gen": 2}},
    )
    use = from_profile(path)
    assert use.layers == (7,)
    assert use.reachable_ME.astype(int).tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1]]
    assert use.imbalance(TEXT) == pytest.approx([4 / 3])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON with a table of integers 'counts'"),
        ('{"count": []}', "not JSON with a table of integers 'counts'"),
        ('{"counts": [[[1, "a"]]]}', "not JSON with a table of integers 'counts'"),
        ('{"counts": [[1, 2], [3, 4]]}', r"counts must be \[layers\]\[3\]\[experts\], got"),
    ],
)
def test_bad_profiles_are_refused(tmp_path, text, message):
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"--profile .*p.json: {message}"):
        from_profile(path)


def test_missing_profile_is_named(tmp_path):
    with pytest.raises(ValueError, match="--profile .*no.json: No such file or directory"):
        from_profile(tmp_path / "no.json")


def test_running_mean_reaches_as_far_back_as_forward():
    assert running_mean(np.array([1.0, 2, 6, 4, 5]), 1).tolist() == [1, 3, 4, 5, 5]
    assert running_mean(np.array([1.0, 2, 6, 4, 5]), 2).tolist() == pytest.approx([1, 3, 3.6, 5, 5])
    assert running_mean(np.array([3.0]), 0).tolist() == [3]
