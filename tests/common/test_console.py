"""Sizes, durations and memory for a person."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np

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
