"""Training state's files: what is read is what was written, and what is wrong with a file is named."""

from __future__ import annotations

import json

import pytest

from mlxgpt.formats import training_state

RECORD = dict(
    step=7, skipped=1, learning_rate=0.25, beta1=0.5, beta2=0.99, eps=1e-8, weight_decay=0.125, best_val_loss=1.5,
    settings={"max_iters": 9}, progress={"windows": 84},
)  # fmt: skip


def test_a_training_record_is_read_as_it_was_written(tmp_path):
    (tmp_path / "training.json").write_bytes(training_state.training_json(**RECORD))
    assert training_state.load_training_record(tmp_path) == {"format": 2, **RECORD}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(format=3), "format is 3, this version reads up to 2; nothing was changed"),
        (dict(format="2"), "format is '2', expected 1 to 2"),
        (dict(progress=[]), "not a training state"),
        (dict(step=-1), "step is -1, expected a whole number of steps"),
        (dict(step=1.5), "step is 1.5, expected a whole number of steps"),
        (dict(eps="small"), "eps is 'small', expected a number of at least 0"),
        (dict(beta1=None), "beta1 is None, expected a number"),
        (dict(best_val_loss=float("nan")), "best_val_loss is nan, expected a number"),
        (dict(settings=3), "not a training state"),
    ],
)
def test_a_fault_of_a_training_record_is_named(tmp_path, change, message):
    record = json.loads(training_state.training_json(**RECORD))
    (tmp_path / "training.json").write_text(json.dumps(record | change))
    with pytest.raises(ValueError, match=message):
        training_state.load_training_record(tmp_path)
