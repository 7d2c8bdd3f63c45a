"""[data], [[data.sources]] and [latents]: what is read, mixed and packed."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from symbiotic_titan.config.rows import row_from_dict


@dataclass
class DataSource:
    """One row of [[data.sources]]."""

    name: str
    """Name of the source, unique; used in messages, metrics and the saved state."""

    task: Literal["lm", "mmu", "t2i", "t2i_long"]
    """What its samples train: plain text, questions about images, or images from short or long captions."""

    format: Literal["webdataset", "jsonl"]
    """``webdataset``: tar shards; ``jsonl``: one JSON object a line."""

    path: str
    """Path or fsspec URL of the files; ``*`` matches several."""

    weight: float = 1.0
    """Share of the samples that come from this source, relative to the other sources' weights."""


def source_rows(rows: list[Any], table: str) -> list[DataSource]:
    """The rows of ``table`` as sources.

    Raises:
        ValueError: a key, type or weight is wrong, a name is used twice, or the weights sum to zero; ``table`` leads the message.
    """
    sources = [
        row_from_dict(DataSource, row, f"{table} #{i}") for i, row in enumerate(rows, start=1)
    ]
    names = [s.name for s in sources]
    for i, s in enumerate(sources, start=1):
        where = f"{table} #{i} ({s.name})"
        if names.count(s.name) > 1:
            raise ValueError(f"{where}: name is used twice; every source needs its own")
        if not 0 <= s.weight < float("inf"):
            raise ValueError(f"{where}: weight must be zero or positive, got {s.weight}")
    if sources and not sum(s.weight for s in sources) > 0:
        raise ValueError(
            f"{table}: the weights sum to zero; give at least one source a positive weight"
        )
    return sources


@dataclass
class Data:
    sources: Annotated[list[Any], tyro.conf.Fixed] = field(default_factory=list)
    """Rows of [[data.sources]]; set in TOML."""

    seed: int = 0
    """Seed of the sample order. Changing it on a resumed run is refused."""

    num_lanes: int = 0
    """Independent streams of packed rows that the ranks share out; fixed for the life of a run. 0 means the global batch size.
    Every data rank takes an equal share. Where the number divides the global batch size, a global batch holds the same rows on any
    number of ranks."""

    lookahead: int = 32
    """Samples a lane holds while it looks for one that fills the row."""

    max_vit_tokens: int = 0
    """ViT tokens a row may hold; 0 means as many as the row is long. A smaller number saves compute on rows without images."""

    max_vae_tokens: int = 0
    """Latent tokens a row may hold; 0 means as many as the row is long."""

    vit_pixels: int = 1024
    """Pixel budget of an image to be understood; it keeps its shape within it."""

    vae_pixels: int = 1024
    """Pixel budget of an image to be generated; it is resized to the nearest aspect bucket within it."""

    max_aspect: float = 2.0
    """Longest side over shortest side of the aspect buckets."""

    condition_dropout: float = 0.1
    """Share of the captions of T2I samples that are dropped, so that guidance can be used."""

    bad_samples: Literal["raise", "skip"] = "raise"
    """What happens on a corrupt sample: stop and name shard and key, or skip and count it."""

    max_bad_samples: int = 100
    """With ``skip``: how many bad samples the run tolerates, over all ranks, before it stops."""

    def __post_init__(self) -> None:
        self.sources = source_rows(self.sources, "[[data.sources]]")
        for name, low in (
            ("num_lanes", 0),
            ("lookahead", 1),
            ("max_vit_tokens", 0),
            ("max_vae_tokens", 0),
            ("vit_pixels", 1),
            ("vae_pixels", 1),
            ("max_bad_samples", 0),
        ):
            if getattr(self, name) < low:
                raise ValueError(f"data.{name}: must be at least {low}, got {getattr(self, name)}")
        if not 0.0 <= self.condition_dropout <= 1.0:
            raise ValueError(
                f"data.condition_dropout: must lie in [0, 1], got {self.condition_dropout}"
            )
        if self.max_aspect < 1.0:
            raise ValueError(f"data.max_aspect: must be at least 1, got {self.max_aspect}")


@dataclass
class Latents:
    codec: Literal["pixel"] = "pixel"
    """``pixel``: patches of pixels, scaled to [-1, 1]; for small runs, needs no autoencoder."""

    patch: int = 4
    """Latent cells along one side of one sequence token (pixels, for the ``pixel`` codec)."""

    def __post_init__(self) -> None:
        if self.patch < 1:
            raise ValueError(f"latents.patch: must be at least 1, got {self.patch}")
