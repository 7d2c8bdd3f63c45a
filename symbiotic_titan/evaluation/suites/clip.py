"""CLIP models in the layout of transformers, from local folders, for the suites that compare pictures with texts. Nothing is downloaded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from symbiotic_titan.evaluation.files import check_folder

# Makes the inputs of a CLIP model from texts and images.
Processor = Callable[..., Any]


def check_clip(option: str, folder: str) -> None:
    """Pass if ``folder``, the value of ``option``, has the config of a model."""
    check_folder(option, folder, "the folder of a CLIP model")
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{option}: {folder} has no config.json, so it holds no CLIP model")


@contextmanager
def _naming(folder: str) -> Iterator[None]:
    """Raises ValueError, which names ``folder``, for files that are missing or not those of a CLIP model."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: holds no CLIP model that can be read ({error})") from error


def load_processor(folder: str) -> Processor:
    """Tokenizer and image processor of ``folder``; a text that is too long keeps its end token, whose features are the text's.

    Raises:
        ValueError: files are missing, or are not those of a CLIP model.
    """
    from transformers import CLIPProcessor

    with _naming(folder):
        processor: Any = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    return partial(processor, truncation=True)


def load_model(folder: str) -> Any:
    """The CLIPModel of ``folder`` with its weights, ready to score. Raises as ``load_processor`` does."""
    from transformers import CLIPModel

    with _naming(folder):
        return CLIPModel.from_pretrained(folder, local_files_only=True).eval()


def untrained_model(folder: str) -> Any:
    """A CLIPModel of the config of ``folder`` with random weights in float32. Raises as ``load_processor`` does."""
    from transformers import CLIPConfig, CLIPModel

    with _naming(folder):
        return CLIPModel(CLIPConfig.from_pretrained(folder, local_files_only=True)).eval()
