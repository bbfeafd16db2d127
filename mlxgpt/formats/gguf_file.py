"""Writes GGUF, the file that llama.cpp loads: the keys and tensor names that its own convert_hf_to_gguf.py
gives a Hugging Face GPT-2, through the package gguf."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..common import disk
from ..data.tokenizer import END_OF_TEXT, BPETokenizer, CharTokenizer, Tokenizer, byte_of_character
from ..model.config import GPTConfig
from . import gpt2
from .tensors import FLOATS, Tensor, numpy_dtype, to_float32

if TYPE_CHECKING:
    from gguf import GGUFWriter

_TYPE_NAMES = {  # GGUF's names for the type of a tensor, and for that of most tensors of a file
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
}


def write(path: Path, config: GPTConfig, tensors: Mapping[str, Tensor], tokenizer: Tokenizer | None, name: str) -> None:
    """Writes a GGUF file that llama.cpp loads, in place of one that is there: whole, or not at all.

    tensors: by GPT-2's names, linear weights (n_out, n_in); lm_head.weight (V, C) only where the head is not tied.
    One is in memory at a time. Matrices keep their dtype; norms, biases and the positions are
    float32, as llama.cpp's converter has them. Without biases, zeros are written. name: what the model is called.

    ValueError that lists missing, unknown and misshapen tensors, or says that the tokenizer is missing or does not fit
    the model, or that the package gguf is not installed. OSError when the file can't be written.
    """
    try:
        import gguf
    except ImportError:
        raise ValueError("GGUF needs the package gguf: pip install 'mlxgpt[gguf]'") from None
    if tokenizer is None:
        raise ValueError("gguf: the source has no tokenizer, and llama.cpp needs one: say --meta for nanoGPT's")
    config = replace(config, tied_head="lm_head.weight" not in tensors)
    gpt2.check_model(tensors, config, "GGUF", FLOATS)
    shapes = gpt2.shapes(replace(config, bias=True))
    try:
        with disk.appearing(path) as temporary, closing(gguf.GGUFWriter(temporary, "gpt2")) as writer:  # no file yet
            _add_model(writer, config, tensors["wte.weight"].dtype, name)
            _add_tokenizer(writer, tokenizer, config.vocab_size)
            llama_names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
            for parameter, shape in shapes.items():
                llama_name = llama_names.get_name(parameter, (".weight", ".bias")) or parameter
                dtype = _file_dtype(parameter, tensors)
                in_numpy, in_gguf = numpy_dtype(dtype), gguf.GGMLQuantizationType[_TYPE_NAMES[dtype][0]]
                n_bytes = math.prod(shape) * in_numpy.itemsize
                writer.add_tensor_info(llama_name, shape, in_numpy, n_bytes, in_gguf)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for parameter, shape in shapes.items():
                writer.write_tensor_data(_read(parameter, shape, tensors))
    except OSError as error:
        if error.filename not in (None, str(temporary), temporary):  # a tensor's own file
            raise
        raise OSError(f"{path}: the file can't be written: {error.strerror or error}") from None


def warnings(config: GPTConfig, tokenizer: Tokenizer | None = None) -> list[str]:
    """How llama.cpp will compute with the file otherwise than this package, a line for each difference."""
    lines = []
    if config.activation == "gelu":
        lines.append("llama.cpp computes GELU's tanh form, and this model has the exact one: logits differ a little")
    if isinstance(tokenizer, CharTokenizer):
        characters, is_ascii = tokenizer.characters, _is_ascii(tokenizer, config.vocab_size)
        if len(characters) == config.vocab_size and not is_ascii:
            lines.append(f"llama.cpp takes the last character, {characters[-1]!r}, for the end of a text")
        instead = f"reads {characters[tokenizer.start]!r} for" if is_ascii else "leaves out"
        lines.append(f"llama.cpp {instead} a character that the model doesn't know; here that is an error")
    return lines


def _file_dtype(name: str, tensors: Mapping[str, Tensor]) -> str:
    """The type of a tensor in the file: llama.cpp adds vectors and positions to float32, and wants them in it."""
    is_matrix = name in tensors and len(tensors[name].shape) == 2
    return tensors[name].dtype if is_matrix and name != "wpe.weight" else "float32"


def _read(name: str, shape: gpt2.Shape, tensors: Mapping[str, Tensor]) -> np.ndarray:
    """The array that is written for a tensor. ValueError for a tensor that doesn't read as what it says."""
    if name not in tensors:
        return np.zeros(shape, np.float32)  # a bias of a model without biases
    dtype, array = tensors[name].dtype, tensors[name].read()
    if array.shape != shape or array.dtype != numpy_dtype(dtype):
        raise ValueError(f"GGUF: {name} reads as {array.dtype} {array.shape}, expected {dtype} {shape}")
    if dtype != _file_dtype(name, tensors):
        array = to_float32(array, dtype)
    return np.ascontiguousarray(array)


