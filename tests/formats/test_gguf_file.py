"""GGUF: what gguf's own reader finds in a file, and, where llama-cpp-python is installed, what llama.cpp computes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxgpt.data.tokenizer import BPETokenizer, CharTokenizer, decode
from mlxgpt.formats import gguf_file
from mlxgpt.formats.tensors import Tensor
from mlxgpt.generation.decoding import Decoder
from mlxgpt.generation.sampling import Sampler
from mlxgpt.model.config import GPTConfig
from mlxgpt.model.gpt import GPT

gguf = pytest.importorskip("gguf")

TINY = GPTConfig(block_size=9, vocab_size=7, n_layer=2, n_head=3, n_embd=12)
SEVEN = CharTokenizer("\n abcdé")
GPT2 = BPETokenizer.gpt2()
MX = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def lazy(array: mx.array) -> Tensor:
    dtype = str(array.dtype).removeprefix("mlx.core.")
    bits = array.view(mx.uint16) if dtype == "bfloat16" else array
    return Tensor(dtype, tuple(array.shape), lambda: np.array(bits))


def random_model(config: GPTConfig, scale: float = 0.2) -> GPT:
    """No weight is 0 or 1, so that none can stand for another."""
    mx.random.seed(config.n_layer)
    model = GPT(config)
    noisy = {n: p + mx.random.normal(p.shape, scale=scale) for n, p in model.named_weights().items()}
    model.load_weights(list(noisy.items()))
    model.eval()
    return model


def weights(config: GPTConfig, dtype: str = "float32") -> dict[str, mx.array]:
    return {name: w.astype(MX[dtype]) for name, w in random_model(config).named_weights().items()}


def write(path: Path, config=TINY, tensors=None, tokenizer=SEVEN) -> Path:
    tensors = weights(config) if tensors is None else tensors
    gguf_file.write(path, config, {n: lazy(w) for n, w in tensors.items()}, tokenizer, "a name")
    return path


def fields(path: Path) -> dict:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def float32(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))


def test_keys_are_those_of_llama_cpps_converter(tmp_path):
    found = fields(write(tmp_path / "m.gguf"))
    assert {k: v for k, v in found.items() if not k.startswith(("GGUF.", "tokenizer."))} == {
        "general.architecture": "gpt2",
        "general.type": "model",
        "general.name": "a name",
        "general.file_type": 0,
        "general.quantization_version": 2,
        "gpt2.block_count": 2,
        "gpt2.context_length": 9,
        "gpt2.embedding_length": 12,
        "gpt2.feed_forward_length": 48,
        "gpt2.attention.head_count": 3,
        "gpt2.attention.layer_norm_epsilon": np.float32(1e-5),
    }


@pytest.mark.parametrize(("dtype", "file_type"), [("float32", 0), ("float16", 1), ("bfloat16", 32)])
def test_tensors_there_and_back(tmp_path, dtype, file_type):
    model = weights(TINY, dtype)
    model["lm_head.weight"] = mx.random.normal((7, 12)).astype(MX[dtype])
    path = write(tmp_path / "m.gguf", tensors=model)
    found = {t.name: t for t in gguf.GGUFReader(path).tensors}
    expected = {
        "token_embd.weight": model["wte.weight"],
        "position_embd.weight": model["wpe.weight"].astype(mx.float32),
        "output_norm.weight": model["ln_f.weight"].astype(mx.float32),
        "output_norm.bias": model["ln_f.bias"].astype(mx.float32),
        "output.weight": model["lm_head.weight"],
    }
    llama_names = {
        "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
        "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
    }  # fmt: skip
    for n in range(2):
        for module, name in llama_names.items():
            weight = model[f"h.{n}.{module}.weight"]
            expected[f"blk.{n}.{name}.weight"] = weight if weight.ndim == 2 else weight.astype(mx.float32)
            expected[f"blk.{n}.{name}.bias"] = model[f"h.{n}.{module}.bias"].astype(mx.float32)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        kind = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16"}[array.dtype]
        assert found[name].tensor_type.name == kind, name
        assert found[name].shape.tolist() == list(reversed(array.shape)), name  # GGUF's order: n_in first
        assert found[name].data.tobytes() == lazy(array).read().tobytes(), name
    assert fields(path)["general.file_type"] == file_type


def test_without_biases_zeros_are_written(tmp_path):
    config = GPTConfig(block_size=9, vocab_size=7, n_layer=1, n_head=3, n_embd=12, bias=False)
    found = {t.name: t for t in gguf.GGUFReader(write(tmp_path / "m.gguf", config)).tensors}
    biases = {name: t for name, t in found.items() if name.endswith(".bias")}
    assert {name: t.data.shape for name, t in biases.items()} == {
        "blk.0.attn_norm.bias": (12,), "blk.0.attn_qkv.bias": (36,), "blk.0.attn_output.bias": (12,),
        "blk.0.ffn_norm.bias": (12,), "blk.0.ffn_up.bias": (48,), "blk.0.ffn_down.bias": (12,),
        "output_norm.bias": (12,),
    }  # fmt: skip
    assert not any(t.data.any() for t in biases.values())
    assert "output.weight" not in found


def test_a_transposed_view_is_written_in_its_own_order(tmp_path):
    tensors = {n: lazy(w) for n, w in weights(TINY).items()}
    square = tensors["h.0.attn.c_proj.weight"].read()
    view = np.ascontiguousarray(square.T).T
    tensors["h.0.attn.c_proj.weight"] = Tensor("float32", (12, 12), lambda: view)
    gguf_file.write(tmp_path / "m.gguf", TINY, tensors, SEVEN, "a name")
    found = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert np.array_equal(found["blk.0.attn_output.weight"].data, square)


def test_one_tensor_is_read_at_a_time(tmp_path):
    alive, most = 0, 0

    class Counted(np.ndarray):
        def __del__(self):
            nonlocal alive
            alive -= self.base is None

    def counting(tensor: Tensor) -> Tensor:
        def read() -> np.ndarray:
            nonlocal alive, most
            array = np.ndarray.__new__(Counted, tensor.shape, np.float32)
            alive += 1
            most = max(most, alive)
            return array

        return Tensor(tensor.dtype, tensor.shape, read)

    tensors = {n: counting(lazy(w)) for n, w in weights(TINY).items()}
    gguf_file.write(tmp_path / "m.gguf", TINY, tensors, SEVEN, "a name")
    assert (alive, most) == (0, 1)


def test_gpt2_vocabulary_padded(tmp_path):
    config = GPTConfig(block_size=4, vocab_size=50304, n_layer=1, n_head=1, n_embd=2)
    found = fields(write(tmp_path / "m.gguf", config, tokenizer=GPT2))
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert (len(tokens), tokens[0], tokens[262], tokens[50256]) == (50304, "!", "Ġthe", "<|endoftext|>")
    assert (tokens[50257], tokens[-1]) == ("[PAD50257]", "[PAD50303]")
    assert types == [gguf.TokenType.NORMAL] * 50256 + [gguf.TokenType.CONTROL] + [gguf.TokenType.UNUSED] * 47
    merges = found["tokenizer.ggml.merges"]
    assert (len(merges), merges[0], merges[-1]) == (50000, "Ġ t", "Ġg azed")
    assert found["tokenizer.ggml.bos_token_id"] == found["tokenizer.ggml.eos_token_id"] == 50256
    assert found["tokenizer.ggml.add_bos_token"] is False


def test_ascii_characters_are_escaped_tokens(tmp_path):
    found = fields(write(tmp_path / "m.gguf", tokenizer=CharTokenizer("\x00\n '\\az")))
    assert found["tokenizer.ggml.model"] == "rwkv"
    assert found["tokenizer.ggml.tokens"] == [r"\x00", r"\n", " ", "'", r"\\", "a", "z"]
    assert found["tokenizer.ggml.unknown_token_id"] == 1  # as in tokenizer.json: the line break
    assert "tokenizer.ggml.eos_token_id" not in found


def test_other_characters_are_byte_pairs(tmp_path):
    found = fields(write(tmp_path / "m.gguf", tokenizer=CharTokenizer("\n aéè—😀")))
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.tokens"] == ["Ċ", "Ġ", "a", "Ã©", "Ã¨", "âĢĶ", "ðŁĺĢ"]
    assert found["tokenizer.ggml.merges"] == ["Ã ©", "Ã ¨", "â Ģ", "âĢ Ķ", "ð Ł", "ðŁ ĺ", "ðŁĺ Ģ"]
    assert found["tokenizer.ggml.eos_token_id"] == 6  # the last one: there is no other


def test_padded_characters_end_in_padding(tmp_path):
    found = fields(write(tmp_path / "m.gguf", tokenizer=CharTokenizer("\n az")))
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.tokens"] == ["Ċ", "Ġ", "a", "z", "[PAD4]", "[PAD5]", "[PAD6]"]
    assert found["tokenizer.ggml.merges"] == ["þ ÿ"]  # of bytes that UTF-8 never uses
    assert found["tokenizer.ggml.eos_token_id"] == 6


def test_warnings_say_what_llama_cpp_does_otherwise():
    ascii_seven = CharTokenizer("\n abcde")
    assert gguf_file.warnings(TINY) == gguf_file.warnings(TINY, GPT2) == []
    exact = GPTConfig(block_size=9, vocab_size=7, n_layer=2, n_head=3, n_embd=12, activation="gelu")
    assert [line for line in gguf_file.warnings(exact) if "tanh" in line] == gguf_file.warnings(exact)
    assert len(gguf_file.warnings(exact)) == 1
    [unknown] = gguf_file.warnings(TINY, ascii_seven)
    assert r"reads '\n' for a character" in unknown
    end, unknown = gguf_file.warnings(TINY, SEVEN)
    assert "the last character, 'é'," in end and "leaves out a character" in unknown
    assert all("\n" not in line for line in (end, unknown))
    [unknown] = gguf_file.warnings(GPTConfig(block_size=9, vocab_size=8, n_layer=1, n_head=3, n_embd=12), SEVEN)
    assert "leaves out" in unknown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("h.1.mlp.c_fc.bias"), r"missing h\.1\.mlp\.c_fc\.bias"),
        (lambda t: t.update({"h.2.ln_1.weight": t["ln_f.weight"]}), r"unknown h\.2\.ln_1\.weight"),
        (lambda t: t.update({"wte.weight": t["wpe.weight"]}), r"wte\.weight is \(9, 12\), expected \(7, 12\)"),
        (lambda t: t.update({"ln_f.bias": Tensor("int8", (12,), None)}), r"ln_f\.bias is int8, expected float32 or"),
        (
            lambda t: t.update({"ln_f.bias": Tensor("float32", (12,), lambda: np.zeros(11, np.float32))}),
            r"ln_f\.bias reads as float32 \(11,\), expected float32 \(12,\)",
        ),
        (
            lambda t: t.update({"ln_f.bias": Tensor("float32", (12,), lambda: np.zeros(12))}),
            r"ln_f\.bias reads as float64 \(12,\), expected float32 \(12,\)",
        ),
    ],
)  # fmt: skip
def test_wrong_tensors_are_named_and_the_old_file_stays(tmp_path, change, message):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"old")
    tensors = {n: lazy(w) for n, w in weights(TINY).items()}
    change(tensors)
    with pytest.raises(ValueError, match=message):
        gguf_file.write(path, TINY, tensors, SEVEN, "a name")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["m.gguf"]


def test_a_bias_that_the_config_denies_is_refused(tmp_path):
    config = GPTConfig(block_size=9, vocab_size=7, n_layer=2, n_head=3, n_embd=12, bias=False)
    with pytest.raises(ValueError, match=r"unknown .*; and 5 more$"):
        write(tmp_path / "m.gguf", config, weights(TINY))


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (GPT2, "the tokenizer has 50257 tokens, the model's vocab_size is 7"),
        (CharTokenizer("?é\ud800"), "two tokens of the same text"),  # a lone surrogate is "?" in UTF-8
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path, tokenizer, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "m.gguf", tokenizer=tokenizer)
    assert not os.listdir(tmp_path)


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def interrupted() -> np.ndarray:
        raise KeyboardInterrupt

    tensors = {n: lazy(w) for n, w in weights(TINY).items()}
    tensors["ln_f.bias"] = Tensor("float32", (12,), interrupted)
    with pytest.raises(KeyboardInterrupt):
        gguf_file.write(tmp_path / "m.gguf", TINY, tensors, SEVEN, "a name")
    assert not os.listdir(tmp_path)


def test_where_nothing_can_be_written_is_named(tmp_path):
    path = tmp_path / "none" / "m.gguf"
    with pytest.raises(OSError, match=f"^{path}: the file can't be written: No such file or directory$"):
        write(path)


@pytest.mark.parametrize("part", [0.01, 0.5, 0.999])  # in the keys, in the tensors, at the end
def test_a_full_disk_leaves_nothing(tmp_path, part):
    resource = pytest.importorskip("resource")
    tensors, limits = weights(TINY), resource.getrlimit(resource.RLIMIT_FSIZE)
    size = write(tmp_path / "whole.gguf", tensors=tensors).stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size * part), limits[1]))
    try:
        with pytest.raises(OSError, match=r"m\.gguf: the file can't be written: \w"):
            write(tmp_path / "m.gguf", tensors=tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["whole.gguf"]


def test_a_tensors_own_error_is_not_the_files(tmp_path):
    def gone() -> np.ndarray:
        raise FileNotFoundError(2, "No such file or directory", "source.pt")

    tensors = {n: lazy(w) for n, w in weights(TINY).items()}
    tensors["ln_f.bias"] = Tensor("float32", (12,), gone)
    with pytest.raises(FileNotFoundError, match=r"source\.pt"):
        gguf_file.write(tmp_path / "m.gguf", TINY, tensors, SEVEN, "a name")


def test_without_the_package_the_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"^GGUF needs the package gguf: pip install 'mlxgpt\[gguf\]'$"):
        write(tmp_path / "m.gguf")


# Live: what llama.cpp reads, computes and tokenizes


def llama(path: Path, **options):
    llama_cpp = pytest.importorskip("llama_cpp")
    float32_cache = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}  # the default is float16
    return llama_cpp.Llama(str(path), n_threads=2, verbose=False, flash_attn=False, **float32_cache, **options)


@pytest.mark.parametrize(
    ("dtype", "far", "tolerance"),
    [
        # On a CPU llama.cpp looks GELU up in a table of float16 for inputs between -10 and 10. Few are there
        # when what goes into the MLP is large: all else is held to a tight tolerance.
        ("float32", 100, 1e-4),
        ("float32", 1, 1e-2),
        # What is multiplied with a 16-bit matrix is rounded to 16 bits.
        ("float16", 1, 2e-2),
        ("bfloat16", 1, 2e-1),
    ],
)
@pytest.mark.parametrize(
    ("config", "tied"),
    [
        (GPTConfig(block_size=33, vocab_size=101, n_layer=3, n_head=5, n_embd=60), True),
        (GPTConfig(block_size=64, vocab_size=65, n_layer=2, n_head=1, n_embd=48, bias=False), True),
        (GPTConfig(block_size=40, vocab_size=70, n_layer=1, n_head=3, n_embd=96, layer_norm_epsilon=1e-2), True),
        (GPTConfig(block_size=48, vocab_size=90, n_layer=4, n_head=7, n_embd=112), False),
    ],
)
def test_llama_cpp_computes_our_logits(tmp_path, config, tied, dtype, far, tolerance):
    model = random_model(config)
    tensors = {n: (w * far if "ln_2" in n else w).astype(MX[dtype]) for n, w in model.named_weights().items()}
    model.load_weights([(n, w.astype(mx.float32)) for n, w in tensors.items()])
    ids = np.random.default_rng(0).integers(0, config.vocab_size, config.block_size)
    if tied:
        expected = float32(model(mx.array(ids)[None])[0])
    else:
        tensors["lm_head.weight"] = mx.random.normal((config.vocab_size, config.n_embd), scale=0.2).astype(MX[dtype])
        expected = float32(model.hidden(mx.array(ids)[None])[0]) @ float32(tensors["lm_head.weight"]).T
    assert 1 < np.abs(expected).max() < 30
    characters = CharTokenizer([chr(32 + i) for i in range(config.vocab_size)])  # beyond ASCII in one case
    path = write(tmp_path / "m.gguf", config, tensors, characters)
    llm = llama(path, n_ctx=config.block_size, n_batch=config.block_size, logits_all=True)
    llm.eval(ids.tolist())
    found = np.array(llm.scores[: config.block_size])
    assert np.abs(found - expected).max() < tolerance
    llm.close()


TEXT = "Hello, world!  Don't\n\n\tstop: 'it ' ends . Or ? naïve — 😀 λ<|endoftext|>[PAD65]\r\n"


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("text", [TEXT, TEXT.encode("ascii", "ignore").decode(), "a [", "日本語\nテキスト"])
def test_llama_cpp_reads_our_characters(tmp_path, text, padding):
    characters = CharTokenizer.of(text)
    config = GPTConfig(block_size=8, vocab_size=characters.vocab_size + padding, n_layer=1, n_head=1, n_embd=32)
    llm = llama(write(tmp_path / "m.gguf", config, tokenizer=characters), vocab_only=True)
    ids = llm.tokenize(text.encode(), add_bos=True, special=False)
    assert ids == characters.encode(text).tolist()
    assert b"".join(llm.detokenize([i]) for i in ids) == text.encode()
    alone = [llm.tokenize(c.encode(), add_bos=False) for c in characters.characters]
    assert alone == [[i] for i in range(characters.vocab_size)]
    # characters it doesn't have, that begin with the same byte as one it has: as the warning says, and it returns
    start = [characters.start] if text.isascii() and not padding else []
    assert llm.tokenize("è语".encode(), add_bos=False) == start * 5
    llm.close()


def test_llama_cpp_goes_on_as_we_do(tmp_path):
    characters = CharTokenizer([chr(32 + i) for i in range(60)])
    config = GPTConfig(block_size=64, vocab_size=60, n_layer=2, n_head=2, n_embd=64)
    llm = llama(write(tmp_path / "m.gguf", config, tokenizer=characters), n_ctx=64)
    found = llm("THE START", max_tokens=40, temperature=0, repeat_penalty=1)["choices"][0]
    steps = Decoder(random_model(config), [characters.encode("THE START")], Sampler(temperature=0))
    assert found["text"] == decode(characters, [int(next(steps).tokens[0]) for _ in range(40)])
    assert found["finish_reason"] == "length"  # no character ends it
    llm.close()


def test_llama_cpp_reads_gpt2s_byte_pairs(tmp_path):
    config = GPTConfig(block_size=4, vocab_size=50304, n_layer=1, n_head=1, n_embd=32)
    llm = llama(write(tmp_path / "m.gguf", config, tokenizer=GPT2), vocab_only=True)
    text = TEXT + Path(__file__).read_text(encoding="utf-8") * 2
    ids = llm.tokenize(text.encode(), add_bos=True, special=False)
    assert ids == GPT2.encode(text).tolist()
    assert b"".join(llm.detokenize([i]) for i in ids) == text.encode()
    assert llm.tokenize(b"<|endoftext|>", add_bos=False, special=True) == [50256]
    assert llm.token_bos() == llm.token_eos() == 50256
    llm.close()
