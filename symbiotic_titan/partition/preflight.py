"""What is seen to before a model is converted: that its sources are what they are taken for, and that writing spares them."""

from collections.abc import Iterable
from pathlib import Path

from symbiotic_titan.hf.model import open_model
from symbiotic_titan.model import model_config as shape_file
from symbiotic_titan.partition.apply import plan_of_checkpoint
from symbiotic_titan.partition.profile import router_hash
from symbiotic_titan.weights.safetensors import has_weights


def check_apart(out: Path, sources: Iterable[Path | str | None], option: str = "--out") -> None:
    """Pass if writing ``out`` leaves alone what is read: ``sources``, files and folders (None: not given).

    Raises:
        ValueError: one of them is ``out``, lies in it, or holds it.
    """
    target = out.resolve()
    for source in (Path(name) for name in sources if name is not None):
        place = source.resolve()
        if target == place:
            relation = f"is {source}"
        elif target in place.parents:
            relation = f"holds {source}"
        elif place in target.parents:
            relation = f"lies in {source}"
        else:
            continue
        raise ValueError(f"{option}: {out} {relation}, which this command reads; choose another")


def check_release(folder: Path) -> None:
    """Pass if ``--hf`` is a folder.

    Raises:
        ValueError: it is a file, nothing, or the name of a model on a hub: nothing is fetched here.
    """
    if not folder.is_dir():
        found = "is a file" if folder.is_file() else "no such folder"
        raise ValueError(
            f"--hf: {folder}: {found}; give the local folder of a download (nothing is fetched here)"
        )


def check_holds_tensors(folder: Path, option: str) -> None:
    """Pass unless a folder holds a shape only, as ``from-hf --shape-only`` writes.

    Raises:
        ValueError: it does.
    """
    has_tensors = (folder / ".metadata").is_file() or has_weights(folder)
    if not has_tensors and (folder / shape_file.NAME).is_file():
        raise ValueError(
            f"{option}: {folder} holds a shape only; name the released folder, where the tensors are"
        )


def check_original(checkpoint: Path, original: Path) -> None:
    """Pass if ``checkpoint`` was partitioned from ``original``, or nobody wrote down what it was made from.

    Raises:
        ValueError: it was made from a model with other routers.
    """
    plan = plan_of_checkpoint(checkpoint)
    if plan is None:
        return
    found = router_hash(open_model(original))
    if plan.model.routers != found:
        raise ValueError(
            f"the plan of {checkpoint} is of another model: its routers have hash {plan.model.routers} (flavor "
            f"{plan.model.flavor}, step {plan.model.step}), those of {original} {found}; name with --original what the checkpoint "
            "was made from"
        )
