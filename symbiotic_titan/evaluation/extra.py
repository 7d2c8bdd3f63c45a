"""scikit-learn, and scipy which it brings: the extra ``demo``, needed where something is scored and not before."""

from importlib import import_module
from typing import Any


def demo_extra(module: str) -> Any:
    """``module`` of scikit-learn or scipy; ValueError where it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(
            f"the demo world's score needs {module}, which comes with scikit-learn; install it: pip install scikit-learn"
        ) from error
