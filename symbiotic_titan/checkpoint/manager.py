"""Saves and loads the checkpoints of a run: torchtitan's manager with what this trainer adds to it.

Added are: what must be right before a save and what follows one, a start from a checkpoint whose metadata the first rank alone has read,
a save at any step, and an end that waits for an asynchronous save. The trainer's constructor makes the manager within ``in_use``.
"""

import concurrent.futures
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed.checkpoint as dcp
import torchtitan.train
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from torchtitan.components.checkpoint import (
    LR_SCHEDULER,
    MODEL,
    OPTIMIZER,
    AsyncMode,
    CheckpointManager,
)
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import GarbageCollection

from symbiotic_titan.checkpoint.start import Start, averaged, open_weights, share_way_back
from symbiotic_titan.config.job import Checkpoint, JobConfig
from symbiotic_titan.config.optimizer import Weights
from symbiotic_titan.parallel.float8 import refresh_scales
from symbiotic_titan.parallel.ranks import gather_over_ranks
from symbiotic_titan.process import DiskFull, is_first_process
from symbiotic_titan.weights.reader import some_of

if TYPE_CHECKING:  # loaded by the runs that use them
    from symbiotic_titan.checkpoint.history import History
    from symbiotic_titan.optim.ema import EMA

# After an error on one rank the others may be gone, and the save would never finish.
SAVE_TIMEOUT_S = 120
# No pinned or shared memory and no stream: a copy on the CPU.
NO_STAGING = StagingOptions(False, False, False, False)


