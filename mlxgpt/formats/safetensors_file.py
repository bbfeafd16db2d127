"""safetensors files: tensors are memory-mapped when they are read, and written one at a time.

A file is the length of its header in 8 bytes, the header in JSON, {name: {dtype, shape, data_offsets}}, and the
tensors without gaps (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .tensors import Tensor, in_file, numpy_dtype

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_MOST_HEADER = 100_000_000  # bytes, the format's own rule
_PIECE = 1 << 20  # bytes, which are still in the cache when they are written after they were hashed


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, none of them read yet.

    FileNotFoundError; ValueError, naming the file, for a header that is damaged or doesn't fit the file.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} has no {path.name}")
    size = path.stat().st_size
    with open(path, "rb") as file:
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > min(size - 8, _MOST_HEADER):
            raise ValueError(f"{path}: not a safetensors file, or cut short: its header is {length} bytes of {size}")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a safetensors file: the header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: not a safetensors file: the header is not an object")
    header.pop("__metadata__", None)
    begin, end, name, tensors = 8 + length, 0, "its offsets", {}
    try:
        entries = sorted((entry["data_offsets"], name) for name, entry in header.items())
        for (start, stop), name in entries:
            dtype, shape = DTYPES[header[name]["dtype"]], tuple(header[name]["shape"])
            if any(type(n) is not int or n < 0 for n in (start, stop, *shape)):
                raise ValueError("a size is not a whole number")
            if start != end or stop - start != math.prod(shape) * numpy_dtype(dtype).itemsize or begin + stop > size:
                raise ValueError(f"{dtype} {shape} does not fit bytes {start} to {stop}")
            tensors[name] = in_file(path, begin + start, dtype, shape)
            end = stop
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a safetensors file, or cut short: at {name}: {error}") from None
    return {name: tensors[name] for name in header}


def header(tensors: Mapping[str, Tensor]) -> bytes:
    """The length and the JSON that a file of these tensors begins with."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors lie on multiples of their items
    return struct.pack("<Q", len(text)) + text


def write(
    path: Path,
    tensors: Mapping[str, Tensor],
    done: Callable[[int], None] = lambda n: None,
    digest: Any = None,
) -> None:
    """Writes a file, and holds one tensor at a time. OSError.

    `done` is called after each tensor, with the number of its bytes; `digest`, one of hashlib's, is updated with all
    that is written.
    """
    with open(path, "wb") as file:

        def write(content: memoryview) -> None:
            for start in range(0, len(content), _PIECE):
                piece = content[start : start + _PIECE]
                if digest is not None:
                    digest.update(piece)
                file.write(piece)

        write(memoryview(header(tensors)))
        for tensor in tensors.values():
            array = np.ascontiguousarray(tensor.read(), numpy_dtype(tensor.dtype))
            write(array.reshape(-1).view(np.uint8).data)  # (bytes,), not copied
            done(array.nbytes)
            del array


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(content := dict(pairs)) < len(pairs):
        raise ValueError("a name occurs twice")
    return content
