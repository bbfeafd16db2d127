"""PyTorch's files: golden ones, PyTorch itself where it is installed, and hostile ones."""

from __future__ import annotations

import itertools
import os
import pickle
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from golden import GOLDEN
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxgpt.formats import pickles, torch_file
from mlxgpt.formats.tensors import Tensor
from mlxgpt.formats.torch_file import read, write

FILES = [GOLDEN / "torch_zip.pt", GOLDEN / "torch_legacy.pt"]
SIX = np.arange(6, dtype="<f4").tobytes()  # the storage of most files here
fuzz = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def plain(value):
    """A value with a tensor's dtype, shape and bytes for each tensor, so that == compares all of it."""
    if isinstance(value, Tensor):
        array = value.read()
        assert array.shape == value.shape and array.nbytes == value.nbytes
        return value.dtype, value.shape, array.tobytes()
    if isinstance(value, np.ndarray):
        return value.dtype.name, value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(item) for item in value)
    return value


def read_all(path):
    return plain(read(path))


def refused(path, message=None, read=read_all):
    """The message of the ValueError: one line with the file's name."""
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    text = str(caught.value)
    assert text.startswith(str(path)) and len(text.splitlines()) == 1 and text.isprintable() and len(text) < 500
    assert type(caught.value) is ValueError
    return text


def survives(path):
    """Reads a file that may be damaged. Nothing but a value or a ValueError comes of it, soon."""
    start = time.process_time()
    try:
        read_all(path)
    except ValueError as error:
        assert type(error) is ValueError and str(error).startswith(str(path)) and len(str(error).splitlines()) == 1
    assert time.process_time() - start < 2


# Pickles by hand.


def put(value):
    return pickle.dumps(value, 2)[2:-1]


def storage(key="0", numel=6, kind="FloatStorage", more=b""):
    return b"(" + put("storage") + f"ctorch\n{kind}\n".encode() + put(key) + put("cpu") + put(numel) + more + b"tQ"


def tensor(offset=0, shape=(2, 3), stride=(3, 1), of=None):
    start = b"ctorch._utils\n_rebuild_tensor_v2\n(" + (storage() if of is None else of)
    return start + put(offset) + put(shape) + put(stride) + b"\x89NtR"


def archive(path, content, storages=(SIX,), method=zipfile.ZIP_STORED, **others):
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("a/data.pkl", b"\x80\x02" + content + b".")
        for key, data in enumerate(storages):
            file.writestr(f"a/data/{key}", data)
        for name, data in others.items():
            file.writestr(f"a/{name}", data)
    return path


def legacy(path, content, keys=("0",), storages=((6, SIX),), little=True):
    magic = [put(0x1950A86A20F9469CFC6C), put(1001), put({"little_endian": little})]
    pickles = b"".join(b"\x80\x02" + part + b"." for part in (*magic, content, put(list(keys))))
    path.write_bytes(pickles + b"".join(struct.pack("<q", numel) + data for numel, data in storages))
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pt"


# What is read.


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_golden(file):
    value = read(file)
    count = np.arange(24, dtype=np.float32).reshape(4, 6)
    parts = {
        "whole": count, "transposed": count.T, "column": count[1:, 4], "every_second": count[::2, 1::2], "tied": count,
        "expanded": np.broadcast_to(count[1, 2], (5, 2)), "empty": np.empty((0, 3), np.float32),
        "parameter": np.array([1.5, 2.5], np.float32), "best_val_loss": np.float32(3.25) * np.ones(()),
    }  # fmt: skip
    for name, expected in parts.items():
        assert plain(value[name]) == plain(np.asarray(expected, np.float32)), name
    numbers = np.array([[0, 1, 1], [3, 0, 100]])
    for name, got in value["dtypes"].items():
        bits = name == "bfloat16"
        expected = (
            (numbers.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16) if bits else numbers.astype(name)
        )
        assert (got.dtype, got.read().dtype) == (name, expected.dtype)
        np.testing.assert_array_equal(got.read(), expected)
    assert len(value["dtypes"]) == 10
    assert list(value["model"]) == ["_orig_mod.weight", "_orig_mod.bias"] and list(value["state_dict"]) == [
        "weight",
        "bias",
    ]
    assert value["model_args"] == {"n_layer": 2, "bias": False, "dropout": 0.0, "vocab_size": None}
    assert value["config"] == {"dtype": "bfloat16", "device": "cuda:1", "out": "out-shäkespeare", "big": -(2**70)}
    others = [(3, 4), {1, 2}, b"\x00\xffraw", (), [], {}, True, -1, 70000, 1e300, "", {3: (4, 5)}]
    assert value["others"] == others and list(map(type, value["others"])) == list(map(type, others))
    groups, state = value["optimizer"]["param_groups"], value["optimizer"]["state"]
    assert [group["params"] for group in groups] == [[0], [1]] and groups[1]["weight_decay"] == 0.0
    assert groups[0]["betas"] == (0.9, 0.999) and state[0]["step"].read() == 1
    np.testing.assert_allclose(state[0]["exp_avg"].read(), np.full((2, 3), 0.2), rtol=1e-6)  # (1 - beta1) x 2


