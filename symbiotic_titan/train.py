"""Entry point: read the config, check it, run the trainer.

``run_train.sh`` and torchrun call it: ``-m symbiotic_titan.train --job.config_file FILE [--section.key value]``. What a run needs,
which takes nearly all of the time until its first step, is imported when it starts.
"""

import gc
import logging
import os
import re
import sys
import traceback
import warnings
from typing import TYPE_CHECKING, NoReturn

from symbiotic_titan.process import (
    DISK_FULL,
    DIVERGED,
    INTERRUPTED,
    MISTAKE,
    DiskFull,
    NothingToDo,
    is_first_process,
    loading,
    raised_by_us,
)
from symbiotic_titan.signals import Stopped, StopRequest, follow_parent, ignore_stop_signals

# What a run reports in one line, and its exit status then.
STATUSES: dict[type[Exception], int] = {
    ValueError: MISTAKE,
    DiskFull: DISK_FULL,
    FloatingPointError: DIVERGED,
    NothingToDo: 0,
}

# Warnings of torch, most of them once for each module on each rank, that mean nothing here: no output of a module is changed in place, no
# weight is drawn by DTensor, the groups whose timeout cannot be set have one member, and a profile is written at the end of its cycle.
MEANINGLESS = (
    "FSDP2-wrapped module .* returned a view tensor",
    "DTensor random operators may not have complete support on cpu",
    "DTensor manual_seed.* may not have complete support on cpu",
    "Warning: Profiler clears events at the end of each cycle",
    "Set timeout is now only supported for either nccl or gloo",
)

# Lines of torchtitan that tell a user nothing. The model's shape, a hundred lines of JSON, is that of the flavor.
UNTOLD = re.compile(
    r"Building symbiotic .*with \{|\[GC\] |Peak FLOPS used for computing MFU: nan|Destroying the purge thread|Sleeping 2 seconds"
    r"|Training completed|Mixed precision training is |Synchronizing and adjusting timeout|Saving the checkpoint \(or staging"
)

if TYPE_CHECKING:
    from symbiotic_titan.checkpoint.start import Start
    from symbiotic_titan.config.job import JobConfig


def is_told(record: logging.LogRecord) -> bool:
    """Whether the log shows a line of the root logger, which is torchtitan's."""
    return UNTOLD.match(str(record.msg)) is None


def train(config: "JobConfig", start: "Start | None", stop: StopRequest) -> None:
    """Train a checked config until ``stop``. A function of its own, so that the model and its process groups are freed when it returns."""
    from torchtitan.tools.logging import logger

    from symbiotic_titan.training.ending import closing_lines
    from symbiotic_titan.training.trainer import SymbioticTrainer

    trainer = None
    try:
        trainer = SymbioticTrainer(config, start, stop)
        if config.sampling.enable:
            from symbiotic_titan.training.sample_grids import (
                add_sample_grids,  # loads the generator
            )

            add_sample_grids(trainer)
        trainer.train()
    finally:
        if trainer is not None:
            trainer.close()
    for line in closing_lines(config, trainer.step) if is_first_process() else ():
        logger.info(line)


def run(args: list[str], stop: StopRequest) -> None:
    """Read the config from ``args``, check it, train.

    Raises:
        Stopped: by a signal, before the first step was done.
        ValueError: a user's mistake, raised before anything is built wherever possible.
        NothingToDo: the checkpoint that the run goes on from is that of its last step, or of a later one.
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
    for message in MEANINGLESS:
        warnings.filterwarnings("ignore", message=message)
    config = load_job_config(args)
    stop.install(config.checkpoint.stop_signals)
    config = with_rows_of_rank(config, int(os.environ.get("WORLD_SIZE", "1")))
    register()
    check_job(config)
    check_extension(config)
    from symbiotic_titan.checkpoint.lock import holding_folder  # not for a config that is refused

    with holding_folder(config):
        start = find_start(config)
        try:
            train(config, start, stop)
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            gc.collect()  # frees the trainer's reference cycles, and with them the loader's worker processes


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 when the run ended or was stopped by a signal; reported in one line, 2 on a user's mistake, 3 where a disk is full, 4
    where numbers are not finite."""
    stop = StopRequest()
    try:
        stop.begin()
        if "TORCHELASTIC_RUN_ID" in os.environ:  # a rank of run_train.sh or torchrun
            follow_parent()
        with loading():
            from torch.distributed.elastic.multiprocessing.errors import record
            from torchtitan.tools.logging import init_logger, logger
        init_logger()
        logger.addFilter(is_told)
        record(run)(sys.argv[1:] if arguments is None else arguments, stop)
    except Stopped:
        stop.end(0)
    except KeyboardInterrupt:  # SIGINT is none of the stop signals
        stop.end(INTERRUPTED)
    except Exception as error:
        if stop.nothing_to_save and stop.signal_name is not None:
            stop.end(0)  # of the interruption, here or on another rank
        if not (isinstance(error, tuple(STATUSES)) and raised_by_us(error)):
            if stop.leave_at_once:
                traceback.print_exc()
                stop.status(1)
            raise
        status = next(s for kind, s in STATUSES.items() if isinstance(error, kind))
        logger.log(logging.ERROR if status else logging.INFO, f"{error}")
        return stop.status(status)
    finally:
        stop.close()
    return stop.status(0)


def leave(status: int) -> NoReturn:
    """End the process. With several processes the interpreter's shutdown is skipped: torch's caches keep process groups alive until
    then, and one of their threads that takes the GIL during shutdown aborts the process (seen in 2 of 60 runs on gloo)."""
    ignore_stop_signals()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(status)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    leave(main())