class SymbioticCheckpointManager(CheckpointManager):
    """Checkpoints in ``checkpoint.folder`` of a run. Without ``checkpoint.enable`` it saves and loads nothing."""

    on_failed_save: Callable[[], object] = staticmethod(lambda: None)
    """Called in a thread when an asynchronous save has failed; the next call of ``save`` or ``save_now`` raises its error."""

    _saving = 0  # the step whose save was begun last
    _start: Start | None = None  # what ``load`` reads instead of the folder that upstream finds
    _begun_with: tuple[int, str, int] | None = None  # its step, source and ``went_back_to``
    _unfinished: int | None = None  # the step whose save was not seen to end
    _rolls_back: "tuple[JobConfig, EMA | None] | None" = None  # of a run that does
    _ending = threading.Lock()

    # ---- saving -------------------------------------------------------------------------------------------------------

    def save(self, curr_step: int, last_step: bool = False) -> None:
        """Save if ``curr_step`` is due, or is the ``last_step``. Collective."""
        if not self._should_save(curr_step, last_step):
            return
        self._async_wait()
        self.before_save(curr_step, last_step)
        self._saving = curr_step
        with self._saying_what_is_full():
            super().save(curr_step, last_step)
        self.after_save(curr_step)

    def before_save(self, step: int, last_step: bool) -> None:
        """Called on all ranks before anything of a checkpoint is written, the one before being complete. Where it raises, nothing is
        saved.

        Raises:
            FloatingPointError: the checkpoint would hold NaN or infinities.
            DiskFull: the disk has no room for it.
            OSError, ValueError: its folder cannot be made, or another run has taken the lock.
        """
        from symbiotic_titan.checkpoint import save_checks  # only runs that save need it

        model_only = last_step and self.last_save_model_only
        state = self._flattened_model_states_sd({MODEL: self.states[MODEL]} if model_only else None)
        tensors = save_checks.tensors_of(state)
        save_checks.check_finite(tensors, step)
        save_checks.check_room(tensors, Path(self.folder), step, purging=self.keep_latest_k > 0)
        failure = self._begin_save(step) if is_first_process() else None
        failure = gather_over_ranks(failure)[0]
        if failure is not None:
            raise failure

    def _begin_save(self, step: int) -> Exception | None:
        """Make the folder of a checkpoint. Returns what went wrong, since the other ranks wait to hear of it."""
        from symbiotic_titan.checkpoint.lock import check_held
        from symbiotic_titan.checkpoint.save_checks import as_disk_full

        try:
            check_held(Path(self.folder))
            self.history.begin_save(step)
        except (OSError, ValueError) as error:
            return as_disk_full(error, Path(self.folder), step) or error
        return None

    @contextmanager
    def _saying_what_is_full(self) -> Iterator[None]:
        try:
            yield
        except DiskFull:
            raise
        except (Exception, CheckpointException) as error:  # the latter is a BaseException
            from symbiotic_titan.checkpoint.save_checks import as_disk_full

            full = as_disk_full(error, Path(self.folder), self._saving)
            if full is None:
                raise
            raise full from None

    def after_save(self, step: int) -> None:
        """Called on all ranks once the checkpoint of ``step`` is written, or, where saves are asynchronous, handed over for that."""
        self._unfinished = step
        if self.save_future is None:
            self._end_save()
        else:
            self.save_future.add_done_callback(self._end_save)

    def _end_save(self, future: Future[Any] | None = None) -> None:
        """The last save is complete, or ``future`` says that it failed. The first to notice calls this."""
        with self._ending:
            step, self._unfinished = self._unfinished, None
            if future is not None and future.exception() is not None:
                self.on_failed_save()
                return
            if step is None:
                return
            if is_first_process():
                try:
                    surplus = self.history.end_save(step)
                except OSError as error:  # the checkpoint itself is fine
                    logger.warning(f"{self.folder} could not be tidied after step {step}: {error}")
                    return
                for path in surplus:
                    self.purge_queue.put(str(path))

    @functools.cached_property
    def history(self) -> "History":
        """What is known of the folder's checkpoints; the first process uses it."""
        from symbiotic_titan.checkpoint.history import History

        every = self.interval if self._rolls_back else 0
        return History(Path(self.folder), self.keep_latest_k, every)

    def _purge_stale_checkpoints(self) -> None:
        """Upstream's moment, at which an asynchronous save is not complete; ``_end_save`` does it."""

    def _async_wait(self) -> None:
        """Wait for the save that is under way. Collective.

        Raises:
            DiskFull: it did not find room.
        """
        with self._saying_what_is_full():
            try:
                super()._async_wait()
            except (Exception, CheckpointException):
                self._unfinished = None
                raise
            finally:
                self.save_future = None
        self._end_save()

    @torch.no_grad()
    def dcp_save(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        async_mode: AsyncMode,
        *args: Any,
        **options: Any,
    ) -> Future[Any] | AsyncSaveResponse | None:
        """As upstream's, with digests of the files beside them."""
        from symbiotic_titan.weights.digests import DigestingWriter  # only runs that save need it

        writer = DigestingWriter(checkpoint_id)
        if async_mode == AsyncMode.DISABLED:
            dcp.save(state_dict, storage_writer=writer)
            GarbageCollection.collect("GC collection invoked by checkpointer.")
            return None
        if async_mode == AsyncMode.ASYNC_WITH_PINNED_MEM:
            kind, stager = AsyncCheckpointerType.PROCESS, self.stager
        else:
            # The one that is made where no writer is given; a writer is taken for a stager otherwise.
            kind, stager = AsyncCheckpointerType.THREAD, DefaultStager(NO_STAGING)
        saving = dcp.async_save(
            state_dict,
            storage_writer=writer,
            process_group=self.pg,
            async_checkpointer_type=kind,
            async_stager=stager,
        )
        if isinstance(saving, Future):
            saving.add_done_callback(lambda _: stager.close())
        return saving

    def save_now(self, step: int) -> None:
        """Save a full checkpoint of ``step``; if it was just saved, wait for that save to finish. Collective."""
        if self._should_save(step):
            self._async_wait()
            return
        self.last_save_model_only = False
        self.save(step, last_step=True)

    def close(self) -> None:
        """End the manager's threads once a running save has finished, also after an exception."""
        pending = getattr(self, "save_future", None)
        if pending is not None:
            self.save_future = None
            done, _ = concurrent.futures.wait([pending], timeout=SAVE_TIMEOUT_S)
            if not done:
                logger.warning(
                    "the last asynchronous save did not finish; its folder is incomplete"
                )
            elif (error := pending.exception()) is None:
                self._end_save()
            else:
                logger.warning(f"the save of step {self._saving} failed: {error}")
        super().close()

    # ---- loading ------------------------------------------------------------------------------------------------------

    def begin(self, start: Start, options: Checkpoint, ema: "EMA | None") -> None:
        """Read what ``load``, which is called next, cannot, and let it read the rest from ``start``. Collective."""
        (model,) = self.states[MODEL].model
        source = "" if start.step else str(start.folder)
        self._begun_with = (start.step, source, start.went_back_to)
        if start.step == 0 and options.initial_load_model_only:
            read_weights(start, model, options.initial_load_weights, ema)
            return
        excluded = read_beforehand(start, ema)
        if "stability" in self.states and "stability.json" not in start.entries:
            excluded.append("stability")  # saved without [stability], which begins anew
        self.exclude_from_loading = [*options.exclude_from_loading, *excluded]
        self._start = start

    @torch.no_grad()
    def load(self, step: int = -1) -> bool:
        """Read what ``begin`` was given, unless it has read it. Checkpoints after it, or all where ``step`` is 0, then get other
        names, since the run goes another way from here. Collective."""
        start, self._start = self._start, None  # the metadata are freed once they are loaded
        if start is not None:
            logger.info(f"Loading the checkpoint from {start.folder}.")
            self._read(start, self._states_to_load(model_only=False))
        if self.enable and not self.load_only and is_first_process():
            if self._begun_with or step == 0:
                self.history.begin(*self._begun_with or (0,))
        return start is not None

    def _read(self, start: Start, state: dict[str, Any]) -> None:
        from symbiotic_titan.checkpoint.save_checks import check_loaded, tensors_of

        load_from(start, state)
        self.states[MODEL].load_state_dict(state)
        check_loaded(tensors_of(state), start.folder)

    # ---- rolling back -------------------------------------------------------------------------------------------------

    def prepare_to_roll_back(self, config: JobConfig, ema: "EMA | None") -> None:
        """Keep what ``find_way_back`` finds among ``checkpoint.keep_latest_k``, if [stability] rolls back. To be called before ``load``."""
        if config.stability.on_bad_step == "roll_back":
            self._rolls_back = config, ema

    def find_way_back(self) -> Start | None:
        """The run's newest complete checkpoint whose step is a multiple of ``checkpoint.interval``: one that was stopped, saved at another
        step and resumed finds the same. None if there is none. A save that is under way is waited for. Collective."""
        assert self._rolls_back is not None
        config, _ = self._rolls_back
        self._async_wait()
        return share_way_back(Path(self.folder), self.interval, verify=config.checkpoint.verify)

    @torch.no_grad()
    def roll_back(self, start: Start) -> None:
        """Read weights, optimizer state and average again from ``start``; data, step and rates go on. Collective."""
        assert self._rolls_back is not None
        config, ema = self._rolls_back
        optimizers, rates = self.states[OPTIMIZER], self.states[LR_SCHEDULER]
        optimizers.zero_grad()  # torch makes no state to read into where there are gradients
        _restore_average(start, ema)
        states = {name: self.states[name] for name in (MODEL, OPTIMIZER)}
        self._read(start, self._flattened_model_states_sd(states))
        rates.load_state_dict(rates.state_dict())  # some optimizers' state has rates as well
        refresh_scales(self.states[MODEL].model[0], config)