def test_views_are_mapped(path):
    """A tensor takes no memory, can't be changed, and outlives what it was read by."""
    write(path, {"a": np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024)})
    tensors = [read(path)["a"], read(archive(path.with_name("b.pt"), tensor(1, (2, 2), (1, 3))))]
    tracemalloc.start()
    whole, part = (tensor.read() for tensor in tensors)
    assert tracemalloc.get_traced_memory()[1] < 3 << 20  # the buffer that CRCs are computed in
    tracemalloc.stop()
    assert part.tolist() == [[1, 4], [2, 5]] and whole[3, 4] == 3076 and not whole.flags.writeable
    del tensors
    os.remove(path)
    assert whole.sum(dtype=np.float64) == (1 << 20) * ((1 << 20) - 1) / 2


def test_relative_path(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    archive(path, tensor())
    value = read(Path(path.name))
    monkeypatch.chdir("/")
    assert value.read().sum() == 15


def test_a_changed_file_is_noticed(path):
    """A mapping past the end of a file that became shorter would kill the process."""
    value = read(archive(path, tensor()))
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="has changed"):
        value.read()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_meta(protocol):
    """nanoGPT's meta.pkl, of the protocols that Python's versions choose, and of a large vocabulary."""
    chars = [chr(32 + i) for i in range(60000) if not 0xD800 <= 32 + i < 0xE000]
    meta = {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}
    assert pickles.read(pickle.dumps(meta, protocol), "meta.pkl") == meta
    for value in [
        None,
        True,
        255,
        256,
        65536,
        -1,
        2**31,
        -(2**200),
        0.5,
        "ä" * 300,
        b"ab",
        b"c" * 300,
        {1},
        set(),
        [[()]],
    ]:
        assert pickles.read(pickle.dumps(value, protocol), "x") == value


def test_python_2(path):
    """Byte strings for names and an OrderedDict's items as an argument, as Python 2 wrote them."""
    items = b"](](U\x01aK\x01e](U\x01bK\x02ee"
    assert list(read(archive(path, b"ccollections\nOrderedDict\n(" + items + b"tR")).items()) == [("a", 1), ("b", 2)]
    assert read(archive(path, b"c__builtin__\nset\n(](K\x01K\x02etR")) == {1, 2}


def test_untyped_storage(path):
    raw = storage(numel=24, kind="UntypedStorage")
    assert read(archive(path, tensor(0, (24,), (1,), raw))).read().tobytes() == SIX


def test_compressed(path):
    """torch.save compresses nothing; who packs a file again may."""
    data = np.repeat(np.arange(6, dtype="<f4"), 100)
    value = read(archive(path, tensor(100, (2, 3), (200, 1), storage(numel=600)), [data], zipfile.ZIP_DEFLATED))
    assert value.read().tolist() == [[1, 1, 1], [3, 3, 3]]


def test_zip64(path):
    """Sizes of 64 bits in the local header, as for entries of 4 GB."""
    with zipfile.ZipFile(path, "w") as file:
        for name, data in (
            ("data.pkl", b"\x80\x02" + tensor() + b"."),
            ("data/0", SIX),
        ):
            with file.open("a/" + name, "w", force_zip64=True) as entry:
                entry.write(data)
    assert read(path).read().sum() == 15


