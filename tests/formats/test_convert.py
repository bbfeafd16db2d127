"""The converter: every kind of source, every destination, and what must be refused.

The cases here run without PyTorch, on files that it made (make_golden.py); those at the end make their own with it.
"""

import dataclasses
import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from golden import GOLDEN
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxgpt.data import tokenizer
from mlxgpt.formats import foreign as convert
from mlxgpt.formats import model_directory as checkpoint
from mlxgpt.formats import safetensors_file, torch_file
from mlxgpt.formats.torch_file import Tensor
from mlxgpt.model.config import GPTConfig
from mlxgpt.model.gpt import GPT
from mlxgpt.training import trainer as training
from mlxgpt.training.checkpoints import restore_optimizer
from mlxgpt.training.recipe import TrainConfig

SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_weights.py"
SHAPE = GPTConfig(block_size=16, vocab_size=29, n_layer=2, n_head=3, n_embd=12)


def command(*args: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True)


def converted(source: Path, destination: Path, *options: object) -> Path:
    result = command(source, destination, *options)
    assert result.returncode == 0, result.stderr
    return destination


def logits_of(directory: Path, ids: np.ndarray) -> np.ndarray:
    return np.array(checkpoint.load_model(directory)(mx.array(ids.astype(np.int32))))


def arrays(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: np.array(t.read()) for name, t in tensors.items()}


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert {n: (t.dtype, t.shape) for n, t in a.items()} == {n: (t.dtype, t.shape) for n, t in b.items()}
    for name, tensor in a.items():
        np.testing.assert_array_equal(np.array(tensor.read()), np.array(b[name].read()), err_msg=name)


def random_model(config: GPTConfig = SHAPE, dtype: str = "float32", seed: int = 0) -> convert.Checkpoint:
    """A checkpoint with values that are all different, so that no mistake of layout hides."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, p in GPT(config).named_weights().items():
        values = rng.standard_normal(p.shape).astype(np.float32) * 0.1
        tensors[name] = convert.cast(name, Tensor("float32", values.shape, lambda v=values: v), dtype)
    return convert.Checkpoint("made", config, tensors)


@pytest.fixture
def ids() -> np.ndarray:
    return np.random.default_rng(1).integers(0, SHAPE.vocab_size, (2, 16))


# ---- sources ----


def test_hugging_face_directory(tmp_path):
    golden = np.load(GOLDEN / "hf_gpt2.npz")
    directory = converted(GOLDEN / "hf_gpt2", tmp_path / "model")
    np.testing.assert_allclose(logits_of(directory, golden["ids"]), golden["logits"], atol=2e-5)


def test_nanogpt_as_pytorch_left_it(tmp_path):
    """A model that torch.compile had wrapped, after two steps, and its optimizer."""
    golden = np.load(GOLDEN / "nanogpt.npz")
    source = convert.read(GOLDEN / "nanogpt.pt")
    assert (source.config.activation, source.config.n_head, source.config.bias) == ("gelu", 3, True)
    assert source.training["step"] == 2 and source.nanogpt["config"] == {"dataset": "made"}
    for name in ("wpe.weight", "h.1.attn.c_proj.weight", "ln_f.bias"):
        np.testing.assert_array_equal(source.averages[f"m.{name}"].read(), golden[f"m.{name}"])
        np.testing.assert_array_equal(source.averages[f"v.{name}"].read(), golden[f"v.{name}"])
    directory = converted(GOLDEN / "nanogpt.pt", tmp_path / "model")
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
    assert_same_bits(convert.read(tmp_path).tensors, convert.read(GOLDEN / "hf_gpt2").tensors)
    for shard in ("../part0.safetensors", "/etc/passwd", "..", ""):
        index.write_text(json.dumps({"weight_map": {"wte.weight": shard}}))
        with pytest.raises(ValueError, match="name of a file beside the index"):
            convert.read(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="weight_map"):
        convert.read(tmp_path)


def write_llmc(path: Path, model: convert.Checkpoint, version: int, padded: int) -> None:
    """As llm.c's train_gpt2.py does."""
    c = model.config
    header = np.zeros(256, np.int32)
    header[:8] = 20240326, version, c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd, padded
    kinds = [f"{m}.{p}" for m in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
             for p in ("weight", "bias")]  # fmt: skip
    names = ["wte.weight", "wpe.weight"]
    names += [f"h.{layer}.{kind}" for kind in kinds for layer in range(c.n_layer)]
    values = arrays(model.tensors)
    values["wte.weight"] = np.pad(values["wte.weight"], ((0, padded - c.vocab_size), (0, 0)))
    with open(path, "wb") as file:
        file.write(header.tobytes())
        for name in [*names, "ln_f.weight", "ln_f.bias"]:
            file.write(values[name].tobytes())