def _add_model(writer: GGUFWriter, config: GPTConfig, dtype: str, name: str) -> None:
    from gguf import GGML_QUANT_VERSION, GGUFType, LlamaFileType

    writer.add_type(GGUFType.MODEL)
    writer.add_name(name)
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_file_type(LlamaFileType[_TYPE_NAMES[dtype][1]])
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _add_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer, size: int) -> None:
    """Adds a tokenizer in the form of one of llama.cpp's.

    Byte pairs are its "gpt2". Characters can be spelled in byte pairs too: the bytes of one are merged from left
    to right, in steps that need no ids of their own, and nothing else is merged. But "gpt2" has an end-of-text
    id (11 if it is not set, a character), and characters have none to give unless the vocabulary is padded.
    "rwkv", which takes the longest token that fits, does without; but it loops for ever at a character that it
    doesn't have and that shares its first byte with one that it has, so it serves for ASCII alone. In other
    unpadded vocabularies the last character, of the highest code point and so likely a rare one, ends the text.
    """
    from gguf import TokenType

    if tokenizer.vocab_size > size:
        raise ValueError(f"GGUF: the tokenizer has {tokenizer.vocab_size} tokens, the model's vocab_size is {size}")
    types = [TokenType.NORMAL] * tokenizer.vocab_size + [TokenType.UNUSED] * (size - tokenizer.vocab_size)
    texts = [f"[PAD{i}]" for i in range(size)]
    if _is_ascii(tokenizer, size):
        texts = [repr(tokenizer.token_bytes(i))[2:-1] for i in range(size)]  # escaped as in b"\n"
        writer.add_tokenizer_model("rwkv")
        writer.add_unk_token_id(tokenizer.start)  # as in tokenizer.json
    else:
        merges = []
        visible = {byte: character for character, byte in byte_of_character().items()}
        if isinstance(tokenizer, BPETokenizer):
            files = tokenizer.files()
            for text, i in json.loads(files["vocab.json"]).items():
                texts[i] = text
            merges = [line for line in files["merges.txt"].decode("utf-8").splitlines()[1:] if line]
        else:
            for i in range(tokenizer.vocab_size):
                texts[i] = text = "".join(visible[byte] for byte in tokenizer.token_bytes(i))
                merges += [f"{text[:n]} {text[n]}" for n in range(1, len(text))]
        end = size - 1 if tokenizer.end_of_text is None else tokenizer.end_of_text
        if texts[end] == END_OF_TEXT:
            types[end] = TokenType.CONTROL
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        # there must be a merge: 0xFE and 0xFF are not in any text
        writer.add_token_merges(list(dict.fromkeys(merges)) or [f"{visible[0xFE]} {visible[0xFF]}"])
        writer.add_bos_token_id(end)
        writer.add_eos_token_id(end)
        writer.add_add_bos_token(False)
    if len(set(texts)) < size:  # llama.cpp would abort
        raise ValueError("GGUF: the tokenizer has two tokens of the same text")
    writer.add_token_list(texts)
    writer.add_token_types(types)


def _is_ascii(tokenizer: Tokenizer, size: int) -> bool:
    """Whether every id of a model of this vocabulary size is an ASCII character."""
    is_ascii = isinstance(tokenizer, CharTokenizer) and "".join(tokenizer.characters).isascii()
    return is_ascii and tokenizer.vocab_size == size
