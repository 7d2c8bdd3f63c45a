"""Verdicts on claims: what has to be seen in the runs of a study for a claim to count as confirmed or refuted.

A claim is a list of parts. A part compares two systems, or one system with a number that was named before the runs:

    confirmed     all seeds agree with it, and the interval of 95 % is on its side of 0 (or of the number). In an order of systems
                  the intervals of the two means must not overlap either
    refuted here  the opposite, as strictly
    not decided   neither
    not measured  fewer than two seeds have the numbers

A claim is confirmed if all its parts are, and refuted here if one of them is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from symbiotic_titan.study.results import Measure, Study
from symbiotic_titan.study.statistics import Estimate, estimate

Sign = Literal["<", ">"]


class Verdict(StrEnum):
    CONFIRMED = "confirmed"
    REFUTED = "refuted here"
    UNDECIDED = "not decided"
    UNMEASURED = "not measured"


@dataclass(frozen=True)
class Comparison:
    """``first`` is below or above ``second``.

    second    a system, or a number as the paper or the issue states it.
    is_order  whether it belongs to an order of systems: then the intervals of their means must be apart.
    """

    measure: Measure
    first: str
    sign: Sign
    second: str | float
    is_order: bool = False


@dataclass(frozen=True)
class Claim:
    """name, paper: what the paper says, in words and with its numbers.

    expected, reason: what was expected of these runs, and why; written before they were started.
    """

    name: str
    paper: str
    expected: Verdict
    reason: str
    parts: tuple[Comparison, ...]


@dataclass(frozen=True)
class Finding:
    """A part with its numbers. difference: first - second. ours, theirs: of the systems; ``theirs`` is None beside a number."""

    part: Comparison
    verdict: Verdict
    difference: Estimate | None = None
    ours: Estimate | None = None
    theirs: Estimate | None = None

    def summary(self) -> dict[str, Any]:
        """JSON-able."""
        part, numbers = self.part, ("difference", "ours", "theirs")
        found = {name: getattr(self, name) for name in numbers}
        return {
            "measure": part.measure.name,
            "first": part.first,
            "sign": part.sign,
            "second": part.second,
            "is_order": part.is_order,
            "verdict": str(self.verdict),
            **{name: value and value.summary() for name, value in found.items()},
        }


@dataclass(frozen=True)
class Judgement:
    claim: Claim
    verdict: Verdict
    findings: tuple[Finding, ...]

    def summary(self) -> dict[str, Any]:
        """JSON-able."""
        claim = self.claim
        return {
            "claim": claim.name,
            "paper": claim.paper,
            "expected": str(claim.expected),
            "reason": claim.reason,
            "verdict": str(self.verdict),
            "parts": [finding.summary() for finding in self.findings],
        }


def verdict_of(
    difference: Estimate, sign: Sign, means: tuple[Estimate, Estimate] | None = None
) -> Verdict:
    """The rule. ``means``: of the two systems of an order."""
    is_clear = difference.same_sign and (difference.low > 0 or difference.high < 0)
    if not is_clear or (means and means[0].overlaps(means[1])):
        return Verdict.UNDECIDED
    agrees = (difference.mean < 0) == (sign == "<")
    return Verdict.CONFIRMED if agrees else Verdict.REFUTED


def combined(verdicts: Sequence[Verdict]) -> Verdict:
    """That of a claim from those of its parts."""
    for verdict in (Verdict.REFUTED, Verdict.UNMEASURED, Verdict.UNDECIDED):
        if verdict in verdicts:
            return verdict
    return Verdict.CONFIRMED


def judge_part(study: Study, part: Comparison) -> Finding:
    measure, first, second = part.measure, part.first, part.second
    ours = study.estimate(first, measure)
    if isinstance(second, str):
        difference, theirs = (
            study.difference(first, second, measure),
            study.estimate(second, measure),
        )
        if difference is None or ours is None or theirs is None:
            return Finding(part, Verdict.UNMEASURED, difference, ours, theirs)
        means = (ours, theirs) if part.is_order else None
        return Finding(part, verdict_of(difference, part.sign, means), difference, ours, theirs)
    if ours is None:
        return Finding(part, Verdict.UNMEASURED)
    beyond = {seed: value - second for seed, value in ours.values.items()}
    difference = estimate(beyond, f"{first}: {measure.name}")
    return Finding(part, verdict_of(difference, part.sign), difference, ours)


def judge(study: Study, claim: Claim) -> Judgement:
    """Raises ValueError for a value that is not finite."""
    findings = tuple(judge_part(study, part) for part in claim.parts)
    return Judgement(claim, combined([finding.verdict for finding in findings]), findings)


def order(measure: Measure, *systems: str) -> tuple[Comparison, ...]:
    """The parts of an order of ``systems``, best first: each is better than the next."""
    sign: Sign = "<" if measure.better == "lower" else ">"
    pairs = zip(systems, systems[1:], strict=False)
    return tuple(Comparison(measure, a, sign, b, is_order=True) for a, b in pairs)


def below(measure: Measure, *systems: str) -> tuple[Comparison, ...]:
    """Each of ``systems`` is lower than the next, seed by seed: of measures before the first step, whose level depends on the seed."""
    pairs = zip(systems, systems[1:], strict=False)
    return tuple(Comparison(measure, a, "<", b) for a, b in pairs)