@pytest.mark.parametrize(("version", "dtype"), [(3, "float32"), (5, "bfloat16")])
def test_llmc(tmp_path, version, dtype):
    model = random_model(dtype=dtype)
    path = tmp_path / "gpt2.bin"
    write_llmc(path, model, version, padded=64)
    read = convert.read(path)
    assert read.config == SHAPE
    assert_same_bits(read.tensors, model.tensors)
    data = path.read_bytes()
    path.write_bytes(data[:-4])
    with pytest.raises(ValueError, match="bytes, expected"):
        convert.read(path)
    path.write_bytes(data[:4] + struct.pack("<i", 1) + data[8:])
    with pytest.raises(ValueError, match="format 1, expected 3"):
        convert.read(path)


# ---- destinations, and back ----

CONFIGS = [
    SHAPE,
    dataclasses.replace(SHAPE, bias=False, activation="gelu"),
    dataclasses.replace(SHAPE, tied_head=False, n_head=1),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["tied", "no bias, exact GELU", "untied"])
@pytest.mark.parametrize("dtype", convert.FLOATS)
def test_there_and_back_bit_for_bit(tmp_path, config, dtype):
    model = random_model(config, dtype)
    convert.write_directory(tmp_path / "ours", model, 0, lambda n: None)
    ours = convert.read(tmp_path / "ours")
    assert ours.config == config
    assert_same_bits(ours.tensors, model.tensors)
    convert.write_nanogpt(tmp_path / "nanogpt", ours, lambda n: None)
    nanogpt = convert.read(tmp_path / "nanogpt")
    assert nanogpt.config == dataclasses.replace(config, activation="gelu")
    assert_same_bits(nanogpt.tensors, model.tensors)
    safetensors_file.write(tmp_path / "one.safetensors", convert.hugging_face_tensors(nanogpt))
    assert_same_bits(
        safetensors_file.read(tmp_path / "one.safetensors"),
        safetensors_file.read(tmp_path / "ours" / "model.safetensors"),
    )


