"""The train spec ``symbiotic``: our parts in the slots of torchtitan's TrainSpec."""

from typing import Any

from torchtitan.protocols import train_spec as upstream

from symbiotic_titan.build import (
    build_dataloader,
    build_loss,
    build_tokenizer,
)
from symbiotic_titan.model.flavors import FLAVORS
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.optim.build import build_optimizers
from symbiotic_titan.optim.lr_schedule import build_schedulers
from symbiotic_titan.parallel.float8 import register_float8
from symbiotic_titan.parallel.parallelize import parallelize
from symbiotic_titan.training.metrics import build_metrics


def build_validator(**arguments: Any) -> Any:
    """``training.validation.build_validator``, imported only where [validation] is on."""
    from symbiotic_titan.training.validation import build_validator

    return build_validator(**arguments)


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
