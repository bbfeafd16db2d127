"""Files on the disk: written whole or not at all, checksums, and JSON read from files that may hold anything."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK = 1 << 24  # bytes read at a time for a checksum


def write_file(path: Path, content: bytes) -> None:
    """Writes a file, replacing one that is there. OSError leaves the old file as it was."""
    with appearing(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, where the block writes a file or a directory of files.

    When the block ends, what it wrote is synced to the disk and replaces what is at `path`. When the block raises, what
    it wrote is removed, and what is at `path` stays. OSError when the disk is full or can't be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if temporary.is_dir():
            for file in temporary.iterdir():
                sync(file)
        sync(temporary)
        replace(temporary, path)
    finally:
        remove(temporary)


def replace(path: Path, destination: Path) -> None:
    """Renames a file or directory to `destination`, replacing what is there. OSError leaves both as they were."""
    if not destination.is_dir() or destination.is_symlink():
        os.rename(path, destination)
        return
    old = destination.with_name(f".{destination.name}.{os.getpid()}.old")  # a rename replaces only an empty directory
    os.rename(destination, old)
    try:
        os.rename(path, destination)
    except OSError:
        os.rename(old, destination)
        raise
    shutil.rmtree(old)


def remove(path: Path) -> None:
    """Removes a file, a symbolic link (not what it names) or a directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Writes a file's content, or the list of a directory's names, through to the disk. OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def follow(link: Path) -> Path:
    """The path that a symbolic link names at this moment; any other path is returned as it is.

    A run moves its links while it trains: to read several files of one checkpoint, follow the link once.
    """
    return link.parent / os.readlink(link) if link.is_symlink() else link


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, as 64 hexadecimal digits. OSError."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def read_small(path: Path, most: int = 200_000_000) -> bytes:
    """The content of a file. FileNotFoundError; ValueError, naming the file, for one of more than `most` bytes."""
    if (size := path.stat().st_size) > most:
        raise ValueError(f"{path}: {size} bytes, expected at most {most}")
    return path.read_bytes()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. FileNotFoundError; ValueError, naming the file, for anything else in it, and for a
    file that is too large."""
    text = read_small(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: it holds a JSON {type(content).__name__}, expected an object")
    return content


def require_format(path: Path, name: str, value: Any, newest: int) -> None:
    """ValueError for a file of a format that this version doesn't know: `name` says where the number stands in it."""
    if type(value) is int and value > newest:
        raise ValueError(f"{path}: {name} is {value}, this version reads up to {newest}; nothing was changed")
    if type(value) is not int or value < 1:
        raise ValueError(f"{path}: {name} is {value!r}, expected 1{f' to {newest}' if newest > 1 else ''}")


def json_bytes(content: Any, indent: int = 2) -> bytes:
    """The content of a JSON file, UTF-8. ValueError for a number that is not finite, which JSON can't express."""
    return (json.dumps(content, indent=indent, allow_nan=False) + "\n").encode()
