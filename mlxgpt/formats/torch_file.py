"""PyTorch's files without PyTorch: read as data, nothing in them is imported or executed, and written.

A file of torch.save is a pickle (pickles.py) and the storages that it refers to:
- since PyTorch 1.6 a zip file, DIR/data.pkl beside DIR/data/KEY, stored and aligned so that it can be mapped;
- before that the pickles in a row (magic number, version, machine, value, storage keys), then the storages.
What a file claims is checked before anything of that size is allocated, and every loop is bounded by the file's own
size. The format is torch/serialization.py's (_save, _load, _legacy_save, _legacy_load).
"""

from __future__ import annotations

import io
import itertools
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from ..common import disk
from .pickles import MAX_BYTES, RESAVE, Interpreter, PickleWriter, Storage, dtype_of, shown
from .tensors import Tensor, numpy_dtype

# These bounds, with those of pickles.py, keep a hostile file to seconds and 500 MB.
_MAX_DIRECTORY = 4 << 20  # bytes of a zip file's directory
_MAX_INFLATED = 64 << 20, 20  # bytes that compressed storages may become, and what multiple of the file is added
_MAGIC = 0x1950A86A20F9469CFC6C


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
        raise ValueError(f"{path}: the tar format of PyTorch 0.1 is not supported: {RESAVE}")
    if head.startswith(b"\x80"):
        return _read_legacy(file)
    raise ValueError(f"{path}: not a PyTorch file: it starts with {head[:8]!a}, expected b'PK' or b'\\x80'")


# ---------------------------------------------------------------------------------------------- files


class _File:
    """A file that must not change. It is opened anew for each tensor, so that pages are unmapped with their array."""

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
        """A part of the file, uint8 (nbytes,), read-only."""
        if nbytes == 0:
            return np.empty(0, np.uint8)
        with self.open() as stream:
            return np.memmap(stream, np.uint8, mode="r", offset=start, shape=(nbytes,)).view(np.ndarray)

    def crc(self, start: int, nbytes: int) -> int:
        """The CRC-32 of a part of the file, a piece of which is in memory at a time."""
        buffer, crc = memoryview(bytearray(min(nbytes, 1 << 20))), 0
        with self.open() as stream:
            stream.seek(start)
            while nbytes and (n := stream.readinto(buffer[:nbytes])):  # type: ignore[attr-defined]
                crc, nbytes = zlib.crc32(buffer[:n], crc), nbytes - n
        return crc


# ---------------------------------------------------------------------------------------------- the zip format

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")


class _BoundedFile(io.FileIO):
    """A zip file for zipfile to open, which refuses a directory that is too large to be read."""

    def read(self, size: int | None = -1) -> bytes:
        if size and size > _MAX_DIRECTORY:
            raise ValueError(f"its directory has {size} bytes, expected at most {_MAX_DIRECTORY}")
        return super().read(size)  # type: ignore[arg-type]


