"""Sequences that a model reads chunk by chunk, with or without a key-value cache. All generation goes through this file.

N here: the columns of a chunk whose logits are wanted.
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch

from symbiotic_titan.inference.chunks import joined
from symbiotic_titan.model.kv_cache import KeyValueCache
from symbiotic_titan.model.symbiotic import ModelOutput, SymbioticModel
from symbiotic_titan.sequence.batch import PackedBatch

Autocast = Callable[[], AbstractContextManager[None]]


class Session:
    """The state of generation for the sequences of one batch: ``prefill`` with prompts, then ``decode`` tokens or ``denoise`` images.

    Every call is one forward, with its collectives, so processes that share a model must make the same number of calls.

    cached: keep a key-value cache. Without it every call is a forward over the whole sequences, as in training: slower, and the
    reference for the cache.
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
        self._past: PackedBatch | None = None  # without a cache

    def prefill(
        self, chunk: PackedBatch, logit_index_BN: torch.Tensor | None = None
    ) -> ModelOutput:
        """Append ``chunk`` and give the (B, N, V) logits of the columns ``logit_index_BN``, by default of none."""
        return self._forward(chunk, logit_index_BN, timestep=0.0, append=True)

    def decode(self, chunk: PackedBatch) -> ModelOutput:
        """Append a chunk of one column and give its (B, 1, V) logits."""
        first_B1 = torch.zeros_like(chunk.tokens[:, :1])
        return self._forward(chunk, first_B1, timestep=0.0, append=True)

    def denoise(self, chunk: PackedBatch, timestep: float) -> ModelOutput:
        """(B, L, Z) velocities at ``timestep`` of the noised latents in ``chunk``.

        The chunk is not appended: in training, later tokens never attend to a noised image.
        """
        return self._forward(chunk, None, timestep=timestep, append=False)

    @torch.no_grad()
    def _forward(
        self,
        chunk: PackedBatch,
        logit_index_BN: torch.Tensor | None,
        *,
        timestep: float,
        append: bool,
    ) -> ModelOutput:
        assert not (append and chunk.latents.shape[1])
        if logit_index_BN is None:
            logit_index_BN = torch.empty_like(chunk.tokens[:, :0])
        batch = chunk
        if self._past is not None:
            logit_index_BN = logit_index_BN + self._past.tokens.shape[1]
            batch = joined(self._past, chunk)
        num_rows, length = batch.tokens.shape
        first_B1 = length * torch.arange(num_rows, device=batch.tokens.device).unsqueeze(1)
        timesteps_BL = torch.full(chunk.vae_image.shape, timestep, device=chunk.tokens.device)
        no_shield = torch.ones((), device=chunk.tokens.device)  # acts on gradients alone
        # Not compiled, even if the model was for training: its graphs are for one shape, and chunks have many.
        with self._autocast(), torch.compiler.set_stance("force_eager"):
            output = self._model(
                batch,
                chunk.latents,
                timesteps_BL,
                no_shield,
                cache=self._cache,
                logit_index_N=(first_B1 + logit_index_BN).flatten(),
            )
        if append and self._cache is not None:
            self._cache.append(chunk)
        elif append:
            self._past = batch
        return replace(output, logits=output.logits.unflatten(0, logit_index_BN.shape))
