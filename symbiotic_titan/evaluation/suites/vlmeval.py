"""VLMEvalKit's interface of a model, implemented by a Generator.

VLMEvalKit is installed from its repository. Importing it turns off the verification of TLS certificates for the whole process, so
nothing else imports this module; docs/evaluation.md has a script that runs the kit with it.
"""

from collections.abc import Sequence
from typing import TypedDict

from vlmeval.vlm.base import BaseModel

from symbiotic_titan.evaluation.files import opened
from symbiotic_titan.inference.generator import Generator


class Item(TypedDict):
    """A part of a message: ``type`` is text, or image, whose ``value`` is the path of its file."""

    type: str
    value: str


class SymbioticVLM(BaseModel):
    """Puts the images of a message first, then its texts, one per line; decodes greedily."""

    INTERLEAVE = False
    allowed_types = ["text", "image"]

    def __init__(
        self, config: str, checkpoint: str | None = None, *, max_tokens: int = 512
    ) -> None:
        """``config`` and ``checkpoint`` as in ``Generator.load``."""
        super().__init__()
        self.generator = Generator.load(config, checkpoint)
        self.max_tokens = max_tokens

    def generate_inner(self, message: Sequence[Item], dataset: str | None = None) -> str:
        texts = [item["value"] for item in message if item["type"] == "text"]
        images = [opened(item["value"]) for item in message if item["type"] == "image"]
        [completion] = self.generator.text(["\n".join(texts)], [images], max_tokens=self.max_tokens)
        return completion.text