class _Zip:
    """The entries of a zip file. The module zipfile reads the directory; what it doesn't check is checked here."""

    def __init__(self, file: _File) -> None:
        self.file = file
        try:
            with file.open(), _BoundedFile(file.path) as stream, zipfile.ZipFile(stream) as archive:
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
        self.ends = dict(itertools.pairwise([*offsets, end]))  # by the position of an entry, that of the next one
        found = [name for name in self.infos if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(found) != 1:
            raise ValueError(f"{file.name}: the zip file has {len(found)} entries DIR/data.pkl, expected one")
        self.directory = found[0].removesuffix("data.pkl")  # such as "archive/": all entries lie in it

    def locate(self, name: str) -> tuple[zipfile.ZipInfo, int]:
        """Finds an entry -> what the directory says of it, and the position of its first byte.

        ValueError unless the entry lies whole in the file and shares no byte with another.
        """
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
        unknown = (
            (0, 0xFFFFFFFF) if flags & 8 else (0xFFFFFFFF,)
        )  # they follow the data, or stand in zip64's extra field
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
        """The content of a small entry, with its CRC checked."""
        info, start = self.locate(name)
        if info.file_size > MAX_BYTES:
            self.refuse(name, f"has {info.file_size} bytes, expected at most {MAX_BYTES}")
        return self._view(info, start)(0, info.file_size).tobytes()

    def storage(self, key: str, dtype: str, numel: int) -> Storage:
        """The storage of a key. ValueError unless the file holds just that many elements."""
        name = self.directory + "data/" + key
        info, start = self.locate(name)
        inflated = info.file_size if info.compress_type != zipfile.ZIP_STORED else 0
        storage = Storage(dtype, numel, self._view(info, start), inflated)
        if storage.nbytes != info.file_size:
            self.refuse(name, f"has {info.file_size} bytes, expected {shown(numel)} {dtype}")
        return storage

    def _view(self, info: zipfile.ZipInfo, start: int) -> Callable[[int, int], np.ndarray]:
        """A function that gives a part of an entry, (first byte, bytes) -> uint8 (bytes,), and checks the CRC at its
        first call."""
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
        """Raises ValueError for an entry that breaks a rule."""
        raise ValueError(f"{self.file.name}: {shown(name)[1:-1]}: {rule}")


def _read_zip(file: _File) -> Any:
    """The value in a file of PyTorch 1.6 or later. ValueError."""
    archive = _Zip(file)
    directory = archive.directory
    if directory + "constants.pkl" in archive.infos:
        raise ValueError(f"{file.name}: a TorchScript program, expected what torch.save writes")
    if directory + "byteorder" in archive.infos and (order := archive.content(directory + "byteorder")) != b"little":
        archive.refuse(directory + "byteorder", f"is {shown(order)}, expected b'little': {RESAVE} on this machine")
    pickle = archive.content(directory + "data.pkl")
    most = _MAX_INFLATED[0] + _MAX_INFLATED[1] * file.size
    return Interpreter(pickle, f"{file.name}: data.pkl", archive.storage, most).run()


# ---------------------------------------------------------------------------------------------- the old format


def _read_legacy(file: _File) -> Any:
    """The value in a file of a PyTorch before 1.6. ValueError."""
    with file.open() as stream:
        head = stream.read(MAX_BYTES)
    positions: dict[str, int] = {}
    interpreter = Interpreter(head, file.name, lambda key, dtype, numel: Storage(dtype, numel, view_of(key)))

    def view_of(key: str) -> Callable[[int, int], np.ndarray]:
        return lambda first, nbytes: file.map(positions[key] + first, nbytes)

    magic, version, machine = interpreter.run(), interpreter.run(), interpreter.run()
    if magic != _MAGIC or version != 1001:
        raise ValueError(f"{file.name}: not a PyTorch file: a pickle without torch.save's magic number and version")
    if not (isinstance(machine, dict) and machine.get("little_endian") is True):
        raise ValueError(f"{file.name}: written on a big-endian machine: {RESAVE} on this machine")
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
                raise ValueError(f"{file.name}: storage {shown(key)} ends at {position} of {file.size} bytes")
            if numel != storages[key].numel:
                raise ValueError(f"{file.name}: storage {shown(key)} has {numel} elements, not {storages[key].numel}")
    return value


# ---------------------------------------------------------------------------------------------- writing

_ALIGNMENT = 64  # bytes, torch's: a mapped tensor starts where vector instructions like it


def write(path: Path, value: Any) -> None:
    """Writes the zip file that torch.save writes; torch.load opens it, with weights_only and with mmap too.

    `value`: dicts, lists, tuples, strings, numbers, bools and None, Tensors and arrays. One tensor is in memory at a
    time; the same object twice is one storage. The file appears whole or not at all, in place of one that is there.
    ValueError for other values, and for a Tensor that doesn't read as what it says; OSError.
    """
    pickle = PickleWriter()
    try:
        pickle.put(value, 0)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    with (
        disk.appearing(Path(path)) as temporary,
        open(temporary, "wb") as stream,
        zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive,
    ):
        _add(archive, "data.pkl", bytes(pickle.out) + b".")
        _add(archive, "byteorder", b"little")
        for key, tensor in enumerate(pickle.tensors):
            _add(archive, f"data/{key}", _bytes(tensor, f"{path}: tensor {key}"))
        _add(archive, "version", b"3\n")


def _add(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    """Appends an entry whose data is aligned, by an extra field in its local header."""
    info = zipfile.ZipInfo("archive/" + name)
    info.file_size = len(content)
    zip64 = len(content) >= 1 << 30
    header = _LOCAL_HEADER.size + len(info.filename) + (20 if zip64 else 0) + 4
    padding = -(archive.start_dir + header) % _ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    with archive.open(info, "w", force_zip64=zip64) as entry:
        for start in range(0, len(content), 1 << 20):  # a piece is still in the cache when its CRC is computed
            entry.write(content[start : start + (1 << 20)])
    info.extra = b""  # not in the directory


def _bytes(tensor: Tensor | np.ndarray, name: str) -> memoryview:
    """The elements of a tensor in row-major order, uint8 (bytes,)."""
    array = tensor.read() if isinstance(tensor, Tensor) else tensor
    dtype = numpy_dtype(dtype_of(tensor))
    if array.shape != tensor.shape or array.dtype.newbyteorder("<") != dtype:
        raise ValueError(f"{name}: reads as {array.dtype} {array.shape}, expected {dtype} {tensor.shape}")
    return np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8).data
