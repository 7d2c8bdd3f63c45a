"""Entry point: read the config, check it, run the trainer.

``run_train.sh`` and torchrun call it: ``-m symbiotic_titan.train --job.config_file FILE [--section.key value]``. What a run needs,
which takes nearly all of the time until its first step, is imported when it starts.
"""

import gc
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from symbiotic_titan.process import MISTAKE, loading, raised_by_us

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


def make_dump_folder(config: "JobConfig") -> None:
    """Raises ValueError where the run could write nothing."""
    try:
        Path(config.job.dump_folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"job.dump_folder = {config.job.dump_folder!r}: the folder cannot be made ({error}); name one that can be written"
        ) from None


def run(args: list[str]) -> None:
    """Read the config from ``args``, check it, train.

    Raises:
        ValueError: a user's mistake, raised before anything is built wherever possible.
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
    make_dump_folder(config)
    try:
        train(config, start)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        gc.collect()  # frees the trainer's reference cycles, and with them the loader's worker processes


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 when the run ended or was stopped by a signal, 2 on a user's mistake, reported in one line."""
    with loading():
        from torch.distributed.elastic.multiprocessing.errors import record
        from torchtitan.tools.logging import init_logger, logger
    init_logger()
    try:
        record(run)(sys.argv[1:] if arguments is None else arguments)
    except ValueError as error:
        if not raised_by_us(error):
            raise
        logger.error(f"{error}")
        return MISTAKE
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
