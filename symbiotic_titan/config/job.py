"""JobConfig: torchtitan's sections and ours, one field per section; and the short sections themselves."""

import functools
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Annotated, Any, Literal, get_args

import tyro
from torchtitan.config import JobConfig as UpstreamJobConfig
from torchtitan.config.job_config import Checkpoint as UpstreamCheckpoint
from torchtitan.config.job_config import LRScheduler as UpstreamLRScheduler
from torchtitan.config.job_config import Metrics as UpstreamMetrics
from torchtitan.config.job_config import Model as UpstreamModel
from torchtitan.config.job_config import Parallelism as UpstreamParallelism
from torchtitan.config.job_config import Validation as UpstreamValidation

from symbiotic_titan.config.data import Data, DataSource, source_rows
from symbiotic_titan.config.experts import Experts, Shielding
from symbiotic_titan.config.generation import Latents, Sampling
from symbiotic_titan.config.losses import (
    LOSS_TERMS,
    Flow,
    Losses,
    LossSettings,
    LossTerm,
    losses_class,
)
from symbiotic_titan.config.optimizer import LR_DECAYS, Ema, Optimizer, Weights
from symbiotic_titan.config.rows import NAME, PATH, STEPS, Range, Rows, Text, check_row
from symbiotic_titan.config.tokenizer import Tokenizer
from symbiotic_titan.registry import choice
from symbiotic_titan.signals import STOP_SIGNALS, StopSignal


@dataclass
class Float8:
    """[float8]: how ``model.converters = ["float8"]`` converts."""

    emulate: bool = False
    """Round operands to float8 and multiply them in the model's precision: any device, for tests; slower than no float8."""

    recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = "tensorwise"
    """Scales of linear layers: per tensor, per row, or per row with the weights' gradients in the model's precision."""

    experts: bool = True
    """Whether the grouped matmuls of routed experts are converted too. Their scales are per row in any case."""

    all_gather: bool = False
    """Whether FSDP gathers the weights of linear layers in float8: half the bytes of bfloat16. Needs scales per tensor."""

    def __post_init__(self) -> None:
        if self.all_gather and self.recipe != "tensorwise":
            raise ValueError(
                f"float8.all_gather needs one scale per weight, but float8.recipe = {self.recipe!r}; "
                "use recipe = 'tensorwise' or set all_gather = false"
            )


@dataclass
class Validation(UpstreamValidation):
    """[validation] and [[validation.sources]]: losses on held-out data while training."""

    enable: bool = False
    """Whether to measure the losses on held-out data: before the first step, every ``freq`` steps and at the last step"""

    freq: Annotated[int, STEPS] = 100
    """Steps between two validations"""

    steps: Annotated[int, Range(1, 10**5)] = 4
    """Batches of one validation, each as large as a global batch of training. The same rows, made once, are used every time"""

    weights: Weights = "trained"
    """Which weights are measured; ``ema``: the average that [ema] keeps"""

    sources: Annotated[list[Any], tyro.conf.Fixed, Rows(DataSource)] = field(default_factory=list)
    """Rows of [[validation.sources]], with the keys of [[data.sources]]; set in TOML. [data] applies to them, except that their
    order does not depend on data.seed and no caption is dropped."""

    def __post_init__(self) -> None:
        check_row("validation", self)
        self.sources = source_rows(self.sources, "[[validation.sources]]")


@dataclass
class Model(UpstreamModel):
    name: Annotated[str, NAME] = "symbiotic"
    """Which train spec to use"""

    flavor: Annotated[str, PATH] = "debug"
    """Which size to train: its name, or the path of a model.json"""

    vocab_size: Annotated[int, Range(1, 10**8, also={0: "those of the flavor"})] = 0
    """Embeddings, and so the token ids that the model knows, of a model trained from scratch. A vocabulary file needs one for each of
    its ids and for each special token that it lacks; where there are too few, the refusal names the number. 0: those of the flavor"""

    attention_backend: Literal["sdpa", "flex"] = "sdpa"
    """``sdpa``: dense mask, runs anywhere; ``flex``: FlexAttention with one block mask per step, needs CUDA"""

    hf_assets_path: str = "."
    """Not used"""


STOP_SIGNAL = Text("one of " + ", ".join(get_args(StopSignal)), "|".join(get_args(StopSignal)))


@dataclass
class Checkpoint(UpstreamCheckpoint):
    initial_load_weights: Weights = "trained"
    """Which weights of ``initial_load_path`` a new run starts from; ``ema``: the average that the run before kept, see [ema]"""

    last_save_model_only: bool = False
    """Whether the last save holds the model alone; such a run cannot be resumed"""

    verify: bool = True
    """Whether the bytes of a checkpoint are compared with their digests before a run starts from it. A damaged one is then passed over,
    or refused where the config names it. Each rank reads its share of the files for that, which the load then finds in the page cache if
    the memory holds them: measured, a start that reads from a disk takes up to 1.8 times as long. Digests are written in any case"""

    lock_timeout: Annotated[int, Range(0, 3600)] = 240
    """Seconds that a run waits for another one that still writes into its folder, as the ranks of the job before may for a while; then
    it is refused. 0: refused at once. With several ranks, less than ``comm.init_timeout_seconds``, for which the others wait"""

    stop_signals: Annotated[list[str], STOP_SIGNAL] = field(
        default_factory=lambda: list(STOP_SIGNALS)
    )
    """Signals on which the last step is saved and the run ends with status 0: Ctrl-C, what ``kill`` and schedulers send, a terminal
    that is gone (unless ``nohup`` ignores it), and SLURM's ``--signal=USR1@60``. Others do what they do to any process. Those of the
    default count until the config is read"""

    def __post_init__(self) -> None:
        check_row("checkpoint", self)


