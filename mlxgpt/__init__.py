"""mlxgpt: train and sample small GPTs with MLX, on the Apple GPU or on a CPU."""

import importlib
import os
import sys
from pkgutil import extend_path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Run from a checkout, this package is the checkout's folder and has no compiled `_core` in it:
# look for that in the installed package too.
__path__ = extend_path(__path__, __name__)


def load_mlx(is_command: bool) -> None:
    """Loads MLX. Where that fails, ImportError says what to install; a command prints it as one line and exits."""
    try:
        import mlx.core  # noqa: F401 (only to see that it loads)
    except ImportError as error:
        message = (
            f"mlxgpt: MLX doesn't load ({error}); on Linux install one of its builds: "
            "pip install 'mlxgpt[cpu]' (or cuda12, cuda13)"
        )
        if is_command:
            sys.exit(message)
        raise ImportError(message) from error


def _may_list_verbs() -> bool:
    """Whether this process was started as `mlxgpt` or `python -m mlxgpt`: `__main__` loads MLX when a verb runs."""
    after_m = sys.orig_argv[sys.orig_argv.index("-m") + 1 :] if "-m" in sys.orig_argv else []
    return os.path.basename(sys.argv[0]) == __name__ or after_m[:1] == [__name__]


if not _may_list_verbs():
    load_mlx(is_command=sys.argv[0] == "-m")  # python -m mlxgpt.VERB

if TYPE_CHECKING:
    from .generation.samples import load, sample, stream

__all__ = ["load", "sample", "stream"]


def __getattr__(name: str) -> Any:
    """The functions of the Python interface. Their module is imported when one of them is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(".generation.samples", __name__), name)
