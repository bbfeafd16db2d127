"""The progress line and the closing summary of a run."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from mlxgpt.common import console
from mlxgpt.training.metrics import History
from mlxgpt.training.progress import Progress, summary


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    monkeypatch.setattr(console, "peak_memory", lambda: 91_000_000)
    return clock


def text_console(**options) -> Console:
    return Console(file=io.StringIO(), **options)


def test_the_speed_leaves_pauses_out_and_the_eta_counts_the_ones_to_come(clock):
    out = text_console(width=100)
    progress = Progress(
        out, 100, 300, 1000, eval_interval=50, flops_per_token=2e6, peak_flops=1e10, tokens=7, seconds=3.0
    )
    with progress.paused():
        clock.now += 50.0
    with progress:
        clock.now += 5.0
        first = progress.log(101, 2.5, 1e-3)  # a slow first step
        with progress.paused():
            clock.now += 20.0
        clock.now += 4.0
        second = progress.log(121, 2.25, 1e-3)
        clock.now += 1.0
        assert progress.totals(125) == {"tokens": 25_007, "seconds": 13.0}
    assert first == {"tokens_per_s": 200.0, "mfu": 0.04, "memory": 91_000_000, "tokens": 1007, "seconds": 8.0}
    assert second == {"tokens_per_s": 5000.0, "mfu": 1.0, "memory": 91_000_000, "tokens": 21_007, "seconds": 12.0}
    lines = out.file.getvalue().splitlines()
    # 199 steps of 5 s and 4 evaluations of 50 s; then 179 steps of 0.2 s and 4 evaluations of 20 s
    assert lines == [
        "step 101/300  loss 2.5000  lr 1.00e-03  200 tokens/s  MFU 4%  91 MB  ETA 0:19:55",
        "step 121/300  loss 2.2500  lr 1.00e-03  5,000 tokens/s  MFU 100%  91 MB  ETA 0:01:56",
    ]


@pytest.mark.parametrize(
    ("step", "evaluations"), [(1, 3), (49, 3), (50, 3), (51, 2), (100, 2), (101, 1), (119, 1), (120, 1)]
)
def test_evaluations_to_come(clock, step, evaluations):
    """Evaluations come after steps 50, 100 and 120, the last."""
    out = text_console(width=100)
    progress = Progress(out, 0, 120, 1, eval_interval=50)
    with progress.paused():
        clock.now += 1000.0
    clock.now += 0.001
    progress.log(step, 1.0, 1.0)
    seconds = sum(int(n) * 60**i for i, n in enumerate(reversed(out.file.getvalue().split("ETA ")[1].split(":"))))
    assert seconds // 1000 == evaluations


def test_the_live_line_fits_a_terminal(clock):
    out = text_console(width=100, force_terminal=True, color_system=None, legacy_windows=False)
    progress = Progress(out, 1000, 5000, 768, eval_interval=250, flops_per_token=5e6, peak_flops=2e11)
    with progress:
        clock.now += 0.5
        progress.log(1010, 1.8756, 1e-3)
    line = [line for line in out.file.getvalue().splitlines() if "loss" in line][-1]
    assert "ETA 0:03:20" in line
    assert "15,360 tokens/s  MFU 38%  91 MB" in line
    assert "━" in line.split("ETA")[1]


def test_without_a_peak_there_is_no_mfu(clock):
    progress = Progress(text_console(), 0, 10, 8, eval_interval=5)
    clock.now += 1.0
    assert set(progress.log(1, 3.0, 1e-3)) == {"tokens_per_s", "memory", "tokens", "seconds"}


def test_the_summary(tmp_path):
    history = History(
        [
            {"step": 0, "val_loss": 4.0},
            {"step": 3, "event": "skipped", "loss": None},
            {"step": 4, "event": "spike", "loss": 9.0, "deviations": 7.0},
            {"step": 5, "event": "spike", "loss": 9.0, "deviations": 7.0},
            {"step": 10, "loss": 2.0, "tokens_per_s": 500.0, "mfu": 0.5, "memory": 3_000_000_000, "tokens": 72_000,
             "seconds": 3610.0},
            {"step": 10, "val_loss": 2.5},
        ]
    )  # fmt: skip
    run = tmp_path / "run"
    assert summary(history, 10, 10, run).splitlines() == [
        "done after 10 steps; best validation loss 2.5000 at step 10",
        "trained: 72,000 tokens in 1:00:10, 20 tokens/s, MFU 2.0%",
        "memory: 3.0 GB at most",
        "events: skipped steps 1, spikes of the loss 2",
        f"loss curve: {run / 'loss.png'}",
        f"sample more: python -m mlxgpt.generate --model {run}",
        f"train on: python -m mlxgpt.train --resume {run} --max_iters 20",
    ]
    stopped = summary(History([]), 4, 10, run).splitlines()
    assert stopped[0] == "stopped after 4 of 10 steps"
    assert stopped[-1] == f"train on: python -m mlxgpt.train --resume {run}"
