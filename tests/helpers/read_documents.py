"""What training would see of a source: its samples as documents, written as text.

    <user>a<see red>b<assistant>[It is red.<eos>]       an input image, a question, the trained answer
    <user>[a red square]<assistant><make red>[<eos>]    a trained caption and the image to generate

What stands in brackets is trained. An image is named by the nearest colour of ``released_data``; the tokens around an image, the
beginning of the document and the label of the token that begins a target image are left out.
"""

import tomllib
from collections.abc import Iterator
from pathlib import Path

import torch

from symbiotic_titan.config.data import Data, DataSource
from symbiotic_titan.config.generation import Latents
from symbiotic_titan.data.documents import Document, Segment, TextSegment, VitSegment
from symbiotic_titan.data.formats.shard import BadSample, Sample
from symbiotic_titan.data.latents import TargetImages
from symbiotic_titan.data.readers import Reader, check_names, index_source
from symbiotic_titan.data.samples import DocumentMaker
from symbiotic_titan.data.tokenizer import ByteTokenizer
from symbiotic_titan.sequence.geometry import ImageGeometry
from tests.helpers.released_data import COLOURS

GEOMETRY = ImageGeometry(
    vit_patch=4, vit_merge=2, vit_channels=3, latent_channels=3, latent_stride=1, latent_patch=4
)
TOKENIZER = ByteTokenizer()
SEQ_LEN = 1024
HIDDEN = ("bos", "vit_start", "vit_end", "vae_start", "vae_end")
NAMES = {getattr(TOKENIZER.special, name): f"<{name}>" for name in vars(TOKENIZER.special)}
NAMES |= {getattr(TOKENIZER.special, name): "" for name in HIDDEN}
NAMES |= {TOKENIZER.turn(role).prefix[0]: f"<{role}>" for role in ("user", "assistant")}


def read_source(folder: Path, toml: str) -> Iterator[str | BadSample]:
    """Documents of the samples of the one source in ``toml``, in the order of its files, or why a sample is bad. FOLDER in ``toml``
    stands for ``folder``. Raises ValueError as the start of a run does."""
    tables = tomllib.loads(toml.replace("FOLDER", str(folder)))
    config = Data(**({"condition_dropout": 0.0, "vae_pixels": 64} | tables["data"]))
    [source] = config.sources
    shards = index_source(source, "[[data.sources]] #1", cache_folder=config.cache_folder)
    check_names(source, shards, "[[data.sources]] #1")
    maker = DocumentMaker(
        config, GEOMETRY, TargetImages(config, Latents(), GEOMETRY, [source]), TOKENIZER, SEQ_LEN
    )
    reader, index = Reader(shards), 0
    for number, shard in enumerate(shards):
        for sample in range(shard.num_samples):
            try:
                documents = maker.make(source, reader.read(number, sample), index)
                yield "".join(map(written, documents))
            except BadSample as error:
                yield error
            index += 1


def written(document: Document) -> str:
    """``document`` as text."""
    text = "".join(map(_written, document.segments))
    return text.replace("][", "").replace("[]", "")


def _written(segment: Segment) -> str:
    if isinstance(segment, TextSegment):
        kept = b"".join(
            NAMES[i].encode() if i in NAMES else bytes([i]) for i in segment.ids
        ).decode()
        return f"[{kept}]" if segment.trained else kept
    if isinstance(segment, VitSegment):
        return f"<see {_colour(segment.patches, 3)}>"
    return f"<make {_colour(segment.latents, 3)}>"


def _colour(values: torch.Tensor, channels: int) -> str:
    """The colour of an image of one colour: (tokens, channels * pixels) in [-1, 1]."""
    mean_C = values.unflatten(-1, (channels, -1)).mean((0, 2))
    wanted_NC = torch.tensor(list(COLOURS.values())) / 127.5 - 1.0
    return list(COLOURS)[int((wanted_NC - mean_C).abs().sum(-1).argmin())]


def document_of(
    task: str,
    values: dict[str, object],
    *,
    keys: dict[str, str | list[str]] | None = None,
    index: int = 0,
    shard: str = "s.tar",
    options: dict[str, str] | None = None,
    **config: object,
) -> str:
    """The only document of a sample with ``values``, as text. ``options`` are other keys of its source; raises BadSample."""
    source = DataSource("s", task, "webdataset", "x", keys or {}, **(options or {}))
    data = Data(**({"condition_dropout": 0.0, "vae_pixels": 64} | config))
    targets = TargetImages(data, Latents(), GEOMETRY, [source])
    maker = DocumentMaker(data, GEOMETRY, targets, TOKENIZER, SEQ_LEN)
    [document] = maker.make(source, Sample(shard, "0", values), index)
    return written(document)
