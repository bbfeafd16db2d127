"""safetensors files whose header lies."""

from __future__ import annotations

import json
import struct

import pytest

from mlxgpt.formats import safetensors_file


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
}  # fmt: skip  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_safetensors_header_that_lies(tmp_path, lie):
    path = tmp_path / "x.safetensors"
    path.write_bytes(LIES[lie])
    with pytest.raises(ValueError, match="safetensors") as error:
        safetensors_file.read(path)
    assert str(path) in str(error.value)
