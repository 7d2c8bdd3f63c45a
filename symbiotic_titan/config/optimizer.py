"""[optimizer] with [[optimizer.param_groups]]: which parameter learns how fast."""

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro
from torchtitan.config.job_config import Optimizer as UpstreamOptimizer

from symbiotic_titan.config.rows import row_from_dict


@dataclass
class ParamGroupRow:
    """One row of [[optimizer.param_groups]]; the first row that matches a parameter claims it."""

    name: str
    """Name of the group, unique; used in metrics (``lr/<name>``)."""

    match: list[str]
    """Regular expressions, searched in the parameter's name."""

    lr: float | None = None
    """Learning rate; ``optimizer.lr`` where absent."""

    weight_decay: float | None = None
    """Weight decay; ``optimizer.weight_decay`` where absent."""

    betas: list[float] | None = None
    """Adam betas; ``optimizer.beta1`` and ``beta2`` where absent."""

    frozen: bool = False
    """Whether these parameters stay as they are."""


@dataclass
class Optimizer(UpstreamOptimizer):
    name: Literal["Adam", "AdamW"] = "AdamW"
    """Optimizer to use"""

    lr: float = 1e-4
    """Learning rate of groups that name none."""

    weight_decay: float = 0.0
    """Weight decay of groups that name none."""

    implementation: Literal["for-loop", "foreach", "fused"] = "fused"
    """How Adam's arithmetic is launched: one kernel for many parameters (``fused``), one per operation (``foreach``), or one per
    operation and parameter (``for-loop``). All three give the same weights within rounding, on plain parameters and under FSDP2,
    HSDP and expert parallelism; a CPU has all of them too."""

    param_groups: Annotated[list[Any], tyro.conf.Fixed] = field(default_factory=list)
    """Rows of [[optimizer.param_groups]]; set in TOML. None: one group of all parameters."""

    def __post_init__(self) -> None:
        for key in ("lr", "weight_decay", "eps"):
            if not getattr(self, key) >= 0:
                raise ValueError(
                    f"optimizer.{key}: must be zero or positive, got {getattr(self, key)}"
                )
        for key in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, key) < 1.0:
                raise ValueError(f"optimizer.{key}: must lie in [0, 1), got {getattr(self, key)}")
        self.param_groups = [
            row_from_dict(ParamGroupRow, row, f"[[optimizer.param_groups]] #{i + 1}")
            for i, row in enumerate(self.param_groups)
        ]
        names = [row.name for row in self.param_groups]
        for i, row in enumerate(self.param_groups):
            self._check_row(f"[[optimizer.param_groups]] #{i + 1} ({row.name})", row, names)

    @staticmethod
    def _check_row(where: str, row: ParamGroupRow, names: list[str]) -> None:
        if names.count(row.name) > 1:
            raise ValueError(f"{where}: name is used twice; every group needs its own")
        if not row.match:
            raise ValueError(
                f"{where}: match is empty; give at least one regular expression, '.*' for all"
            )
        for pattern in row.match:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"{where}: match {pattern!r} is not a regular expression: {error}"
                ) from None
        if row.frozen and row.lr is not None:
            raise ValueError(f"{where}: a frozen group has no lr; remove lr = {row.lr}")
        for key in ("lr", "weight_decay"):
            value = getattr(row, key)
            if value is not None and value < 0:
                raise ValueError(f"{where}: {key} must be zero or positive, got {value}")
        if row.betas is not None and not (
            len(row.betas) == 2 and all(0.0 <= beta < 1.0 for beta in row.betas)
        ):
            raise ValueError(f"{where}: betas must be two numbers in [0, 1), got {row.betas}")