@fuzz
@given(
    offset=st.integers(-1, 7),
    numel=st.sampled_from([6, 6, 6, 5, 7, -6]),
    dims=st.lists(st.tuples(st.integers(-1, 4), st.integers(-1, 4)), max_size=4),
)
@pytest.mark.parametrize("make", [archive, legacy])
def test_views(make, path, offset, numel, dims):
    """Every view is refused, or is what indexing says. A storage of six elements is one."""
    shape, stride = (tuple(d[i] for d in dims) for i in (0, 1))
    make(path, tensor(offset, shape, stride, storage(numel=numel)))
    indexes = list(itertools.product(*map(range, shape)))
    elements = [offset + sum(i * s for i, s in zip(index, stride, strict=True)) for index in indexes]
    if min((offset, *shape, *stride)) < 0 or numel != 6 or max(elements, default=0) > 5:
        refused(path)
    else:
        assert read(path).read().ravel().tolist() == elements and read(path).shape == shape


# What is written.

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
scalars = st.none() | st.booleans() | st.integers(-(2**200), 2**200) | st.floats(allow_nan=False) | names
dtypes = st.sampled_from(["<f4", "<f2", "<f8", "<i8", "<i4", "<i2", "i1", "u1", "?", ">f4", ">i8"])
arrays = st.builds(
    lambda dtype, shape, seed: np.random.default_rng(seed).integers(0, 2, shape).astype(dtype),
    dtypes, st.lists(st.integers(0, 3), max_size=3), st.integers(0, 99),
)  # fmt: skip
values = st.recursive(
    scalars | arrays,
    lambda parts: st.lists(parts) | st.lists(parts).map(tuple) | st.dictionaries(names | st.integers(-5, 2**40), parts),
    max_leaves=12,
)


@fuzz
@given(values)
def test_round_trip(path, value):
    write(path, value)
    native = read(path)
    assert plain(native) == plain_native(value)
    write(path, native)
    assert read_all(path) == plain_native(value)


def plain_native(value):
    """plain(), of arrays in any byte order."""
    if isinstance(value, dict):
        return {key: plain_native(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain_native(item) for item in value)
    return plain(value.astype(value.dtype.newbyteorder("<"))) if isinstance(value, np.ndarray) else value


def test_bfloat16_and_views(path):
    bits = np.arange(12, dtype=np.uint16).reshape(3, 4)
    write(path, [Tensor("bfloat16", (4, 3), lambda: bits.T), np.arange(6)[::-2]])
    half, backwards = read(path)
    assert (
        half.dtype == "bfloat16" and half.read().tolist() == bits.T.tolist() and backwards.read().tolist() == [5, 3, 1]
    )


def test_tied_tensors_are_one_storage(path):
    array = np.arange(1000.0)
    tied = Tensor("float64", (1000,), lambda: array)
    write(path, {"wte": tied, "lm_head": tied, "a": array, "b": array, "other": np.arange(1000.0)})
    with zipfile.ZipFile(path) as file:
        assert [name for name in file.namelist() if "/data/" in name] == [f"archive/data/{i}" for i in range(3)]
    assert all(value.read().tolist() == array.tolist() for value in read(path).values())


def test_written_entries_are_aligned(path):
    write(path, {f"{i}": np.arange(i, dtype=np.int8) for i in range(70)})
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        for info in file.infolist():
            header = path.read_bytes()[info.header_offset :][:30]
            assert (info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))) % 64 == 0
            assert (info.compress_type, info.flag_bits & 8) == (zipfile.ZIP_STORED, 0)


def test_one_tensor_at_a_time(path):
    tensors = [Tensor("float32", (1 << 20,), lambda: np.ones(1 << 20, np.float32)) for _ in range(12)]
    tracemalloc.start()
    write(path, tensors)
    assert tracemalloc.get_traced_memory()[1] < 10 << 20  # of 48 MiB
    tracemalloc.stop()


def test_whole_or_not_at_all(path):
    write(path, 1)

    def fail():
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write(path, [np.ones(9), Tensor("float32", (3,), fail)])
    assert read(path) == 1 and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object(), "an? object can't be written"),
        ({"a": b"bytes"}, "can't be written"),
        ({(1, 2): 3}, "a key is"),
        (1 << 2040, "can't be written"),
        ("\ud800", "surrogates not allowed"),
        (np.ones(2, np.complex64), "dtype is complex64"),
        (np.ones(2, np.uint16), "dtype is uint16"),
        (Tensor("bfloat16", (2,), lambda: np.ones(2, np.float32)), r"reads as float32 \(2,\), expected uint16"),
        (Tensor("float32", (2, 3), lambda: np.ones((3, 2), np.float32)), r"tensor 0: reads as float32 \(3, 2\)"),
    ],
)  # fmt: skip
def test_unwritable(path, value, message):
    refused(path, message, lambda path: write(path, [value]))
    assert not os.listdir(path.parent)


