"""Rows read chunk by chunk by a model, with or without a cache: the one way through which all generation goes.

Letters: B rows, T columns of a chunk, N columns whose logits are wanted, L latent tokens of a chunk.
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from symbiotic_titan.inference.chunks import joined
from symbiotic_titan.model.kv_cache import KeyValueCache
from symbiotic_titan.model.symbiotic import ModelOutput, SymbioticModel
from symbiotic_titan.sequence.batch import PackedBatch

Autocast = Callable[[], AbstractContextManager[None]]


class Session:
    """Rows that a model reads. Without ``cached`` every chunk is read together with all that were kept before it, in one forward
    over the whole rows, as in training: slower, and the reference for the cache.

    One ``read`` is one forward, whatever the rows hold: processes that share a model must read equally often.
    """

    def __init__(
        self,
        model: SymbioticModel,
        *,
        cached: bool = True,
        autocast: Autocast = contextlib.nullcontext,
    ) -> None:
        self._model = model
        self._autocast = autocast
        self._cache = KeyValueCache(len(model.layers)) if cached else None
        self._kept: PackedBatch | None = None  # without a cache

    @torch.no_grad()
    def read(
        self,
        chunk: PackedBatch,
        logit_index_BN: torch.Tensor,
        *,
        timestep: float = 0.0,
        keep: bool = True,
    ) -> ModelOutput:
        """What the model says about ``chunk``: (B, N, vocabulary) logits and (B, L, Z) velocities.

        logit_index: columns of the chunk; N may be 0. timestep: of the chunk's latents. Without ``keep`` the chunk is forgotten, as
        an image must be: at training nobody behind it sees it.
        """
        assert not (keep and chunk.latents.shape[1])
        batch = chunk
        if self._kept is not None:
            logit_index_BN = logit_index_BN + self._kept.tokens.shape[1]
            batch = joined(self._kept, chunk)
        timesteps_BL = torch.full(chunk.vae_image.shape, timestep, device=chunk.tokens.device)
        no_shield = torch.ones((), device=chunk.tokens.device)
        # A model that was compiled for training runs as it was written: its graphs are for one shape, and chunks have many.
        with self._autocast(), torch.compiler.set_stance("force_eager"):
            output = self._model(
                batch,
                chunk.latents,
                timesteps_BL,
                no_shield,
                cache=self._cache,
                logit_index_BN=logit_index_BN,
            )
        if keep and self._cache is not None:
            self._cache.append(chunk)
        elif keep:
            self._kept = batch
        return output
