"""What a path names: read from every kind of file, written and read again to the bit, and refused where damaged."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from adapted_models import SHAPE as BASE_SHAPE
from adapted_models import TOKENIZER, X
from golden import GOLDEN
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_models import SHAPE, assert_same_bits, foreign_model

from mlxgpt import convert
from mlxgpt.formats import hugging_face, model_directory, nanogpt, safetensors_file, sources
from mlxgpt.formats.tensors import FLOATS
from mlxgpt.model.config import GPTConfig
from mlxgpt.model.gpt import GPT

CONFIGS = [
    SHAPE,
    dataclasses.replace(SHAPE, bias=False, activation="gelu"),
    dataclasses.replace(SHAPE, tied_head=False, n_head=1),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["tied", "no bias, exact GELU", "untied"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_there_and_back_bit_for_bit(tmp_path, config, dtype):
    model = foreign_model(config, dtype)
    hugging_face.write(tmp_path / "directory", model)
    from_directory = sources.read_model(tmp_path / "directory")
    assert from_directory.config == config
    assert_same_bits(from_directory.tensors, model.tensors)
    nanogpt.write(tmp_path / "nanogpt", from_directory)
    from_nanogpt = sources.read_model(tmp_path / "nanogpt")
    assert from_nanogpt.config == dataclasses.replace(config, activation="gelu")
    assert_same_bits(from_nanogpt.tensors, model.tensors)
    safetensors_file.write(tmp_path / "one.safetensors", hugging_face.tensors_of(from_nanogpt))
    assert_same_bits(
        safetensors_file.read(tmp_path / "one.safetensors"),
        safetensors_file.read(tmp_path / "directory" / "model.safetensors"),
    )


SOURCES = {
    "safetensors": (GOLDEN / "hf_gpt2" / "model.safetensors").read_bytes(),
    "pt": (GOLDEN / "nanogpt.pt").read_bytes(),
}


@pytest.mark.parametrize("kind", SOURCES)
@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_are_refused_or_read(tmp_path, kind, data):
    """Bytes changed, most of them where the structure is, or the end cut off: an error in one line, or a model."""
    content = bytearray(SOURCES[kind])
    ends = st.integers(0, 3000) | st.integers(-8000, -1) | st.integers(0, len(content) - 1)
    for at in data.draw(st.lists(ends, max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))]
    path = tmp_path / f"damaged.{kind}"
    path.write_bytes(content)
    try:
        for tensor in sources.read_model(path, n_head=2).tensors.values():
            tensor.read()
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)


def test_training_starts_from_nanogpts_file_as_it_does_from_the_converted(tmp_path):
    exact = GPTConfig(**{**vars(BASE_SHAPE), "activation": "gelu"})
    model = GPT(exact)
    model.eval()
    model_directory.save_model(tmp_path / "model", model, TOKENIZER)
    convert.main([str(tmp_path / "model"), str(tmp_path / "out"), "--to", "nanogpt"])
    for path in (tmp_path / "out" / "ckpt.pt", tmp_path / "out"):
        source = sources.open_model(path)
        assert (source.config, source.directory) == (exact, None)
        assert source.tokenizer.characters == TOKENIZER.characters
        np.testing.assert_array_equal(np.array(source.load()(X)), np.array(model(X)))
    (tmp_path / "out" / "meta.pkl").unlink()
    with pytest.raises(ValueError, match=r"^init_from: .*ckpt.pt comes without a tokenizer: put nanoGPT's meta.pkl"):
        sources.open_model(tmp_path / "out" / "ckpt.pt")
    with pytest.raises(FileNotFoundError, match=r"^init_from: there is no file or directory .*nothing.pt"):
        sources.open_model(tmp_path / "nothing.pt")
    with pytest.raises(FileNotFoundError, match=r"^init_from: .* is not a model directory: it has no config.json"):
        sources.open_model(tmp_path)
