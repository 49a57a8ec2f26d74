"""The bounds of scripts/structure.py, and what it counts."""

import ast
from pathlib import Path

import pytest
import structure

ROOT = Path(__file__).parents[1]
KERNEL = """
@triton.jit
def kernel(a, b, c, d, e, f, g):
    pass
"""


def measures_of(source: str) -> dict[str, structure.Measure]:
    module = structure.Module("example.py", len(source.splitlines()), ast.parse(source))
    return structure.measure([module])


@pytest.fixture(scope="module")
def measures() -> dict[str, structure.Measure]:
    return structure.measure(structure.read_modules(ROOT))


@pytest.mark.parametrize("name", structure.BOUNDS)
def test_the_code_keeps_the_bounds(measures, name):
    value, where = measures[name]
    assert 0 < value <= structure.BOUNDS[name], f"{name}: {value} in {where}"


def test_a_triton_kernel_has_places_but_no_more_lines_than_others():
    source = KERNEL + "    pass\n" * 70 + "def plain(a, b): ...\n"
    measures = measures_of(source)
    assert measures["positional arguments of one function"] == (2, "example.py:75 plain")
    assert measures["lines of the longest function"] == (72, "example.py:3 kernel")


def test_what_may_only_be_given_by_name_has_no_place():
    measures = measures_of("class A:\n    def f(self, a, /, b, *, c, d): ...\n")
    assert measures["positional arguments of one function"].value == 2
