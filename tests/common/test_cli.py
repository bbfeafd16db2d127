"""The command line: spellings of flags, errors in one line, and what a command's exit says."""

from __future__ import annotations

import errno
import sys
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
import tyro

from mlxgpt.common import cli


@dataclass(frozen=True)
class Size:
    width: int = 2
    """how wide"""


@dataclass(frozen=True)
class Shop:
    """Open a shop."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """what it is called"""
    open: bool = True
    """whether it is open"""
    kind: Literal["small", "large"] = "small"
    """how large"""
    sign: str = ""
    """what stands on its sign"""
    size: Size = field(default_factory=Size)

    def __post_init__(self) -> None:
        if self.size.width < 1:
            raise ValueError(f"width is {self.size.width}, expected at least 1")


def parse(*args: str, default: Shop | None = None) -> Shop:
    return cli.parse(Shop, args, "shop", default)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["a", "b"], Shop(names=("a", "b"))),
        (["--width", "3"], Shop(size=Size(3))),
        (["--width=3", "a"], Shop(names=("a",), size=Size(3))),
        (["--open"], Shop()),
        (["--no-open"], Shop(open=False)),
        (["--no_open"], Shop(open=False)),
        (["--open=False"], Shop(open=False)),
        (["--open", "false", "a"], Shop(names=("a",), open=False)),
        (["--no_open=False"], Shop()),
        (["--sign", "--closed--"], Shop(sign="--closed--")),
        (["--sign", ""], Shop(sign="")),
        (["--sign=a=b"], Shop(sign="a=b")),
    ],
)
def test_spellings_of_flags(args, expected):
    assert parse(*args) == expected


def test_flags_change_the_default():
    default = Shop(kind="large", size=Size(7))
    assert parse("--no-open", default=default) == Shop(open=False, kind="large", size=Size(7))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--widht", "3"], "unknown flag --widht (did you mean 'width'?)"),
        (["--width", "three"], "three"),
        (["--width"], "--width has no value"),
        (["--kind", "vast"], "vast"),
        (["--open=maybe"], "--open is maybe, expected True or False"),
        (["--width", "0"], "width is 0, expected at least 1"),
    ],
)
def test_bad_usage_is_one_line(args, message):
    with pytest.raises(cli.UsageError) as error:
        parse(*args)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_help_names_the_command_and_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert not stop.value.code
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert text.startswith("usage: shop [-h]")
    for words in ("--width", "how wide (default: 2)", "--open", "--kind", "--sign", "Open a shop."):
        assert words in text


def run(main, *args):
    with pytest.raises(SystemExit) as stop:
        cli.run("shop", main, args)
    return stop.value.code


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (cli.UsageError("unknown flag --x"), 2, "unknown flag --x"),
        (ValueError("width is 0,\n  expected 1"), 1, "width is 0, expected 1"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"), 1, "a.txt: No such file or directory"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
        (MemoryError(), 1, "MemoryError"),
        (RuntimeError("[malloc] Unable to allocate 10 bytes"), 1, "[malloc] Unable to allocate 10 bytes"),
    ],
)
def test_a_users_mistake_is_one_line(error, status, line, capsys):
    def main(args):
        raise error

    assert run(main) == status
    assert capsys.readouterr().err == f"shop: error: {line}\n"


def test_other_exceptions_are_raised(monkeypatch):
    def main(args):
        raise {"runtime": RuntimeError("a bug"), "type": TypeError("a bug"), "value": ValueError("a mistake")}[args[0]]

    for name, error in (("runtime", RuntimeError), ("type", TypeError)):
        with pytest.raises(error, match="a bug"):
            cli.run("shop", main, [name])
    monkeypatch.setenv("MLXGPT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="a mistake"):
        cli.run("shop", main, ["value"])


def test_success_and_interruption(capsys, monkeypatch):
    seen = []
    assert run(seen.append, "a", "b") == 0
    assert seen == [("a", "b")]
    monkeypatch.setattr(sys, "argv", ["shop", "c"])
    with pytest.raises(SystemExit) as stop:
        cli.run("shop", seen.append)
    assert (stop.value.code, seen[1:]) == (0, [["c"]])

    def main(args):
        raise KeyboardInterrupt

    assert run(main) == 130
    assert capsys.readouterr().err == "\n"


def test_a_reader_that_stops_reading_is_no_error(run_python):
    program = (
        "import subprocess, sys\n"
        "code = 'from mlxgpt.common import cli; cli.run(\"shop\", lambda args: [print(n) for n in range(10**6)])'\n"
        "writer = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)\n"
        "writer.stdout.readline()\n"
        "writer.stdout.close()\n"
        "print(writer.stderr.read().decode(), writer.wait())\n"
    )
    assert run_python("-c", program).stdout.strip() == "1"


def test_the_name_that_a_command_was_started_by_wins(capsys):
    assert run(lambda args: cli.parse(Shop, args, "another"), "--help") == 0
    assert capsys.readouterr().out.startswith("usage: shop [-h]")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("[malloc] Unable to allocate 8000 bytes."), True),
        (RuntimeError("[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum"), True),
        (RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (00000008:...)."), True),
        (RuntimeError("cudaMallocAsync(&data, size, stream) failed: out of memory"), True),
        (RuntimeError("[matmul] Last dimension of first input must match"), False),
        (ValueError("alloc"), False),
    ],
)
def test_which_errors_are_of_memory(error, expected):
    assert cli.is_out_of_memory(error) is expected
