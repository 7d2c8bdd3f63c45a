"""A sample -> documents that fit into a packed sequence. What a document of each task looks like: see ``layouts``."""

from dataclasses import replace
from functools import partial

from PIL import Image

from symbiotic_titan.config.data import Data, DataSource
from symbiotic_titan.config.files import InputLimits
from symbiotic_titan.data.documents import Document, Segment, TextSegment, VaeSegment
from symbiotic_titan.data.fields import Draw, Fields, first_of_all, refuse_unread
from symbiotic_titan.data.formats.shard import BadSample, Sample
from symbiotic_titan.data.image_files import ImageFiles
from symbiotic_titan.data.latents import TargetImages
from symbiotic_titan.data.layouts import TaskSample, decoded, lay_out
from symbiotic_titan.data.order import hash_fraction
from symbiotic_titan.data.tokenizer import Tokenizer
from symbiotic_titan.sequence.geometry import ImageGeometry
from symbiotic_titan.sequence.tasks import TASKS, task_names


def image_document_overhead(tokenizer: Tokenizer) -> int:
    """Tokens of a document with one image, besides the image and the text: opening, two turns, begin and end of the image."""
    user, assistant = tokenizer.turn("user"), tokenizer.turn("assistant")
    around_text = (tokenizer.opening, *user, tokenizer.separator, *assistant)
    return sum(len(ids) for ids in around_text) + 2


class DocumentMaker:
    """Turns samples into documents that fit a packed sequence of ``seq_len`` tokens, or the share of it that their task may take."""

    def __init__(
        self,
        config: Data,
        geometry: ImageGeometry,
        targets: TargetImages,
        tokenizer: Tokenizer,
        seq_len: int,
    ) -> None:
        self._config = config
        self._limits = config.limits
        self._geometry = geometry
        self._targets = targets
        self._tokenizer = tokenizer
        self._seq_len = seq_len
        # Kept here because a worker process that is spawned has not imported the extension that registers a task.
        self._tasks = [TASKS[name] for name in task_names()]
        self._numbers = {task.name: number for number, task in enumerate(self._tasks)}
        self._max_tokens = [config.row_tokens_of(task.name, seq_len) for task in self._tasks]
        self._max_vit_tokens = config.max_vit_tokens or seq_len
        self._max_vae_tokens = config.max_vae_tokens or seq_len

    def make(self, source: DataSource, sample: Sample, index: int) -> list[Document]:
        """Documents of ``sample``, which is number ``index`` of its source's endless sequence.

        Raises:
            BadSample: an image is damaged, a field is missing or of the wrong type, or the document is too long or empty.
        """
        number = self._numbers[source.task]
        try:
            laid_out = lay_out(self._task_sample(source, sample, index))
            documents = [Document(number, tuple(segments)) for segments in laid_out]
            # A stream reads until enough documents wait: without this refusal it would read such samples forever.
            if not documents or not all(document.num_tokens for document in documents):
                raise BadSample(
                    "empty", f"task {source.task!r} makes no document of it, or one without tokens"
                )
            truncates = source.too_long_of(self._config) == "truncate"
            return [self._fitted(document, truncates) for document in documents]
        except BadSample as error:
            raise error.at(sample.shard, sample.key) from error.__cause__
        except (RecursionError, MemoryError) as error:
            if self._tasks[number].layout is not None:
                raise  # by a user's layout, whose author needs the traceback
            what = "nested too deeply" if isinstance(error, RecursionError) else "too large"
            bad = BadSample("too_large", f"it is {what} to be taken apart")
            raise bad.at(sample.shard, sample.key) from error

    def _task_sample(self, source: DataSource, sample: Sample, index: int) -> TaskSample:
        number = self._numbers[source.task]
        task = self._tasks[number]
        return TaskSample(
            task=task,
            source=source,
            fields=fields_of(source, sample, partial(self._draw, source, index), self._limits),
            max_tokens=self._max_tokens[number],
            drops_caption=task.drops_caption and self._drops_condition(source, index),
            config=self._config,
            geometry=self._geometry,
            targets=self._targets,
            tokenizer=self._tokenizer,
        )

    def _drops_condition(self, source: DataSource, index: int) -> bool:
        """Another decision in every epoch, and the same one whenever this sample is read again, e.g. by a resumed run."""
        return self._draw(source, index, "condition") < self._config.condition_dropout

    def _draw(self, source: DataSource, index: int, what: str) -> float:
        return hash_fraction(self._config.seed, source.name, what, index)

    def _fitted(self, document: Document, truncates: bool) -> Document:
        """``document``, or with ``truncates`` as much of it as fits; raises BadSample when nothing to train is left."""
        if self._fits(document):
            return document
        max_tokens = self._max_tokens[document.task]
        if truncates:
            cut = _truncated(document, max_tokens)
            if self._fits(cut) and _has_target(cut):
                return cut
        raise BadSample(
            "too_long",
            f"it needs {document.num_tokens} tokens, a row holds {self._holds(document.task)}"
            if document.num_tokens > max_tokens
            else f"its images need {document.num_vit_tokens} ViT and {document.num_vae_tokens} latent tokens, a row holds "
            f"{self._max_vit_tokens} and {self._max_vae_tokens} (data.max_vit_tokens, data.max_vae_tokens)",
        )

    def _holds(self, task: int) -> str:
        max_tokens, name = self._max_tokens[task], self._tasks[task].name
        if max_tokens == self._seq_len:
            return f"{max_tokens} (training.seq_len)"
        return f"{max_tokens} of {name} (data.max_row_share)"

    def _fits(self, document: Document) -> bool:
        return (
            document.num_tokens <= self._max_tokens[document.task]
            and document.num_vit_tokens <= self._max_vit_tokens
            and document.num_vae_tokens <= self._max_vae_tokens
        )


