"""Every test runs on MLX's GPU where there is one, else on the CPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import mlx.core as mx
import pytest

from mlxgpt.cpu import extension
from mlxgpt.model import ops


@pytest.fixture(autouse=True)
def device() -> mx.Device:
    mx.random.seed(0)
    return ops.use_device("auto")


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess]:
    """Runs Python in this directory, with some arguments and, as keywords, additional environment variables."""

    def run(*arguments: str, text: bool = True, **environment: str) -> subprocess.CompletedProcess:
        command, env = [sys.executable, *arguments], {**os.environ, **environment}
        return subprocess.run(command, cwd=Path(__file__).parent, env=env, capture_output=True, text=text, timeout=600)

    return run


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """Processes that are started heed Ctrl-C: one that a shell starts in the background ignores it, as do its own, and
    these tests may be one."""
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, ours)


@pytest.fixture
def switch_off_kernels() -> Iterator[Callable[[], None]]:
    """Called, it makes the rest of the test compute by MLX's own operations."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(extension.switched_off())


@pytest.fixture(params=["kernels", "mlx"])
def cpu_backend(request: pytest.FixtureRequest, switch_off_kernels: Callable[[], None]) -> str:
    """The test runs on the CPU twice: on the kernels, where they are there, and by MLX's own operations."""
    ops.use_device("cpu")
    if request.param == "mlx":
        switch_off_kernels()
    elif not extension.is_there():
        pytest.skip("the extension is not there")
    return request.param
