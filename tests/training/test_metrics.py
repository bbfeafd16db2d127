"""Metrics that lose and double nothing, the progress line, spikes, the closing summary."""

from __future__ import annotations

import io
import json
import math
import time

import numpy as np
import pytest
from rich.console import Console

from mlxgpt.training import metrics as report
from mlxgpt.training.metrics import History, Metrics, Progress, Spikes


def written(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_go_on_where_a_checkpoint_was(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    for step in (1, 5, 10):
        metrics.add(step=step, loss=5.0 - step / 10)
    metrics.add(step=7, event="spike", loss=9.0, deviations=8.0)
    metrics.add(step=10, val_loss=4.2)
    metrics.add(step=12, event="skipped", loss=math.nan)
    with open(path, "a") as file:
        file.write('{"step": 13, "lo')
    before = path.read_text().splitlines()[:5]
    again = Metrics(path, after=10)
    assert path.read_text().splitlines() == before
    again.add(step=11, loss=3.9)
    assert written(path) == again.lines
    assert len(again.lines) == 6
    assert again.curve("val_loss") == ([10], [4.2])
    assert again.last("loss") == 3.9
    assert [event["step"] for event in again.events("spike")] == [7]
    assert again.events("skipped") == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_a_loss_that_is_not_finite_is_null(tmp_path):
    metrics = Metrics(tmp_path / "m")
    metrics.add(step=1, event="skipped", loss=math.inf)
    assert (tmp_path / "m").read_text() == '{"step": 1, "event": "skipped", "loss": null}\n'
    assert metrics.curve("loss") == ([], [])


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", []),
        ('{"step": 1}\n{"step": 2}\n', [1, 2]),
        ('{"step": 1}\n{"step": 2}', [1, 2]),
        ('{"step": 1}\n{"step": 2', [1]),
        ('{"step": 1}\n\0\0\0', [1]),
        ('{"step": 1}\n{"', [1]),
        ("12", []),
    ],
)
def test_a_last_line_may_be_torn(tmp_path, text, steps):
    (tmp_path / "m").write_text(text)
    assert [line["step"] for line in History.read(tmp_path / "m").lines] == steps


@pytest.mark.parametrize("line", ["", "{", '{"loss": 1}', "[1]", '{"step": "3"}', "3"])
def test_a_broken_line_in_the_middle_is_an_error(tmp_path, line):
    path = tmp_path / "m"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=r"m: line 2 is .*, expected a JSON object with a step"):
        Metrics(path, after=3)
    assert path.read_text().count("\n") == 3  # as it was


def test_metrics_that_cannot_be_written_name_the_file(tmp_path):
    metrics = Metrics(tmp_path / "m")
    (tmp_path / "m").unlink()
    (tmp_path / "m").mkdir()
    with pytest.raises(OSError, match=f"Is a directory: '{tmp_path / 'm'}'"):
        metrics.add(step=1)


def test_curves_over_tokens_and_seconds():
    lines = [
        {"step": 0, "val_loss": 5.0},
        {"step": 10, "loss": 4.0, "tokens": 1000, "seconds": 1.0},
        {"step": 15, "val_loss": 3.5},
        {"step": 20, "loss": 3.0, "tokens": 2000, "seconds": 4.0},
        {"step": 25, "val_loss": 2.5},
    ]
    history = History(lines)
    assert history.curve("loss", "tokens") == ([1000, 2000], [4.0, 3.0])
    assert history.curve("val_loss", "seconds") == ([0, 2.5, 4.0], [5.0, 3.5, 2.5])
    assert history.best() == (2.5, 25)
    assert History([]).best() is None


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    monkeypatch.setattr(report.console, "peak_memory", lambda: 91_000_000)
    return clock


def console(**options) -> Console:
    return Console(file=io.StringIO(), **options)


def test_progress_leaves_pauses_out_and_counts_those_to_come(clock):
    out = console(width=100)
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
    """After steps 50, 100 and 120, the last."""
    out = console(width=100)
    progress = Progress(out, 0, 120, 1, eval_interval=50)
    with progress.paused():
        clock.now += 1000.0
    clock.now += 0.001
    progress.log(step, 1.0, 1.0)
    seconds = sum(int(n) * 60**i for i, n in enumerate(reversed(out.file.getvalue().split("ETA ")[1].split(":"))))
    assert seconds // 1000 == evaluations


