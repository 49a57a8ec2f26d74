"""The script behind docs/support-matrix.md, on a family that packs, one that cannot, and none."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import support_matrix
import torch.distributed as dist

from fastpref.distributed import init_world


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    world = init_world()
    try:
        yield {
            family: support_matrix.check_family(family, world, tmp_path_factory.mktemp(family))
            for family in ("phimoe", "mamba", "bloom", "xlnet", "mistral3")
        }
    finally:
        dist.destroy_process_group()


def test_a_family_is_taken_through_what_a_run_goes_through(entries, tmp_path):
    # its router draws random numbers in training mode
    packed = entries["phimoe"]
    assert (packed.outcome, packed.layout) == ("trains", "packed, prompts shared")
    assert packed.score_error <= 1e-4 and packed.loss_error <= 1e-6 and packed.export_error <= 1e-4
    recurrent = entries["mamba"]
    assert (recurrent.outcome, recurrent.layout) == ("trains", "packed, prompts shared")
    assert recurrent.recurrent == "MambaMixer" and not packed.recurrent
    padded = entries["bloom"]
    assert (padded.outcome, padded.layout) == ("trains", "padded") and padded.remark
    wrapper = entries["mistral3"]
    assert wrapper.outcome == "trains" and wrapper.adapters == "yes"
    assert wrapper.wrapper == "vision_tower, multi_modal_projector" and not padded.wrapper
    refused = entries["xlnet"]
    assert refused.outcome == "refused" and "no causal language model" in refused.remark
    unknown = support_matrix.check_family("nosuch", None, tmp_path)
    assert unknown.outcome == "not built" and unknown.remark == "KeyError: 'nosuch'"


def test_the_document_is_what_the_script_writes(entries):
    text = support_matrix.format_document(list(entries.values()))
    assert "Of 5 families 4 train, 3 of them" in " ".join(text.split())
    document = Path(support_matrix.DOCUMENT).read_text(encoding="utf-8")
    heading = next(line for line in text.splitlines() if line.startswith("| family | class"))
    assert heading in document.splitlines()


def rows_of(title: str) -> list[dict[str, str]]:
    """The cells of a section's table in the document by the names of its columns."""
    document = support_matrix.DOCUMENT.read_text(encoding="utf-8")
    sections = re.split(r"^#+ ", document, flags=re.MULTILINE)
    found = [section for section in sections if section.startswith(title)]
    lines = [line for section in found for line in section.splitlines() if line.startswith("| ")]
    cells = [re.split(r"(?<!\\)\|", line.strip("|")) for line in lines]
    head, *rows = [[cell.strip() for cell in row] for row in cells]
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_the_document_counts_and_bounds_what_it_lists():
    text = " ".join(support_matrix.DOCUMENT.read_text(encoding="utf-8").split())
    counts = re.search(
        r"Of (\d+) families (\d+) train, (\d+) of them on packed rows \((\d+) with shared prompts, "
        r"(\d+) with windows shorter than the rows, (\d+) with recurrent layers or convolutions, "
        r"[^)]*\), (\d+) with adapters; (\d+) of them are wrappers",
        text,
    )
    assert counts and re.search(r"transformers \d+\.\d+\.\d+, torch \d+\.\d+", text)
    trained = rows_of("Which model families train here")
    others = rows_of("Refused") + rows_of("Let through") + rows_of("Not tried")
    families = [row["family"] for row in trained + others]
    assert len(families) == len(set(families)) == int(counts[1])
    assert len(trained) == int(counts[2]) >= 53
    for number, column, least in (
        (3, "packs", 170),
        (4, "shares", 170),
        (5, "window", 26),
        (6, "recurrent", 15),
        (7, "adapters", 165),
        (8, "wrapper", 40),
    ):
        found = [row for row in trained if row[column] not in ("", "no")]
        if column == "adapters":
            found = [row for row in trained if row[column] == "yes"]
        assert len(found) == int(counts[number]) >= least, column
    # of packed rows, in windows shorter than they are
    for wish in ("window", "sinks", "softcap", "recurrent", "shares"):
        asking = [row for row in trained if row[wish]]
        assert asking and all(row["packs"] == "yes" for row in asking), wish
    for row in trained:
        assert row["adapters"], row
        assert row["class"].isidentifier(), row
        assert float(row["scores off, nats"]) <= support_matrix.SCORE_BOUND, row
        assert float(row["loss off"]) <= support_matrix.LOSS_BOUND, row
        assert float(row["export off, nats"]) <= support_matrix.SCORE_BOUND, row
        assert bool(row["why"]) == (row["packs"] != "yes"), row
    assert all(len(row) == 2 and all(row.values()) for row in others)


def test_each_family_named_is_a_line_and_leaves_nothing_behind(tmp_path):
    root = Path(__file__).resolve().parents[1]
    paths = os.pathsep.join(str(root / folder) for folder in (".", "kernels"))
    result = subprocess.run(
        [sys.executable, str(root / "scripts" / "support_matrix.py"), "gpt_neox"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    (neox,) = result.stdout.splitlines()
    assert neox.startswith("gpt_neox  trains  GPTNeoXForCausalLM  packed, prompts shared  sdpa")
    assert not list(tmp_path.iterdir())
