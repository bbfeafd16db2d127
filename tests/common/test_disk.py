"""Files and directories appear whole or not at all, whatever fails; checksums; JSON that may hold anything."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mlxgpt.common import disk


@contextmanager
def small_files_only() -> Iterator[None]:
    """Writing more than 1000 bytes to a file fails, as on a full disk.

    Not a fixture: pytest writes its own output between a fixture and a test, and that may be a file too.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_file_is_written_and_replaced(tmp_path):
    for content in (b"first", b"second, and longer", b""):
        disk.write_file(tmp_path / "a", content)
        assert (tmp_path / "a").read_bytes() == content
        assert os.listdir(tmp_path) == ["a"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    disk.write_file(tmp_path / "a", b"old")
    with small_files_only(), pytest.raises(OSError) as error:
        disk.write_file(tmp_path / "a", b"new" * 1000)
    assert error.value.errno == errno.EFBIG
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_an_exception_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    disk.write_file(tmp_path / "a", b"old")
    for write in (lambda path: path.write_bytes(b"new"), lambda path: path.mkdir(), lambda path: None):
        with pytest.raises(KeyboardInterrupt), disk.appearing(tmp_path / "a") as temporary:
            write(temporary)
            raise KeyboardInterrupt
        assert (tmp_path / "a").read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_killed_while_writing_the_old_one_stays(kind, tmp_path, run_python):
    path = tmp_path / "a"
    if kind == "file":
        disk.write_file(path, b"old")
    else:
        path.mkdir()
        (path / "part").write_bytes(b"old")
    program = (
        "import os, sys, pathlib\n"
        "from mlxgpt.common import disk\n"
        "with disk.appearing(pathlib.Path(sys.argv[1])) as temporary:\n"
        "    if sys.argv[2] == 'directory':\n"
        "        temporary.mkdir()\n"
        "        temporary /= 'part'\n"
        "    with open(temporary, 'wb') as file:\n"
        "        file.write(b'new')\n"
        "        file.flush()\n"
        f"    os.kill(os.getpid(), {int(signal.SIGKILL)})\n"
    )
    assert run_python("-c", program, str(path), kind).returncode == -signal.SIGKILL
    assert (path if kind == "file" else path / "part").read_bytes() == b"old"
    with disk.appearing(path) as temporary:  # and what the killed process left is in nobody's way
        temporary.write_bytes(b"new")
    assert path.read_bytes() == b"new"


def test_a_directory_appears_whole_in_place_of_another(tmp_path):
    for name in ("first", "second"):
        with disk.appearing(tmp_path / "a") as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name)
            assert not (tmp_path / "a" / name).exists()
        assert os.listdir(tmp_path / "a") == [name]
        assert os.listdir(tmp_path) == ["a"]


def test_a_failed_rename_leaves_the_old_directory(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").touch()
    with pytest.raises(FileNotFoundError):
        disk.replace(tmp_path / "missing", tmp_path / "a")
    assert os.listdir(tmp_path / "a") == ["old"]
    assert os.listdir(tmp_path) == ["a"]


def test_a_link_is_replaced_not_what_it_names(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "kept").touch()
    (tmp_path / "a").symlink_to("target")
    (tmp_path / "new").symlink_to("elsewhere")
    disk.replace(tmp_path / "new", tmp_path / "a")
    assert os.readlink(tmp_path / "a") == "elsewhere"
    assert os.listdir(tmp_path / "target") == ["kept"]


def test_a_link_is_removed_not_what_it_names(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "kept").touch()
    (tmp_path / "a").symlink_to("target")
    disk.remove(tmp_path / "a")
    assert os.listdir(tmp_path / "target") == ["kept"]
    (tmp_path / "broken").symlink_to("nowhere")
    for name in ("target", "broken", "missing"):
        disk.remove(tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_a_link_is_followed_once(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "last").symlink_to("one")
    (tmp_path / "best").symlink_to(tmp_path / "one")
    assert disk.follow(tmp_path / "last") == tmp_path / "one"
    assert disk.follow(tmp_path / "best") == tmp_path / "one"
    assert disk.follow(tmp_path / "one") == tmp_path / "one"
    assert disk.follow(tmp_path / "missing") == tmp_path / "missing"


def test_the_checksum_of_a_file_larger_than_a_block(tmp_path):
    content = os.urandom(1 << 20) * 17
    (tmp_path / "a").write_bytes(content)
    assert disk.sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_json_is_written_and_read_again(tmp_path):
    content = {"name": "Straße", "numbers": [1, 2.5, None], "nested": {"yes": True}}
    disk.write_file(tmp_path / "a.json", disk.json_bytes(content))
    assert disk.read_json(tmp_path / "a.json") == content
    with pytest.raises(ValueError, match="not JSON compliant"):
        disk.json_bytes({"loss": float("nan")})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"a\.json: not JSON: "),
        (b"\xff{}", r"a\.json: not JSON: "),
        (b"[" * 100_000, r"a\.json: not JSON: "),
        (b"[1]", r"a\.json: it holds a JSON list, expected an object"),
        (b"", r"a\.json: not JSON: "),
    ],
)
def test_a_file_without_a_json_object_is_named(content, message, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        disk.read_json(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        disk.read_json(tmp_path / "none.json")


def test_a_json_file_that_is_too_large_is_not_read(tmp_path):
    with open(tmp_path / "a.json", "wb") as file:
        file.write(json.dumps({"a": 1}).encode())
        file.truncate(200_000_001)
    with pytest.raises(ValueError, match=r"a\.json: 200000001 bytes, expected at most 200000000"):
        disk.read_json(tmp_path / "a.json")