def test_the_live_line_fits_a_terminal(clock):
    out = console(width=100, force_terminal=True, color_system=None, legacy_windows=False)
    progress = Progress(out, 1000, 5000, 768, eval_interval=250, flops_per_token=5e6, peak_flops=2e11)
    with progress:
        clock.now += 0.5
        progress.log(1010, 1.8756, 1e-3)
    line = [line for line in out.file.getvalue().splitlines() if "loss" in line][-1]
    assert "ETA 0:03:20" in line
    assert "15,360 tokens/s  MFU 38%  91 MB" in line
    assert "━" in line.split("ETA")[1]


def test_without_a_peak_there_is_no_mfu(clock):
    progress = Progress(console(), 0, 10, 8, eval_interval=5)
    clock.now += 1.0
    assert set(progress.log(1, 3.0, 1e-3)) == {"tokens_per_s", "memory", "tokens", "seconds"}


def losses(n: int, seed: int = 0) -> np.ndarray:
    """As of a run: falling from 4 to 2, with the noise of small batches."""
    return 2 + 2 * np.exp(-np.arange(n) / 150) + np.random.default_rng(seed).normal(0, 0.06, n)


def test_an_ordinary_run_has_no_spike():
    for seed in range(20):
        spikes = Spikes(6.0)
        assert not any(spikes.seen(float(loss)) for loss in losses(2000, seed))


def test_spikes_are_found_one_after_another():
    values = losses(1000)
    values[[10, 400, 401, 403, 700]] += 3.0
    spikes = Spikes(6.0)
    found = {n: above for n, loss in enumerate(values) if (above := spikes.seen(float(loss)))}
    assert list(found) == [400, 401, 403, 700]  # 10 is before the warm-up has ended
    assert found[400] > 20
    assert not any(Spikes(0.0).seen(float(loss)) for loss in values)


def test_a_loss_that_has_risen_for_good_is_no_spike_forever():
    spikes = Spikes(6.0)
    seen = [spikes.seen(float(loss)) is not None for loss in [*losses(500), *(losses(500) + 4.0)]]
    assert 3 < sum(seen[500:]) < 60
    assert not any(seen[600:])


def test_a_loss_that_stands_still_or_is_nan():
    spikes = Spikes(6.0)
    for _ in range(100):
        assert spikes.seen(1.5) is None
    state = spikes.state
    assert spikes.seen(math.nan) is None
    assert spikes.seen(math.inf) is None
    assert spikes.state == state
    assert spikes.seen(1.500001) is None
    assert spikes.seen(1.6) > 6


def test_spikes_go_on_from_a_state():
    values = losses(300)
    values[250] += 3
    whole, half = Spikes(6.0), Spikes(6.0)
    expected = [whole.seen(float(loss)) for loss in values]
    got = [half.seen(float(loss)) for loss in values[:40]]
    other = Spikes(6.0, json.loads(json.dumps(half.state)))
    assert got + [other.seen(float(loss)) for loss in values[40:]] == expected
    assert expected[250]
    assert other.state == whole.state


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
    assert report.summary(history, 10, 10, run).splitlines() == [
        "done after 10 steps; best validation loss 2.5000 at step 10",
        "trained: 72,000 tokens in 1:00:10, 20 tokens/s, MFU 2.0%",
        "memory: 3.0 GB at most",
        "events: skipped steps 1, spikes of the loss 2",
        f"loss curve: {run / 'loss.png'}",
        f"sample more: python -m mlxgpt.generate --model {run}",
        f"train on: python -m mlxgpt.train --resume {run} --max_iters 20",
    ]
    stopped = report.summary(History([]), 4, 10, run).splitlines()
    assert stopped[0] == "stopped after 4 of 10 steps"
    assert stopped[-1] == f"train on: python -m mlxgpt.train --resume {run}"
