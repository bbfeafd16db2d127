"""The order of the wings: each imports from those to its left and from itself, and nobody imports a verb.

A verb is a module at the root of the package. The root's own `__init__` and `__main__` may import every wing.
"""

from __future__ import annotations

import ast
import graphlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mlxgpt"
WINGS = ("common", "cpu", "data", "model", "formats", "generation", "training")
EXTENSION = "_core"  # the compiled module
ITS_IMPORTER = "cpu/extension.py"
MAY_REPEAT = ("__init__.py", "README.md")  # file names


@dataclass(frozen=True)
class Import:
    """A module imports another; both are named without the package's name: 'data.shards', or '' for its root."""

    file: str
    line: int
    importer: str
    imported: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.imported or 'the package'}"


def imports(package: Path) -> list[Import]:
    """Every import of a module of the package in its files, those inside functions and for types alone as well."""
    modules = {_module(file, package) for file in package.rglob("*.py")} | {EXTENSION}
    found = []
    for file in sorted(package.rglob("*.py")):
        importer = _module(file, package)
        home = importer if file.name == "__init__.py" else importer.rpartition(".")[0]
        for line, dotted in _dotted_imports(ast.parse(file.read_bytes()), package.name, home):
            name, _, last = dotted.rpartition(".")
            imported = dotted if dotted in modules else name  # `last` may be a function or a class
            assert imported in modules, f"{file}:{line}: there is no module {name or last}"
            found.append(Import(file.relative_to(package).as_posix(), line, importer, imported))
    return found


