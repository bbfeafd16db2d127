"""The shape of a model: the default one, and the rules."""

from __future__ import annotations

import pytest

from mlxgpt.model.config import GPTConfig


def test_default_model_is_the_documented_one():
    config = GPTConfig()
    assert (config.block_size, config.n_embd, config.n_head, config.n_layer) == (512, 768, 12, 12)
    assert (config.head_dim, config.vocab_size) == (64, 50257)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(n_embd=100, n_head=3), "n_embd is 100, expected a multiple of n_head = 3"),
        (dict(n_layer=0), "n_layer is 0, expected at least 1"),
        (dict(dropout=1.0), "dropout is 1.0, expected 0 <= dropout < 1"),
        (dict(activation="relu"), "activation is 'relu'"),
    ],
)
def test_model_rules_name_the_value(values, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**values)
