"""[losses] and [flow]: the terms of the loss and the flow-matching path."""

import keyword
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass
from typing import Annotated, Any, Literal

import tyro

from symbiotic_titan.config.rows import SEED, Range, check_row
from symbiotic_titan.registry import Registry, choice, load_part

_WEIGHT = Range(0, remedy="set 0 to train without this term")
SHIFT = Range(0, 10**6, "(]")
TASK_WEIGHT = Range(
    1e-3, 1e3, remedy="weight 0 of a source in [[data.sources]] leaves its task out"
)


@dataclass(frozen=True)
class LossTerm:
    """One term of the loss, as [losses] knows it.

    weight  default of its key in [losses].
    help    the sentence about that key in --help.
    value   (StepInputs) -> Tensor, differentiable: with ``count`` the (J,) sums over a micro-batch's targets by task, else () the
            micro-batch's share of the step's value. See ``losses.terms``.
    count   (PackedBatch) -> (J,) float Tensor, targets by task, known before the forward. The step's sums are divided by the step's
            count over all ranks and micro-batches, so accumulation and sharding do not change the loss.
    only_weighted  while its weight is 0, the term is neither computed nor logged. Others are logged with any weight.
    all_logits  ``value`` reads the logits of all tokens. If no term does, only those of labelled tokens are computed, which saves time and
            memory: ``StepInputs.logits`` are then (N, V), to be used with ``StepInputs.labels`` and ``StepInputs.tasks``.

    Either function may be given as an address, ``"package.module:function"``, which is imported when it is needed.
    """

    weight: float
    help: str
    value: Callable[..., Any] | str
    count: Callable[..., Any] | str | None = None
    only_weighted: bool = False
    all_logits: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.weight, bool) or not isinstance(self.weight, (int, float)):
            raise ValueError(f"losses: the weight of a term must be a number, got {self.weight!r}")
        if not 0 <= self.weight < float("inf"):
            raise ValueError(
                f"losses: the weight of a term must be zero or positive, got {self.weight}"
            )

    def value_function(self) -> Callable[..., Any]:
        return load_part(self.value) if isinstance(self.value, str) else self.value

    def count_function(self) -> Callable[..., Any] | None:
        return load_part(self.count) if isinstance(self.count, str) else self.count


# In the order in which terms are added up.
LOSS_TERMS: Registry[LossTerm] = Registry("losses")

_TERMS = "symbiotic_titan.losses.terms"
LOSS_TERMS.register(
    "text",
    LossTerm(
        1.0,
        "Weight of the next-token cross entropy.",
        f"{_TERMS}:text_sums",
        f"{_TERMS}:label_counts",
        all_logits=False,
    ),
)
LOSS_TERMS.register(
    "flow",
    LossTerm(
        1.0,
        "Weight of the flow-matching error.",
        f"{_TERMS}:flow_sums",
        f"{_TERMS}:latent_counts",
        all_logits=False,
    ),
)
LOSS_TERMS.register(
    "balance",
    LossTerm(
        0.01,
        "Weight of the load-balancing loss.",
        "symbiotic_titan.losses.balance:balance",
        all_logits=False,
    ),
)
LOSS_TERMS.register(
    "z_loss",
    LossTerm(
        0.0,
        "Weight of the z-loss of the routers (ST-MoE, which has 0.001): keeps their logits small, in each group by the mean over its own "
        "tokens. Needs softmax scores.",
        "symbiotic_titan.losses.balance:z_loss",
        only_weighted=True,
        all_logits=False,
    ),
)


@dataclass
class LossSettings:
    """What [losses] says besides the weights of the terms."""

    balance_scope: Literal["local", "global"] = "local"
    """Over which tokens expert shares are counted: those of one micro-batch on one rank, or all of the step. ``global`` with
    gradient accumulation runs every micro-batch's forward once more, without gradients, to know the shares beforehand."""

    task_weights: Annotated[dict[str, float], tyro.conf.Fixed, TASK_WEIGHT] = field(
        default_factory=dict
    )
    """Task -> how many targets each of its targets counts as where a term is the mean over targets, e.g. ``{mmu = 4.0}``; those of other
    tasks count once. Short answers are few among the labels of long texts: weight 4 gives them the share of gradient that they had with
    4 times as many tokens. ``loss/text`` and ``loss/flow`` are these weighted means, ``loss/by_task/*`` are not weighted. Set in TOML."""

    def __post_init__(self) -> None:
        check_row("losses", self)
        self.terms()

    def terms(self) -> dict[str, LossTerm]:
        """The terms that have a weight here, in the order in which they are added up.

        Raises:
            ValueError: a term was registered after this config was read.
        """
        late = [name for name in LOSS_TERMS if not hasattr(self, name)]
        if late:
            raise ValueError(
                f"losses.{late[0]}: this term was registered after the config was read, so it has no weight; register it in the "
                "module that experimental.custom_import names, which is imported first"
            )
        return {name: LOSS_TERMS[name] for name in LOSS_TERMS}

    def weight(self, name: str) -> float:
        return float(getattr(self, name))


def check_term_name(name: str) -> str:
    """``name``, if it can be a key of [losses] and a metric.

    Raises:
        ValueError: it is no identifier, or taken by a setting of [losses] or by the sum of all terms.
    """
    taken = {"total", *dir(LossSettings)}
    if not str(name).isidentifier() or keyword.iskeyword(name) or name in taken:
        raise ValueError(
            f"losses: a term cannot have the name {name!r}; choose an identifier such as 'entropy' that is no key of [losses]"
        )
    return name


def losses_class() -> type[LossSettings]:
    """The class of [losses]: a weight per registered term, and ``LossSettings``."""
    weights = [
        (name, Annotated[float, tyro.conf.arg(help=term.help), _WEIGHT], field(default=term.weight))
        for name in LOSS_TERMS
        for term in (LOSS_TERMS[name],)
    ]
    cls = make_dataclass("Losses", weights, bases=(LossSettings,))
    cls.__module__ = __name__
    return cls


Losses = losses_class()


# (shape, [flow], CPU generator) -> float32 timesteps in [0, 1] of that shape, before the shift.
TimestepDistribution = Callable[[tuple[int, ...], "Flow", Any], Any]
TIMESTEP_DISTRIBUTIONS: Registry[TimestepDistribution] = Registry(
    "flow.timesteps",
    {
        "uniform": "symbiotic_titan.flow.path:uniform",
        "logit_normal": "symbiotic_titan.flow.path:logit_normal",
    },
)


@dataclass
class Flow:
    timesteps: str = choice(TIMESTEP_DISTRIBUTIONS, "logit_normal")
    """Distribution of the timestep t, before the shift."""

    mean: Annotated[float, Range(-1000, 1000)] = 0.0
    """Mean of the normal under ``logit_normal``."""

    std: Annotated[float, Range(0, 1000, "(]")] = 1.0
    """Standard deviation of the normal under ``logit_normal``."""

    shift: Annotated[float, SHIFT] = 1.0
    """s in t <- s t / (1 + (s - 1) t); above 1 it moves timesteps towards noise."""

    seed: Annotated[int, SEED] = 0
    """Seed of noise and timesteps."""

    def __post_init__(self) -> None:
        check_row("flow", self)
