"""The layers of csrc: bindings include ops, ops include runtime, runtime includes kernels/table.h, nothing goes up."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"

BELOW = ("kernels/table.h",)  # all that the layers above see of the kernels
MAY_INCLUDE = {
    "bindings": ("bindings/", "ops/", "runtime/", *BELOW),
    "ops": ("ops/", "runtime/", *BELOW),
    "runtime": ("runtime/", *BELOW),
    "kernels": ("kernels/",),
    "tests": ("tests/", "ops/", "runtime/", *BELOW),
}
# Pointers, sizes and strides need no more: no containers, no threads, nothing of the C++ library, whose templates the
# linker could keep with one instruction set's code for the whole program.
SYSTEM_HEADERS_OF_KERNELS = {"arm_neon.h", "float.h", "immintrin.h", "math.h", "stddef.h", "stdint.h", "string.h"}
PYTHON = re.compile(r"pybind11/|python", re.IGNORECASE)


def files(root: Path = CSRC) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.suffix in (".h", ".cpp"))


def faults(root: Path) -> list[str]:
    """A line for each include that breaks a rule, and for each name that two files have."""
    found = [
        f"{name}: {n} files have this name" for name, n in Counter(path.name for path in files(root)).items() if n > 1
    ]
    for path in files(root):
        layer = path.relative_to(root).parts[0]
        where = f"{path.relative_to(root)} includes"
        for bracket, header in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', path.read_text(), re.MULTILINE):
            if bracket == '"' and not (root / header).is_file():
                found.append(f"{where} {header}, which is no path from csrc on")
            elif bracket == '"' and not header.startswith(MAY_INCLUDE[layer]):
                found.append(f"{where} {header}, expected one of {', '.join(MAY_INCLUDE[layer])}")
            if PYTHON.match(header) and layer != "bindings":
                found.append(f"{where} {header}, expected Python in bindings/ alone")
            if bracket == "<" and layer == "kernels" and header not in SYSTEM_HEADERS_OF_KERNELS:
                found.append(f"{where} {header}, expected one of {', '.join(sorted(SYSTEM_HEADERS_OF_KERNELS))}")
    return found


def test_no_include_runs_up():
    assert {path.relative_to(CSRC).parts[0] for path in files()} == set(MAY_INCLUDE)
    assert faults(CSRC) == []


@pytest.mark.parametrize(
    "name, line, fault",
    [
        ("ops/linear.cpp", '#include "bindings/arguments.h"', "ops/linear.cpp includes bindings/arguments.h, expected"),
        ("runtime/split.h", '#include "ops/linear.h"', "runtime/split.h includes ops/linear.h, expected"),
        ("kernels/tile.h", '#include "runtime/split.h"', "kernels/tile.h includes runtime/split.h, expected"),
        ("ops/linear.cpp", '#include "kernels/tile.h"', "ops/linear.cpp includes kernels/tile.h, expected"),
        ("ops/linear.cpp", '#include "linear.h"', "ops/linear.cpp includes linear.h, which is no path from csrc on"),
        ("runtime/linear.h", "", "linear.h: 2 files have this name"),
        ("ops/linear.cpp", "#include <pybind11/stl.h>", "expected Python in bindings/ alone"),
        ("runtime/split.h", "#include <Python.h>", "expected Python in bindings/ alone"),
        ("kernels/tile.h", "#  include <vector>", "kernels/tile.h includes vector, expected one of arm_neon.h"),
        ("kernels/tile.h", "#include <thread>", "kernels/tile.h includes thread, expected one of arm_neon.h"),
    ],
)
def test_a_broken_rule_is_found(name, line, fault, tmp_path):
    for file in ("bindings/arguments.h", "ops/linear.h", "ops/linear.cpp", "runtime/split.h", "kernels/tile.h"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    assert faults(tmp_path) == []
    (tmp_path / name).write_text(line + "\n")
    assert len(faults(tmp_path)) == 1
    assert fault in faults(tmp_path)[0]
