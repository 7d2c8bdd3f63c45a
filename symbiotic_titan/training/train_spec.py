"""Which part fills which slot of torchtitan's train spec."""

from typing import Any

from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.protocols import train_spec as upstream
from torchtitan.tools.logging import logger

from symbiotic_titan.build import (
    _rows_of,
    build_dataloader,
    build_loss,
    build_tokenizer,
    parallelize,
)
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.data.loader import build_loader
from symbiotic_titan.inference.held_out import held_out_data
from symbiotic_titan.model.flavors import FLAVORS
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.optim.build import build_optimizers
from symbiotic_titan.optim.lr_schedule import build_schedulers
from symbiotic_titan.parallel.float8 import register_float8
from symbiotic_titan.training.metrics import build_metrics
from symbiotic_titan.training.validation import (
    SymbioticValidator,
    read_held_out,
)


def build_validator(
    *,
    job_config: JobConfig,
    dp_world_size: int,
    dp_rank: int,
    tokenizer: BaseTokenizer,
    loss_fn: Any,
    metrics_processor: MetricsProcessor,
    **unused: Any,
) -> SymbioticValidator:
    """The validator, with its held-out rows read. Upstream passes what pipelines and its own validator need besides."""
    loader = build_loader(
        held_out_data(job_config),
        **_rows_of(job_config, tokenizer, dp_rank, dp_world_size),
        table="[[validation.sources]]",
    )
    rows = read_held_out(
        loader,
        job_config.validation.steps,
        job_config.training.local_batch_size,
        dp_rank,
        dp_world_size,
    )
    logger.info(
        f"validation: {rows.num_bytes / 2**20:.1f} MiB of held-out rows in the memory of each rank"
    )
    return SymbioticValidator(job_config, rows, loss_fn, metrics_processor)


def register() -> None:
    """Make ``model.name = "symbiotic"`` and the float8 converter known to torchtitan. Idempotent."""
    register_float8()
    spec = upstream.TrainSpec(
        model_cls=SymbioticModel,
        model_args=FLAVORS,
        parallelize_fn=parallelize,
        pipelining_fn=None,
        build_optimizers_fn=build_optimizers,
        build_lr_schedulers_fn=build_schedulers,
        build_dataloader_fn=build_dataloader,
        build_tokenizer_fn=build_tokenizer,
        build_loss_fn=build_loss,
        build_validator_fn=build_validator,
        build_metrics_processor_fn=build_metrics,
    )
    if "symbiotic" not in upstream._extra_train_specs:
        upstream.register_train_spec("symbiotic", spec)
