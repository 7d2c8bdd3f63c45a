"""[optimizer] with [[optimizer.param_groups]]: the learning rate, decay and schedule of each group of parameters; [ema].

A group names its parameters by regular expressions over their clean names, which are also those of checkpoints.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

import tyro
from torchtitan.config.job_config import Optimizer as UpstreamOptimizer

from symbiotic_titan.config.rows import (
    NAME,
    NOT_NEGATIVE,
    SHARE,
    STEPS,
    TEXT,
    Range,
    Rows,
    check_row,
    row_from_dict,
)
from symbiotic_titan.registry import Registry, choice

LRDecay = Callable[[float], float]
"""Progress in (0, 1] through the decay -> factor on the learning rate, from 1 down to 0; ``min_lr_factor`` raises its end. A pure
function, so that a resumed run continues exactly."""

DEFAULT_BUILDER = "param_groups"
# Name -> ``optim.build.OptimizerBuilder``.
OPTIMIZER_BUILDERS: Registry[Callable[..., Any]] = Registry(
    "optimizer.builder", {DEFAULT_BUILDER: "symbiotic_titan.optim.build:param_group_optimizers"}
)

_DECAYS = "symbiotic_titan.optim.lr_schedule"
LR_DECAYS: Registry[LRDecay] = Registry(
    "lr_scheduler.decay_type",
    {"linear": f"{_DECAYS}:linear", "sqrt": f"{_DECAYS}:sqrt", "cosine": f"{_DECAYS}:cosine"},
)

_BETA = Range(0, 1, "[)")

# Prefixes that activation checkpointing and torch.compile put into parameter names.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def clean_name(name: str) -> str:
    """The parameter's name in the model without wrappers."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


SCHEDULE_KEYS = ("warmup_steps", "decay_ratio", "decay_type", "min_lr_factor")
"""Keys of [lr_scheduler] that a parameter group may override."""


@dataclass
class ParamGroupRow:
    """One row of [[optimizer.param_groups]]. A parameter belongs to the first row that matches its name."""

    name: Annotated[str, NAME]
    """Name of the group, unique; used in metrics (``lr/<name>``)."""

    match: Annotated[list[str], TEXT]
    """Regular expressions, searched in the parameter's name."""

    lr: Annotated[float | None, NOT_NEGATIVE] = None
    """Learning rate; ``optimizer.lr`` where absent."""

    weight_decay: Annotated[float | None, NOT_NEGATIVE] = None
    """Weight decay; ``optimizer.weight_decay`` where absent."""

    betas: Annotated[list[float] | None, _BETA] = None
    """Adam betas; ``optimizer.beta1`` and ``beta2`` where absent."""

    frozen: bool = False
    """Whether these parameters are not trained."""

    warmup_steps: Annotated[int | None, Range(0, 10**9)] = None
    """Steps over which the group's learning rate rises; ``lr_scheduler.warmup_steps`` where absent."""

    decay_ratio: Annotated[float | None, SHARE] = None
    """Share of the run, at its end, over which the learning rate decays; ``lr_scheduler.decay_ratio`` where absent."""

    decay_type: str | None = choice(LR_DECAYS, None)
    """Curve of the decay; ``lr_scheduler.decay_type`` where absent."""

    min_lr_factor: Annotated[float | None, SHARE] = None
    """Final learning rate over the peak; ``lr_scheduler.min_lr_factor`` where absent."""

    def schedule(self) -> dict[str, Any]:
        """The keys of [lr_scheduler] that the group overrides."""
        return {key: getattr(self, key) for key in SCHEDULE_KEYS if getattr(self, key) is not None}


