"""Prompts, with the layout of training documents (``data.samples``) up to the token where the model continues.

text          <bos> TEXT                                                         as the task lm
conversation  <bos> <user> <vit_start> [vit] <vit_end> QUESTION <assistant>      as mmu; without images, as any conversation
image         <bos> <user> CAPTION <assistant> <vae_start>                       as t2i; an empty CAPTION is a dropped one
"""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from symbiotic_titan.config.data import Data
from symbiotic_titan.data.decoding import upright_rgb
from symbiotic_titan.data.documents import (
    Document,
    Segment,
    TextSegment,
    VitSegment,
    drop_overlap,
)
from symbiotic_titan.data.images import (
    ImageSizeError,
    vit_patches,
)
from symbiotic_titan.data.tokenizer import Tokenizer
from symbiotic_titan.sequence.geometry import ImageGeometry
from symbiotic_titan.sequence.modality import NO_TASK

# A text, or its token ids.
Text = str | list[int]


def ids_of(tokenizer: Tokenizer, text: Text) -> list[int]:
    """Token ids of ``text``; ids are returned unchanged."""
    return tokenizer.encode(text) if isinstance(text, str) else list(text)


@dataclass(frozen=True)
class PromptMaker:
    """Lays out prompts. ``data``: the pixel budget of images; ``seq_len``: positions of a row."""

    tokenizer: Tokenizer
    geometry: ImageGeometry
    data: Data
    seq_len: int

    def text(self, text: Text) -> Document:
        """A document that begins with ``text``."""
        ids = [*self.tokenizer.opening, *ids_of(self.tokenizer, text)]
        return Document(NO_TASK, (TextSegment(ids),))

    def conversation(self, question: Text, images: Sequence[Image.Image] = ()) -> Document:
        """A conversation up to the assistant's first token; the user's message has ``images``, then ``question``.

        Raises:
            ValueError: an image has a size or an aspect ratio that the image encoder does not accept.
        """
        tokenizer, special = self.tokenizer, self.tokenizer.special
        opening = tokenizer.opening
        user, assistant = tokenizer.turn("user"), tokenizer.turn("assistant")
        segments: list[Segment] = [TextSegment([*opening, *drop_overlap(opening, user.prefix)])]
        for image in images:
            segments += [
                TextSegment([special.vit_start]),
                self._seen(image),
                TextSegment([special.vit_end]),
            ]
        between = drop_overlap(user.suffix, [*tokenizer.separator, *assistant.prefix])
        end = [*ids_of(tokenizer, question), *user.suffix, *between]
        return Document(NO_TASK, (*segments, TextSegment(end)))

    def image(self, caption: Text) -> Document:
        """A document up to the first token of the image that ``caption`` describes."""
        start = TextSegment([self.tokenizer.special.vae_start])
        return Document(NO_TASK, (*self.conversation(caption).segments, start))

    def check_room(self, documents: Sequence[Document], wanted: Sequence[int], what: str) -> None:
        """Pass if each prompt fits in a row together with ``wanted`` more tokens, which messages call ``what``.

        Raises:
            ValueError: names the first prompt that is too long.
        """
        for number, (document, count) in enumerate(zip(documents, wanted, strict=True)):
            excess = document.num_tokens + count - self.seq_len
            if excess > 0:
                raise ValueError(
                    f"prompt #{number}: its {document.num_tokens} tokens and {count} {what} are more than a row holds, "
                    f"training.seq_len = {self.seq_len}; shorten it by {excess}"
                )

    def _seen(self, image: Image.Image) -> VitSegment:
        try:
            rgb = upright_rgb(image)
            return vit_patches(rgb, self.data.vit_pixels, self.geometry, self.data.vit_min_pixels)
        except ImageSizeError as error:
            raise ValueError(f"an image of a prompt has the wrong size ({error})") from error
