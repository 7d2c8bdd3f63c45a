"""The rule of the verdicts, at its edges, and the claims as data."""

from pathlib import Path

import pytest

from symbiotic_titan.study.claims import (
    Claim,
    Comparison,
    Verdict,
    below,
    combined,
    judge,
    judge_part,
    order,
    verdict_of,
)
from symbiotic_titan.study.paper import CLAIMS, SPLITS, SYSTEMS, UNTRAINED
from symbiotic_titan.study.results import Measure, Study, SystemRun
from symbiotic_titan.study.statistics import estimate

YES, NO, OPEN, NONE = Verdict
LOSS = Measure("loss", "before", "text")
RIGHT = Measure("right", "before", "right", better="higher")


def study_of(key="text", **values):
    """A study in which system -> values by seed, None where a seed has none."""
    runs = {
        name: {s: SystemRun(before={key: v}) for s, v in enumerate(of_seeds) if v is not None}
        for name, of_seeds in values.items()
    }
    return Study(Path("x"), (0, 1, 2), runs, (), {})


@pytest.mark.parametrize(
    ("differences", "below_zero", "above_zero"),
    [
        ((-1.0, -1.1, -0.9), YES, NO),
        ((1.0, 1.1, 0.9), NO, YES),
        ((-1.0, -1.1, 0.01), OPEN, OPEN),  # a seed disagrees
        ((-3.0, -0.1, -0.2), OPEN, OPEN),  # all agree, the interval has 0
        ((0.0, 0.0, 0.0), OPEN, OPEN),  # no width, and no difference
        ((-0.1, -0.1, -0.1), YES, NO),
    ],
)
def test_signs_and_interval_decide(differences, below_zero, above_zero):
    found = estimate(dict(enumerate(differences)), "d")
    assert (verdict_of(found, "<"), verdict_of(found, ">")) == (below_zero, above_zero)


def test_an_order_needs_means_whose_intervals_are_apart():
    study = study_of(a=(1.0, 2.0, 3.0), b=(2.0, 3.0, 4.1), c=(11.0, 12.0, 13.0))
    assert judge_part(study, Comparison(LOSS, "a", "<", "b")).verdict is YES
    assert judge_part(study, Comparison(LOSS, "a", "<", "b", is_order=True)).verdict is OPEN
    assert judge_part(study, Comparison(LOSS, "a", "<", "c", is_order=True)).verdict is YES
    assert judge_part(study, Comparison(LOSS, "c", "<", "a", is_order=True)).verdict is NO


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((0.96, 0.97, 0.965), YES),
        ((0.94, 0.93, 0.935), NO),
        ((0.951, 0.99, 0.96), OPEN),  # all above, the interval reaches below
        ((0.95, 0.95, 0.95), OPEN),  # the number itself
        ((0.96, None, None), NONE),
    ],
)
def test_a_number_named_before_is_a_claim_as_well(values, verdict):
    found = judge_part(study_of(a=values), Comparison(LOSS, "a", ">", 0.95))
    assert found.verdict is verdict and found.theirs is None
    if found.difference:
        assert found.difference.mean == pytest.approx(sum(values) / 3 - 0.95)


def test_systems_are_paired_by_seeds_that_both_have():
    study = study_of(a=(1.0, 2.0, 9.0), b=(2.0, 3.1, None), c=(None, None, 3.0))
    found = judge_part(study, Comparison(LOSS, "a", "<", "b"))
    assert found.difference.values == pytest.approx({0: -1.0, 1: -1.1}) and found.verdict is YES
    assert judge_part(study, Comparison(LOSS, "a", "<", "c")).verdict is NONE
    assert judge_part(study, Comparison(LOSS, "a", "<", "not there")).verdict is NONE


def test_a_claim_is_as_good_as_its_worst_part():
    assert combined([YES, YES]) is YES and combined([YES, OPEN]) is OPEN
    assert combined([OPEN, NONE, YES]) is NONE and combined([NONE, NO, OPEN]) is NO


def test_an_order_is_judged_link_by_link():
    study = study_of(a=(1.0, 1.1, 0.9), b=(2.0, 2.1, 1.9), c=(2.05, 1.8, 2.2))
    claim = Claim("n", "p", YES, "r", order(LOSS, "a", "b", "c"))
    judgement = judge(study, claim)
    assert [finding.verdict for finding in judgement.findings] == [YES, OPEN]
    assert judgement.verdict is OPEN
    assert judgement.summary()["parts"][0]["difference"]["mean"] == pytest.approx(-1.0)
    assert judge(study, Claim("n", "p", YES, "r", order(LOSS, "b", "a"))).verdict is NO


def test_the_best_of_an_order_is_the_lower_loss_and_the_higher_accuracy():
    assert [part.sign for part in order(LOSS, "a", "b") + order(RIGHT, "a", "b")] == ["<", ">"]
    assert order(LOSS, "a", "b")[0].is_order and not below(LOSS, "a", "b")[0].is_order


def test_the_papers_claims_name_systems_that_the_study_has():
    known = {*SYSTEMS, *UNTRAINED}
    parts = [part for claim in CLAIMS for part in claim.parts]
    named = {part.first for part in parts}
    named |= {part.second for part in parts if isinstance(part.second, str)}
    assert named <= known and set(SPLITS) <= known
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)
    assert all(claim.paper and claim.reason and claim.parts for claim in CLAIMS)
    assert all(claim.expected is not Verdict.UNMEASURED for claim in CLAIMS)
