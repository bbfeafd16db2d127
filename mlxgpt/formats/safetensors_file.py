"""safetensors files, a tensor at a time: memory-mapped when read, streamed when written.

A file is the length of its header in 8 bytes, the header in JSON, {name: {dtype, shape, data_offsets}}, and the
tensors without gaps (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_MOST_HEADER = 100_000_000  # bytes, the format's own rule
_PIECE = 1 << 20  # bytes, written while they are in the cache since they were summed
_NOT_WORTH_MAPPING = 65536  # bytes, which are read in less time


@dataclass(frozen=True, slots=True)
class Tensor:
    """An array that is read when it is needed.

    dtype is torch's name without "torch.". read() gives an array of that shape, read-only and mapped from the
    file where it can be, with the file's strides; bfloat16 comes as its bits in uint16. read() raises ValueError
    when the bytes are damaged (CRC) or the file has changed since it was opened.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    memory: Any = field(default=None, repr=False, compare=False)  # equal for two views of the same elements

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * numpy_dtype(self.dtype).itemsize


def numpy_dtype(dtype: str) -> np.dtype:
    """What a Tensor's array is made of, little-endian; bfloat16 as its bits."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype).newbyteorder("<")


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, none of them read yet. FileNotFoundError, ValueError for a header that lies."""
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
            tensors[name] = Tensor(dtype, shape, mapped(path, begin + start, numpy_dtype(dtype), shape))
            end = stop
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a safetensors file, or cut short: at {name}: {error}") from None
    return {name: tensors[name] for name in header}


def mapped(path: Path, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    """Reads an array of a file when it is called. ValueError if the file has become shorter."""

    def read() -> np.ndarray:
        if math.prod(shape) * dtype.itemsize <= _NOT_WORTH_MAPPING:
            return np.fromfile(path, dtype, math.prod(shape), offset=offset).reshape(shape)
        return np.memmap(path, dtype, "r", offset, shape)  # unmapped when it is let go

    return read


def header(tensors: Mapping[str, Tensor]) -> bytes:
    """What a file of some tensors begins with."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        n = math.prod(tensor.shape) * numpy_dtype(tensor.dtype).itemsize
        entries[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + n]}
        end += n
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors lie on multiples of their items
    return struct.pack("<Q", len(text)) + text


def write(
    path: Path,
    tensors: Mapping[str, Tensor],
    done: Callable[[int], None] = lambda n: None,
    digest: Any = None,
) -> None:
    """Writes a file; `done` hears of bytes written. One tensor is held at a time.

    `digest`, one of hashlib's, is updated with all that is written.
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
