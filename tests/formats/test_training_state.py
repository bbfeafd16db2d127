"""Training state's files: what is read is what was written, and what is wrong with a file is named."""

from __future__ import annotations

from mlxgpt.formats import training_state

RECORD = dict(
    step=7, skipped=1, learning_rate=0.25, beta1=0.5, beta2=0.99, eps=1e-8, weight_decay=0.125, best_val_loss=1.5,
    settings={"max_iters": 9}, progress={"windows": 84},
)  # fmt: skip


def test_a_training_record_is_read_as_it_was_written(tmp_path):
    (tmp_path / "training.json").write_bytes(training_state.training_json(**RECORD))
    assert training_state.load_training_record(tmp_path) == {"format": 2, **RECORD}
