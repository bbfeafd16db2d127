"""Pickles as data: read by an interpreter that imports and calls nothing, and written.

A file of PyTorch's is a pickle that refers to storages, the raw bytes that tensors are views of. Only the opcodes and
the globals of plain values and tensors are known here. What a pickle claims is checked before anything of that size is
allocated, and every loop is bounded by the pickle's own size.
The references are those of torch/serialization.py and torch/_utils.py.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pickle import decode_long, encode_long  # two's complement; nothing else of pickle's is used
from typing import Any

import numpy as np

from .tensors import Tensor, numpy_dtype

_STORAGES = {  # PyTorch's types of a storage, and torch's names of what they hold
    "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16", "DoubleStorage": "float64",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip
DTYPES = tuple(_STORAGES.values())

# GPT-2 XL with its optimizer takes 400 KB and 80,000 opcodes. These bounds keep a hostile file to seconds and 500 MB.
MAX_BYTES = 16 << 20  # of a pickle
_MAX_OPCODES = 1_000_000
_MAX_DEPTH = 100  # of containers in one another: whoever walks them may recurse
_MAX_EXPANDED = 1 << 30  # bytes of a tensor with more elements than its storage (strides of 0)

RESAVE = "re-save it with torch.save(torch.load(path), path)"


def read(data: bytes, name: str) -> Any:
    """The value that a pickle without tensors stands for (nanoGPT's meta.pkl). ValueError, in one line that begins with
    `name`."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"{name}: the pickle has {len(data)} bytes, expected at most {MAX_BYTES}")
    return Interpreter(data, name).run()


# ---------------------------------------------------------------------------------------------- tensors


@dataclass(frozen=True, slots=True)
class Storage:
    """The elements, all of one type, that tensors are views of."""

    dtype: str
    numel: int
    view: Callable[[int, int], np.ndarray]  # (first byte, bytes) -> uint8 (bytes,)
    inflated: int = 0  # bytes that each view costs in time and memory, where the storage is compressed

    @property
    def nbytes(self) -> int:
        return self.numel * numpy_dtype(self.dtype).itemsize


def _view(storage: Storage, offset: Any, shape: Any, stride: Any) -> Tensor:
    """The view of a storage that torch's as_strided gives. Offset and strides are in elements. ValueError for what
    doesn't lie inside the storage."""
    if not (_sizes(shape) and _sizes(stride) and _sizes((offset,)) and len(shape) == len(stride)):
        raise ValueError(f"offset, shape and strides are {shown((offset, shape, stride))}")
    dtype = numpy_dtype(storage.dtype)
    if math.prod(max(n, 1) for n in shape) * dtype.itemsize >= 1 << 62:
        raise ValueError(f"the shape is {shown(shape)}, expected less than 2^62 bytes")
    if 0 in shape:
        return Tensor(storage.dtype, shape, lambda: np.empty(shape, dtype))
    span = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if offset + span > storage.numel:
        raise ValueError(f"elements {offset} to {shown(offset + span)} are of a storage of {storage.numel}")
    if (nbytes := math.prod(shape) * dtype.itemsize) > max(storage.nbytes, _MAX_EXPANDED):
        raise ValueError(f"shape and strides {shown((shape, stride))} make {nbytes} bytes of {storage.nbytes}")
    strides = [s * dtype.itemsize if n > 1 else 0 for n, s in zip(shape, stride, strict=True)]

    def read() -> np.ndarray:
        raw = storage.view(offset * dtype.itemsize, span * dtype.itemsize)
        return np.ndarray(shape, dtype, raw, strides=strides)

    return Tensor(storage.dtype, shape, read, (id(storage), offset, stride))


def _sizes(value: Any) -> bool:
    """Whether this is a tuple of at most 64 integers (NumPy's limit) that are not negative. A bool is none."""
    return type(value) is tuple and len(value) <= 64 and all(type(n) is int and n >= 0 for n in value)


def _few(value: Any) -> bool:
    """Whether this is a tuple short enough to be arguments. Copying a long one often would take quadratic time."""
    return type(value) is tuple and len(value) <= 8


def shown(value: Any) -> str:
    """A value from a file as one short line for an error. A container is shown as its type, for it may be endless."""
    if isinstance(value, tuple):
        return "(" + ", ".join(shown(v) if not isinstance(v, tuple) or _sizes(v) else "..." for v in value[:8]) + ")"
    if isinstance(value, str | bytes):
        return ascii(value[:80])
    if isinstance(value, _Global):
        return value.name
    if value is None or isinstance(value, bool | int | float):
        return hex(value)[:40] if type(value) is int and abs(value) >> 63 else repr(value)
    return f"a {type(value).__name__}"


# ---------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Global:
    """A name that the pickle refers to. It stands for a function of the interpreter, never for Python's own."""

    name: str


class Interpreter:
    """Runs the pickles in `data`, one at each call of run().

    `name` begins each error. `storage(key, dtype, numel)` finds a storage; without it a tensor is an error. Views of
    compressed storages may become `max_inflated` bytes together.
    """

    def __init__(
        self, data: bytes, name: str, storage: Callable[[str, str, int], Storage] | None = None, max_inflated: int = 0
    ) -> None:
        self.data, self.name, self.find_storage = data, name, storage
        self.position = 0
        self.storages: dict[str, Storage] = {}
        self.copied = 0  # bytes, by the functions: pickle itself writes nothing that is copied twice
        self.inflated, self.max_inflated = 0, max_inflated

    def run(self) -> Any:
        """The value that the next pickle builds. ValueError."""
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

    # The steps that opcodes are made of.

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
        """The value on top of the stack, for an opcode that fills it. ValueError unless it has one of the types."""
        if type(self.stack[-1]) not in types:
            raise ValueError(f"{shown(self.stack[-1])} where a {types[0].__name__} is filled")
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
        """ValueError for a global that is none of those in the tables below."""
        full = f"{module}.{name}".replace("__builtin__.", "builtins.")
        if name in DTYPES and module == "torch":
            self.push(name)
        elif full in _FUNCTIONS or full in _STORAGE_TYPES:
            self.push(_Global(full))
        else:
            raise ValueError(f"{shown(full)} is not one of the globals that plain values and tensors need")

    def stack_global(self) -> None:
        module, name = self.pop_tuple(2)
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError(f"a global is called {shown(module)}, {shown(name)}")
        self.push_global(module, name)

    def reduce(self) -> None:
        function, arguments = self.pop_tuple(2)
        if not isinstance(function, _Global) or function.name not in _FUNCTIONS or not _few(arguments):
            raise ValueError(f"{shown(function)} is called")
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
        """Replaces the reference ("storage", type, key, device, elements) by its storage, one for each key."""
        reference = self.pop()
        match reference if self.find_storage and _few(reference) else None:
            case ("storage", _Global(kind), str(key), str(), numel, *views) if kind in _STORAGE_TYPES:
                dtype = _STORAGE_TYPES[kind]
            case _:
                raise ValueError(f"{shown(reference)} is not a reference to a storage")
        if not _sizes((numel,)):
            raise ValueError(f"storage {shown(key)} has {shown(numel)} elements")
        if views not in ([], [None]):
            raise ValueError(f"storage {shown(key)} is a view of another, as only PyTorch 0.3 wrote: {RESAVE}")
        known = self.storages.get(key)
        if known is None:
            known = self.storages[key] = self.find_storage(key, dtype, numel)  # type: ignore[misc]
        if (known.dtype, known.numel) != (dtype, numel):
            raise ValueError(
                f"storage {shown(key)} is {known.numel} {known.dtype} at first and then {shown(numel)} {dtype}"
            )
        self.push(known)

    # The functions that a pickle may call.

    def copying(self, values: Any, *types: type) -> Any:
        """An argument that is about to be copied. ValueError if it has none of the types, or if the pickle makes more
        copies than it has bytes: one that is small must not become large."""
        if type(values) not in types:
            raise ValueError(f"the argument is {shown(values)}, expected a {types[0].__name__}")
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
                raise ValueError(f"an item is {shown(pair)}, expected a pair")
            _fill(result, pair[:1], pair[1:])
        return result

    def make_set(self, items: Any = ()) -> set[Any]:
        return set(map(_key, self.copying(items, list, tuple)))

    def encode(self, text: Any, encoding: Any) -> bytes:
        if encoding != "latin1":
            raise ValueError(f"the encoding is {shown(encoding)}, expected 'latin1'")
        return bytes(self.copying(text, str).encode("latin1"))

    def size(self, sizes: Any) -> tuple[int, ...]:
        if not _sizes(result := tuple(self.copying(sizes, tuple, list))):
            raise ValueError(f"the sizes are {shown(result)}")
        return result

    def device(self, kind: Any, index: Any = None) -> str:
        if type(kind) is not str or type(index) not in (int, type(None)):
            raise ValueError(f"the device is {shown((kind, index))}")
        self.copying(kind, str)
        return kind if index is None else f"{kind}:{index}"

    def tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Tensor:
        if not isinstance(storage, Storage):
            raise ValueError(f"{shown(storage)} is not a storage")
        self.charge(32)  # fewer bytes than any pickled tensor takes
        self.inflated += storage.inflated
        if self.inflated > self.max_inflated:
            raise ValueError(f"compressed storages become {self.inflated} bytes, expected at most {self.max_inflated}")
        return _view(storage, offset, shape, stride)

    def parameter(self, tensor: Any, *_: Any) -> Tensor:
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{shown(tensor)} is not a tensor")
        return tensor


_STORAGE_TYPES = {f"torch.{name}": dtype for name, dtype in _STORAGES.items()} | {
    "torch.UntypedStorage": "uint8",
    "torch.storage.UntypedStorage": "uint8",
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": Interpreter.ordered_dict,
    "builtins.set": Interpreter.make_set,
    "_codecs.encode": Interpreter.encode,
    "torch.Size": Interpreter.size,
    "torch.device": Interpreter.device,
    "torch._utils._rebuild_tensor": Interpreter.tensor,
    "torch._utils._rebuild_tensor_v2": Interpreter.tensor,
    "torch._utils._rebuild_parameter": Interpreter.parameter,
    "torch._utils._rebuild_parameter_with_state": Interpreter.parameter,
}
_OPCODES: dict[bytes, Callable[[Interpreter], Any]] = {
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
    b"(": Interpreter.mark,
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
    b"\x93": Interpreter.stack_global,
    b"R": Interpreter.reduce,
    b"b": Interpreter.build,
    b"Q": Interpreter.persistent,
}


def _key(value: Any) -> Any:
    """A value that may be the key of a dictionary. ValueError for others: to hash nested tuples takes exponential time,
    or more stack than there is, and large integers that are equal modulo 2^61 - 1 have one hash, so that many of them
    take quadratic time."""
    if type(value) in _KEYS and not (type(value) is int and abs(value) >> 60):
        return value
    raise ValueError(f"a key is {shown(value)}, expected a string or a number")


def _fill(target: dict[Any, Any], keys: Any, values: Any) -> None:
    if len(keys) != len(values):
        raise ValueError("a key has no value")
    target.update(zip(map(_key, keys), values, strict=True))


_KEYS = frozenset([str, bytes, bool, int, float, type(None)])
_ATOMS = _KEYS | {Tensor}


def _measure(value: Any, depth: int, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """The height and the number of nodes of a value as a tree. ValueError if it is too deep or too large to be walked,
    holds itself, or isn't plain. (A list that holds one list twice, which holds one list twice, and so on, is small as
    a pickle and too large as a tree.)"""
    if type(value) in _ATOMS or not value:
        return 0, 1 + len(value) // 16 if type(value) in (str, bytes) else 1
    if isinstance(value, (_Global, Storage)):
        raise ValueError(f"{shown(value)} stands where a value should")
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
        raise ValueError(f"{shown(value)} holds itself")
    if depth + measured[0] > _MAX_DEPTH:
        raise ValueError(f"values are more than {_MAX_DEPTH} deep in one another")
    if measured[1] > _MAX_OPCODES:
        raise ValueError(f"it stands for {shown(measured[1])} values, expected at most {_MAX_OPCODES}")
    return measured


# ---------------------------------------------------------------------------------------------- writing

_KINDS = {dtype: name for name, dtype in _STORAGES.items()}


def dtype_of(tensor: Tensor | np.ndarray) -> str:
    """torch's name of the type of a tensor's elements. ValueError if torch has no storage of them."""
    name = tensor.dtype if isinstance(tensor, Tensor) else tensor.dtype.name
    if name not in DTYPES:
        raise ValueError(f"the dtype is {name}, expected one of {', '.join(DTYPES)}")
    return name


class PickleWriter:
    """Builds a pickle of protocol 2, which refers to the storages of tensors by their numbers.

    `out` is the pickle without its last opcode, `tensors` the tensors whose bytes are the storages 0, 1 and so on.
    """

    def __init__(self) -> None:
        self.out = bytearray(b"\x80\x02")
        self.tensors: list[Tensor | np.ndarray] = []
        self.keys: dict[int, int] = {}  # the number of a storage, by the id of its tensor

    def put(self, value: Any, depth: int) -> None:
        """Adds a value that lies `depth` containers deep. ValueError for one that is not plain."""
        if depth > _MAX_DEPTH:
            raise ValueError(f"values are more than {_MAX_DEPTH} deep in one another")
        if isinstance(value, dict):
            self.put_items(b"}(", [part for item in value.items() for part in item], b"u", depth)
            for key in value:
                _key(key)
        elif isinstance(value, list):
            self.put_items(b"](", value, b"e", depth)
        elif isinstance(value, tuple):
            self.put_items(b"(", value, b"t", depth)
        elif isinstance(value, Tensor | np.ndarray):
            self.put_tensor(value, depth)
        else:
            self.out += _pickled_scalar(value)

    def put_items(self, before: bytes, values: Any, after: bytes, depth: int) -> None:
        self.out += before
        for value in values:
            self.put(value, depth + 1)
        self.out += after

    def put_tensor(self, tensor: Tensor | np.ndarray, depth: int) -> None:
        """torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks)."""
        kind = _KINDS[dtype_of(tensor)]
        key = self.keys.setdefault(id(tensor), len(self.tensors))
        if key == len(self.tensors):
            self.tensors.append(tensor)
        self.out += b"ctorch._utils\n_rebuild_tensor_v2\n(("
        self.put("storage", depth)
        self.out += f"ctorch\n{kind}\n".encode()
        for value in (str(key), "cpu", math.prod(tensor.shape)):
            self.put(value, depth)
        self.out += b"tQ"
        for value in (0, tensor.shape, _contiguous(tensor.shape), False):
            self.put(value, depth)
        self.out += b"ccollections\nOrderedDict\n)RtR"


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a row-major array, in elements."""
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
    raise ValueError(f"{shown(value)} can't be written, expected a plain value or a tensor")
