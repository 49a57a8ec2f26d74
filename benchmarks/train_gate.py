"""The check before the step benchmark: that both systems compute the same."""

import sys
from pathlib import Path
from typing import Any

from train_arms import config_of, write_start
from train_cases import SHAPES, write_ids, write_random_model, write_random_rows
from train_children import AbsentError, ArmError, Children, is_peer

GATE_TOLERANCE = {"losses": 1e-5, "grad_norms": 1e-5, "weights": 1e-5, "a_matrix": 5e-5}
"""Relative tolerances; `weights` is for all weights together, `a_matrix` for the matrix with the
largest error. AdamW normalizes gradients near zero, which amplifies rounding in the weights."""


def check_equality(
    children: Children, world: Any, folder: Path, rank: int | None
) -> dict[str, Any]:
    """Train a tiny model, or adapters of this rank, in float32 with both systems.

    Returns:
        Largest relative differences of loss, gradient norm and weights; or, under "left_out", the
        reason why the peer has none.

    Raises:
        SystemExit: one exceeds its tolerance: the systems do not compute the same. Or ours failed.
    """
    case = _prepare(world, folder, rank)
    runs = {}
    for arm in ("T1", "F3"):
        weights = str(folder / f"{arm}.safetensors")
        try:
            runs[arm] = children.measure(case | {"arm": arm, "weights": weights})
        except ArmError as error:
            if not (is_peer(arm) or isinstance(error, AbsentError)):
                sys.exit(f"{arm} failed:\n{error}")
            print(f"equality gate left out, no result of {arm}: {error}", flush=True)
            return {"left_out": f"{arm}: {error}"}
    gate = differences(runs["T1"], runs["F3"], folder)
    print("equality gate, relative differences:", gate)
    if not passes(gate):
        sys.exit(f"the two systems do not compute the same: {gate}")
    return gate


def _prepare(world: Any, folder: Path, rank: int | None) -> dict[str, Any]:
    write_random_model("tiny", folder / "tiny")
    write_random_rows("UF", SHAPES["tiny"]["vocab_size"], 32, folder / "gate" / "words")
    case = {
        "model": str(folder / "tiny"),
        "data": str(folder / "gate"),
        "name": "words",
        "pairs": 8,
        "micro_batches": 1,
        "max_tokens": 8192,
        "steps": 3,
        "max_length": 512,
        "dtype": "float32",
        "rank": rank,
        "lr": 1e-3,
        "ids": str(folder / "gate.jsonl"),
    }
    write_ids(config_of(case, folder / "unused"), world, case["steps"], Path(case["ids"]))
    if rank:
        case["start"] = str(folder / "start.safetensors")
        write_start(case, world, Path(case["start"]))
    return case


def passes(gate: dict[str, float]) -> bool:
    """Whether no difference exceeds its tolerance, or is NaN."""
    return all(gate[name] <= bound for name, bound in GATE_TOLERANCE.items())


def differences(theirs: dict[str, Any], ours: dict[str, Any], folder: Path) -> dict[str, float]:
    """Largest relative differences of two arms; NaN where a value is NaN.

    Args:
        theirs, ours: Results of the arms.
        folder: Folder of their weights, `<arm>.safetensors`.
    """
    import torch
    from safetensors.torch import load_file

    gate = {}
    for name in ("losses", "grad_norms"):
        a, b = (torch.tensor(run[name], dtype=torch.float64) for run in (theirs, ours))
        gate[name] = ((a - b).abs() / a.abs()).max().item()
    their_weights, our_weights = (
        load_file(str(folder / f"{run['arm']}.safetensors")) for run in (theirs, ours)
    )
    norms = torch.tensor(
        [
            [(our_weights[name].float() - weight.float()).norm(), weight.float().norm()]
            for name, weight in their_weights.items()
            if name in our_weights
        ]
    )
    differences, sizes = norms.unbind(1)
    gate["weights"] = (differences.norm() / sizes.norm()).item()
    gate["a_matrix"] = torch.where(differences == 0, 0, differences / sizes).max().item()
    return gate
