"""Where a run begins: what a checkpoint says is checked before anything else happens."""

from __future__ import annotations

import json

import pytest

from mlxgpt.data.tokenizer import CharTokenizer
from mlxgpt.formats import model_directory, training_state
from mlxgpt.model.config import GPTConfig
from mlxgpt.model.gpt import GPT
from mlxgpt.training.origin import find_origin


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_itres": 3}, r"training\.json: unknown setting 'max_itres' \(did you mean 'max_iters'"),
        ({"max_iters": 0}, r"training\.json: max_iters is 0, expected at least 1"),
    ],
)
def test_a_setting_of_a_checkpoint_that_is_not_valid_is_named(tmp_path, settings, message):
    shape = GPTConfig(block_size=8, vocab_size=3, n_layer=1, n_head=2, n_embd=8)
    model_directory.save_model(tmp_path / "model", GPT(shape), CharTokenizer("abc"))
    record = dict(step=1, learning_rate=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, best_val_loss=None)
    path = tmp_path / "model" / "training.json"
    path.write_bytes(training_state.training_json(**record, settings={"max_iters": 5}))
    origin, inherited = find_origin({"resume": str(tmp_path / "model")})
    assert (origin.step, inherited["max_iters"], inherited["n_embd"], inherited["beta1"]) == (1, 5, 8, 0.9)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"settings": settings}))
    with pytest.raises(ValueError, match=message):
        find_origin({"resume": str(tmp_path / "model")})