def test_a_list_in_itself_is_not_written(path):
    value = []
    value.append(value)
    refused(path, "deep", lambda path: write(path, value))


# PyTorch itself.


def plain_torch(value):
    """plain(), of what torch.load gives."""
    import torch

    if isinstance(value, torch.Tensor):
        raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return str(value.dtype).removeprefix("torch."), tuple(value.shape), raw
    if isinstance(value, torch.Size):
        return tuple(value)
    if isinstance(value, dict):
        return {key: plain_torch(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain_torch(item) for item in value)
    return str(value).removeprefix("torch.") if isinstance(value, (torch.dtype, torch.device)) else value


@pytest.mark.parametrize("old", [False, True])
def test_reads_what_torch_saves(path, old):
    torch = pytest.importorskip("torch")
    from make_torch_files import value

    made = value()
    torch.save(made, path, _use_new_zipfile_serialization=not old)
    assert read_all(path) == plain_torch(torch.load(path, weights_only=True)) == plain_torch(made)
    torch.save(made["whole"].T, path, _use_new_zipfile_serialization=not old, pickle_protocol=4)
    assert read_all(path) == plain_torch(made["whole"].T)


def test_without_checksums(path):
    torch = pytest.importorskip("torch")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(6.0)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert read(path)["a"].read().tolist() == [0, 1, 2, 3, 4, 5]


def test_golden_files_are_what_torch_loads():
    torch = pytest.importorskip("torch")
    for file in FILES:
        assert read_all(file) == plain_torch(torch.load(file, weights_only=True))


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_what_is_written(path, mmap):
    torch = pytest.importorskip("torch")
    value = read(FILES[0])
    del value["others"][1:3]  # a set, and bytes
    write(path, value)
    loaded = torch.load(path, weights_only=True, mmap=mmap)
    assert plain_torch(loaded) == plain(value)
    assert loaded["optimizer"]["state"][0]["exp_avg"].is_contiguous() and loaded["model_args"]["bias"] is False
    tied = Tensor("float32", (2,), lambda: np.ones(2, np.float32))
    write(path, [tied, tied])
    a, b = torch.load(path, weights_only=True, mmap=mmap)
    assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


@settings(fuzz, max_examples=40)
@given(values)
def test_torch_loads_any_value(path, value):
    torch = pytest.importorskip("torch")
    write(path, value)
    assert plain_torch(torch.load(path, weights_only=True)) == plain_native(value)


# Hostile files.


@pytest.mark.parametrize("make", [archive, legacy])
@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"cos\nsystem\n" + put(("touch pwned",)) + b"R", "'os.system'"),
        (b"c__builtin__\neval\n" + put(("open('pwned', 'w')",)) + b"R", "'builtins.eval'"),
        (b"\x8c\x05posix\x8c\x06system\x93" + put(("touch pwned",)) + b"R", "'posix.system'"),
        (b"cantigravity\nfly\n", "'antigravity.fly'"),
        (b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n", "'torch._utils._rebuild_tensor_v2.__globals__'"),
        (b"ctorch\nComplexFloatStorage\n", "'torch.ComplexFloatStorage'"),
        (b"cos\nsys\x1b[31m\rtem\n", "'os.sys"),
    ],
)  # fmt: skip
def test_other_globals_are_refused_by_name(path, monkeypatch, make, content, name):
    monkeypatch.chdir(path.parent)
    before = set(sys.modules)
    assert name in refused(make(path, content))
    assert os.listdir(path.parent) == [path.name] and "antigravity" not in set(sys.modules) - before
    with pytest.raises(ValueError, match=r"meta\.pkl: byte"):
        pickles.read(content + b".", "meta.pkl")


