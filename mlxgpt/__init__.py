"""mlxgpt: train and sample small GPTs with MLX, on the Apple GPU or on a CPU."""

import importlib
import sys
from pkgutil import extend_path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Run from a checkout, this package is the checkout's folder and has no compiled `_core` in it:
# look for that in the installed package too.
__path__ = extend_path(__path__, __name__)

try:
    import mlx.core  # noqa: F401 (only to see that it loads)
except ImportError as error:
    _message = (
        f"mlxgpt: MLX doesn't load ({error}); on Linux install one of its builds: "
        "pip install 'mlxgpt[cpu]' (or cuda12, cuda13)"
    )
    if sys.argv[0] == "-m":  # python -m mlxgpt.train: a line for a person, no traceback
        sys.exit(_message)
    raise ImportError(_message) from error

if TYPE_CHECKING:
    from .generation.samples import load, sample, stream

__all__ = ["load", "sample", "stream"]


def __getattr__(name: str) -> Any:
    """The Python interface, imported when a name of it is first used: `import mlxgpt` alone takes no time."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(".generation.samples", __name__), name)
