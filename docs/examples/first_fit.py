"""A packing: every waiting document that still fits, the oldest first."""

from symbiotic_titan.data.documents import Document
from symbiotic_titan.data.packing import SequenceSize
from symbiotic_titan.extend import register_packing


@register_packing("first_fit")
def first_fit(waiting: list[Document], size: SequenceSize) -> list[int]:
    chosen, left = [], size
    for i, document in enumerate(waiting):
        if left.fits(document):
            chosen.append(i)
            left = left.minus(document)
    return chosen
