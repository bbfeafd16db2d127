"""PyTorch's files without PyTorch: read as data, nothing in them is imported or executed, and written.

A file of torch.save is a pickle that refers to storages, the raw bytes that tensors are views of:
- since PyTorch 1.6 a zip file, DIR/data.pkl beside DIR/data/KEY, stored and aligned so that it can be mapped;
- before that the pickles in a row (magic number, version, machine, value, storage keys), then the storages.
The pickle is interpreted here: the opcodes and the globals of plain values and tensors, no others. What a file
claims is checked before anything of that size is allocated, and every loop is bounded by the file's own size.
The format is torch/serialization.py's (_save, _load, _legacy_save, _legacy_load).
"""

from __future__ import annotations

import io
import itertools
import math
import os
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import decode_long, encode_long  # two's complement; nothing else of pickle's is used
from typing import Any, BinaryIO, NoReturn

import numpy as np

from .safetensors_file import Tensor

_NUMPY = {  # torch's dtypes; numpy has no bfloat16: its bits
    "float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "float64": "<f8", "int64": "<i8",
    "int32": "<i4", "int16": "<i2", "int8": "|i1", "uint8": "|u1", "bool": "|b1",
}  # fmt: skip
_STORAGES = {
    "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16", "DoubleStorage": "float64",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip

# GPT-2 XL with its optimizer takes 400 KB and 80,000 opcodes. These keep a hostile file to seconds and 500 MB.
_MAX_BYTES = 16 << 20  # of a pickle
_MAX_DIRECTORY = 4 << 20  # bytes of a zip file's directory
_MAX_OPCODES = 1_000_000
_MAX_DEPTH = 100  # of containers in one another: whoever walks them may recurse
_MAX_EXPANDED = 1 << 30  # bytes of a tensor with more elements than its storage (strides of 0)
_MAX_INFLATED = 64 << 20, 20  # bytes that compressed storages may become: these, and so many times the file

_MAGIC = 0x1950A86A20F9469CFC6C
_RESAVE = "re-save it with torch.save(torch.load(path), path)"


def read(path: Path) -> Any:
    """What torch.load(path) gives, with a Tensor for each tensor and each Parameter.

    torch.Size becomes a tuple, torch.device and dtypes strings ("cuda:0", "float32"); attributes of an OrderedDict
    (a state dict's _metadata) are dropped. Devices are ignored. FileNotFoundError; ValueError, in one line, for
    what isn't a PyTorch file, is damaged, or holds anything but plain values and tensors.
    """
    file = _File(path)
    with file.open() as stream:
        head = stream.read(512)
    if head.startswith(b"PK"):
        return _read_zip(file)
    if head[257:262] == b"ustar":
        raise ValueError(f"{path}: the tar format of PyTorch 0.1 is not supported: {_RESAVE}")
    if head.startswith(b"\x80"):
        return _read_legacy(file)
    raise ValueError(f"{path}: not a PyTorch file: it starts with {head[:8]!a}, expected b'PK' or b'\\x80'")


def read_pickle(data: bytes, name: str) -> Any:
    """A pickle of plain values (nanoGPT's meta.pkl), read as data. ValueError, with `name` for the file's."""
    if len(data) > _MAX_BYTES:
        raise ValueError(f"{name}: the pickle has {len(data)} bytes, expected at most {_MAX_BYTES}")
    return _Interpreter(data, name).run()


# ---------------------------------------------------------------------------------------------- files


class _File:
    """A file that stays the same: opened anew for each tensor, so that mapped pages go with the array."""

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.abspath(path))
        if not self.path.exists():
            raise FileNotFoundError(f"{path}: no such file")
        if not self.path.is_file():
            raise ValueError(f"{path}: not a file")
        self.name = str(path)
        self.identity = self._identify(os.stat(self.path))
        self.size = self.identity[2]

    @staticmethod
    def _identify(stat: os.stat_result) -> tuple[int, ...]:
        return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        with open(self.path, "rb") as stream:
            # A mapping past the end of a file that became shorter would kill the process.
            if self._identify(os.fstat(stream.fileno())) != self.identity:
                raise ValueError(f"{self.name}: the file has changed since it was opened")
            yield stream

    def map(self, start: int, nbytes: int) -> np.ndarray:
        """-> uint8 (nbytes,), read-only."""
        if nbytes == 0:
            return np.empty(0, np.uint8)
        with self.open() as stream:
            return np.memmap(stream, np.uint8, mode="r", offset=start, shape=(nbytes,)).view(np.ndarray)

    def crc(self, start: int, nbytes: int) -> int:
        buffer, crc = memoryview(bytearray(min(nbytes, 1 << 20))), 0
        with self.open() as stream:
            stream.seek(start)
            while nbytes and (n := stream.readinto(buffer[:nbytes])):  # type: ignore[attr-defined]
                crc, nbytes = zlib.crc32(buffer[:n], crc), nbytes - n
        return crc


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str
    numel: int
    view: Callable[[int, int], np.ndarray]  # (first byte, bytes) -> uint8 (bytes,)
    inflated: int = 0  # bytes that each view costs in time and memory, where the storage is compressed

    @property
    def nbytes(self) -> int:
        return self.numel * np.dtype(_NUMPY[self.dtype]).itemsize


