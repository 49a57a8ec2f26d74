"""README and docs: links lead somewhere, options exist, and no merge was left half done."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from fastpref.config import LOSSES, Config

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]
}
OF_OTHERS = {"recipe", "code", "learning_rate", "precompute_ref_log_probs"}
"""A choice of configs/, a shell's variable and names of other trainers, which pages have too."""


def options(schema: type[Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of all options below a schema."""
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        yield prefix + field.name
        for kind in (hints[field.name], *get_args(hints[field.name])):
            if dataclasses.is_dataclass(kind):
                assert isinstance(kind, type)
                yield from options(kind, f"{prefix}{field.name}.")


def anchors(path: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall("^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    path = PAGES[page]
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = path.parent / name if name else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES)
def test_options_in_code_exist(page):
    known = {*options(Config), *OF_OTHERS}
    known.update(name for loss in LOSSES.values() for name in options(loss, "loss."))
    text = PAGES[page].read_text(encoding="utf-8")
    pieces = re.findall("`([^`\n]+)`", text) + re.findall("```\n(.*?)```", text, re.DOTALL)
    named = {name for piece in pieces for name in re.findall(r"(?:^|[\s'])([a-z][a-z_.]*)=", piece)}
    assert named <= known


def test_no_file_has_marks_of_a_merge():
    paths = [*PAGES.values(), *ROOT.glob("configs/**/*.yaml"), ROOT / "Makefile"]
    for path in paths:
        marks = re.findall("^(?:<{7}|>{7}) .*$", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert not marks, path
