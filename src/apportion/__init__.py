"""apportion: give every layer of a PyTorch model the bits, rank and sparsity it deserves."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apportion.spaces.choice import Choice
    from apportion.spaces.kernel_sizes import elastic_kernel
    from apportion.spaces.loading import load
    from apportion.spaces.supernet import train_supernet
    from apportion.spaces.unit_order import sort_units
    from apportion.studies.specification import StudySpec
    from apportion.studies.study import Study

__version__ = "0.1.0"
__all__ = [
    "Choice",
    "Study",
    "StudySpec",
    "__version__",
    "elastic_kernel",
    "load",
    "sort_units",
    "train_supernet",
]

_HOMES = {
    "Choice": "apportion.spaces.choice",
    "Study": "apportion.studies.study",
    "StudySpec": "apportion.studies.specification",
    "elastic_kernel": "apportion.spaces.kernel_sizes",
    "load": "apportion.spaces.loading",
    "sort_units": "apportion.spaces.unit_order",
    "train_supernet": "apportion.spaces.supernet",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import apportion` is fast."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
