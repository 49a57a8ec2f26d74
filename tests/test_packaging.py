"""`kernels/` is a source root; what is installed; who may import what from outside."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

from setuptools import find_packages

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for folder in ("fastpref", "kernels", "benchmarks", "scripts", "tests")
    for path in (ROOT / folder).rglob("*.py")
) + sorted(ROOT.glob("*.py"))


@cache
def imported_modules(path: Path) -> set[str]:
    """Dotted names of every module a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def top_level(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def run_python(code: str) -> None:
    """Run code in a fresh interpreter that sees the two source roots and nothing of ours loaded."""
    path = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'kernels')!r}]\n"
    result = subprocess.run(
        [sys.executable, "-c", path + code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stderr


def test_kernels_is_a_source_root_and_no_package():
    assert not list((ROOT / "kernels").glob("*.py"))
    for path in SOURCES:
        folders = path.relative_to(ROOT).parts[1:-1]
        assert "kernels" not in folders, f"{path}: no other folder may be called kernels"


def test_an_installed_package_of_that_name_wins_over_our_folder(tmp_path):
    package = tmp_path / "kernels" / "__init__.py"
    package.parent.mkdir()
    package.write_text("")
    run_python(
        f"""
sys.path.append({str(tmp_path)!r})
import kernels
assert kernels.__file__ == {str(package)!r}, kernels
"""
    )


def test_nothing_in_the_tree_imports_the_name_kernels():
    assert SOURCES
    for path in SOURCES:
        assert "kernels" not in top_level(imported_modules(path)), path


def test_an_installation_holds_exactly_our_two_packages():
    find = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    options = find["find"]
    found = {
        name
        for where in options["where"]
        for name in find_packages(str(ROOT / where), include=options["include"])
    }
    assert top_level(found) == {"fastpref", "fastpref_kernels"}


def test_an_installation_brings_and_offers_what_the_design_says():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {re.split("[>;]", line)[0]: line for line in project["dependencies"]}
    least = {
        "torch": ">=2.11",
        "triton": ">=3.6",
        "transformers": ">=5.12",
        "datasets": ">=4",
        "hydra-core": ">=1.3.2",
        "liger-kernel": "",
        "safetensors": "",
        "rich": "",
    }
    for name, bound in least.items():
        assert required[name].startswith(name + bound), required[name]
    # they have no wheels elsewhere
    for name in ("triton", "liger-kernel"):
        assert required[name].endswith("platform_system == 'Linux'")
    offered = set(project["optional-dependencies"])
    assert {"flash-attn", "peft", "wandb", "tensorboard", "bench"} <= offered
    assert project["requires-python"] == ">=3.11"


def test_every_library_that_is_imported_is_asked_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    asked = {re.split("[>;]", line)[0].replace("-", "_") for lines in groups for line in lines}
    packages = [p for p in SOURCES if p.relative_to(ROOT).parts[0] in {"fastpref", "kernels"}]
    imported = top_level(set().union(*map(imported_modules, packages)))
    # of `Buffer`, for mypy alone, which brings it
    imported -= sys.stdlib_module_names | {"fastpref", "fastpref_kernels", "typing_extensions"}
    named_otherwise = {"bs4": "beautifulsoup4", "hydra": "hydra_core", "yaml": "pyyaml"}
    assert {named_otherwise.get(name, name) for name in imported} <= asked


def test_the_ops_import_without_triton_and_alone():
    run_python(
        """
sys.modules["triton"] = None
import fastpref_kernels, fastpref_kernels.naive
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"fastpref", "transformers", "datasets", "hydra", "omegaconf"}, loaded
"""
    )


def test_the_ops_import_nothing_of_fastpref():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert "fastpref" not in top_level(imported_modules(path)), path


def test_only_train_py_imports_hydra():
    importers = {path for path in SOURCES if "hydra" in top_level(imported_modules(path))}
    assert {path for path in importers if "tests" not in path.parts} <= {ROOT / "train.py"}