def _truncated(document: Document, max_tokens: int) -> Document:
    """``document`` without the end of the text that shrinks, or else without its own end."""
    segments = list(document.segments)
    for number, segment in enumerate(segments):
        if isinstance(segment, TextSegment) and segment.shrinks:
            length = max(0, len(segment.ids) - (document.num_tokens - max_tokens))
            segments[number] = replace(segment, ids=segment.ids[:length])
            return Document(document.task, tuple(segments), truncated=True)
    return Document(document.task, tuple(_beginning(segments, max_tokens)), truncated=True)


def _beginning(segments: list[Segment], max_tokens: int) -> list[Segment]:
    """The first ``max_tokens`` tokens of ``segments``. An image is kept whole or not at all."""
    kept: list[Segment] = []
    for segment in segments:
        if isinstance(segment, TextSegment):
            segment = replace(segment, ids=segment.ids[:max_tokens])
            max_tokens -= len(segment.ids)
        elif segment.rows * segment.columns > max_tokens:
            kept.pop()  # the token that begins the image
            break
        else:
            max_tokens -= segment.rows * segment.columns
        kept.append(segment)
    return kept


def _has_target(document: Document) -> bool:
    """Whether anything in ``document`` carries a loss."""
    return any(
        isinstance(s, VaeSegment) or (isinstance(s, TextSegment) and s.trained and s.ids)
        for s in document.segments
    )


def fields_of(
    source: DataSource,
    sample: Sample,
    draw: Draw = first_of_all,
    limits: InputLimits | None = None,
) -> Fields:
    """The fields of ``sample``; raises BadSample where it has more than its task can train."""
    own = sample.shard.rpartition("/")[0]
    files = ImageFiles(source.image_folder or own, (own, *source.image_roots), limits)
    fields = Fields(sample, source.keys, files=files, draw=draw)
    refuse_unread(TASKS[source.task], fields)
    return fields


def image_of(source: DataSource, sample: Sample, limits: InputLimits) -> Image.Image:
    """The one image of ``sample``, upright and RGB; raises BadSample."""
    try:
        data = fields_of(source, sample, limits=limits).image()
        return decoded(data, limits.max_image_pixels, source.truncated_images)
    except BadSample as error:
        raise error.at(sample.shard, sample.key) from error.__cause__