def test_a_converted_model_computes_the_same(tmp_path, ids):
    model = random_model()
    ours = GPT(SHAPE)
    ours.load_weights([(name, mx.array(t.read())) for name, t in model.tensors.items()])
    ours.eval()
    expected = np.array(ours(mx.array(ids.astype(np.int32))))
    convert.write_nanogpt(tmp_path / "nanogpt", model, lambda n: None)
    result = converted(tmp_path / "nanogpt", tmp_path / "model")
    config = json.loads((result / "config.json").read_text())
    assert config["activation_function"] == "gelu"  # what nanoGPT computes
    config["activation_function"] = "gelu_new"
    (result / "config.json").write_text(json.dumps(config))
    np.testing.assert_allclose(logits_of(result, ids), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_cast_rounds_to_the_nearest(dtype):
    values = np.random.default_rng(0).standard_normal(10000).astype(np.float32) * 10.0 ** np.arange(-8, 2).repeat(1000)
    values = np.concatenate([values.astype(np.float32), [0.0, -0.0, np.inf, -np.inf, np.nan, 1 + 2**-8, 1 + 3 * 2**-8]])
    values = values.astype(np.float32)
    tensor = convert.cast("x", Tensor("float32", values.shape, lambda: values), dtype)
    expected = np.array(mx.array(values).astype(getattr(mx, dtype)).astype(mx.float32))
    np.testing.assert_array_equal(convert.to_float32(tensor.read(), dtype), expected)


def test_cast_says_what_does_not_fit():
    tensor = convert.cast("h.0.x", Tensor("float32", (2,), lambda: np.array([1, 1e6], np.float32)), "float16")
    with pytest.raises(ValueError, match=r"h\.0\.x holds 1e\+06, more than float16's 65504"):
        tensor.read()


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized(tmp_path, bits):
    config = dataclasses.replace(SHAPE, n_embd=192)
    model = random_model(config)
    convert.write_directory(tmp_path / "model", model, bits, lambda n: None)
    tensors = safetensors_file.read(tmp_path / "model" / "model.safetensors")
    groups = json.loads((tmp_path / "model" / "config.json").read_text())["quantization"]
    assert groups == {"group_size": 64, "bits": bits}
    for name in ("wte", "wpe", "h.1.attn.c_proj", "h.0.mlp.c_proj"):
        part = [mx.array(tensors[f"model.{name}.{kind}"].read()) for kind in ("weight", "scales", "biases")]
        back = np.array(mx.dequantize(*part, group_size=64, bits=bits))
        step = np.abs(np.array(part[1])).max()
        np.testing.assert_allclose(back, model.tensors[f"{name}.weight"].read(), atol=step)
    logits = logits_of(tmp_path / "model", np.arange(16)[None])
    convert.write_directory(tmp_path / "whole", model, 0, lambda n: None)
    expected = logits_of(tmp_path / "whole", np.arange(16)[None])
    assert 0 < np.abs(logits - expected).max() < {8: 0.1, 4: 1.5}[bits]


def test_cropped(tmp_path, ids):
    convert.write_directory(tmp_path / "whole", random_model(), 0, lambda n: None)
    crop = converted(tmp_path / "whole", tmp_path / "crop", "--block_size", 10)
    assert checkpoint.load_config(crop).block_size == 10
    np.testing.assert_array_equal(logits_of(crop, ids[:, :10]), logits_of(tmp_path / "whole", ids[:, :10]))
    assert "expected 1 to the source's 16" in command(tmp_path / "whole", tmp_path / "x", "--block_size", 17).stderr


def test_characters_come_along(tmp_path):
    characters = [*"\n !abcdefghijklmnopqrstuvwxyé"]
    meta = {"vocab_size": 29, "itos": dict(enumerate(characters)), "stoi": {c: i for i, c in enumerate(characters)}}
    convert.write_nanogpt(tmp_path / "run", random_model(), lambda n: None)
    (tmp_path / "run" / "meta.pkl").write_bytes(pickle.dumps(meta))
    directory = converted(tmp_path / "run", tmp_path / "model")
    assert tokenizer.load(directory).characters == characters
    back = converted(directory, tmp_path / "back", "--to", "nanogpt")
    assert pickle.loads((back / "meta.pkl").read_bytes()) == meta


def test_a_tokenizer_of_another_kind_comes_along_with_a_note(tmp_path):
    convert.write_directory(tmp_path / "model", random_model(), 0, lambda n: None)
    other = json.dumps({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}})
    (tmp_path / "model" / "tokenizer.json").write_text(other)
    result = command(tmp_path / "model", tmp_path / "again")
    assert result.returncode == 0 and "not a tokenizer that this package reads" in " ".join(result.stderr.split())
    assert (tmp_path / "again" / "tokenizer.json").read_text() == other
    result = command(tmp_path / "model", tmp_path / "nanogpt", "--to", "nanogpt")
    assert result.returncode == 0 and "not a tokenizer that this package reads" in " ".join(result.stderr.split())


# ---- what is refused ----


def test_an_evil_meta_pkl_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    convert.write_nanogpt(tmp_path / "run", random_model(), lambda n: None)
    (tmp_path / "run" / "meta.pkl").write_bytes(pickle.dumps({"itos": Evil()}))
    result = command(tmp_path / "run", tmp_path / "model")
    assert result.returncode == 1 and "exec" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "ran").exists() and not (tmp_path / "model").exists()