def _module(file: Path, package: Path) -> str:
    parts = file.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _dotted_imports(tree: ast.Module, package: str, home: str) -> Iterator[tuple[int, str]]:
    """The line and the dotted name, without the package's, of each module or name that is imported from the package.

    home: the package or wing that a relative import starts from, as `imports` names modules.
    """
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = _absolute("." * node.level + (node.module or ""), package, home)
            names = [f"{start}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            if isinstance(node.args[0], ast.Constant):
                names = [_absolute(str(node.args[0].value), package, home)]
        for name in names:
            if name == package or name.startswith(f"{package}."):
                yield node.lineno, name[len(package) + 1 :]


def _absolute(name: str, package: str, home: str) -> str:
    """A module's name with the package's: '..data' in the wing model is mlxgpt.data."""
    tail = name.lstrip(".")
    if tail == name:
        return name
    parts = [package, *filter(None, home.split("."))]
    return ".".join([*parts[: len(parts) - (len(name) - len(tail) - 1)], *filter(None, [tail])])


def _wing(module: str) -> str | None:
    """The wing of a module, or None for a verb and for the root."""
    wing = module.partition(".")[0]
    return wing if wing in WINGS else None


# ---- the rules: each returns its faults, a line each ----


def upward_imports(package: Path) -> list[str]:
    """Imports of a wing from a wing to its right. (Imports of verbs are `imports_of_verbs`.)"""
    found = []
    for each in imports(package):
        importer, imported = _wing(each.importer), _wing(each.imported)
        if importer and imported and WINGS.index(imported) > WINGS.index(importer):
            found.append(str(each))
    return found


def imports_of_verbs(package: Path) -> list[str]:
    return [
        str(each) for each in imports(package) if each.imported not in ("", EXTENSION) and _wing(each.imported) is None
    ]


def circles(package: Path) -> list[str]:
    """The first circle of imports inside each wing that has one."""
    graphs: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for each in imports(package):
        wing = _wing(each.importer)
        if wing and wing == _wing(each.imported):
            graphs[wing][each.importer].add(each.imported)
    found = []
    for graph in graphs.values():
        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            found.append(" <- ".join(error.args[1]))
    return found


def other_importers_of_the_extension(package: Path) -> list[str]:
    """Imports of `_core` outside the one file that may. (Benchmarks, which lie outside the package, may too.)"""
    return [str(each) for each in imports(package) if each.imported == EXTENSION and each.file != ITS_IMPORTER]


def repeated_names(package: Path) -> list[str]:
    """Files of one name in two folders."""
    files = defaultdict(list)
    for file in sorted(package.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts and file.name not in MAY_REPEAT:
            files[file.name].append(file.relative_to(package).as_posix())
    return [" and ".join(paths) for paths in files.values() if len(paths) > 1]


def unknown_folders(package: Path) -> list[str]:
    """Folders of Python files at the root that are no wing, for which there is no rule."""
    return sorted({file.parent.name for file in package.glob("*/*.py")} - {*WINGS})


RULES = [
    upward_imports, imports_of_verbs, circles, other_importers_of_the_extension, repeated_names, unknown_folders,
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule):
    assert rule(PACKAGE) == []


# ---- each rule fails when it should ----

SOUND = {
    "__init__.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .model.gpt import GPT",
    "__main__.py": "from importlib import import_module\nfrom .common import cli\nimport_module(f'tiny.{1}')",
    "train.py": "from . import __doc__\nfrom .common import cli\nfrom .model.gpt import GPT\nimport tiny.data.shards",
    "common/__init__.py": "",
    "common/cli.py": "import os.path\nfrom collections.abc import Callable",
    "cpu/__init__.py": "",
    "cpu/extension.py": "import importlib\nimportlib.import_module('tiny._core')",
    "data/__init__.py": "",
    "data/shards.py": "from ..common import cli",
    "model/__init__.py": "",
    "model/gpt.py": "from ..data import shards\nfrom ..common.cli import parse",
}


@pytest.fixture
def tiny(tmp_path):
    """Writes a package that keeps every rule, with a line more in one of its files."""

    def write(file: str = "common/cli.py", line: str = "") -> Path:
        for name, text in {file: "", **SOUND}.items():
            path = tmp_path / "tiny" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n{line}\n" if name == file else text)
        return tmp_path / "tiny"

    return write


def test_a_package_that_keeps_every_rule_has_no_faults(tiny):
    assert [rule(tiny()) for rule in RULES] == [[]] * len(RULES)


@pytest.mark.parametrize(
    ("rule", "file", "line", "fault"),
    [
        (upward_imports, "data/shards.py", "from ..model import gpt", "data/shards.py:2 imports model.gpt"),
        (upward_imports, "data/shards.py", "from ..model.gpt import GPT", "data/shards.py:2 imports model.gpt"),
        (upward_imports, "data/shards.py", "import tiny.model.gpt as g", "data/shards.py:2 imports model.gpt"),
        (upward_imports, "data/shards.py", "from tiny import model", "data/shards.py:2 imports model"),
        (upward_imports, "data/shards.py", "def f():\n    from .. import model", "data/shards.py:3 imports model"),
        (upward_imports, "common/__init__.py", "from .. import data", "common/__init__.py:2 imports data"),
        (upward_imports, "common/cli.py", "if TYPE_CHECKING:\n    from .. import cpu", "common/cli.py:4 imports cpu"),
        (upward_imports, "common/cli.py", "import_module('tiny.model.gpt')", "common/cli.py:3 imports model.gpt"),
        (upward_imports, "common/cli.py", "import_module('..cpu.extension')", "common/cli.py:3 imports cpu.extension"),
        (imports_of_verbs, "model/gpt.py", "from ..train import main", "model/gpt.py:3 imports train"),
        (imports_of_verbs, "generate.py", "from . import train", "generate.py:2 imports train"),
        (imports_of_verbs, "__init__.py", "import_module('.train', __name__)", "__init__.py:4 imports train"),
        (other_importers_of_the_extension, "model/gpt.py", "from .. import _core", "model/gpt.py:3 imports _core"),
        (other_importers_of_the_extension, "cpu/tape.py", "from .._core import isa", "cpu/tape.py:2 imports _core"),
        (repeated_names, "model/cli.py", "", "common/cli.py and model/cli.py"),
        (unknown_folders, "attic/old.py", "", "attic"),
    ],
)  # fmt: skip
def test_a_fault_is_found(rule, file, line, fault, tiny):
    assert rule(tiny(file, line)) == [fault]


def test_circles_are_found(tiny):
    package = tiny("data/corpus.py", "from . import shards")
    assert circles(package) == []
    (package / "data" / "shards.py").write_text("def load():\n    from .corpus import Corpus")
    (circle,) = circles(package)
    assert sorted(set(circle.split(" <- "))) == ["data.corpus", "data.shards"]


def test_an_import_of_a_module_that_is_not_there_is_named(tiny):
    with pytest.raises(AssertionError, match=r"gpt\.py:3: there is no module data\.shard"):
        imports(tiny("model/gpt.py", "from ..data.shard import Split"))
