"""Which rule claims which parameter: every parameter exactly one, the first that matches."""

import re
from collections.abc import Iterable

from symbiotic_titan.config.optimizer import ParamGroupRow
from symbiotic_titan.config.parameter_names import clean_name


def claim_parameters(names: Iterable[str], rules: list[ParamGroupRow]) -> dict[str, list[str]]:
    """Rule name -> parameter names it claims, in the order given. Without rules, one group ``all``.

    Raises:
        ValueError: a rule claims nothing, or a parameter is claimed by no rule; the names are listed.
    """
    names = list(names)
    if not rules:
        return {"all": names}
    claimed: dict[str, list[str]] = {rule.name: [] for rule in rules}
    unclaimed: list[str] = []
    for name in names:
        rule = next(
            (r for r in rules if any(re.search(p, clean_name(name)) for p in r.match)), None
        )
        (claimed[rule.name] if rule else unclaimed).append(name)
    if unclaimed:
        raise ValueError(
            f"[[optimizer.param_groups]]: no rule claims {len(unclaimed)} parameters, e.g. "
            f"{', '.join(clean_name(n) for n in unclaimed[:5])}; add a last rule with match = ['.*']"
        )
    for i, rule in enumerate(rules):
        if not claimed[rule.name]:
            raise ValueError(
                f"[[optimizer.param_groups]] #{i + 1} ({rule.name}): match {rule.match} claims no parameter that "
                "an earlier rule left; correct the expressions, reorder the rules, or remove this one"
            )
    return claimed