def test_a_destination_that_is_there_stays(tmp_path):
    convert.write_directory(tmp_path / "model", random_model(), 0, lambda n: None)
    other = tmp_path / "other"
    convert.write_directory(other, random_model(seed=1), 0, lambda n: None)
    before = (other / "model.safetensors").read_bytes()
    assert "say --force" in command(tmp_path / "model", other).stderr
    assert (other / "model.safetensors").read_bytes() == before
    converted(tmp_path / "model", other, "--force")
    assert (other / "model.safetensors").read_bytes() == (tmp_path / "model" / "model.safetensors").read_bytes()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    assert "is not replaced" in command(tmp_path / "model", mine, "--force").stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "model", "other"]  # nothing half-written


def test_a_source_that_fails_midway_leaves_nothing(tmp_path):
    values = random_model()
    large = np.full((29, 12), 1e6, np.float32)
    values.tensors["wte.weight"] = Tensor("float32", large.shape, lambda: large)
    convert.write_directory(tmp_path / "model", values, 0, lambda n: None)
    result = command(tmp_path / "model", tmp_path / "half", "--dtype", "float16")
    assert result.returncode == 1 and "more than float16's 65504" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def change(model: convert.Checkpoint, **tensors: Tensor | None) -> dict[str, Tensor]:
    all_tensors = {**convert.hugging_face_tensors(model), **{k.replace("__", "."): t for k, t in tensors.items()}}
    return {k: t for k, t in all_tensors.items() if t is not None}