LAUGHS = b")" + b"".join(b"q\0h\0\x86" for _ in range(60))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"]q\0h\0a", "a list holds itself"),
        (b"]q\0(" + b"N" * 100_000 + b"h\0h\0e", "a list holds itself"),
        (b"}q\0K\1h\0s", "a dict holds itself"),
        (b"]" * 300_000 + b"a" * 299_999, "more than 100 deep"),
        (b")" + b"\x85" * 300_000, "more than 100 deep"),
        (LAUGHS, r"stands for \d+ values"),
        (b"(" + put("a" * 100_000) + b"h\0" * 200_000 + b"t", r"stands for \d+ values"),
        (b"}" + LAUGHS + b"Ns", "a key is"),
        (b"}" + put(1 << 61) + b"Ns", "a key is"),
        (b"}(NNNu", "a key has no value"),
        (b"(" * 1_000_001, "more than 1000000 opcodes"),
        (put("a" * 10_000) + b"q\2c_codecs\nencode\nq\1(" + (b"h\1h\2" + put("latin1") + b"\x86R") * 9 + b"t", "again"),
        (b"c_codecs\nencode\n(" + b"N" * 100_000 + b"tR", "_codecs.encode is called"),
        (b"c_codecs\nencode\n" + put(("a", "rot13")) + b"R", "encoding is 'rot13'"),
        (b"ccollections\nOrderedDict\n(NNNNtR", "arguments"),
        (b"ctorch\nSize\n", "torch.Size stands where"),
        (b"ctorch\nSize\n((K\1J\xff\xff\xff\xffttR", "the sizes are"),
        (storage(), "a Storage stands where"),
        (b"NNa", "None where a list is filled"),
        (b"N}b", "None where a OrderedDict is filled"),
        (b"ccollections\nOrderedDict\n)\x81", r"opcode b'\\x81'"),
        (b"NN", "doesn't end with one value"),
        (b"(N", "doesn't end with one value"),
        (b"a", "that isn't there"),
        (b"h\5", "that isn't there"),
        (b"(K\1s", "that isn't there"),
        (b"\x8e" + b"\xff" * 8, "cut off"),
        (b"X\xff\xff\xff\xffabc", "cut off"),
        (b"c" + b"a" * 1000, "cut off|not one of the globals"),
        (b"X\1\0\0\0\xff", "can't decode byte"),
        (put("storage") + b"Q", "not a reference to a storage"),
        (tensor(of=b"N"), "None is not a storage"),
        (b"ctorch._utils\n_rebuild_parameter\n(NNNtR", "None is not a tensor"),
        (tensor(of=storage(more=put(("1", 0, 3)))), "view of another"),
        (tensor(of=storage(kind="Size")), "not a reference to a storage"),
        (tensor(of=storage(numel=True)), "elements"),
        (b"(" + tensor() + tensor(0, (1,), (1,), storage(numel=3, kind="DoubleStorage")) + b"t", "at first and then"),
        (tensor(1 << 300), "of a storage of 6"),
        (tensor(0, (1 << 62,), (0,)), "less than 2.62 bytes"),
        (tensor(0, (0, 1 << 62), (0, 0)), "less than 2.62 bytes"),
        (tensor(0, (1 << 40,), (0,)), "bytes of 24"),
        (tensor(0, (2, 3), (3,)), "offset, shape and strides"),
        (tensor(0, (1,) * 65, (0,) * 65), "offset, shape and strides"),
        (tensor(False), "offset, shape and strides"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("make", [archive, legacy])
def test_hostile_pickles(path, make, content, message):
    start = time.process_time()
    refused(make(path, content), message)
    assert time.process_time() - start < 10


def test_a_small_expansion_is_a_view(path):
    assert read(archive(path, tensor(5, (1000, 1000), (0, 0)))).read().strides == (0, 0)


def test_the_stride_of_one_element_is_any(path):
    assert read(archive(path, tensor(0, (1, 6), (1 << 70, 1)))).read().tolist() == [[0, 1, 2, 3, 4, 5]]


def test_functions_are_not_values_of_others(path):
    """BUILD drops a state dict's attributes; it doesn't set them."""
    value = read(archive(path, b"ccollections\nOrderedDict\n)R}" + put("__class__") + b"Nsb"))
    assert type(value).__name__ == "OrderedDict" and not vars(value)


def patched(path, old, new, count=1):
    data = path.read_bytes()
    assert data.count(old) >= count
    path.write_bytes(data.replace(old, new, count))
    return path


def test_damaged_zip_files(path):
    good = archive(path, tensor()).read_bytes()
    values = SIX
    refused(patched(path, values, values[::-1]), "a/data/0: its CRC is 0x")
    for part, message in [
        (b"PK\x03\x04", "disagrees"),  # of data/0's local header, below
        (b"PK\x01\x02", "damaged zip file"),
        (b"PK\x05\x06", "damaged zip file"),
    ]:
        at = good.rindex(part)
        path.write_bytes(good[:at] + b"XX" + good[at + 2 :])
        refused(path, message)
    local, central = good.rindex(b"PK\x03\x04"), good.rindex(b"PK\x01\x02")
    for position, new, message in [
        (local + 6, b"\x01", "encrypted"),
        (central + 8, b"\x01", "encrypted"),
        (local + 8, b"\x08", "disagrees"),
        (central + 10, b"\x08", "disagrees"),
        (local + 14, b"\0\0\0\0", "disagrees"),
        (central + 16, b"\0\0\0\0", "disagrees"),
        (local + 18, b"\0", "disagrees"),
        (local + 22, b"\x99", "disagrees"),
        (central + 24, b"\x99", "disagrees"),
        (local + 30, b"b", "disagrees"),
        (local + 28, b"\xff\xff", "overlap"),
        (central + 42, b"\xff\xff\xff", "local header|damaged"),
        (central + 42, b"\0\0\0", "disagrees"),  # data.pkl's
        (central + 46, b"b", "missing"),
    ]:
        path.write_bytes(good[:position] + new + good[position + len(new) :])
        refused(path, message)
    both = bytearray(good)
    for at in (local + 18, local + 22, central + 20, central + 24):
        both[at : at + 4] = (1 << 30).to_bytes(4, "little")
    path.write_bytes(both)
    refused(path, "overlap what follows")
    both[local + 18 : local + 22] = both[central + 20 : central + 24] = bytes([24, 0, 0, 0])
    path.write_bytes(both)
    refused(path, "bytes stored in 24")


def test_entries_that_share_bytes(path):
    """The same bytes for many storages: reading them all would take quadratic time."""
    archive(path, tensor(), [b"", SIX])
    data = bytearray(path.read_bytes())
    first, second = data.index(b"PK\x03\x04", 4), data.rindex(b"PK\x03\x04")
    assert first < second
    data[first + 18 : first + 26] = struct.pack("<LL", 100, 100)
    at = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 4)
    data[at + 20 : at + 28] = struct.pack("<LL", 100, 100)
    path.write_bytes(data)
    refused(path, "a/data/0: its 100 bytes overlap")


