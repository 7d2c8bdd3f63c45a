"""Pictures with a note of how they were made, as PNG files that carry it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo


@dataclass(frozen=True)
class Picture:
    """An RGB image and what it was made with: prompt, seed, index, sampler, steps, shift, guidance, checkpoint."""

    image: Image.Image
    settings: Mapping[str, object]

    def save(self, path: Path | str) -> None:
        """Write a PNG file whose text chunks are the settings; ``Image.open(path).text`` reads them."""
        notes = PngInfo()
        for name, value in self.settings.items():
            notes.add_text(name, str(value))
        self.image.save(path, "PNG", pnginfo=notes)
