"""Hugging Face's directories: shards, and configs that lie."""

from __future__ import annotations

import json

import pytest
from golden import GOLDEN
from random_models import assert_same_bits, foreign_model

from mlxgpt.formats import hugging_face, safetensors_file, sources


def test_shards_and_what_their_index_may_not_say(tmp_path):
    tensors = safetensors_file.read(GOLDEN / "hf_gpt2" / "model.safetensors")
    names = list(tensors)
    for i, part in enumerate((names[:5], names[5:])):
        safetensors_file.write(tmp_path / f"part{i}.safetensors", {n: tensors[n] for n in part})
    (tmp_path / "config.json").write_bytes((GOLDEN / "hf_gpt2" / "config.json").read_bytes())
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {n: f"part{int(n not in names[:5])}.safetensors" for n in names}}))
    assert_same_bits(sources.read_model(tmp_path).tensors, sources.read_model(GOLDEN / "hf_gpt2").tensors)
    for shard in ("../part0.safetensors", "/etc/passwd", "..", ""):
        index.write_text(json.dumps({"weight_map": {"wte.weight": shard}}))
        with pytest.raises(ValueError, match="name of a file beside the index"):
            sources.read_model(tmp_path)
    for content, message in {"{}": "weight_map", '{"weight_map": 3}': "weight_map", "[]": "expected an object"}.items():
        index.write_text(content)
        with pytest.raises(ValueError, match=f"{index}: .*{message}"):
            sources.read_model(tmp_path)


@pytest.mark.parametrize("setting", ["n_layer", "n_embd", "vocab_size", "n_positions"])
def test_a_config_that_claims_too_much_allocates_nothing(tmp_path, setting):
    hugging_face.write(tmp_path / "model", foreign_model())
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config[setting] = 3 * 10**9
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="3000000000"):
        sources.read_model(tmp_path / "model")
