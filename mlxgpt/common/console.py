"""What the program shows a person: lines, sizes, durations, peak memory and progress bars."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import mlx.core as mx

if TYPE_CHECKING:
    from rich.console import Console


def say(console: Console, text: str, style: str = "") -> None:
    """Prints a line as it is: rich looks for no markup or emoji in it, and does not wrap it."""
    console.print(text, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)


def size_text(n_bytes: float) -> str:
    """A number of bytes, for a person to read: 652 MB, 1.2 GB."""
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.0f} MB"


def duration_text(seconds: float) -> str:
    """A duration, for a person to read: h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def peak_memory() -> int:
    """The most bytes held at one time so far: by MLX on a GPU, by the process on a CPU."""
    if mx.default_device().type == mx.gpu:
        return mx.get_peak_memory()
    try:  # on Linux ru_maxrss counts the memory of the parent process, too, from before this program was started
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # bytes in one unit of ru_maxrss
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Advance(Protocol):
    def __call__(self, amount: int, title: str | None = None) -> None:
        """Moves a progress bar on by an amount, and sets its title if one is given."""


@contextlib.contextmanager
def progress(title: str, total: int, *, done: int = 0, in_bytes: bool = False) -> Iterator[Advance]:
    """Yields a function that moves a progress bar on. The bar disappears when the block ends.

    It is shown on standard error, and only where that is a terminal. total: the amount that makes it complete; done:
    the amount done before it begins. in_bytes: amounts are bytes, and the bar shows them and their speed.
    """
    if not sys.stderr.isatty():
        yield lambda amount, title=None: None
        return
    # imported here because rich would delay the first token of `generate`
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        ProgressColumn,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn()]
    if in_bytes:
        columns += [DownloadColumn(), TransferSpeedColumn()]
    columns.append(TimeRemainingColumn())
    # rich may not redirect standard output, which may be a file
    bar = Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False)
    with bar:
        task = bar.add_task(title, total=total, completed=done)

        def advance(amount: int, title: str | None = None) -> None:
            bar.update(task, advance=amount, description=title)

        yield advance
