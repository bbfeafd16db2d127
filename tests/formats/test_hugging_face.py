"""Hugging Face's directories and files: golden ones, shards, configs that lie, and transformers' own files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conversion import command, converted, spread
from golden import GOLDEN
from random_models import assert_same_bits, foreign_model, logits_of

from mlxgpt.formats import hugging_face, safetensors_file, sources


def test_hugging_face_directory(tmp_path):
    golden = np.load(GOLDEN / "hf_gpt2.npz")
    directory = converted(GOLDEN / "hf_gpt2", tmp_path / "model")
    np.testing.assert_allclose(logits_of(directory, golden["ids"]), golden["logits"], atol=2e-5)


def test_a_safetensors_file_alone_says_its_shape_but_for_the_heads(tmp_path):
    source = tmp_path / "alone.safetensors"
    source.write_bytes((GOLDEN / "hf_gpt2" / "model.safetensors").read_bytes())
    assert "say --n_head" in command(source, tmp_path / "model").stderr
    golden = np.load(GOLDEN / "hf_gpt2.npz")
    directory = converted(source, tmp_path / "model", "--n_head", 2)
    np.testing.assert_allclose(logits_of(directory, golden["ids"]), golden["logits"], atol=2e-5)


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
    for content, message in {"{}": "weight_map", '{"weight_map": {}}': "weight_map", "[]": "an object"}.items():
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


@pytest.mark.parametrize("form", ["bin", "bin shards", "safetensors shards", "one .bin", "masks and prefix"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_hugging_face_computes_the_same(tmp_path, form, tied):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_head=5, n_embd=40, n_positions=24, vocab_size=50, tie_word_embeddings=tied
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    spread(torch, model)
    source = tmp_path / "source"
    model.save_pretrained(source, max_shard_size="30KB" if "shards" in form else "5GB")
    if form != "safetensors shards":
        weights = dict(model.state_dict())
        for path in source.glob("model*.safetensors*"):
            path.unlink()
        if form == "masks and prefix":
            for layer in range(2):
                weights[f"transformer.h.{layer}.attn.bias"] = torch.ones(24, 24, dtype=torch.bool).tril()[None, None]
                weights[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        if form == "bin shards":
            names = sorted(weights)
            parts = {f"part{i}.bin": names[i::3] for i in range(3)}
            for part, some in parts.items():
                torch.save({n: weights[n] for n in some}, source / part)
            index = {"weight_map": {n: part for part, some in parts.items() for n in some}}
            (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        else:
            torch.save(weights, source / "pytorch_model.bin")
    ids = np.random.default_rng(0).integers(0, 50, (2, 24))
    expected = model(torch.tensor(ids)).logits.detach().numpy()
    assert np.abs(expected).max() > 1
    directory = converted(source / "pytorch_model.bin" if form == "one .bin" else source, tmp_path / "model")
    np.testing.assert_allclose(logits_of(directory, ids), expected, atol=1e-4)
    again = transformers.GPT2LMHeadModel.from_pretrained(directory).eval()
    np.testing.assert_array_equal(again(torch.tensor(ids)).logits.detach().numpy(), expected)