def _tensor(storage: _Storage, offset: Any, shape: Any, stride: Any) -> Tensor:
    """The view of a storage that torch's as_strided gives; offset and strides in elements. ValueError."""
    if not (_sizes(shape) and _sizes(stride) and _sizes((offset,)) and len(shape) == len(stride)):
        raise ValueError(f"offset, shape and strides are {_shown((offset, shape, stride))}")
    dtype = np.dtype(_NUMPY[storage.dtype])
    if math.prod(max(n, 1) for n in shape) * dtype.itemsize >= 1 << 62:
        raise ValueError(f"the shape is {_shown(shape)}, expected less than 2^62 bytes")
    if 0 in shape:
        return Tensor(storage.dtype, shape, lambda: np.empty(shape, dtype))
    span = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if offset + span > storage.numel:
        raise ValueError(f"elements {offset} to {_shown(offset + span)} are of a storage of {storage.numel}")
    if (nbytes := math.prod(shape) * dtype.itemsize) > max(storage.nbytes, _MAX_EXPANDED):
        raise ValueError(f"shape and strides {_shown((shape, stride))} make {nbytes} bytes of {storage.nbytes}")
    strides = [s * dtype.itemsize if n > 1 else 0 for n, s in zip(shape, stride, strict=True)]

    def read() -> np.ndarray:
        raw = storage.view(offset * dtype.itemsize, span * dtype.itemsize)
        return np.ndarray(shape, dtype, raw, strides=strides)

    return Tensor(storage.dtype, shape, read, (id(storage), offset, stride))


def _sizes(value: Any) -> bool:
    """Whether this is a tuple of at most 64 integers (numpy's limit), none of them negative, nor a bool."""
    return type(value) is tuple and len(value) <= 64 and all(type(n) is int and n >= 0 for n in value)


def _few(value: Any) -> bool:
    """Whether this is a tuple as functions take it: copying a long one often would take quadratic time."""
    return type(value) is tuple and len(value) <= 8


def _shown(value: Any) -> str:
    """A value of a file in an error: one short line, whatever it is. Containers may be deep or endless: their type."""
    if isinstance(value, tuple):
        return "(" + ", ".join(_shown(v) if not isinstance(v, tuple) or _sizes(v) else "..." for v in value[:8]) + ")"
    if isinstance(value, str | bytes):
        return ascii(value[:80])
    if isinstance(value, _Global):
        return value.name
    if value is None or isinstance(value, bool | int | float):
        return hex(value)[:40] if type(value) is int and abs(value) >> 63 else repr(value)
    return f"a {type(value).__name__}"


# ---------------------------------------------------------------------------------------------- the zip format

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")


class _Bounded(io.FileIO):
    def read(self, size: int | None = -1) -> bytes:
        if size and size > _MAX_DIRECTORY:
            raise ValueError(f"its directory has {size} bytes, expected at most {_MAX_DIRECTORY}")
        return super().read(size)  # type: ignore[arg-type]


