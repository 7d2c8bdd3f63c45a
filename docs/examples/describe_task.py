"""A task: the model reads an image and learns to describe it, from the same samples that t2i generates images from."""

from symbiotic_titan.data.documents import Segment, TextSegment
from symbiotic_titan.data.layouts import TaskSample
from symbiotic_titan.extend import Task, register_task


def describe(sample: TaskSample) -> list[list[Segment]]:
    """One document: image, caption. The caption and the token that ends it carry the loss."""
    document: list[Segment] = [
        TextSegment(sample.tokenizer.opening),
        *sample.input_image(sample.fields.image()),
        sample.text(sample.fields.text("caption"), trained=True),
        sample.special("eos", trained=True),
    ]
    return [document]


register_task(
    Task(
        "describe",
        schemas=(("image", "caption"),),
        input_images=True,
        trained_fields=("caption",),
        layout=describe,
    )
)