def test_zip_entries(path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        with zipfile.ZipFile(archive(path, tensor()), "a") as file:
            file.writestr("a/data/0", bytes(24))
    refused(path, "two entries of the zip file have one name")
    with zipfile.ZipFile(archive(path, tensor()), "a") as file:
        file.writestr("b/data.pkl", b"N.")
    refused(path, "2 entries DIR/data.pkl")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x", b"")
    refused(path, "0 entries DIR/data.pkl")
    zipfile.ZipFile(path, "w").close()
    refused(path, "not a PyTorch file|0 entries DIR/data.pkl")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x", b"")
    data = bytearray(path.read_bytes())
    data[-14:-6] = bytes(8)  # no entries, a directory of no bytes
    path.write_bytes(data)
    refused(path, "0 entries DIR/data.pkl")
    refused(archive(path, tensor(), storages=()), "a/data/0: is missing")
    refused(archive(path, tensor(of=storage("../../etc/passwd"))), r"\.\./etc/passwd: is missing")
    refused(archive(path, tensor(), [bytes(20)]), "has 20 bytes, expected 6 float32")
    refused(archive(path, tensor(of=storage(numel=1 << 60))), "has 24 bytes, expected 1152921504606846976 float32")
    refused(archive(path, tensor(), byteorder=b"big"), "is b'big', expected b'little'")
    refused(archive(path, tensor(), **{"constants.pkl": b""}), "TorchScript")
    refused(archive(path, tensor(), method=zipfile.ZIP_BZIP2), "compression method is 12")
    refused(archive(path, b"N" * (17 << 20)), "expected at most 16777216")
    assert read(archive(path, tensor(), byteorder=b"little")).read().sum() == 15


def test_a_large_directory(path):
    archive(path, tensor())
    data = path.read_bytes()
    end = data.rindex(b"PK\x05\x06")
    filler = bytes(5 << 20)
    ending = bytearray(data[end:])
    ending[12:16] = struct.pack("<L", len(filler) + struct.unpack("<L", ending[12:16])[0])
    path.write_bytes(data[:end] + filler + ending)
    refused(path, "directory has 52..... bytes, expected at most 4194304")


def test_bombs(path):
    """Compressed storages are refused by what they claim to become, before they are decompressed."""
    size = 72 << 20
    whole = tensor(0, (size // 4,), (1,), storage(numel=size // 4))
    archive(path, whole, [bytes(size)], zipfile.ZIP_DEFLATED)
    tracemalloc.start()
    refused(path, r"become 75497472 bytes, expected at most")
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()
    many = tensor(0, (1,), (1,), storage(numel=1 << 20))
    archive(path, b"(" + many * 20 + b"t", [bytes(4 << 20)], zipfile.ZIP_DEFLATED)
    refused(path, r"become \d+ bytes, expected at most")
    archive(path, tensor(), [bytes(4 << 20)], zipfile.ZIP_DEFLATED)  # 4 MB behind a claim of 24 bytes
    data = bytearray(path.read_bytes())
    for at in (data.rindex(b"PK\x03\x04") + 22, data.rindex(b"PK\x01\x02") + 24):
        data[at : at + 4] = struct.pack("<L", 24)
    path.write_bytes(data)
    refused(path, "doesn't decompress to 24 bytes")


def test_legacy_files(path):
    refused(legacy(path, tensor(), little=False), "big-endian")
    refused(legacy(path, tensor(), keys=()), "the list of storages")
    refused(legacy(path, tensor(), keys=("0", "0")), "the list of storages")
    refused(legacy(path, tensor(), keys=("1",)), "the list of storages")
    refused(legacy(path, tensor(), keys=([],)), "the list of storages")
    refused(legacy(path, tensor(), storages=[(5, bytes(24))]), "has 5 elements, not 6")
    refused(legacy(path, tensor(), storages=[(6, bytes(23))]), "storage '0' ends at")
    refused(legacy(path, tensor(of=storage(numel=1 << 60))), "storage '0' ends at")
    path.write_bytes(pickle.dumps({"a": 1}))
    refused(path, "magic number|cut off")
    path.write_bytes(b"\x80\x02K\x05." * 5)
    refused(path, "magic number")


def test_other_files(path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read(path)
    refused(path.parent, "not a file")
    for content in (b"", b"\n", b"version https://git-lfs", b"\x08\0\0\0\0\0\0\0{}", os.urandom(10 << 20)):
        path.write_bytes(content)
        refused(path)
    path.write_bytes(b"PK" + os.urandom(10 << 20))
    refused(path, "damaged zip file")
    path.write_bytes(b"\x80\x02" + os.urandom(10 << 20))
    refused(path)
    path.write_bytes(bytes(257) + b"ustar\x00")
    refused(path, r"tar format .* re-save it with torch.save\(torch.load\(path\)")
    with pytest.raises(ValueError, match="m: the pickle has 16777217 bytes"):
        pickles.read(bytes((16 << 20) + 1), "m")


CLAIMS = """
import resource, sys
from pathlib import Path
from mlxgpt.formats.torch_file import read
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (200 << 20),) * 2)
for path in sys.argv[1:]:
    try:
        read(Path(path)).read()
    except ValueError as error:
        print(error)
    else:
        raise SystemExit(f"{path} was read")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's address space")
def test_claims_allocate_nothing(path):
    """Files that claim up to 2^63 bytes, in a process that may not have 200 MB more than it has."""
    big = 1 << 60
    contents = [
        tensor(of=storage(numel=big)), tensor(0, (big,), (0,)), tensor(0, (1 << 58,), (0,)), tensor(big),
        tensor(0, (0, big), (0, 0)), b"\x8e" + struct.pack("<Q", big), b"B\xff\xff\xff\xff", b"r\xff\xff\xff\xff",
        b"Nr\xff\xff\xff\xffR", b"j\xff\xff\xff\xff", b"\x95" + b"\xff" * 8, b"\x8a\xff",
    ]  # fmt: skip
    files = []
    for number, (make, content) in enumerate(itertools.product((archive, legacy), contents)):
        files.append(make(path.with_name(f"{number}.pt"), content))
    damaged = bytearray(archive(path, tensor()).read_bytes())
    for at in (damaged.rindex(b"PK\x03\x04") + 18, damaged.rindex(b"PK\x01\x02") + 20):
        damaged[at : at + 8] = struct.pack("<LL", 0xFFFFFFF0, 0xFFFFFFF0)
    path.write_bytes(damaged)
    run = subprocess.run(
        [sys.executable, "-c", CLAIMS, *map(str, files), str(path)],
        capture_output=True, text=True, timeout=60, cwd=Path(torch_file.__file__).parents[2],
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-500:]
    assert len(run.stdout.splitlines()) == len(files) + 1


# Fuzzing.


def small_files(tmp_path):
    """A file of each kind, each with its tensors."""
    value = {"a": np.arange(6.0), "b": [np.ones((2, 2), np.float32), 3, "x"], "c": (None, True, {1: 2.5})}
    write(tmp_path / "written.pt", value)
    content = b"(" + tensor() + tensor(1, (2, 2), (2, 1)) + put({"a": 1}) + b"t"
    compressed = archive(tmp_path / "compressed.pt", content, method=zipfile.ZIP_DEFLATED, byteorder=b"little")
    return [tmp_path / "written.pt", compressed, legacy(tmp_path / "old.pt", content)]


def test_cut_off_anywhere(tmp_path, path):
    for file in small_files(tmp_path):
        data = file.read_bytes()
        read_all(file)
        for length in range(len(data)):
            path.write_bytes(data[:length])
            refused(path)


def test_every_byte_of_a_tensor_is_checked(path):
    """A flipped bit in an entry of a zip file is an error; the old format has no checksums."""
    write(path, np.arange(6.0))
    good, where = path.read_bytes(), path.read_bytes().index(np.arange(6.0).tobytes())
    for i in range(48):
        path.write_bytes(good[: where + i] + bytes([good[where + i] ^ 1]) + good[where + i + 1 :])
        refused(path, "its CRC is")


def test_every_flipped_byte(tmp_path, path):
    for file in small_files(tmp_path):
        data = file.read_bytes()
        for i in range(len(data)):
            path.write_bytes(data[:i] + bytes([data[i] ^ (1, 0x80, 0xFF)[i % 3]]) + data[i + 1 :])
            survives(path)


@settings(fuzz, max_examples=400)
@given(
    st.sampled_from(FILES),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=9)), min_size=1, max_size=4),
    st.floats(0, 1.2),
)
def test_flipped_and_cut(path, file, edits, end):
    data = bytearray(file.read_bytes())
    for place, new in edits:
        at = int(place * len(data))
        data[at : at + len(new)] = new
    path.write_bytes(data[: int(end * len(data))] if end < 1 else data)
    survives(path)


fragments = st.sampled_from(
    [bytes([op]) for op in b"().]}NQRabehjqrstu0\x80\x81\x85\x86\x87\x88\x89\x8f\x90\x93\x94"]
    + [b"K\0", b"K\1", b"J\xff\xff\xff\xff", b"q\0", b"q\1", b"h\0", b"h\1", b"\x8a\1\xff", b"G" + bytes(8), b"C\1a"]
    + [
        put("a"),
        put("latin1"),
        put("storage"),
        put(("cpu",)),
        put((2, 3)),
        put(6),
        storage(),
        tensor(),
        b"X\2\0\0\0\xc3",
    ]
    + [f"c{name}\n".encode() for name in ("collections\nOrderedDict", "__builtin__\nset", "_codecs\nencode")]
    + [f"ctorch\n{name}\n".encode() for name in ("Size", "device", "FloatStorage", "float16")]
    + [f"ctorch._utils\n_rebuild_{name}\n".encode() for name in ("tensor", "tensor_v2", "parameter")]
)


@settings(fuzz, max_examples=600)
@given(st.lists(fragments | st.binary(max_size=3), max_size=30).map(b"".join), st.sampled_from([archive, legacy]))
def test_any_opcodes(path, content, make):
    survives(make(path, content))


@settings(fuzz, max_examples=300)
@given(st.binary(max_size=400), st.sampled_from([b"", b"PK\3\4", b"PK\5\6", b"\x80\2", b"\x80\2\x8a\x0a"]))
def test_any_bytes(path, data, start):
    path.write_bytes(start + data)
    survives(path)
    try:
        pickles.read(start + data, "x")
    except ValueError as error:
        assert type(error) is ValueError