@contextmanager
def in_use() -> Iterator[None]:
    """Let torchtitan's trainer, which names the class of its manager, make one of ours while it is built."""
    upstream = torchtitan.train.CheckpointManager
    torchtitan.train.CheckpointManager = SymbioticCheckpointManager  # type: ignore[misc]
    try:
        yield
    finally:
        torchtitan.train.CheckpointManager = upstream  # type: ignore[misc]


def load_from(start: Start, state: dict[str, Any]) -> None:
    """Fill ``state`` from a distributed checkpoint. Collective.

    Raises:
        ValueError: an entry is missing or damaged.
    """
    from symbiotic_titan.checkpoint.load import (
        load,  # only runs that start from a checkpoint need it
    )

    load(state, start.folder, start.entries, start.metadata)


def read_weights(start: Start, model: nn.Module, weights: Weights, ema: "EMA | None") -> None:
    """Fill ``model``, sharded or not, and start its average from there. Collective."""
    from symbiotic_titan.checkpoint.save_checks import check_loaded

    logger.info(f"Loading the weights in {start.folder} ({weights}).")
    tensors = cast(dict[str, Tensor], get_model_state_dict(model))
    if start.is_distributed:
        chosen = averaged(start.entries) if weights == "ema" else {}
        load_from(start, {chosen.get(name, name): tensor for name, tensor in tensors.items()})
    else:
        open_weights(start.folder, weights).read_into(tensors)
    check_loaded(tensors, start.folder)
    if ema is not None:
        ema.restart()


def read_beforehand(start: Start, ema: "EMA | None") -> list[str]:
    """Read what the checkpointer cannot from the checkpoint that is resumed. Returns the entries that it must leave out. Collective."""
    # It fails on a tensor that the checkpoint lacks, and this run may average other groups than the one before.
    _restore_average(start, ema)
    excluded = [] if ema is None else ["ema"]
    # Older checkpoints have no record of the parameter groups.
    recorded = "param_groups.json" in start.entries
    return excluded if recorded else [*excluded, "param_groups"]


def _restore_average(start: Start, ema: "EMA | None") -> None:
    """Go on with the average of the checkpoint. A parameter that has none there gets its weights as average. Differences from the run
    before are logged.
    """
    stored = averaged(start.entries)
    names = set() if ema is None else ema.tensors.keys()
    if stored or ema is not None:
        _log_differences(start.folder, names, stored)
    if ema is None:
        return
    state: dict[str, Any] = {stored.get(n, n): tensor for n, tensor in ema.tensors.items()}
    if "ema.num_updates" in start.entries:
        state["ema.num_updates"] = 0
    load_from(start, state)
    ema.load_state_dict({"num_updates": state.get("ema.num_updates", 0)})


def _log_differences(folder: Path, names: Iterable[str], stored: Iterable[str]) -> None:
    names, stored = set(names), set(stored)
    if new := sorted(names - stored):
        logger.info(
            f"[ema]: {folder} has no average of {some_of(new)}, which starts from the weights"
        )
    if old := sorted(stored - names):
        what = "averages other groups now" if names else "is off"
        logger.info(f"[ema] {what}: the average of {some_of(old)} in {folder} is not used")