class _Zip:
    """The entries of a zip file. zipfile reads the directory; what it doesn't check is checked here."""

    def __init__(self, file: _File) -> None:
        self.file = file
        try:
            with file.open(), _Bounded(file.path) as stream, zipfile.ZipFile(stream) as archive:
                infos, end = archive.infolist(), archive.start_dir
        except Exception as error:  # zipfile meets damage with a dozen types of exception
            raise ValueError(f"{file.name}: a damaged zip file: {ascii(str(error))[1:-1]}") from None
        self.has_crcs = any(info.CRC for info in infos)  # not after torch.serialization.set_crc32_options(False)
        self.infos = {info.filename: info for info in infos}
        if len(self.infos) != len(infos):
            raise ValueError(f"{file.name}: two entries of the zip file have one name")
        offsets = sorted(info.header_offset for info in infos)
        if offsets and not 0 <= offsets[0] <= offsets[-1] < end:
            raise ValueError(
                f"{file.name}: the zip file's directory lies at {end}, its entries at {offsets[0]} to {offsets[-1]}"
            )
        self.ends = dict(itertools.pairwise([*offsets, end]))  # where the next entry starts
        found = [name for name in self.infos if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(found) != 1:
            raise ValueError(f"{file.name}: the zip file has {len(found)} entries DIR/data.pkl, expected one")
        self.directory = found[0].removesuffix("data.pkl")  # "archive/", which all lies in

    def locate(self, name: str) -> tuple[zipfile.ZipInfo, int]:
        """-> an entry and its first byte's position. ValueError unless it lies whole and alone in the file."""
        if (info := self.infos.get(name)) is None:
            self.refuse(name, "is missing from the zip file")
        with self.file.open() as stream:
            stream.seek(info.header_offset)
            header = stream.read(_LOCAL_HEADER.size)
            if len(header) < _LOCAL_HEADER.size:
                self.refuse(name, "its local header is past the end of the file")
            magic, _, flags, method, _, _, crc, packed, size, name_length, extra_length = _LOCAL_HEADER.unpack(header)
            local_name = stream.read(name_length)
        if (flags | info.flag_bits) & 1:
            self.refuse(name, "is encrypted")
        unknown = (0, 0xFFFFFFFF) if flags & 8 else (0xFFFFFFFF,)  # told after the data, or in zip64's extra field
        agrees = (
            magic == b"PK\3\4"
            and method == info.compress_type
            and local_name == info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
            and (packed == info.compress_size or packed in unknown)
            and (size == info.file_size or size in unknown)
            and (crc == info.CRC or (flags & 8 and crc == 0))
        )
        if not agrees:
            self.refuse(name, "its local header disagrees with the zip file's directory")
        start = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if start + info.compress_size > self.ends[info.header_offset]:
            self.refuse(name, f"its {info.compress_size} bytes overlap what follows, or are cut off")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            self.refuse(name, f"its compression method is {info.compress_type}, expected none or deflate")
        if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
            self.refuse(name, f"is {info.file_size} bytes stored in {info.compress_size}")
        return info, start

    def content(self, name: str) -> bytes:
        """A small entry, its CRC checked."""
        info, start = self.locate(name)
        if info.file_size > _MAX_BYTES:
            self.refuse(name, f"has {info.file_size} bytes, expected at most {_MAX_BYTES}")
        return self._view(info, start)(0, info.file_size).tobytes()

    def storage(self, key: str, dtype: str, numel: int) -> _Storage:
        """ValueError unless the file holds just that many elements."""
        name = self.directory + "data/" + key
        info, start = self.locate(name)
        inflated = info.file_size if info.compress_type != zipfile.ZIP_STORED else 0
        storage = _Storage(dtype, numel, self._view(info, start), inflated)
        if storage.nbytes != info.file_size:
            self.refuse(name, f"has {info.file_size} bytes, expected {_shown(numel)} {dtype}")
        return storage

    def _view(self, info: zipfile.ZipInfo, start: int) -> Callable[[int, int], np.ndarray]:
        checked = not self.has_crcs

        def view(first: int, nbytes: int) -> np.ndarray:
            nonlocal checked
            stored = info.compress_type == zipfile.ZIP_STORED
            content = None if stored else self._inflate(info, start)
            if not checked:
                crc = self.file.crc(start, info.file_size) if content is None else zlib.crc32(content)
                if crc != info.CRC:
                    self.refuse(info.filename, f"its CRC is {crc:#010x}, expected {info.CRC:#010x}")
                checked = True
            if content is None:
                return self.file.map(start + first, nbytes)
            return np.frombuffer(content, np.uint8)[first : first + nbytes]

        return view

    def _inflate(self, info: zipfile.ZipInfo, start: int) -> bytes:
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            content = inflate.decompress(self.file.map(start, info.compress_size).data, info.file_size + 1)
        except zlib.error as error:
            self.refuse(info.filename, f"can't be decompressed: {error}")
        if len(content) != info.file_size:
            self.refuse(info.filename, f"doesn't decompress to {info.file_size} bytes")
        return content

    def refuse(self, name: str, rule: str) -> NoReturn:
        raise ValueError(f"{self.file.name}: {_shown(name)[1:-1]}: {rule}")


def _read_zip(file: _File) -> Any:
    archive = _Zip(file)
    directory = archive.directory
    if directory + "constants.pkl" in archive.infos:
        raise ValueError(f"{file.name}: a TorchScript program, expected what torch.save writes")
    if directory + "byteorder" in archive.infos and (order := archive.content(directory + "byteorder")) != b"little":
        archive.refuse(directory + "byteorder", f"is {_shown(order)}, expected b'little': {_RESAVE} on this machine")
    pickle = archive.content(directory + "data.pkl")
    most = _MAX_INFLATED[0] + _MAX_INFLATED[1] * file.size
    return _Interpreter(pickle, f"{file.name}: data.pkl", archive.storage, most).run()


# ---------------------------------------------------------------------------------------------- the old format


def _read_legacy(file: _File) -> Any:
    with file.open() as stream:
        head = stream.read(_MAX_BYTES)
    positions: dict[str, int] = {}
    interpreter = _Interpreter(head, file.name, lambda key, dtype, numel: _Storage(dtype, numel, view_of(key)))

    def view_of(key: str) -> Callable[[int, int], np.ndarray]:
        return lambda first, nbytes: file.map(positions[key] + first, nbytes)

    magic, version, machine = interpreter.run(), interpreter.run(), interpreter.run()
    if magic != _MAGIC or version != 1001:
        raise ValueError(f"{file.name}: not a PyTorch file: a pickle without torch.save's magic number and version")
    if not (isinstance(machine, dict) and machine.get("little_endian") is True):
        raise ValueError(f"{file.name}: written on a big-endian machine: {_RESAVE} on this machine")
    value, keys = interpreter.run(), interpreter.run()
    storages = interpreter.storages
    if not isinstance(keys, list) or len(keys) != len(storages) or {k for k in keys if type(k) is str} != set(storages):
        raise ValueError(f"{file.name}: the list of storages doesn't name the {len(storages)} storages of the tensors")
    position = interpreter.position
    with file.open() as stream:
        for key in keys:
            stream.seek(position)
            numel = int.from_bytes(stream.read(8), "little")
            positions[key] = position + 8
            position += 8 + storages[key].nbytes
            if position > file.size:
                raise ValueError(f"{file.name}: storage {_shown(key)} ends at {position} of {file.size} bytes")
            if numel != storages[key].numel:
                raise ValueError(f"{file.name}: storage {_shown(key)} has {numel} elements, not {storages[key].numel}")
    return value


# ---------------------------------------------------------------------------------------------- the pickle


@dataclass(frozen=True)
class _Global:
    """A name that the pickle refers to. It stands for a function below, never for the thing of that name."""

    name: str


class _Interpreter:
    """Runs the pickles of `data`, one after the other, and gives what each builds.

    `storage(key, dtype, numel)` finds a storage; without it there are no tensors.
    """

    def __init__(
        self, data: bytes, name: str, storage: Callable[[str, str, int], _Storage] | None = None, max_inflated: int = 0
    ) -> None:
        self.data, self.name, self.find = data, name, storage
        self.position = 0
        self.storages: dict[str, _Storage] = {}
        self.copied = 0  # by functions; what pickle writes is copied once at most
        self.inflated, self.max_inflated = 0, max_inflated

    def run(self) -> Any:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under each mark
        self.memo: dict[int, Any] = {}
        try:
            for _ in range(_MAX_OPCODES):
                opcode = self.take(1)
                if opcode == b".":
                    break
                if (action := _OPCODES.get(opcode)) is None:
                    raise ValueError(f"opcode {opcode!a} is not one that plain values and tensors need")
                action(self)
            else:
                raise ValueError(f"it has more than {_MAX_OPCODES} opcodes")
            if self.below or len(self.stack) != 1:
                raise ValueError("it doesn't end with one value")
            _measure(self.stack[0], 0, {})
        except (ValueError, IndexError, KeyError) as error:
            reason = "a value is taken that isn't there" if isinstance(error, LookupError) else error
            raise ValueError(f"{self.name}: byte {self.position} of the pickle: {reason}") from None
        return self.stack[0]

    # What the opcodes do is built of these.

    def take(self, n: int) -> bytes:
        self.position += n
        if self.position > len(self.data):
            self.position = len(self.data)
            raise ValueError("it is cut off")
        return self.data[self.position - n : self.position]

    def number(self, nbytes: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(nbytes), "little", signed=signed)

    def counted(self, nbytes: int) -> bytes:
        return self.take(self.number(nbytes))

    def text(self, nbytes: int) -> str:
        return str(self.counted(nbytes), "utf-8")

    def line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + 256)
        return str(self.take(end + 1 - self.position if end >= 0 else 256)[:-1], "utf-8")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        return self.stack.pop()

    def top(self, *types: type) -> Any:
        """The value that the next opcode changes, of just these types."""
        if type(self.stack[-1]) not in types:
            raise ValueError(f"{_shown(self.stack[-1])} where a {types[0].__name__} is filled")
        return self.stack[-1]

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def pop_tuple(self, n: int) -> tuple[Any, ...]:
        return tuple([self.pop() for _ in range(n)][::-1])

    def extend(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def set_items(self, items: list[Any]) -> None:
        _fill(self.top(dict, OrderedDict), items[::2], items[1::2])

    def add_items(self, items: list[Any]) -> None:
        self.top(set).update(map(_key, items))

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def push_global(self, module: str, name: str) -> None:
        """Refuses every global that isn't one of ours, by its name."""
        full = f"{module}.{name}".replace("__builtin__.", "builtins.")
        if name in _NUMPY and module == "torch":
            self.push(name)
        elif full in _FUNCTIONS or full in _STORAGE_TYPES:
            self.push(_Global(full))
        else:
            raise ValueError(f"{_shown(full)} is not one of the globals that plain values and tensors need")

    def stack_global(self) -> None:
        module, name = self.pop_tuple(2)
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError(f"a global is called {_shown(module)}, {_shown(name)}")
        self.push_global(module, name)

    def reduce(self) -> None:
        function, arguments = self.pop_tuple(2)
        if not isinstance(function, _Global) or function.name not in _FUNCTIONS or not _few(arguments):
            raise ValueError(f"{_shown(function)} is called")
        try:
            self.push(_FUNCTIONS[function.name](self, *arguments))
        except (TypeError, ValueError) as error:
            # TypeError is a wrong number of arguments; its text is Python's
            reason = "the arguments are not what it takes" if isinstance(error, TypeError) else error
            raise ValueError(f"{function.name}: {reason}") from None

    def build(self) -> None:
        self.pop()  # attributes: of a state dict, _metadata
        self.top(OrderedDict)

    def persistent(self) -> None:
        """("storage", type, key, device, elements) -> that storage, the same for the same key."""
        reference = self.pop()
        match reference if self.find and _few(reference) else None:
            case ("storage", _Global(kind), str(key), str(), numel, *views) if kind in _STORAGE_TYPES:
                dtype = _STORAGE_TYPES[kind]
            case _:
                raise ValueError(f"{_shown(reference)} is not a reference to a storage")
        if not _sizes((numel,)):
            raise ValueError(f"storage {_shown(key)} has {_shown(numel)} elements")
        if views not in ([], [None]):
            raise ValueError(f"storage {_shown(key)} is a view of another, as only PyTorch 0.3 wrote: {_RESAVE}")
        known = self.storages.get(key)
        if known is None:
            known = self.storages[key] = self.find(key, dtype, numel)  # type: ignore[misc]
        if (known.dtype, known.numel) != (dtype, numel):
            raise ValueError(
                f"storage {_shown(key)} is {known.numel} {known.dtype} at first and then {_shown(numel)} {dtype}"
            )
        self.push(known)

    # The functions that a pickle may call.

    def copying(self, values: Any, *types: type) -> Any:
        """An argument that is copied: functions that are called often must not make much of little."""
        if type(values) not in types:
            raise ValueError(f"the argument is {_shown(values)}, expected a {types[0].__name__}")
        self.charge(len(values))
        return values

    def charge(self, nbytes: int) -> None:
        self.copied += nbytes
        if self.copied > len(self.data):
            raise ValueError("the same values are used again and again")

    def ordered_dict(self, pairs: Any = ()) -> OrderedDict[Any, Any]:
        result: OrderedDict[Any, Any] = OrderedDict()
        for pair in self.copying(pairs, tuple, list):  # Python 2 wrote the items as an argument
            if type(pair) not in (list, tuple) or len(pair) != 2:
                raise ValueError(f"an item is {_shown(pair)}, expected a pair")
            _fill(result, pair[:1], pair[1:])
        return result

    def make_set(self, items: Any = ()) -> set[Any]:
        return set(map(_key, self.copying(items, list, tuple)))

    def encode(self, text: Any, encoding: Any) -> bytes:
        if encoding != "latin1":
            raise ValueError(f"the encoding is {_shown(encoding)}, expected 'latin1'")
        return bytes(self.copying(text, str).encode("latin1"))

    def size(self, sizes: Any) -> tuple[int, ...]:
        if not _sizes(result := tuple(self.copying(sizes, tuple, list))):
            raise ValueError(f"the sizes are {_shown(result)}")
        return result

    def device(self, kind: Any, index: Any = None) -> str:
        if type(kind) is not str or type(index) not in (int, type(None)):
            raise ValueError(f"the device is {_shown((kind, index))}")
        self.copying(kind, str)
        return kind if index is None else f"{kind}:{index}"

    def tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Tensor:
        if not isinstance(storage, _Storage):
            raise ValueError(f"{_shown(storage)} is not a storage")
        self.charge(32)  # torch.save takes more for each
        self.inflated += storage.inflated
        if self.inflated > self.max_inflated:
            raise ValueError(f"compressed storages become {self.inflated} bytes, expected at most {self.max_inflated}")
        return _tensor(storage, offset, shape, stride)

    def parameter(self, tensor: Any, *_: Any) -> Tensor:
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{_shown(tensor)} is not a tensor")
        return tensor


_STORAGE_TYPES = {f"torch.{name}": dtype for name, dtype in _STORAGES.items()} | {
    "torch.UntypedStorage": "uint8",
    "torch.storage.UntypedStorage": "uint8",
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _Interpreter.ordered_dict,
    "builtins.set": _Interpreter.make_set,
    "_codecs.encode": _Interpreter.encode,
    "torch.Size": _Interpreter.size,
    "torch.device": _Interpreter.device,
    "torch._utils._rebuild_tensor": _Interpreter.tensor,
    "torch._utils._rebuild_tensor_v2": _Interpreter.tensor,
    "torch._utils._rebuild_parameter": _Interpreter.parameter,
    "torch._utils._rebuild_parameter_with_state": _Interpreter.parameter,
}
_OPCODES: dict[bytes, Callable[[_Interpreter], Any]] = {
    b"\x80": lambda p: p.take(1),  # PROTO
    b"\x95": lambda p: p.take(8),  # FRAME
    b"N": lambda p: p.push(None),
    b"\x88": lambda p: p.push(True),
    b"\x89": lambda p: p.push(False),
    b"K": lambda p: p.push(p.number(1)),
    b"M": lambda p: p.push(p.number(2)),
    b"J": lambda p: p.push(p.number(4, signed=True)),
    b"\x8a": lambda p: p.push(decode_long(p.counted(1))),
    b"G": lambda p: p.push(struct.unpack(">d", p.take(8))[0]),
    b"U": lambda p: p.push(p.text(1)),  # Python 2's strings
    b"T": lambda p: p.push(p.text(4)),
    b"\x8c": lambda p: p.push(p.text(1)),
    b"X": lambda p: p.push(p.text(4)),
    b"\x8d": lambda p: p.push(p.text(8)),
    b"C": lambda p: p.push(p.counted(1)),
    b"B": lambda p: p.push(p.counted(4)),
    b"\x8e": lambda p: p.push(p.counted(8)),
    b")": lambda p: p.push(()),
    b"]": lambda p: p.push([]),
    b"}": lambda p: p.push({}),
    b"\x8f": lambda p: p.push(set()),
    b"(": _Interpreter.mark,
    b"t": lambda p: p.push(tuple(p.pop_mark())),
    b"\x85": lambda p: p.push(p.pop_tuple(1)),
    b"\x86": lambda p: p.push(p.pop_tuple(2)),
    b"\x87": lambda p: p.push(p.pop_tuple(3)),
    b"a": lambda p: p.extend([p.pop()]),
    b"e": lambda p: p.extend(p.pop_mark()),
    b"s": lambda p: p.set_items(list(p.pop_tuple(2))),
    b"u": lambda p: p.set_items(p.pop_mark()),
    b"\x90": lambda p: p.add_items(p.pop_mark()),
    b"q": lambda p: p.remember(p.number(1)),
    b"r": lambda p: p.remember(p.number(4)),
    b"\x94": lambda p: p.remember(len(p.memo)),
    b"h": lambda p: p.push(p.memo[p.number(1)]),
    b"j": lambda p: p.push(p.memo[p.number(4)]),
    b"c": lambda p: p.push_global(p.line(), p.line()),
    b"\x93": _Interpreter.stack_global,
    b"R": _Interpreter.reduce,
    b"b": _Interpreter.build,
    b"Q": _Interpreter.persistent,
}


def _key(value: Any) -> Any:
    """A dictionary's key. Others are refused: hashing nested tuples takes exponential time, or the stack's end.

    Large integers too: those that are equal modulo 2^61 - 1 have one hash, and many of them quadratic time.
    """
    if type(value) in _KEYS and not (type(value) is int and abs(value) >> 60):
        return value
    raise ValueError(f"a key is {_shown(value)}, expected a string or a number")


def _fill(target: dict[Any, Any], keys: Any, values: Any) -> None:
    if len(keys) != len(values):
        raise ValueError("a key has no value")
    target.update(zip(map(_key, keys), values, strict=True))


_KEYS = frozenset([str, bytes, bool, int, float, type(None)])
_ATOMS = _KEYS | {Tensor}


def _measure(value: Any, depth: int, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """-> (height, size) of a value as a tree. ValueError when others couldn't walk it, or it isn't plain.

    Too large is, for one, a list that holds one list twice, which holds one twice, and so on.
    """
    if type(value) in _ATOMS or not value:
        return 0, 1 + len(value) // 16 if type(value) in (str, bytes) else 1
    if isinstance(value, (_Global, _Storage)):
        raise ValueError(f"{_shown(value)} stands where a value should")
    if id(value) not in known:
        if depth > _MAX_DEPTH:
            raise ValueError(f"values are more than {_MAX_DEPTH} deep in one another")
        known[id(value)] = None
        parts = itertools.chain(value.keys(), value.values()) if isinstance(value, dict) else value
        height, size = 0, 1
        for part in parts:
            part_height, part_size = _measure(part, depth + 1, known)
            height, size = max(height, part_height + 1), size + part_size
        known[id(value)] = height, size
    if (measured := known[id(value)]) is None:
        raise ValueError(f"{_shown(value)} holds itself")
    if depth + measured[0] > _MAX_DEPTH:
        raise ValueError(f"values are more than {_MAX_DEPTH} deep in one another")
    if measured[1] > _MAX_OPCODES:
        raise ValueError(f"it stands for {_shown(measured[1])} values, expected at most {_MAX_OPCODES}")
    return measured


# ---------------------------------------------------------------------------------------------- writing

_KINDS = {dtype: name for name, dtype in _STORAGES.items()}
_ALIGNMENT = 64  # bytes, torch's: a mapped tensor starts where vector instructions like it


def write(path: Path, value: Any) -> None:
    """Writes the zip file that torch.save writes; torch.load opens it, with weights_only and with mmap too.

    `value`: dicts, lists, tuples, strings, numbers, bools and None, Tensors and arrays. Tensors are read, written
    and let go one at a time; the same object twice is one storage. The file appears whole or not at all, in place
    of one that is there. ValueError for other values, and for a Tensor that doesn't read as what it says; OSError.
    """
    pickler = _Pickler()
    try:
        pickler.put(value, 0)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as stream:
            with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
                _add(archive, "data.pkl", bytes(pickler.out) + b".")
                _add(archive, "byteorder", b"little")
                for key, leaf in enumerate(pickler.leaves):
                    _add(archive, f"data/{key}", _bytes(leaf, f"{path}: tensor {key}"))
                _add(archive, "version", b"3\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _add(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    """Appends an entry whose data is aligned, by an extra field in its local header."""
    info = zipfile.ZipInfo("archive/" + name)
    info.file_size = len(content)
    zip64 = len(content) >= 1 << 30
    header = _LOCAL_HEADER.size + len(info.filename) + (20 if zip64 else 0) + 4
    padding = -(archive.start_dir + header) % _ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    with archive.open(info, "w", force_zip64=zip64) as entry:
        for start in range(0, len(content), 1 << 20):  # what the CRC is computed of is still in the cache
            entry.write(content[start : start + (1 << 20)])
    info.extra = b""  # not in the directory


def _bytes(leaf: Tensor | np.ndarray, name: str) -> memoryview:
    """-> uint8, one-dimensional."""
    array = leaf.read() if isinstance(leaf, Tensor) else leaf
    dtype = np.dtype(_NUMPY[_dtype(leaf)])
    if array.shape != leaf.shape or array.dtype.newbyteorder("<") != dtype:
        raise ValueError(f"{name}: reads as {array.dtype} {array.shape}, expected {dtype} {leaf.shape}")
    return np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8).data


def _dtype(leaf: Tensor | np.ndarray) -> str:
    name = leaf.dtype if isinstance(leaf, Tensor) else leaf.dtype.name
    if name not in _NUMPY:
        raise ValueError(f"the dtype is {name}, expected one of {', '.join(_NUMPY)}")
    return name


class _Pickler:
    """Builds a pickle of protocol 2 in `out`, without its end; the tensors whose bytes it refers to in `leaves`."""

    def __init__(self) -> None:
        self.out = bytearray(b"\x80\x02")
        self.leaves: list[Tensor | np.ndarray] = []
        self.keys: dict[int, int] = {}  # of a tensor's id

    def put(self, value: Any, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise ValueError(f"values are more than {_MAX_DEPTH} deep in one another")
        if isinstance(value, dict):
            self.items(b"}(", [part for item in value.items() for part in item], b"u", depth)
            for key in value:
                _key(key)
        elif isinstance(value, list):
            self.items(b"](", value, b"e", depth)
        elif isinstance(value, tuple):
            self.items(b"(", value, b"t", depth)
        elif isinstance(value, Tensor | np.ndarray):
            self.tensor(value, depth)
        else:
            self.out += _pickled_scalar(value)

    def items(self, before: bytes, values: Any, after: bytes, depth: int) -> None:
        self.out += before
        for value in values:
            self.put(value, depth + 1)
        self.out += after

    def tensor(self, leaf: Tensor | np.ndarray, depth: int) -> None:
        """torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks)."""
        kind = _KINDS[_dtype(leaf)]
        key = self.keys.setdefault(id(leaf), len(self.leaves))
        if key == len(self.leaves):
            self.leaves.append(leaf)
        self.out += b"ctorch._utils\n_rebuild_tensor_v2\n(("
        self.put("storage", depth)
        self.out += f"ctorch\n{kind}\n".encode()
        for value in (str(key), "cpu", math.prod(leaf.shape)):
            self.put(value, depth)
        self.out += b"tQ"
        for value in (0, leaf.shape, _contiguous(leaf.shape), False):
            self.put(value, depth)
        self.out += b"ccollections\nOrderedDict\n)RtR"


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """-> the strides of a row-major array, in elements."""
    return tuple(math.prod(max(n, 1) for n in shape[i + 1 :]) for i in range(len(shape)))


def _pickled_scalar(value: Any) -> bytes:
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        if -(1 << 31) <= value < 1 << 31:
            return b"J" + struct.pack("<i", value)
        if len(encoded := encode_long(value)) < 256:
            return b"\x8a" + bytes([len(encoded)]) + encoded
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        encoded = value.encode()
        return b"X" + struct.pack("<I", len(encoded)) + encoded
    raise ValueError(f"{_shown(value)} can't be written, expected a plain value or a tensor")
