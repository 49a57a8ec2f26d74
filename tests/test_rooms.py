"""The rooms of the house: which there are, and that imports between them point one way."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fastpref"
ROOMS = (
    "",
    "config",
    "checkpoint",
    "data",
    "batches",
    "model",
    "objectives",
    "memory",
    "scoring",
    "train",
    "tisdpo",
    "cli",
)
"""A room may import of itself and of those before it; the first is the package's own files."""
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(module: str) -> str:
    """The room of a dotted module: "fastpref.data.layouts.rows" -> "data"."""
    parts = module.split(".")[1:]
    return parts[0] if parts and (PACKAGE / parts[0]).is_dir() else ""


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, wherever in it, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "fastpref"}


def test_every_folder_is_a_room_of_the_table():
    folders = {path.name for path in PACKAGE.iterdir() if list(path.glob("*.py"))}
    assert folders == set(ROOMS) - {""}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_to_earlier_rooms(path):
    own = path.relative_to(PACKAGE).parts
    room = own[0] if len(own) > 1 else ""
    for name in imports(path):
        assert ROOMS.index(room_of(name)) <= ROOMS.index(room), f"{path} imports {name}"


def test_no_modules_import_each_other():
    def name_of(path: Path) -> str:
        return ".".join(["fastpref", *path.relative_to(PACKAGE).with_suffix("").parts])

    # of "from fastpref.data.layouts.rows import Row" both the module and its name are looked up
    graph = {
        name_of(path): {
            known
            for name in imports(path)
            for known in (name, name.rpartition(".")[0])
            if known != "fastpref"
        }
        for path in MODULES
        if path.name != "__init__.py"
    }
    graph = {module: found & set(graph) for module, found in graph.items()}
    # raises CycleError with the modules on the cycle
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("room", ROOMS[1:])
def test_a_room_says_what_enters_what_leaves_and_what_may_be_changed(room):
    text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text("utf-8"))) or ""
    for word in ("Enters:", "Leaves:", "To be changed here:"):
        assert word in " ".join(text.split()), f"{room}: {word}"


@pytest.mark.parametrize("inner", ["data/layouts", "model/files"])
def test_what_lies_below_a_room_knows_nothing_else_of_it(inner):
    dotted, room = f"fastpref.{inner.replace('/', '.')}.", f"fastpref.{inner.split('/')[0]}."
    for path in (PACKAGE / inner).glob("*.py"):
        found = {name for name in imports(path) if name.startswith(room)}
        assert all(name.startswith(dotted) for name in found), f"{path} imports {found}"


def test_what_shows_the_data_is_asked_for_by_no_part_that_reads_it():
    for path in (PACKAGE / "data").rglob("*.py"):
        if path.parent.name != "audit":
            assert not [name for name in imports(path) if name.startswith("fastpref.data.audit")]


def test_what_the_table_of_changes_names_is_there():
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text("utf-8")
    table = text.partition("Where a change goes:")[2].partition("Words of the kernels")[0]
    kernels = PACKAGE.parent / "kernels" / "fastpref_kernels"
    sources = [*MODULES, *kernels.glob("*.py")]
    code = "\n".join(path.read_text("utf-8") for path in sources)
    for name in re.findall(r"`([^`]+)`", table):
        if "NAME" in name:
            continue
        if name.endswith(".py"):
            assert any(str(path).endswith(f"/{name}") for path in sources), name
        elif name.isidentifier():
            assert re.search(rf"\b{name}\b", code), name
