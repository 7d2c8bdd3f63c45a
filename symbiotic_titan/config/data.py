"""[data] and [[data.sources]]: what is read, mixed and packed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated, Any, Literal

import tyro

from symbiotic_titan.config.files import InputLimits
from symbiotic_titan.config.rows import (
    FILES,
    LINE,
    NAME,
    NOT_NEGATIVE,
    PATH,
    PATH_OR_NONE,
    SEED,
    SHARE,
    Range,
    Rows,
    check_row,
    row_from_dict,
)
from symbiotic_titan.config.stages import MixtureBy, Stage, Weights, stage_rows, weights_by_stage
from symbiotic_titan.registry import Registry, choice
from symbiotic_titan.sequence.tasks import TASKS

_FORMATS = "symbiotic_titan.data.formats"
# Values of ``format``: subclasses of ``data.formats.shard.FileFormat``.
FORMATS: Registry[Any] = Registry(
    "format",
    {
        "webdataset": f"{_FORMATS}.webdataset:WebDataset",
        "jsonl": f"{_FORMATS}.jsonl:JsonLines",
        "json": f"{_FORMATS}.jsonl:Json",
        "parquet": f"{_FORMATS}.parquet:Parquet",
    },
)

_PACKINGS = "symbiotic_titan.data.packing"
# Values of ``data.packing``: functions of the type ``data.packing.Packing``.
PACKINGS: Registry[Any] = Registry(
    "data.packing",
    {"longest_first": f"{_PACKINGS}:longest_first", "fullest": f"{_PACKINGS}:fullest"},
)

_PIXELS = Range(1, 2**26)  # of one image: 8192 x 8192
AtEnd = Literal["repeat", "stop"]
TooLong = Literal["bad", "skip", "truncate"]


@dataclass
class DataSource:
    """One row of [[data.sources]]."""

    name: Annotated[str, NAME]
    """Name of the source, unique; used in messages, metrics and the saved state."""

    task: Annotated[str, NAME]
    """What its samples train: ``lm``: plain text; ``mmu``: questions about images; ``t2i`` and ``t2i_long``: images from short or long
    captions; ``interleaved``: text among input and target images; or a task that ``experimental.custom_import`` registers."""

    format: str = choice(FORMATS)
    """``webdataset``: tar shards; ``jsonl``: one JSON object a line; ``json``: files that are one array of objects; ``parquet``:
    tables. All but the last may be compressed (``.gz``, ``.bz2``, ``.xz``, ``.zst``), see ``data.cache_folder``."""

    path: Annotated[str, FILES]  # type: ignore[misc]  # mypy takes what ``choice`` returns for a default
    """Path or fsspec URL (``s3://``, ``hf://datasets/NAME/...``) of the files: one of them; a pattern, where ``*`` matches any
    characters, and braces as in ``shards/{0000..0099}.tar`` or ``{a,b}/*.tar`` name files that must all exist; or a folder, whose
    files of this format are taken, also those further down. Hidden files and those that Spark adds (``_SUCCESS``) are no data, and
    valid files without samples are left out."""

    keys: Annotated[dict[str, str | list[str]], LINE] = field(default_factory=dict)
    """Which of the samples' own names stands for a field such as ``text``, ``image``, ``caption``, ``question``, ``answer``,
    ``messages``, ``conversations`` or ``segments``: a tar member by its extension, a JSON key, a Parquet column; dots lead into
    tables. E.g. ``{image = "jpg", caption = "json.prompt"}``. Where ``caption`` has several names, as in
    ``{caption = ["short", "long"]}``, one of a sample's captions is chosen at random in each epoch."""

    image_folder: Annotated[str, PATH_OR_NONE] = ""
    """Folder or fsspec URL in which relative paths of images are looked up; empty: the folder of the file that names them."""

    image_roots: Annotated[list[str], PATH] = field(default_factory=list)
    """More folders, or beginnings of URLs, whose images samples may name. By default they may name regular files below
    ``image_folder`` and below the folder of their own file, once symbolic links are followed, and no URL. E.g. ``["/data/coco"]``
    where the data hold absolute paths, ``["https://images.example.org/"]`` where they hold URLs; ``["/"]`` trusts them with any file
    of the machine. May change on a resumed run."""

    truncated_images: Literal["bad", "decode"] = "bad"
    """What becomes of an image file that breaks off: the sample is ``bad``; or ``decode`` keeps what there is, and the missing part
    is grey or black. Decoders cannot tell how much of a JPEG is missing: its last two bytes or its lower half. A resumed run
    may change from ``bad`` to ``decode``."""

    weight: Annotated[float, NOT_NEGATIVE] = 1.0
    """Share of the samples, or with ``data.mixture_by = "tokens"`` of the tokens, that come from this source, relative to the other
    sources' weights. 0: not read. May change on a resumed run, and by [[data.stages]] at a given step: every source goes on where it
    was, and the new shares count from then on."""

    at_end: AtEnd | None = None
    """Like ``data.at_end``, which holds where this is not given."""

    bad_samples: Literal["raise", "skip"] | None = None
    """Like ``data.bad_samples``, which holds where this is not given."""

    too_long: TooLong | None = None
    """Like ``data.too_long``, which holds where this is not given."""

    skip_list: Annotated[str, PATH_OR_NONE] = ""
    """Samples to pass over: the file ``bad_samples.jsonl`` that ``symbiotic check-data`` writes. They do not count as bad, also with
    ``bad_samples = "raise"``; the order of the others stays the same. May change on a resumed run."""

    def at_end_of(self, data: "Data") -> str:
        return self.at_end or data.at_end

    def bad_samples_of(self, data: "Data") -> str:
        return self.bad_samples or data.bad_samples

    def too_long_of(self, data: "Data") -> str:
        return self.too_long or data.too_long


def _check_keys(source: DataSource, where: str) -> None:
    """Refuse keys that the task does not have, or that belong to different schemas."""
    task = TASKS[source.task]
    known = sorted({*task.fields, *(["image"] if task.has_images else [])})
    for name, key in source.keys.items():
        if name not in known:
            raise ValueError(
                f"{where}.keys: samples of the task {source.task} have no {name!r}; choose from {', '.join(known)}"
            )
        names = key if isinstance(key, list) else [key]
        if not names or not all(names):
            raise ValueError(
                f"{where}.keys.{name}: must not be empty; name what the samples have, or remove it"
            )
        if isinstance(key, list) and name != "caption":
            raise ValueError(
                f"{where}.keys.{name}: only a caption may have several names, got {key}; keep one of them"
            )
        if len(set(names)) < len(names):
            raise ValueError(f"{where}.keys.{name}: has a name twice, got {key}; keep one of them")
    named = [schema for schema in task.schemas if (set(schema) - {"image"}) & source.keys.keys()]
    if len(named) > 1:
        both = " and ".join(schema[-1] for schema in named)
        raise ValueError(
            f"{where}.keys: {both} are different schemas of a sample; keep one of them"
        )


def _check_image_options(source: DataSource, where: str) -> None:
    """Refuse what concerns images where samples have none."""
    if TASKS[source.task].has_images:
        return
    for key, is_set in (
        ("image_folder", bool(source.image_folder)),
        ("image_roots", bool(source.image_roots)),
        ("truncated_images", source.truncated_images != "bad"),
    ):
        if is_set:
            raise ValueError(
                f"{where}: {key} has no effect, samples of the task {source.task} have no images; remove it"
            )


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
        TASKS.check(f"{table} #{i}.task", s.task)
        if names.count(s.name) > 1:
            raise ValueError(f"{where}: name is used twice; every source needs its own")
        _check_keys(s, where)
        _check_image_options(s, where)
    if sources and not sum(s.weight for s in sources) > 0:
        raise ValueError(
            f"{table}: the weights sum to zero; give at least one source a positive weight"
        )
    return sources


def used_sources(sources: list[DataSource], stages: Sequence[Stage] = ()) -> list[DataSource]:
    """Those of ``sources`` that are read: their weight is positive, now or in one of the ``stages``."""
    later = {name for stage in stages for name, weight in stage.weights.items() if weight > 0}
    return [source for source in sources if source.weight > 0 or source.name in later]


@dataclass
class Data(InputLimits):
    sources: Annotated[list[Any], tyro.conf.Fixed, Rows(DataSource)] = field(default_factory=list)
    """Rows of [[data.sources]]; set in TOML. On a resumed run sources may be added, which start at their beginning, or removed; one
    that comes back goes on where it was. They are recognised by name."""

    stages: Annotated[list[Any], tyro.conf.Fixed, Rows(Stage)] = field(default_factory=list)
    """Rows of [[data.stages]]; set in TOML: from ``from_step`` on, ``weights = {source = 2.0}`` and ``lr = {group = 1e-5}`` replace
    what held before. The change reaches the packed sequences within the ``lookahead``: samples that wait are still packed. On a
    resumed run later stages may be changed or added; one at or before the checkpoint's step must be as it was in that run."""

    seed: Annotated[int, SEED] = 0
    """Seed of the sample order. Changing it on a resumed run is refused."""

    num_lanes: Annotated[int, Range(0, 2**16)] = 0
    """Independent streams of packed rows that the ranks share out; fixed for the life of a run. 0 means the global batch size.
    Every data rank takes an equal share, so the number must be a multiple of that of the ranks, now and whenever the run is resumed;
    a rank starts no more loader workers than it has streams. Where the number divides the global batch size, a global batch holds the
    same rows on any number of ranks. Every stream holds its own ``lookahead`` in memory."""

    mixture_by: MixtureBy = "samples"
    """Whether the weights of the sources are shares of the samples or of the tokens; images and long texts have more tokens. Either
    is kept exactly in every stream, not only on average: after any sample a source is less than one sample, or about one longest
    sample, off its share (``data/mixture.py`` has the proofs). Changing it on a resumed run is refused."""

    at_end: AtEnd = "repeat"
    """What happens when all samples of a source were read: they come again in another order; or the run stops, with every sample
    of that source trained exactly once. A stream at its end first uses up its waiting samples, then gives empty rows until all
    streams have ended; that is the last step, and a full checkpoint is saved. Training does not last longer than
    ``training.steps`` in any case, and the learning rate follows that number. May change on a resumed run: with ``repeat`` it
    goes on."""

    lookahead: Annotated[int, Range(1, 4096)] = 32
    """Samples a stream holds while it looks for one that fills the row."""

    packing: str = choice(PACKINGS, "longest_first")
    """Which of the samples held share a row, besides the oldest: ``longest_first`` takes the longest that still fits, again and
    again; ``fullest`` those that leave the fewest positions empty. The first is enough where a row holds many samples; where it
    holds few, the second fills it better (mini.toml: 97.6 instead of 93.0 %) for some tenths of a millisecond a row of 2048, more
    the longer the row. May change on a resumed run."""

    max_row_share: Annotated[dict[str, float], tyro.conf.Fixed, Range(0, 1, "(]")] = field(
        default_factory=dict
    )
    """Task -> share of a row's positions that its samples may take, e.g. ``{t2i = 0.6, lm = 0.3}``; other tasks may take all. So
    every row holds the mixture also where images dominate, not only the average over many rows. A text of ``lm`` is split
    accordingly; another sample that is longer than its task's share is handled as ``too_long`` says. A share below what the task
    has of the mixture's tokens leaves the rest of the rows empty: control the average by weights and ``mixture_by``, and give each
    task some room above it. Set in TOML."""

    max_vit_tokens: Annotated[int, Range(0, 2**20)] = 0
    """ViT tokens a row may hold; 0 means as many as the row is long. A smaller number saves compute on rows without images."""

    max_vae_tokens: Annotated[int, Range(0, 2**20)] = 0
    """Latent tokens a row may hold; 0 means as many as the row is long."""

    vit_pixels: Annotated[int, _PIXELS] = 1024
    """Pixel budget of an input image, which keeps its aspect. Where learned queries read the images (Aria): the pixels of the square
    that every image is laid in; the model must have queries for that size."""

    vit_min_pixels: Annotated[int, Range(0, 2**26)] = 0
    """Smaller input images are enlarged to about this many pixels; 0 leaves them as they are. Where learned queries read the images:
    the shorter side is stretched to at least its square root."""

    vae_pixels: Annotated[int, _PIXELS] = 1024
    """Pixel budget of a target image, which is resized to the nearest aspect bucket."""

    max_aspect: Annotated[float, Range(1.0, 1000.0)] = 2.0
    """Longest side over shortest side of the aspect buckets."""

    condition_dropout: Annotated[float, SHARE] = 0.1
    """Share of the captions of T2I samples that are dropped, so that guidance can be used."""

    bad_samples: Literal["raise", "skip"] = "raise"
    """What happens on a corrupt sample: stop and name shard and key, or skip and count it."""

    cache_folder: Annotated[str, PATH_OR_NONE] = ""
    """Local folder for compressed shards, which are unpacked into it, since samples are read from anywhere in a file, and for what
    was found in tar and JSON files, which makes the next start fast and is one copy for all processes of a machine, however many
    samples there are. Processes and runs may share it. Nothing is removed from it."""

    max_bad_samples: Annotated[int, NOT_NEGATIVE] = 100
    """With ``skip``: how many bad samples the run tolerates, over all ranks, before it saves a checkpoint and stops."""

    max_bad_share: Annotated[float, Range(0, 1, "[)")] = 0.0
    """With ``skip``: share of the samples read so far, over all ranks, that may be bad. The run stops once the bad samples are more than
    this share and more than ``max_bad_samples``. For images from the web, where some 5 % are missing, 0.1 is a useful value. 0 makes
    ``max_bad_samples`` the only limit. May change on a resumed run."""

    max_bad_in_a_row: Annotated[int, Range(1)] = 100
    """With ``skip``: how many consecutive samples of one source a stream skips before the run stops; those that ``too_long`` skips
    count too."""

    too_long: TooLong = "bad"
    """What becomes of a sample that is longer than a row, or than its task's part of one: it is ``bad``; or it is skipped, and
    counted apart from the bad ones; or its text is truncated: a caption at its end, everything else where the row ends, never
    inside an image. Plain text of ``lm`` is split over rows instead."""

    read_timeout_seconds: Annotated[float, Range(0, ends="(]")] = 600.0
    """Seconds that one sample, with the image files that it names, may take to be read and prepared while the trainer waits for it: a
    disk in the network may hang for ever. Then the last step is saved and the run ends, with one line that names source, file and
    sample. With several ranks it is at most 0.8 of ``comm.train_timeout_seconds``, after which those that wait for this rank would end
    the run unsaved. A stop signal does not wait for a read."""

    def __post_init__(self) -> None:
        check_row("data", self)
        self.sources = source_rows(self.sources, "[[data.sources]]")
        self.stages = stage_rows(self.stages, {s.name: s.weight for s in self.sources})
        if self.vit_min_pixels > self.vit_pixels:
            raise ValueError(
                f"data.vit_min_pixels: must be at most data.vit_pixels = {self.vit_pixels}, got {self.vit_min_pixels}"
            )
        self._check_row_shares()

    def _check_row_shares(self) -> None:
        """Refuse shares with which no row could be filled, or that have no effect."""
        tasks = list(dict.fromkeys(source.task for source in self.sources))
        for task in self.max_row_share:
            if task not in tasks:
                raise ValueError(
                    f"data.max_row_share.{task}: no source has this task; there are {', '.join(tasks)}"
                )
        for first_step, weights in self.weights_by_stage if self.sources else []:
            self._check_row_shares_of(weights, f" from step {first_step} on" * (first_step > 1))

    def _check_row_shares_of(self, weights: Weights, when: str) -> None:
        """The same for the ``weights`` of one stage."""
        by_task: dict[str, Fraction] = {}
        for source in self.sources:
            if weights[source.name] > 0:
                weight = Fraction(str(weights[source.name]))
                by_task[source.task] = by_task.get(source.task, 0) + weight
        for task, share in self.max_row_share.items():
            of_tokens = by_task.get(task, Fraction(0)) / sum(by_task.values())
            if self.mixture_by == "tokens" and Fraction(str(share)) < of_tokens:
                raise ValueError(
                    f"data.max_row_share.{task}: {share} is less than the task's share of the tokens{when}, {float(of_tokens):.4g}: "
                    "rows would stay empty; raise it, or lower the weights of its sources"
                )
        total = sum(Fraction(str(self.max_row_share.get(task, 1))) for task in by_task)
        if total < 1:
            raise ValueError(
                f"data.max_row_share: the tasks may take {float(total):.4g} of a row together{when}, so none could be filled; let "
                "the shares sum to 1 or more"
            )

    @property
    def weights_by_stage(self) -> list[tuple[int, Weights]]:
        """(first step, weights of all sources) of each stage, in order; the first is step 1."""
        return weights_by_stage({s.name: s.weight for s in self.sources}, self.stages)

    def weights_at(self, step: int) -> Weights:
        """The weights of all sources in training step ``step``, counted from 1."""
        return [weights for first, weights in self.weights_by_stage if first <= max(step, 1)][-1]

    @property
    def seen_pixels(self) -> int | None:
        """Pixel budget of input images; None where no source has any."""
        used = used_sources(self.sources, self.stages)
        return self.vit_pixels if any(TASKS[s.task].input_images for s in used) else None

    def num_streams(self, global_batch_size: int) -> int:
        """Number of streams of a run with batches of that many rows."""
        # One stream per row of the global batch: each batch then takes one row of every stream on any number of ranks.
        return self.num_lanes or global_batch_size

    def row_tokens_of(self, task: str, seq_len: int) -> int:
        """Positions of a row of ``seq_len`` that samples of ``task`` may take."""
        return int(Fraction(str(self.max_row_share.get(task, 1))) * seq_len)
