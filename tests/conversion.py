"""The converter as a command, for its tests and those of formats, and models of PyTorch's to convert."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts" / "convert_weights.py"


def command(*args: object) -> subprocess.CompletedProcess:
    """Runs the converter's command line."""
    return subprocess.run([sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True)


def converted(source: Path, destination: Path, *options: object) -> Path:
    """Runs the converter, which must succeed -> the destination."""
    result = command(source, destination, *options)
    assert result.returncode == 0, result.stderr
    return destination


def spread(torch, model) -> None:
    """Larger weights than a PyTorch model's first ones, so that every term shows in its logits."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
