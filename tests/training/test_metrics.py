"""Metrics that lose nothing and repeat nothing, and the spikes among their losses."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from mlxgpt.training.metrics import History, LossMonitor, Metrics, Spikes


def written(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_continue_at_the_step_of_a_checkpoint(tmp_path):
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


def losses(n: int, seed: int = 0) -> np.ndarray:
    """The losses of a made-up run: falling from 4 to 2, with the noise of small batches."""
    return 2 + 2 * np.exp(-np.arange(n) / 150) + np.random.default_rng(seed).normal(0, 0.06, n)


def test_an_ordinary_run_has_no_spike():
    for seed in range(20):
        spikes = Spikes(6.0)
        assert not any(spikes.add(float(loss)) for loss in losses(2000, seed))


def test_spikes_are_found_one_after_another():
    values = losses(1000)
    values[[10, 400, 401, 403, 700]] += 3.0
    spikes = Spikes(6.0)
    found = {n: above for n, loss in enumerate(values) if (above := spikes.add(float(loss)))}
    assert list(found) == [400, 401, 403, 700]  # 10 is before the warm-up has ended
    assert found[400] > 20
    assert not any(Spikes(0.0).add(float(loss)) for loss in values)


def test_a_loss_that_has_risen_for_good_stops_being_a_spike():
    spikes = Spikes(6.0)
    seen = [spikes.add(float(loss)) is not None for loss in [*losses(500), *(losses(500) + 4.0)]]
    assert 3 < sum(seen[500:]) < 60
    assert not any(seen[600:])


def test_a_constant_loss_has_no_spike_and_nan_is_ignored():
    spikes = Spikes(6.0)
    for _ in range(100):
        assert spikes.add(1.5) is None
    state = spikes.state
    assert spikes.add(math.nan) is None
    assert spikes.add(math.inf) is None
    assert spikes.state == state
    assert spikes.add(1.500001) is None
    assert spikes.add(1.6) > 6


def test_spikes_continue_from_a_saved_state():
    values = losses(300)
    values[250] += 3
    whole, half = Spikes(6.0), Spikes(6.0)
    expected = [whole.add(float(loss)) for loss in values]
    got = [half.add(float(loss)) for loss in values[:40]]
    other = Spikes(6.0, json.loads(json.dumps(half.state)))
    assert got + [other.add(float(loss)) for loss in values[40:]] == expected
    assert expected[250]
    assert other.state == whole.state


def test_skipped_steps_are_counted_in_a_row_and_left_out_of_the_mean():
    monitor = LossMonitor(6.0, {})
    assert monitor.take_mean() is None
    events = [monitor.add(loss, norm) for loss, norm in ((2.0, 1.0), (math.nan, 1.0), (3.0, math.inf))]
    assert events == [None, {"event": "skipped", "in_row": 1}, {"event": "skipped", "in_row": 2}]
    other = LossMonitor(6.0, json.loads(json.dumps(monitor.state)))
    assert (other.skipped_in_row, other.since_log) == (2, [2.0])
    assert other.add(4.0, 0.5) is None
    assert (other.skipped_in_row, other.grad_norm) == (0, 0.5)
    assert other.take_mean() == 3.0
    assert other.take_mean() is None