@dataclass
class Parallelism(UpstreamParallelism):
    fsdp_gradient_sync: Literal["always", "last"] = "always"
    """When FSDP reduces gradients over the ranks that share the shards, in a step of several micro-batches. ``always``: after each, so
    that a rank holds its shard of them alone. ``last``: once, after the last, for less traffic; until then every rank holds the
    unsharded gradients of all weights in ``training.mixed_precision_reduce``. Replicas (HSDP) reduce once in either case."""


@dataclass
class Metrics(UpstreamMetrics):
    routing_freq: Annotated[int, Range(0, 10**9)] = 100
    """Steps between two full routing reports (counts, heat maps, statistics of every layer); 0: none. The first and the last step have
    one. These steps are logged even if they are no multiple of ``log_freq``. A report of 47 layers with 128 experts takes 160 kB of
    the log."""

    routing_window: Annotated[int, Range(1, 10_000)] = 50
    """Steps over which assignments are summed for the capacity rates: where a modality has few tokens in a step, chance alone makes
    their experts unequal. The first steps of a start, also of a resumed run, have those since then. The counts of 47 layers with 128
    experts take 144 kB of each device for every step of the window."""


@dataclass
class Stability:
    """[stability]: what follows a bad step, one whose loss or gradient norm is not finite or far above those of the steps before. It is
    found before the weights change."""

    on_bad_step: Literal["stop", "skip", "roll_back"] = "stop"
    """``stop``: the run ends. ``skip``: the step's data are used up, and step number and learning rate go on, but weights, optimizer
    state and average ([ema]) stay as they are. ``roll_back``: as ``skip``, but they become those of the run's newest checkpoint whose
    step is a multiple of ``checkpoint.interval``"""

    max_in_a_row: Annotated[int, Range(1, 10**6)] = 3
    """Bad steps in a row that do not stop the run, and with ``roll_back`` also the times that the run rolls back to the same weights"""

    loss_spike: Annotated[float, Range(1, ends="(]", also={0: "no limit"})] = 0.0
    """A step is bad whose total loss is more than this many times the median of the last ``window`` good steps; 0: no limit"""

    grad_norm_spike: Annotated[float, Range(1, ends="(]", also={0: "no limit"})] = 0.0
    """As ``loss_spike``, of the gradient norm before clipping"""

    window: Annotated[int, Range(2, 10_000)] = 100
    """Good steps that a spike is compared with. Until there are so many, none is a spike. Checkpoints keep them"""

    def __post_init__(self) -> None:
        check_row("stability", self)
        if self.on_bad_step == "stop" and self.max_in_a_row != Stability.max_in_a_row:
            raise ValueError(
                f"stability.max_in_a_row = {self.max_in_a_row} has no effect with stability.on_bad_step = 'stop'; set that to 'skip' or "
                "'roll_back', or remove max_in_a_row"
            )
        if self.window != Stability.window and not self.has_limits:
            raise ValueError(
                f"stability.window = {self.window} has no effect without stability.loss_spike and stability.grad_norm_spike; set one of "
                "them, or remove window"
            )

    @property
    def has_limits(self) -> bool:
        return self.loss_spike > 0 or self.grad_norm_spike > 0


@dataclass
class LRScheduler(UpstreamLRScheduler):
    decay_type: str = choice(LR_DECAYS, "linear")  # type: ignore[assignment]
    """Shape of the learning rate's decay"""


@dataclass
class JobConfig(UpstreamJobConfig):
    model: Model = field(default_factory=Model)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    metrics: Metrics = field(default_factory=Metrics)
    parallelism: Parallelism = field(default_factory=Parallelism)
    optimizer: Optimizer = field(default_factory=Optimizer)
    ema: Ema = field(default_factory=Ema)
    experts: Experts = field(default_factory=Experts)
    shielding: Shielding = field(default_factory=Shielding)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    stability: Stability = field(default_factory=Stability)
    losses: LossSettings = field(default_factory=lambda: losses_class()())
    flow: Flow = field(default_factory=Flow)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    data: Data = field(default_factory=Data)
    latents: Latents = field(default_factory=Latents)
    float8: Float8 = field(default_factory=Float8)
    validation: Validation = field(default_factory=Validation)
    sampling: Sampling = field(default_factory=Sampling)


def job_config_class() -> type[JobConfig]:
    """JobConfig as it is read: [losses] has a weight for every term that is registered by now."""
    return _with_terms(tuple((name, LOSS_TERMS[name]) for name in LOSS_TERMS))


@functools.cache  # the same class for the same terms: configs of one class can be compared
def _with_terms(terms: tuple[tuple[str, LossTerm], ...]) -> type[JobConfig]:
    known = {f.name for f in fields(Losses)} >= {name for name, _ in terms}
    losses = Losses if known else losses_class()
    section = ("losses", losses, field(default_factory=losses))
    cls = make_dataclass("JobConfig", [section], bases=(JobConfig,))
    cls.__module__ = __name__
    return cls
