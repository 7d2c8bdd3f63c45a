"""The task table: what a sample is trained for. Data, losses and reports read the table and name no task themselves.

Another package adds a task with ``symbiotic_titan.extend.register_task(Task("name", ...))``. A task's number in tensors is its index
in the registry, so tasks are only ever appended.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from symbiotic_titan.registry import Registry

_COMMON_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
_OTHER_EXTENSIONS = ("gif", "bmp", "tif", "tiff", "avif", "jfif", "jp2", "ppm", "pgm", "tga")
IMAGE_EXTENSIONS = (*_COMMON_EXTENSIONS, *_OTHER_EXTENSIONS)

# Keys of a table that hold or name its image; the first that is there and not empty counts. ``datasets`` has bytes and path, OpenAI
# image_url and url, Anthropic source and data, mmc4 image_base64, image_name and raw_url.
IMAGE_KEYS = (
    *("bytes", "image", "image_url", "source", "base64", "image_base64", "data"),
    *("path", "image_path", "image_name", "file_name", "url", "raw_url"),
)

# Numbers of the edits of one sample, in columns of their own: ``instruction_1``, ``edit_image_1`` and so on.
EDIT_NUMBERS = range(1, 10)

# Field of a sample -> names to look it up by, unless the source's ``keys`` name it. The first name that the sample has counts.
FIELDS = {
    "text": ("text", "txt"),
    "image": (*_COMMON_EXTENSIONS, "image", "images", *_OTHER_EXTENSIONS),
    "caption": ("caption", "txt", "captions"),
    "question": ("question",),
    "answer": ("answer",),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "segments": ("segments",),
    "system": ("system", "system_prompt"),
    "texts": ("texts",),
    "image_info": ("image_info",),
    "text_list": ("text_list",),
    "instruction": ("instruction", "edit_prompt", "edited_prompt_list", "edit"),
    "input": ("input",),
    "output": ("output",),
    "history": ("history",),
    "input_image": ("input_image", "source_image", "source_img", "original_image", "src_img"),
    "output_image": ("output_image", "target_image", "target_img", "edited_image", "edited_img"),
    "image_list": ("image_list",),
    "instruction_list": ("instruction_list",),
    **{
        f"{name}_{n}": (f"{name}_{n}",)
        for name in ("instruction", "edit_image")
        for n in EDIT_NUMBERS
    },
}

# Schemas with a document layout in ``data.layouts``. The last field of a schema distinguishes it from the others.
TEXT_SCHEMA = ("text",)
QUESTION_SCHEMA = ("image", "question", "answer")
CAPTION_SCHEMA = ("image", "caption")
SEGMENTS_SCHEMA = ("segments",)
CONVERSATION_SCHEMAS = (("messages",), ("conversations",))
# Lists of questions with their answers (Cauldron, FineVision), or texts among ``images`` (OBELICS, MINT-1T).
TEXTS_SCHEMA = ("texts",)
ALPACA_SCHEMA = ("instruction", "output")
MMC4_SCHEMA = ("image_info", "text_list")
EDIT_SCHEMA = ("input_image", "instruction", "output_image")
EDIT_CHAIN_SCHEMA = ("image_list", "instruction_list")
NUMBERED_EDITS_SCHEMA = ("input_image", "instruction_1", "edit_image_1")
KNOWN_SCHEMAS = (
    *(TEXT_SCHEMA, QUESTION_SCHEMA, CAPTION_SCHEMA, SEGMENTS_SCHEMA),
    *CONVERSATION_SCHEMAS,
    *(TEXTS_SCHEMA, ALPACA_SCHEMA, MMC4_SCHEMA),
    *(EDIT_SCHEMA, EDIT_CHAIN_SCHEMA, NUMBERED_EDITS_SCHEMA),
)

# Last field of a schema -> fields that its samples may have besides.
OPTIONAL_FIELDS = {
    "messages": ("system",),
    "conversations": ("system",),
    "output": ("input", "history", "system"),
    "edit_image_1": tuple(
        f"{name}_{n}" for n in EDIT_NUMBERS[1:] for name in ("instruction", "edit_image")
    ),
}

# Fields that may hold several texts, so that one is chosen at random each time the sample is read.
DRAWN_FIELDS = ("caption", "answer", "instruction")

# Target images of a sample: see ``Task``.
TargetImageCount = Literal["none", "one", "any"]


@dataclass(frozen=True)
class Task:
    """One row of the table of tasks.

    name:              as in ``[[data.sources]]``, in ``data.max_row_share`` and in the metrics ``loss/by_task/<name>_text``.
    schemas:           alternative sets of fields; the first one that a sample has in full applies.
    input_images:      samples may have images that the model reads.
    target_images:     images that the model learns to generate: ``none``; exactly ``one`` per sample, so that its latents can be
                       cached; or ``any`` number. Their latents carry the flow loss.
    trained_fields:    fields whose text carries the next-token loss.
    trained_roles:     speakers whose turns in a conversation carry it.
    drops_caption:     ``data.condition_dropout`` applies: some samples are trained without their caption.
    shortens_caption:  ``too_long = "truncate"`` cuts the caption instead of the end of the document.
    splits_text:       a text longer than a packed sequence continues in further documents.
    layout:            ``data.layouts.TaskSample`` -> a list of segments per document, for a task with its own layout. None: the
                       schema's layout.

    Raises:
        ValueError: a name that cannot be a config key, a value of the wrong form, an unknown field, or a schema without a layout.
    """

    name: str
    schemas: tuple[tuple[str, ...], ...]
    input_images: bool = False
    target_images: TargetImageCount = "none"
    trained_fields: tuple[str, ...] = ()
    trained_roles: tuple[str, ...] = ("assistant",)
    drops_caption: bool = False
    shortens_caption: bool = False
    splits_text: bool = False
    layout: Callable[[Any], list[list[Any]]] | None = None

    def __post_init__(self) -> None:
        where = f"task {self.name!r}"
        if not self.name.isidentifier():
            raise ValueError(f"{where}: a name has only letters, digits and underscores; rename it")
        self._check_forms(where)
        if not self.schemas or not all(self.schemas):
            raise ValueError(f"{where}: schemas is empty; name the fields that its samples have")
        for field in self.fields:
            if field not in FIELDS:
                raise ValueError(
                    f"{where}: schemas has the unknown field {field!r}; choose from {', '.join(FIELDS)}"
                )
        for field in self.trained_fields:
            if field not in self.fields:
                raise ValueError(
                    f"{where}: trained_fields has {field!r}, which no schema has; choose from {', '.join(self.fields)}"
                )
        for schema in self.schemas:
            if self.layout is None and schema not in KNOWN_SCHEMAS:
                known = ", ".join(" + ".join(known) for known in KNOWN_SCHEMAS)
                raise ValueError(
                    f"{where}: no layout is known for samples of {' + '.join(schema)}; choose from {known}, or set layout to a "
                    "function that makes their documents"
                )

    def _check_forms(self, where: str) -> None:
        if not isinstance(self.schemas, tuple) or not all(
            isinstance(schema, tuple) and all(isinstance(field, str) for field in schema)
            for schema in self.schemas
        ):
            raise ValueError(
                f"{where}: schemas must be a tuple of tuples of texts, such as {(QUESTION_SCHEMA,)}, got {self.schemas!r}"
            )
        allowed = get_args(TargetImageCount)
        if self.target_images not in allowed:
            raise ValueError(
                f"{where}: target_images must be one of {', '.join(allowed)}, got {self.target_images!r}"
            )

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields of the schemas, the optional ones after them, without repetition."""
        needed = [field for schema in self.schemas for field in schema]
        optional = [
            field for schema in self.schemas for field in OPTIONAL_FIELDS.get(schema[-1], ())
        ]
        return tuple(dict.fromkeys((*needed, *optional)))

    @property
    def has_images(self) -> bool:
        return self.input_images or self.has_targets

    @property
    def has_targets(self) -> bool:
        """Whether its samples may have target images."""
        return self.target_images != "none"

    @property
    def is_cacheable(self) -> bool:
        """Whether ``latents.cache`` can hold the images of its samples."""
        return self.target_images == "one"

    @property
    def is_understanding(self) -> bool:
        """Whether its documents hold text and input images only."""
        return not self.has_targets


