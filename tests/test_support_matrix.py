"""The support matrix: what its script finds of three families, and the document it has written."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "support_matrix.py"
DOCUMENT = ROOT / "docs" / "support-matrix.md"


def test_a_family_that_trains_one_that_is_refused_and_one_that_there_is_not(tmp_path):
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels"))
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "gpt_neox", "bert-generation", "xlnet", "nosuch"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    neox, bert, xlnet, nosuch = result.stdout.splitlines()
    assert neox.startswith("gpt_neox  trains  GPTNeoXForCausalLM  packed, prompts shared  sdpa")
    assert bert.startswith("bert-generation  trains  BertGenerationDecoder")
    errors = [float(number) for number in re.findall(r"\d\S*e-\d+", neox)]
    assert len(errors) == 3 and max(errors) < 1e-5
    assert xlnet.startswith("xlnet  refused") and "is no causal language model" in xlnet
    assert nosuch.startswith("nosuch  not built") and "KeyError: 'nosuch'" in nosuch
    # nothing is left behind, and the document is written for all families alone
    assert not list(tmp_path.iterdir())


def rows_of(title: str) -> list[list[str]]:
    """The cells of a section's table, its head left out."""
    sections = re.split(r"^#+ ", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = [section for section in sections if section.startswith(title)]
    lines = [line for section in found for line in section.splitlines() if line.startswith("| ")]
    cells = [re.split(r"(?<!\\)\|", line.strip("|")) for line in lines[1:]]
    return [[cell.strip() for cell in row] for row in cells]


def test_the_document_counts_and_bounds_what_it_lists():
    text = " ".join(DOCUMENT.read_text(encoding="utf-8").split())
    counts = re.search(r"Of (\d+) families (\d+) train, (\d+) of them on packed rows", text)
    assert counts and re.search(r"transformers \d+\.\d+\.\d+, torch \d+\.\d+", text)
    trained = rows_of("Which model families train here")
    others = rows_of("Refused") + rows_of("Let through") + rows_of("Not tried")
    families = [row[0] for row in trained + others]
    assert len(families) == len(set(families)) == int(counts[1])
    assert len(trained) == int(counts[2]) >= 53
    assert sum(row[2].startswith("packed") for row in trained) == int(counts[3])
    for family, model_class, rows, _, scores, loss, export, why in trained:
        assert model_class.isidentifier(), family
        assert float(scores) <= 1e-4 and float(loss) <= 1e-6 and float(export) <= 1e-4, family
        assert rows == "packed, prompts shared" or why, family
    assert all(len(row) == 2 and row[1] for row in others)
    assert {"llama", "gpt_neox", "mixtral", "mamba"} <= {row[0] for row in trained}
