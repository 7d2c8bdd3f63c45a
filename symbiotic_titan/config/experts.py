"""[experts] and [shielding]: how routed experts are partitioned, and which gradients shared experts are shielded from."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from symbiotic_titan.config.rows import NAME, POSITIVE, SHARE, Range, Rows, check_row, row_from_dict
from symbiotic_titan.registry import Registry, choice

_SCORES = "symbiotic_titan.moe.router"
# Name -> ``moe.router.RouterScore``.
ROUTER_SCORES: Registry[Callable[..., Any]] = Registry(
    "experts.score_function",
    {"softmax": f"{_SCORES}:softmax", "sigmoid": f"{_SCORES}:sigmoid"},
)

_RULES = "symbiotic_titan.partition.rules"
# Name -> ``partition.rules.PartitionRule``.
PARTITION_RULES: Registry[Callable[..., Any]] = Registry(
    "experts.partition_rule",
    {
        "cumulative": f"{_RULES}:cumulative",
        "cumulative_counts": f"{_RULES}:cumulative_counts",
        "per_modality_max": f"{_RULES}:per_modality_max",
        "balanced": f"{_RULES}:balanced",
        "random": f"{_RULES}:random",
    },
)

ShieldSchedule = Callable[["Shielding", int], float]
"""([shielding], step) -> scale in [0, 1], for the steps 1 to ``shielding.steps``; after them ``after_scale`` holds. A pure
function, so that a resumed run continues exactly."""

_RAMPS = "symbiotic_titan.optim.shield_schedule"
SHIELD_SCHEDULES: Registry[ShieldSchedule] = Registry(
    "shielding.ramp", {"step": f"{_RAMPS}:step_ramp", "linear": f"{_RAMPS}:linear_ramp"}
)


WIDTH_MULTIPLE = 8
_COUNT = Range(1, 2**16)


@dataclass
class ExpertGroupRow:
    """One table of [experts.partition.<name>]."""

    modalities: Annotated[list[str], NAME]
    """Modalities whose tokens are routed within this group: text, vit, vae."""

    num_experts: Annotated[int, _COUNT]
    """Number of experts in the group, in every MoE layer."""

    hidden_dim: Annotated[int | None, Range(1, 2**20)] = None
    """Width of the group's experts, a multiple of 8 (grouped matmuls read rows of 16 bytes). None: the flavor's."""

    top_k: Annotated[int | None, _COUNT] = None
    """Experts that a token of the group is routed to. None: the flavor's. With 1 and normalized weights the weight is always 1, and the
    group's router learns from the balancing loss alone."""

    source: Annotated[str | None, NAME] = None
    """Group of the checkpoint that ``symbiotic convert`` takes the group's experts from; needed where a checkpoint has several. Groups
    with one source divide its experts among them. Training does not read it."""

    copy: bool = False
    """Takes a copy of all experts of the source and of its router, beside the groups that divide them: the model then has that many
    experts more than the flavor."""

    def check(self, where: str) -> None:
        """Pass if the sizes are possible; ValueError, which begins with ``where``, otherwise."""
        check_row(where, self)
        if self.hidden_dim is not None and self.hidden_dim % WIDTH_MULTIPLE:
            raise ValueError(
                f"{where}.hidden_dim: must be a multiple of {WIDTH_MULTIPLE} (grouped matmuls read rows of 16 bytes), got "
                f"{self.hidden_dim}"
            )


@dataclass
class Experts:
    partition: Annotated[dict[str, Any], tyro.conf.Fixed, Rows(ExpertGroupRow)] = field(
        default_factory=dict
    )
    """Tables [experts.partition.<name>] with ``modalities``, ``num_experts`` and, where they differ from the flavor's, ``hidden_dim``
    and ``top_k``; ``source`` and ``copy`` say how a checkpoint is converted. Set in TOML. Without any, the flavor's own groups are kept;
    in most flavors all modalities share all experts."""

    partition_rule: str = choice(PARTITION_RULES, "cumulative")
    """Rule by which ``symbiotic convert plan`` assigns the experts of an unpartitioned checkpoint to the groups: a built-in name or
    one that ``experimental.custom_import`` registers. Training does not read it."""

    score_function: str | None = choice(ROUTER_SCORES, None)
    """Function that turns the router's logits into the scores by which experts are chosen and weighted. None: the flavor's."""

    shared: bool = True
    """Whether the flavor's shared expert is kept."""

    new_shared_experts: Annotated[int, Range(0, 1024)] = 0
    """For a flavor without a shared expert: adds one, N times a routed expert's width. ``symbiotic convert plan`` chooses the most
    used experts of each layer and ``partition`` copies them into it, with output weights of zero, so that the model's outputs at
    step 0 do not change. (Ours; the paper's backbone has a shared expert.)"""

    capacity_factor: Annotated[float, POSITIVE] = 1.0
    """Factor on an expert's fair share of assignments in the capacity-rate metric. It has no effect on training: no token is dropped."""

    def __post_init__(self) -> None:
        check_row("experts", self)
        self.partition = {
            name: row_from_dict(ExpertGroupRow, row, f"experts.partition.{name}")
            for name, row in self.partition.items()
        }
        for name, row in self.partition.items():
            row.check(f"experts.partition.{name}")
        if self.new_shared_experts and not self.shared:
            raise ValueError(
                f"experts.new_shared_experts = {self.new_shared_experts}: has no effect with experts.shared = false; remove "
                "one of them"
            )


@dataclass
class Shielding:
    steps: Annotated[int, Range(0, 10**9)] = 0
    """Steps of the warm-up shield, from the first: ``ramp`` scales the gradient that shielded tokens send through the shared
    experts. 0: no warm-up shield."""

    after_scale: Annotated[float, SHARE] = 1.0
    """Scale of that gradient after the warm-up shield (0.1 in the paper). 1: untouched."""

    modalities: Annotated[list[str], NAME] = field(default_factory=lambda: ["vae"])
    """Modalities that are shielded."""

    mode: Literal["output", "weights"] = "output"
    """``output``: the shared expert's output is detached (scaled) for these tokens; ``weights``: only the gradient of its weights is."""

    ramp: str = choice(SHIELD_SCHEDULES, "step")
    """The scale within the first ``steps`` steps: ``step`` is 0, ``linear`` rises from 0 at step 1 towards ``after_scale``."""

    def __post_init__(self) -> None:
        check_row("shielding", self)
        if self.ramp != "step" and self.steps == 0:
            raise ValueError(
                f"shielding.ramp: {self.ramp!r} rises over shielding.steps, which is 0; "
                "set shielding.steps or use ramp = 'step'"
            )

    @property
    def enabled(self) -> bool:
        """Whether any gradient is ever scaled."""
        return bool(self.modalities) and (self.steps > 0 or self.after_scale != 1.0)
