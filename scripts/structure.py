"""Measures of the code's structure: python scripts/structure.py [FOLDER] [--check].

Parses the source with `ast`, without importing it. `--check` exits with 1 if a bound is exceeded;
the table shows where.
"""

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("fastpref", "kernels/fastpref_kernels")
"""Installed packages to measure; `train.py` is included too."""
BOUNDS = {
    "lines of the longest function": 60,
    "lines of the longest file": 350,
    "signatures that take config": 12,
    "internal imports of one module": 12,
    "positional arguments of one function": 6,
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Module(NamedTuple):
    """One source file."""

    name: str
    """Path relative to the checkout."""
    lines: int
    tree: ast.Module


class Measure(NamedTuple):
    """A value, and the place in the source that it was found at."""

    value: int
    where: str = ""


def read_modules(root: Path) -> list[Module]:
    """Every source file below `root`, in the order of their paths."""
    paths = [path for package in PACKAGES for path in (root / package).rglob("*.py")]
    modules = []
    for path in sorted([*paths, root / "train.py"]):
        text = path.read_text(encoding="utf-8")
        name = str(path.relative_to(root))
        modules.append(Module(name, len(text.splitlines()), ast.parse(text)))
    return modules


def functions(modules: list[Module]) -> Iterator[tuple[str, Function]]:
    """Every function and method, with its place as "file:line name"."""
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, Function):
                yield f"{module.name}:{node.lineno} {node.name}", node


def length(function: Function) -> int:
    """Lines from its `def` to its end."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def takes_config(function: Function) -> bool:
    """Whether a parameter is the run's whole config, annotated as `Config`."""
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return any(
        argument.annotation is not None
        and ast.unparse(argument.annotation).strip("'\"") == "Config"
        for argument in every
    )


def num_positional(function: Function) -> int:
    """Number of parameters that can be passed by position, without `self` and `cls`."""
    names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
    return len([name for name in names if name not in ("self", "cls")])


def has_fixed_places(function: Function) -> bool:
    """Whether an external interface requires positional parameters.

    Triton 3.6, which torch 2.11 installs, does not compile keyword-only parameters; kernel launches
    pass arguments by name anyway. An autograd function gets the arguments of `apply` after `ctx`.
    """
    decorators = " ".join(map(ast.unparse, function.decorator_list))
    first = next(iter(function.args.args), None)
    return "jit" in decorators or (first is not None and first.arg == "ctx")


def internal_imports(module: Module) -> set[str]:
    """Modules of the project that a module imports, anywhere in the file."""
    found = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastpref"):
            found.add(node.module)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("fastpref")}
    return found


def measure(modules: list[Module]) -> dict[str, Measure]:
    """All measures, by name."""
    every = list(functions(modules))
    free = [(place, function) for place, function in every if not has_fixed_places(function)]
    taking = [place for place, function in every if takes_config(function)]

    def largest(values: list[tuple[int, str]]) -> Measure:
        return Measure(*max(values))

    return {
        "files": Measure(len(modules)),
        "lines": Measure(sum(module.lines for module in modules)),
        "lines of the longest function": largest([(length(f), place) for place, f in every]),
        "lines of the longest file": largest([(m.lines, m.name) for m in modules]),
        "signatures that take config": Measure(len(taking), "\n  ".join(["", *taking])),
        "internal imports of one module": largest(
            [(len(internal_imports(m)), m.name) for m in modules]
        ),
        "positional arguments of one function": largest(
            [(num_positional(f), place) for place, f in free]
        ),
    }


def main() -> int:
    """Print the table; returns 1 if `--check` is given and a bound is exceeded, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    passed = 0
    for name, (value, where) in measure(read_modules(options.folder)).items():
        bound = BOUNDS.get(name)
        text = f"{name:38} {value:6,}"
        text += f"  at most {bound}" if bound is not None else ""
        print(f"{text:60} {where}".rstrip())
        passed += bound is not None and value > bound
    return 1 if options.check and passed else 0


if __name__ == "__main__":
    sys.exit(main())
