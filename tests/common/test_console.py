"""What a person is shown: sizes, durations, peak memory, lines, and progress bars on a terminal only."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from rich.console import Console

from mlxgpt.common import console


def test_memory_grows_with_what_is_held():
    """By more than was ever held before, since it is the peak that counts."""
    before = console.peak_memory()
    if mx.default_device().type == mx.gpu:
        held = mx.ones((before + 2**26,), mx.uint8)
        mx.eval(held)
    else:
        held = np.ones(before + 2**26 - _resident(), np.uint8)
    assert before + 2**25 < console.peak_memory() < before + 2**30
    del held


def _resident() -> int:
    """Bytes that this process holds now."""
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 MB"),
        (652e6, "652 MB"),
        (1e9, "1.0 GB"),
        (1.24e9, "1.2 GB"),
        (12345e9, "12,345.0 GB"),
    ],
)
def test_sizes(n_bytes, text):
    assert console.size_text(n_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3725, "1:02:05"), (4e5, "111:06:40")]
)
def test_durations(seconds, text):
    assert console.duration_text(seconds) == text


def test_a_line_is_printed_as_it_is(capsys):
    text = "[bold]loss[/bold] 1.5 a[i:b:c] " + "word " * 100
    console.say(Console(width=40), text)
    assert capsys.readouterr().out == text + "\n"


BAR = """
from mlxgpt.common import console
with console.progress("tokens", 4, done=1, in_bytes=True) as advance:
    print("inside")
    advance(1)
    advance(2, title="characters [x]")
"""


def test_progress_says_nothing_where_there_is_no_terminal(run_python):
    result = run_python("-c", BAR)
    assert (result.stdout, result.stderr, result.returncode) == ("inside\n", "", 0)


def test_progress_is_a_bar_on_standard_error_where_that_is_a_terminal():
    terminal, end = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen([sys.executable, "-c", BAR], stdout=subprocess.PIPE, stderr=end, env=environment) as process:
        os.close(end)
        shown = b""
        while part := _read(terminal):
            shown += part
        assert process.stdout.read() == b"inside\n"
    os.close(terminal)
    assert process.returncode == 0
    assert "characters [x]" in shown.decode()
    assert "100%" in shown.decode()


def _read(terminal: int) -> bytes:
    """What stands next on a terminal; nothing once nobody has it open, which Linux reports as an error."""
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""


def test_progress_off_a_terminal_imports_no_rich(run_python):
    check = BAR + "import sys; print('rich' in sys.modules)"
    assert run_python("-c", check).stdout.splitlines()[-1] == "False"
