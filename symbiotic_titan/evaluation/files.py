"""Files that options of suites name: prompts and images. Every ValueError names the file and the place in it."""

import json
from pathlib import Path

from PIL import Image

from symbiotic_titan.data.decoding import DECODE_ERRORS, decode_image
from symbiotic_titan.data.image_files import read_picture
from symbiotic_titan.data.images import ImageSizeError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def check_file(option: str, path: str, what: str) -> None:
    """Pass if ``path`` is a file; ``what`` describes what it has to be."""
    if not Path(path).is_file():
        raise ValueError(f"{option}: must be {what}, got {path!r}, which is no file")


def check_folder(option: str, path: str, what: str) -> None:
    """Pass if ``path`` is a folder; ``what`` describes what it has to be."""
    if not path or not Path(path).is_dir():
        raise ValueError(f"{option}: must be {what}, got {path!r}, which is no folder")


def check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise ValueError(f"limit: must be at least 1, got {limit}")


def read_prompts(path: str, limit: int | None = None) -> list[str]:
    """Prompts of a file, at least one. In a text file a line is one, up to its first tab, and empty lines are skipped; a ``.json`` file is
    a list of them.

    Raises:
        ValueError: there are none, or a ``.json`` file holds anything else.
    """
    text = Path(path).read_text(encoding="utf-8")
    if path.endswith(".json"):
        prompts = _listed(text, path)
    else:
        prompts = [p for line in text.splitlines() if (p := line.partition("\t")[0].strip())]
    if not prompts:
        raise ValueError(f"{path}: holds no prompts; a line is one, or an item of a .json file")
    return prompts[:limit]


def _listed(text: str, path: str) -> list[str]:
    try:
        prompts = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: is not JSON ({error})") from error
    if not isinstance(prompts, list) or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise ValueError(f"{path}: must be a list of prompts, such as HPDv2's anime.json is")
    return prompts


def image_files(folder: str) -> list[Path]:
    """Images below ``folder``, in the order of their names; there are at least two."""
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if len(paths) < 2:
        raise ValueError(
            f"{folder}: holds {len(paths)} images ({', '.join(IMAGE_SUFFIXES)}); at least 2 are needed"
        )
    return paths


def opened(path: str) -> Image.Image:
    """The RGB image of the file ``path``."""
    try:
        data = read_picture(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    return decoded(data, path)


def decoded(data: bytes, where: str) -> Image.Image:
    """The RGB image that ``data`` encode; ``where`` names them in a message."""
    try:
        return decode_image(data)
    except (*DECODE_ERRORS, ImageSizeError) as error:
        raise ValueError(f"{where}: is no image that can be read ({error})") from error
