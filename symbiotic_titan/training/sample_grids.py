"""Sample grids: images that the model in training generates for fixed prompts, shown as one grid in TensorBoard and W&B.

Prompts and noise are the same every time, so two grids differ only by the weights. Sampling changes no global random state and
nothing that the optimizer reads: training with and without it is bitwise equal. The prompts are divided among the processes, and each
runs the same number of forwards.
"""

import contextlib
import functools
import time
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from PIL import Image
from torchtitan.tools.logging import logger

from symbiotic_titan.codecs.codec import Codec
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.data.tokenizer import Tokenizer
from symbiotic_titan.inference.generator import Generator
from symbiotic_titan.inference.images import picture_grid
from symbiotic_titan.inference.session import Autocast
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.parallel.ranks import DataRanks
from symbiotic_titan.training.metrics import SymbioticMetrics
from symbiotic_titan.training.pause import Interrupted, paused_training
from symbiotic_titan.training.trainer import SymbioticTrainer


class SampleGrids:
    """Generates the grids of [sampling]. Every process calls it; the one that logs writes.

    autocast: context manager of the model's compute precision. stop_requested: a collective, with the same answer on all processes.
    codec: that of [latents]; built here if None. weights: gives the model those that generate.

    Raises:
        ValueError: the codec's weights are missing.
    """

    def __init__(
        self,
        model: SymbioticModel,
        config: JobConfig,
        tokenizer: Tokenizer,
        ranks: DataRanks,
        metrics: SymbioticMetrics,
        *,
        autocast: Autocast,
        stop_requested: Callable[[], bool],
        codec: Codec | None = None,
        weights: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self._model, self._ranks, self._metrics = model, ranks, metrics
        self._settings, self._num_steps = config.sampling, config.training.steps
        self._stop_requested, self._weights = stop_requested, weights
        self._generator = Generator(model, config, tokenizer, ranks.device, autocast=autocast)
        if codec is not None:
            self._generator.codec = codec
        _ = self._generator.codec  # raises now, not at the first grid

    def is_due(self, step: int) -> bool:
        """Every ``sampling.freq`` steps, step 0 included, and at the last step."""
        return step % self._settings.freq == 0 or step == self._num_steps

    def write_if_due(self, step: int) -> None:
        """Generate and write the grid of ``step``. A stop signal ends it after the current solver step, without a grid."""
        if not self.is_due(step):
            return
        start = time.perf_counter()
        activity = f"sampling at step {step}"
        with paused_training(self._model, self._metrics, activity), self._weights():
            self._write(step, self._pictures())
            color, seconds = self._metrics.color, time.perf_counter() - start
            logger.info(
                f"{color.yellow}sampling at step {step}:  {color.green}{len(self._settings.prompts)} pictures  "
                f"{color.blue}{seconds:.1f} s{color.reset}"
            )

    def _pictures(self) -> np.ndarray:
        """(N, H, W, 3) uint8: the images of all prompts, on every process."""
        settings, ranks = self._settings, self._ranks
        num_prompts = len(settings.prompts)
        share = -(-num_prompts // ranks.size)
        first = ranks.rank * share
        # Under FSDP all processes must run the same number of forwards, so one with fewer prompts generates some again.
        own = [settings.prompts[i % num_prompts] for i in range(first, first + share)]
        drawn = self._generator.images(
            own,
            steps=settings.steps,
            guidance=settings.guidance,
            sampler=settings.sampler,
            shift=settings.shift,
            seed=settings.seed,
            aspect=settings.aspect,
            batch_size=settings.batch_size,
            first_index=first,  # seeds the noise: the grid does not depend on the number of processes
            advance=self._check_stop,
        )
        drawn_NHW3 = torch.from_numpy(np.stack([np.asarray(p.image) for p in drawn]))
        all_NHW3 = torch.zeros(
            num_prompts, *drawn_NHW3.shape[1:], dtype=torch.uint8, device=ranks.device
        )
        place = slice(first, first + share)  # the last processes may have fewer, or none
        all_NHW3[place] = drawn_NHW3[: len(all_NHW3[place])].to(ranks.device)
        # Zero outside a process's own share, so the sum gathers shares of unequal size.
        return ranks.sum(all_NHW3).cpu().numpy()  # device sync

    def _check_stop(self, count: int) -> None:
        if self._stop_requested():
            raise Interrupted

    def _write(self, step: int, pictures_NHW3: np.ndarray) -> None:
        if not self._metrics.shows_images:
            return
        images = [Image.fromarray(picture_HW3) for picture_HW3 in pictures_NHW3]
        grid_HW3 = np.asarray(picture_grid(images, self._settings.prompts))
        self._metrics.log_image("sampling/pictures", grid_HW3, step)


def add_sample_grids(trainer: SymbioticTrainer) -> None:
    """Let ``trainer`` write the grids of [sampling] between its steps.

    Raises:
        ValueError: the codec's weights are missing.
    """
    grids = SampleGrids(
        cast(SymbioticModel, trainer.model_parts[0]),
        trainer.job_config,
        cast(Tokenizer, trainer.tokenizer),
        trainer.ranks.each(),  # generation uses a cache, so it shares no sequences
        trainer.metrics_processor,
        autocast=lambda: trainer.maybe_enable_amp,
        stop_requested=trainer.stop_requested,
        codec=trainer.encode.codec,
        weights=functools.partial(trainer.using_weights, trainer.job_config.sampling.weights),
    )
    trainer.step_hooks.append(grids.write_if_due)
