"""The script behind docs/support-matrix.md, on a family that packs, one that cannot, and none."""

import re
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
            for family in ("phimoe", "mamba", "xlnet")
        }
    finally:
        dist.destroy_process_group()


def test_a_family_is_taken_through_what_a_run_goes_through(entries):
    # its router draws random numbers in training mode
    packed = entries["phimoe"]
    assert (packed.outcome, packed.layout) == ("trains", "packed, prompts shared")
    assert packed.score_error <= 1e-4 and packed.loss_error <= 1e-6 and packed.export_error <= 1e-4
    padded = entries["mamba"]
    assert (padded.outcome, padded.layout) == ("trains", "padded") and padded.remark
    refused = entries["xlnet"]
    assert refused.outcome == "refused" and "no causal language model" in refused.remark


def test_the_document_is_what_the_script_writes(entries):
    text = support_matrix.format_document(list(entries.values()))
    assert "Of 3 families 2 train, 1 of them" in " ".join(text.split())
    document = Path(support_matrix.DOCUMENT).read_text(encoding="utf-8")
    heading = next(line for line in text.splitlines() if line.startswith("| family | rows"))
    assert heading in document.splitlines()
    numbers = re.search(r"Of (\d+) families (\d+) train, (\d+) of them", " ".join(document.split()))
    assert numbers is not None and int(numbers[2]) >= 53
