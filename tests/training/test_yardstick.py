"""scripts/yardstick.py in few steps; it runs where the extra `parity` is installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")


@pytest.fixture
def yardstick(monkeypatch):
    path = Path(__file__).parents[2] / "scripts" / "yardstick.py"
    spec = importlib.util.spec_from_file_location("yardstick", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "yardstick", module)
    spec.loader.exec_module(module)
    return module


def test_the_two_curves_agree_until_the_recipes_differ(yardstick, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(yardstick, "EVAL_BATCHES", 2)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} times {n} is {n * n}\n" for n in range(1500)))
    flags = ["--data", str(text), "--steps", "12", "--out", str(tmp_path / "y.png")]
    ours, theirs = yardstick.main(flags)
    assert len(ours.training) == len(theirs.training) == 12
    assert ours.training[0] - ours.training[-1] > 0.3
    assert np.abs(ours.training - theirs.training).max() < 1e-5
    assert abs(ours.validation[-1] - theirs.validation[-1]) < 1e-5
    assert (tmp_path / "y.png").read_bytes().startswith(b"\x89PNG")
    assert "mlxgpt beside PyTorch: training losses differ by" in capsys.readouterr().out
    rate = yardstick.learning_rate
    monkeypatch.setattr(yardstick, "learning_rate", lambda config, step: 1.02 * rate(config, step))
    ours, theirs = yardstick.main(flags)
    assert np.abs(ours.training - theirs.training).max() > 1e-4