@dataclass
class Optimizer(UpstreamOptimizer):
    name: Literal["Adam", "AdamW"] = "AdamW"
    """Optimizer to use"""

    lr: Annotated[float, NOT_NEGATIVE] = 1e-4
    """Learning rate of groups that set none."""

    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0
    """Weight decay of groups that set none."""

    beta1: Annotated[float, _BETA] = 0.9
    """Decay of the gradients' mean."""

    beta2: Annotated[float, _BETA] = 0.95
    """Decay of the squared gradients' mean."""

    eps: Annotated[float, NOT_NEGATIVE] = 1e-8
    """Added to the root of the squared gradients' mean, by which an update is divided."""

    implementation: Literal["for-loop", "foreach", "fused"] = "fused"
    """How Adam's arithmetic is launched: one kernel for many parameters (``fused``), one per operation (``foreach``), or one per
    operation and parameter (``for-loop``). All three give the same weights within rounding, on plain parameters and under FSDP2,
    HSDP and expert parallelism; a CPU has all of them too."""

    builder: str = choice(OPTIMIZER_BUILDERS, DEFAULT_BUILDER)
    """Function that makes the optimizer. ``param_groups``: Adam or AdamW over the rows of [[optimizer.param_groups]]."""

    builder_options: Annotated[dict[str, Any], tyro.conf.Fixed] = field(default_factory=dict)
    """Options of a registered builder, a table set in TOML; ``param_groups`` has none."""

    param_groups: Annotated[list[Any], tyro.conf.Fixed, Rows(ParamGroupRow)] = field(
        default_factory=list
    )
    """Rows of [[optimizer.param_groups]]; set in TOML. Without any, all parameters form one group."""

    def __post_init__(self) -> None:
        check_row("optimizer", self)
        if self.builder == DEFAULT_BUILDER and self.builder_options:
            raise ValueError(
                f"optimizer.builder_options: the builder 'param_groups' has no options, got {self.builder_options}; "
                "remove them, or name another builder"
            )
        self.param_groups = [
            row_from_dict(ParamGroupRow, row, f"[[optimizer.param_groups]] #{i + 1}")
            for i, row in enumerate(self.param_groups)
        ]
        names = [row.name for row in self.param_groups]
        for i, row in enumerate(self.param_groups):
            where = f"[[optimizer.param_groups]] #{i + 1} ({row.name})"
            _check_names(where, row, names)
            _check_numbers(where, row)
        if self.param_groups and all(row.frozen for row in self.param_groups):
            raise ValueError(
                "[[optimizer.param_groups]]: every group is frozen, so nothing would be trained; unfreeze one"
            )


Weights = Literal["trained", "ema"]
"""Which weights of a run are used: those that the optimizer changed last, or their moving average, see ``Ema``."""

WEIGHTS: tuple[Weights, ...] = get_args(Weights)


@dataclass
class Ema:
    """[ema]: exponential moving average (EMA) of the weights, in float32, sharded as they are and saved in checkpoints.

    It changes nothing in the training. ``validation.weights``, ``sampling.weights`` and the option ``--weights`` of commands use it.
    """

    enable: bool = False
    """Whether to keep an average of the weights; 4 bytes per averaged parameter"""

    decay: Annotated[float, Range(0, 1, "()", remedy="0.999 averages over about 1000 updates")] = (
        0.9999
    )
    """An update multiplies the average by ``decay`` and adds 1 - ``decay`` times the weights"""

    warmup: bool = True
    """Whether update number n uses at most (n + 1) / (n + 10) as decay, with n from 0, so that the average forgets the initial weights
    within a short run. With 0.9999 this ends after 90,000 updates"""

    interval: Annotated[int, STEPS] = 1
    """Steps between two updates; ``decay`` is that of an update, not of a step"""

    groups: Annotated[list[str], NAME] = field(default_factory=list)
    """Groups of [[optimizer.param_groups]] that are averaged; by default all that are trained. Of the other parameters, which have no
    average, the weights themselves are used"""

    def __post_init__(self) -> None:
        check_row("ema", self)
        if self.groups and not self.enable:
            raise ValueError(
                f"ema.groups = {self.groups}: no average is kept with ema.enable = false; set it to true, or remove ema.groups"
            )


def _check_names(where: str, row: ParamGroupRow, names: list[str]) -> None:
    if names.count(row.name) > 1:
        raise ValueError(f"{where}: name is used twice; every group needs its own")
    if row.name == "all" and len(names) > 1:
        raise ValueError(
            f"{where}: 'all' names what is measured over all groups; choose another name"
        )
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


def _check_numbers(where: str, row: ParamGroupRow) -> None:
    for key in ("lr", "weight_decay", "betas", *SCHEDULE_KEYS):
        value = getattr(row, key)
        if row.frozen and value is not None:
            raise ValueError(f"{where}: a frozen group has no {key}; remove {key} = {value}")
    if row.betas is not None and len(row.betas) != 2:
        raise ValueError(f"{where}: betas must be two numbers in [0, 1), got {row.betas}")
