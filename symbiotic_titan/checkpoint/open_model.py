"""One way to open a stored model, whatever it is stored as."""

from pathlib import Path

from symbiotic_titan.checkpoint.hugging_face import CONFIG, HuggingFaceModel
from symbiotic_titan.checkpoint.safetensors_folder import SafetensorsModel, has_weights
from symbiotic_titan.checkpoint.stored_model import StoredModel
from symbiotic_titan.checkpoint.tensor_store import DistributedCheckpoint
from symbiotic_titan.model import shape_file


def open_model(folder: Path) -> StoredModel:
    """A distributed checkpoint, a released model, or safetensors under our names: what lies in the folder decides.

    Raises:
        ValueError: there is none of them, or it is damaged.
    """
    if not (folder / ".metadata").is_file():
        if has_weights(folder) and (folder / shape_file.NAME).is_file():
            return SafetensorsModel(folder)
        if has_weights(folder) or (folder / CONFIG).is_file():
            return HuggingFaceModel(folder)
    return DistributedCheckpoint(folder)
