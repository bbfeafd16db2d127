"""Command lines: from words to a checked config, and from an exception to one line for a person."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

from .settings import nearest, settings

Config = TypeVar("Config")
Flag = tuple[str, ...]  # (flag, value), (switch,) or (positional,)
_started_as = ContextVar("_started_as", default="")  # the name that `run` was given


class UsageError(Exception):
    """A mistake on the command line: exit status 2."""


def parse(cls: type[Config], args: Sequence[str], prog: str, default: Config | None = None) -> Config:
    """A config from command-line arguments; `--help` prints its settings and exits.

    prog: the command's name in --help, unless `run` runs it under another one. default: the config that the arguments
    change. Flags are spelt with - or _; booleans as --bias, --no-bias or nanoGPT's --bias=False.
    UsageError holds one line: an unknown flag and the nearest valid one, or the value that doesn't fit.
    """
    return from_flags(cls, read_flags(cls, args), prog, default)


def from_flags(cls: type[Config], flags: Sequence[Flag], prog: str, default: Config | None = None) -> Config:
    """A config from the flags of a command line, as in parse; the default has the values of all other settings."""
    import tyro  # imported here because it takes 0.1 s, which the list of verbs does not need

    words = ["=".join(flag) for flag in flags]  # flag and value in one: a value may begin with a dash
    flat: Any = tyro.conf.OmitArgPrefixes[cls]  # type: ignore[valid-type, misc]
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            return tyro.cli(flat, args=words, default=default, prog=_started_as.get() or prog, use_underscores=True)
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        raise UsageError(_one_line(output.getvalue())) from None
    except ValueError as error:  # from the config's __post_init__
        raise UsageError(str(error)) from None


def given(flags: Sequence[Flag]) -> dict[str, str]:
    """The settings that flags set, as written: name -> value ('' for a switch)."""
    pairs = (flag for flag in flags if flag[0].startswith("--"))
    return {name[2:].removeprefix("no_"): "".join(value) for name, *value in pairs}


def read_flags(cls: type, args: Sequence[str]) -> list[Flag]:
    """The flags of a command line, their names checked. UsageError names an unknown flag and the nearest valid one."""
    return list(_flags(settings(cls), args))


def _flags(kinds: Mapping[str, Any], args: Sequence[str]) -> Iterator[Flag]:
    """The same one by one, given the settings that there are and their types."""
    words = list(args)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            yield (word,)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        positive = name.removeprefix("no_")
        if name == "help":
            yield ("--help",)
        elif kinds.get(positive) is bool:
            if not equals and name == positive and words and words[0].lower() in ("true", "false"):
                value = words.pop(0)
            if value.lower() not in ("", "true", "false"):
                raise UsageError(f"--{name} is {value}, expected True or False")
            on = (name == positive) == (value.lower() != "false")
            yield (f"--{positive}" if on else f"--no_{positive}",)
        elif name not in kinds:
            raise UsageError(f"unknown flag --{name}{nearest(name, kinds)}")
        elif not equals and not words:
            raise UsageError(f"--{name} has no value")
        else:
            yield (f"--{name}", value if equals else words.pop(0))


def _one_line(box: str) -> str:
    """tyro's framed error message as one line. Without UTF-8 the frame is a title over a line of dashes."""
    rows = (row.strip(" │") for row in box.splitlines() if not row.startswith(("╭", "╰")))
    parts = re.split(r"\n[─-]{10,}", "\n".join(rows))
    text = (parts[0] if "╭" in box else parts[1]).split("For full helptext")[0]
    return re.sub(r"^Error parsing [\w.]+: ", "", re.sub(r"\s+", " ", text).strip())


def run(prog: str, main: Callable[[Sequence[str]], None], args: Sequence[str] | None = None) -> None:
    """Runs a command and exits: a user's mistake is one line on stderr, never a traceback.

    prog: the command's name, as it was started. args: its arguments; None takes those of the process.
    Exit status 2 for bad usage, 1 for failure, 130 after Ctrl-C. MLXGPT_TRACEBACK=1 raises the exception instead.
    """
    token = _started_as.set(prog)
    for stream in (sys.stdout, sys.stderr):  # a character that the terminal can't show becomes a ?
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        main(sys.argv[1:] if args is None else args)
        sys.stdout.flush()
        status = 0
    except BrokenPipeError:  # the reader has stopped reading, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except (UsageError, ValueError, OSError, MemoryError, RuntimeError) as error:
        unexpected = isinstance(error, RuntimeError) and not is_out_of_memory(error)
        if os.environ.get("MLXGPT_TRACEBACK") == "1" or unexpected:
            raise
        print(f"{prog}: error: {describe(error)}", file=sys.stderr)
        status = 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        status = 130
    finally:
        _started_as.reset(token)
    sys.exit(status)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory was not to be had: MLX raises a RuntimeError, on a GPU that of Metal or
    CUDA."""
    names = "alloc", "out of memory", "OutOfMemory", "Insufficient Memory"
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(name in str(error) for name in names)
    )


def describe(error: BaseException) -> str:
    """An exception as one line: the file or setting, and what is wrong with it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