BAD = {
    "missing ln_f.bias": dict(ln_f__bias=None),
    "unknown extra.weight": dict(extra__weight=Tensor("float32", (2,), lambda: np.zeros(2, np.float32))),
    "ln_f.weight is (13,), expected (12,)": dict(
        ln_f__weight=Tensor("float32", (13,), lambda: np.zeros(13, np.float32))
    ),
    "wte.weight is int64, expected float32": dict(
        wte__weight=Tensor("int64", (29, 12), lambda: np.zeros((29, 12), np.int64))
    ),
    "it has no matrix h.0.attn.c_attn.weight": dict(h__0__attn__c_attn__weight=None),
    "expected (3C, C) or (C, 3C)": dict(
        h__0__attn__c_attn__weight=Tensor("float32", (12, 12), lambda: np.zeros((12, 12), np.float32))
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_strict(tmp_path, message):
    path = tmp_path / "bad.safetensors"
    safetensors_file.write(path, change(random_model(), **BAD[message]))
    result = command(path, tmp_path / "model", "--n_head", 3)
    assert result.returncode == 1 and message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "model").exists()


def header(**entries: object) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


LIES = {
    "beyond the file": header(a={"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}),
    "another size": header(a={"dtype": "F32", "shape": [3], "data_offsets": [0, 16]}) + bytes(16),
    "negative": header(a={"dtype": "F32", "shape": [-1, -4], "data_offsets": [0, 16]}) + bytes(16),
    "overlapping": header(a={"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},
                          b={"dtype": "U8", "shape": [8], "data_offsets": [4, 12]}) + bytes(16),
    "no such type": header(a={"dtype": "F7", "shape": [4], "data_offsets": [0, 4]}) + bytes(4),
    "not an object": struct.pack("<Q", 2) + b"[]",
    "deep": struct.pack("<Q", 100000) + b"[" * 100000,
    "longer than the file": struct.pack("<Q", 2**62) + b"{}",
    "empty": b"",
    "fractions": header(a={"dtype": "U8", "shape": [1.5], "data_offsets": [0, 1]}) + bytes(4),
    "not a list": header(a={"dtype": "U8", "shape": 3, "data_offsets": 3}),
    "twice": struct.pack("<Q", 15) + b'{"a":{},"a":{}}',
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_safetensors_header_that_lies(tmp_path, lie):
    path = tmp_path / "x.safetensors"
    path.write_bytes(LIES[lie])
    with pytest.raises(ValueError, match="safetensors") as error:
        safetensors_file.read(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("setting", ["n_layer", "n_embd", "vocab_size", "n_positions"])
def test_a_config_that_claims_too_much_allocates_nothing(tmp_path, setting):
    convert.write_directory(tmp_path / "model", random_model(), 0, lambda n: None)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config[setting] = 3 * 10**9
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="3000000000"):
        convert.read(tmp_path / "model")


def test_llmc_headers_that_claim_too_much(tmp_path):
    write_llmc(tmp_path / "gpt2.bin", random_model(), 3, padded=64)
    data = bytearray((tmp_path / "gpt2.bin").read_bytes())
    for field in range(2, 8):
        for value in (0, -1, 2**31 - 1):
            lie = bytearray(data)
            lie[4 * field : 4 * field + 4] = struct.pack("<i", value)
            (tmp_path / "lie.bin").write_bytes(lie)
            with pytest.raises(ValueError, match=r"lie\.bin"):
                convert.read(tmp_path / "lie.bin")


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
        for tensor in convert.read(path, n_head=2).tensors.values():
            tensor.read()
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)


def test_usage(tmp_path):
    for args, status, message in [
        ([tmp_path / "none", tmp_path / "x"], 1, "there is no file or directory"),
        ([tmp_path, tmp_path / "x"], 1, "holds none of model.safetensors"),
        ([tmp_path, tmp_path / "x", "--to", "onnx"], 2, "onnx"),
        ([tmp_path, tmp_path / "x", "--quantize", "8", "--to", "gguf"], 2, "quantize is 8, expected 0 unless"),
        ([tmp_path], 2, "DST"),
    ]:
        result = command(*args)
        assert result.returncode == status and message in result.stderr, result.stderr
        assert "Traceback" not in result.stderr


def test_torch_files_are_not_anything(tmp_path):
    torch_file.write(tmp_path / "x.pt", {"a": 1})
    assert "it holds no tensors by name" in command(tmp_path / "x.pt", tmp_path / "m").stderr
    torch_file.write(tmp_path / "x.pt", [1, 2])
    assert "it holds no tensors by name" in command(tmp_path / "x.pt", tmp_path / "m").stderr


# ---- beside PyTorch and transformers, where they are installed ----

RANDOM = [
    dict(block_size=24, vocab_size=50, n_layer=2, n_head=5, n_embd=40),
    dict(block_size=16, vocab_size=64, n_layer=3, n_head=1, n_embd=24, bias=False),
    dict(block_size=32, vocab_size=31, n_layer=1, n_head=7, n_embd=56),
]


def spread(torch, model) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3)


def nanogpt_checkpoint(torch, shape: dict, steps: int = 0, prefix: str = "transformer."):
    """A model as nanoGPT's train.py saves it after some steps, the model and its optimizer."""
    import torch_gpt

    torch.manual_seed(0)
    model = torch_gpt.GPT(**shape, activation="gelu")
    spread(torch, model)
    optimizer = model.adamw(learning_rate=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.95)
    for _ in range(steps):
        ids = torch.randint(0, shape["vocab_size"], (2, shape["block_size"]))
        optimizer.zero_grad()
        model.loss(ids, ids.roll(-1, 1)).backward()
        optimizer.step()
    weights = {prefix + name: p for name, p in model.state_dict().items()}
    weights[prefix.removesuffix("transformer.") + "lm_head.weight"] = model.wte.weight
    arguments = {"dropout": 0.0, "bias": True, **shape}
    content = dict(model=weights, optimizer=optimizer.state_dict(), model_args=arguments, iter_num=steps,
                   best_val_loss=torch.tensor(2.5), config={"dataset": "made"})  # fmt: skip
    return content, model, optimizer


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("prefix", ["transformer.", "_orig_mod.transformer."])
@pytest.mark.parametrize("shape", RANDOM, ids=str)
def test_nanogpt_computes_the_same(tmp_path, shape, prefix, zipped):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    content, model, _ = nanogpt_checkpoint(torch, shape, prefix=prefix)
    torch.save(content, tmp_path / "ckpt.pt", _use_new_zipfile_serialization=zipped)
    source = convert.read(tmp_path / "ckpt.pt")
    convert.write_directory(tmp_path / "model", source, 0, lambda n: None)
    ids = np.random.default_rng(0).integers(0, shape["vocab_size"], (2, shape["block_size"]))
    theirs = model(torch.tensor(ids)).detach().numpy()
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(logits_of(tmp_path / "model", ids), theirs, atol=1e-4)


def test_nanogpt_comes_back_as_it_was(tmp_path):
    """Weights and optimizer state, loaded by PyTorch without running pickle code, and by its optimizer."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    content, _, _ = nanogpt_checkpoint(torch, RANDOM[0], steps=3)
    torch.save(content, tmp_path / "ckpt.pt")
    converted(tmp_path / "ckpt.pt", tmp_path / "model")
    converted(tmp_path / "model", tmp_path / "back", "--to", "nanogpt")
    back = torch.load(tmp_path / "back" / "ckpt.pt", weights_only=True)
    assert back["model"].keys() == content["model"].keys()
    for name, tensor in content["model"].items():
        assert torch.equal(back["model"][name], tensor), name
    head, embedding = back["model"]["lm_head.weight"], back["model"]["transformer.wte.weight"]
    assert head.data_ptr() == embedding.data_ptr()
    assert back["model_args"] == content["model_args"] and back["iter_num"] == 3 and back["best_val_loss"] == 2.5
    _, _, fresh = nanogpt_checkpoint(torch, RANDOM[0])
    fresh.load_state_dict(back["optimizer"])
    for number, state in content["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(fresh.state_dict()["state"][number][name], value), (number, name)
    groups = zip(back["optimizer"]["param_groups"], content["optimizer"]["param_groups"], strict=True)
    for ours, theirs in groups:
        assert {k: ours[k] for k in ("lr", "betas", "eps", "weight_decay", "params")} == {
            k: theirs[k] for k in ("lr", "betas", "eps", "weight_decay", "params")
        }


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
    theirs = model(torch.tensor(ids)).logits.detach().numpy()
    assert np.abs(theirs).max() > 1
    directory = converted(source / "pytorch_model.bin" if form == "one .bin" else source, tmp_path / "model")
    np.testing.assert_allclose(logits_of(directory, ids), theirs, atol=1e-4)
    again = transformers.GPT2LMHeadModel.from_pretrained(directory).eval()
    np.testing.assert_array_equal(again(torch.tensor(ids)).logits.detach().numpy(), theirs)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_sources_keep_their_bits(tmp_path, dtype):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    content, model, _ = nanogpt_checkpoint(torch, RANDOM[0])
    model.to(getattr(torch, dtype))
    content["model"] = {f"transformer.{n}": p for n, p in model.state_dict().items()}
    torch.save(content, tmp_path / "ckpt.pt")
    converted(tmp_path / "ckpt.pt", tmp_path / "model")
    converted(tmp_path / "model", tmp_path / "back", "--to", "nanogpt")
    back = torch.load(tmp_path / "back" / "ckpt.pt", weights_only=True)["model"]
    for name, tensor in content["model"].items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name


def test_training_goes_on_where_pytorch_stopped(tmp_path):
    """The losses of the next steps, on the same batches."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    shape = RANDOM[0]
    content, model, optimizer = nanogpt_checkpoint(torch, shape, steps=3)
    torch.save(content, tmp_path / "ckpt.pt")
    directory = converted(tmp_path / "ckpt.pt", tmp_path / "model")
    config = TrainConfig(learning_rate=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.95, grad_clip=0.0, decay_lr=False,
                         warmup_iters=0, model=checkpoint.load_config(directory))  # fmt: skip
    trainer = training.Trainer(checkpoint.load_model(directory), config)
    restore_optimizer(directory, trainer.model, trainer.optimizer)
    for seed in range(5):
        x, y = np.random.default_rng(seed).integers(0, shape["vocab_size"], (2, 3, shape["block_size"]), np.int32)
        loss = model.loss(torch.tensor(x, dtype=torch.long), torch.tensor(y, dtype=torch.long))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert trainer.step([(x, y)]).item() == pytest.approx(loss.item(), abs=1e-5)