TASKS: Registry[Task] = Registry("data.sources.task")


def register_task(task: Task) -> Task:
    """Append ``task`` to the table; raises ValueError if it is no ``Task`` or its name is taken."""
    if not isinstance(task, Task):
        raise ValueError(f"{TASKS.key}: register_task takes a Task, got {task!r}")
    return TASKS.register(task.name, task)


def task_names() -> tuple[str, ...]:
    """Names by task number. Losses by task have one entry for each."""
    return tuple(TASKS)


def task_number(name: str) -> int:
    """Number of the task ``name`` in tensors."""
    return task_names().index(name)


for _task in (
    Task(
        "lm",
        (TEXT_SCHEMA, *CONVERSATION_SCHEMAS, ALPACA_SCHEMA),
        trained_fields=("text",),
        splits_text=True,
    ),
    Task(
        "mmu",
        (QUESTION_SCHEMA, *CONVERSATION_SCHEMAS, TEXTS_SCHEMA, ALPACA_SCHEMA),
        input_images=True,
        trained_fields=("answer",),
    ),
    *(
        Task(
            name,
            (CAPTION_SCHEMA,),
            target_images="one",
            trained_fields=("caption",),
            drops_caption=True,
            shortens_caption=True,
        )
        for name in ("t2i", "t2i_long")
    ),
    Task(
        "interleaved",
        (
            *(SEGMENTS_SCHEMA, *CONVERSATION_SCHEMAS, TEXTS_SCHEMA),
            *(MMC4_SCHEMA, EDIT_SCHEMA, EDIT_CHAIN_SCHEMA, NUMBERED_EDITS_SCHEMA),
        ),
        input_images=True,
        target_images="any",
        trained_fields=("segments",),
    ),
):
    register_task(_task)
