"""Entry point: read the config, check it, run the trainer.

``run_train.sh`` and torchrun call it: ``-m symbiotic_titan.train --job.config_file FILE [--section.key value]``. What a run needs,
which takes nearly all of the time until its first step, is imported when it starts.
"""

import gc
import logging
import os
import sys
from typing import TYPE_CHECKING, NoReturn

from symbiotic_titan.process import (
    DISK_FULL,
    DIVERGED,
    MISTAKE,
    DiskFull,
    loading,
    raised_by_us,
)

# What a run reports in one line, and its exit status then.
STATUSES: dict[type[Exception], int] = {
    ValueError: MISTAKE,
    DiskFull: DISK_FULL,
    FloatingPointError: DIVERGED,
}

if TYPE_CHECKING:
    from symbiotic_titan.checkpoint.start import Start
    from symbiotic_titan.config.job import JobConfig


def train(config: "JobConfig", start: "Start | None") -> None:
    """Train a checked config. A function of its own, so that the model and its process groups are freed when it returns."""
    from symbiotic_titan.training.trainer import SymbioticTrainer

    trainer = None
    try:
        trainer = SymbioticTrainer(config, start)
        if config.sampling.enable:
            from symbiotic_titan.training.sample_grids import (
                add_sample_grids,  # loads the generator
            )

            add_sample_grids(trainer)
        trainer.train()
    finally:
        if trainer is not None:
            trainer.close()


def run(args: list[str]) -> None:
    """Read the config from ``args``, check it, train.

    Raises:
        ValueError: a user's mistake, raised before anything is built wherever possible.
        DiskFull: there is no room for a checkpoint.
        FloatingPointError: a loss, a gradient or what a checkpoint would hold is not finite.
    """
    with loading():
        import torch

        from symbiotic_titan.build import with_rows_of_rank
        from symbiotic_titan.checkpoint.start import find_start
        from symbiotic_titan.config.load import load_job_config
        from symbiotic_titan.config.saved import check_extension
        from symbiotic_titan.training.checks import check_job
        from symbiotic_titan.training.train_spec import register
        from symbiotic_titan.training.trainer import SymbioticTrainer  # noqa: F401 - for train()
    if "LOCAL_RANK" not in os.environ and "--help" not in args:
        raise ValueError(
            "no rank is set: start training with symbiotic train, ./run_train.sh or torchrun"
        )
    config = load_job_config(args)
    config = with_rows_of_rank(config, int(os.environ.get("WORLD_SIZE", "1")))
    register()
    check_job(config)
    check_extension(config)
    start = find_start(config)
    try:
        train(config, start)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        gc.collect()  # frees the trainer's reference cycles, and with them the loader's worker processes


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 when the run ended or was stopped by a signal; reported in one line, 2 on a user's mistake, 3 where a disk is full, 4
    where numbers are not finite."""
    with loading():
        from torch.distributed.elastic.multiprocessing.errors import record
        from torchtitan.tools.logging import init_logger, logger
    init_logger()
    try:
        record(run)(sys.argv[1:] if arguments is None else arguments)
    except tuple(STATUSES) as error:
        if not raised_by_us(error):
            raise
        logger.error(f"{error}")
        return next(status for kind, status in STATUSES.items() if isinstance(error, kind))
    return 0


def leave(status: int) -> NoReturn:
    """End the process. With several processes the interpreter's shutdown is skipped: torch's caches keep process groups alive until
    then, and one of their threads that takes the GIL during shutdown aborts the process (seen in 2 of 60 runs on gloo)."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(status)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    leave(main())
