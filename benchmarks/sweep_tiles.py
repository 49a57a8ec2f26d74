"""Times the LM-head kernels with candidate block shapes, to choose the entries of `gemm_tiles.py`.

    python benchmarks/sweep_tiles.py
    TRITON_INTERPRET=1 python benchmarks/sweep_tiles.py --shapes tiny --rows 130 --rounds 1

The candidates of a job are compiled and checked one after another, then timed interleaved. One that
does not compile or whose results are wrong is listed with the reason, and the others continue.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from bench_head import interleave, measure_ceilings
from fastpref_kernels import launch, token_logps_kl_triton, token_logps_triton
from fastpref_kernels.gemm_tiles import FUSED_TILES, JOINT_TILES, GemmTile
from fastpref_kernels.head import Head, Targets
from fastpref_kernels.row_sums import JointStats, TokenStats
from head_cases import SHAPES, SMALL_SHAPES, Case, synthetic_case
from machine import write_results
from torch import Tensor

from fastpref.errors import in_a_line

ORACLE_ROWS = 64
WRONG = 1e-3
"""Bound of log p's error in nats: below that of 16-bit sums, above float32's worst case (1e-4)."""
LOOP, BOTH = FUSED_TILES["sm_90"], JOINT_TILES["sm_90"]
ONE = LOOP._replace(programs=0)
SMALL = GemmTile(128, 128, 64, group_n=16, num_warps=4, num_stages=3)


class Candidate(NamedTuple):
    job: str
    name: str
    tile: GemmTile
    small: bool = False
    """Whether to time the small shape too."""
    frozen: tuple[int, int] = (2048, 32768)
    """Rows, columns of a tile of exponentials in mode "frozen"."""


FORWARD = [
    Candidate("forward", "128x256", ONE, True),
    Candidate("forward", "128x256 looping, now", LOOP, True),
    Candidate("forward", "looping, 3 stages", LOOP._replace(num_stages=3), True),
    Candidate("forward", "looping, group 8", LOOP._replace(group_n=8)),
    Candidate("forward", "looping, group 32", LOOP._replace(group_n=32)),
    Candidate("forward", "looping, group 64", LOOP._replace(group_n=64)),
    Candidate("forward", "256x128", ONE._replace(block_n=256, block_v=128, group_n=8)),
    Candidate("forward", "256x128 looping", LOOP._replace(block_n=256, block_v=128, group_n=8)),
    Candidate("forward", "128x128, 2 at once", SMALL),
    Candidate("forward", "128x128 looping, 2 at once", SMALL._replace(programs=2), True),
    Candidate("forward", "promoted every 1,024", ONE._replace(promote_d=1024)),
    Candidate("forward", "promoted every 512", ONE._replace(promote_d=512)),
    Candidate("forward", "looping, promoted every 1,024", LOOP._replace(promote_d=1024)),
    Candidate("forward", "128x128, promoted every 512", SMALL._replace(num_warps=8, promote_d=512)),
]
JOINT = [
    Candidate(job, name, tile, small=True)
    for job in ("joint", "joint kept")
    for name, tile in [
        ("128x128 now", BOTH),
        ("group 32", BOTH._replace(group_n=32)),
        ("5 stages", BOTH._replace(num_stages=5)),
    ]
]
TRAINING = [
    Candidate(job, name, tile)
    for job in ("kept", "lean")
    for name, tile in [("128x256", ONE), ("128x256 looping, now", LOOP)]
]
FROZEN = [
    Candidate("frozen", f"{rows} x {columns}{' looping' * bool(tile.programs)}", tile, small, shape)
    for rows, columns, tile, small in [
        (2048, 32768, ONE, True),
        (2048, 32768, LOOP, False),
        (4096, 32768, ONE, True),
        (4096, 65536, ONE, False),
        (8192, 32768, ONE, False),
        (8192, 32768, LOOP, True),
        (16384, 16384, ONE, False),
    ]
    for shape in [(rows, columns)]
]
CANDIDATES = FORWARD + JOINT + TRAINING + FROZEN
PASSES = {"forward": 1, "joint": 2, "joint kept": 2, "kept": 1, "lean": 4, "frozen": 2}


def main() -> None:
    arguments = parse_arguments()
    arguments.end = time.monotonic() + arguments.seconds
    found, library = [], {}
    for shape in arguments.shapes:
        case = synthetic_case(shape, arguments.rows, arguments.device)
        ceilings = library[case.name] = measure_ceilings(case)
        print(f"\n{case.name}: {ceilings}", flush=True)
        truth = Truth(case)
        for job in PASSES:
            chosen = [candidate for candidate in CANDIDATES if candidate.job == job]
            if shape in SMALL_SHAPES:
                chosen = [candidate for candidate in chosen if candidate.small]
            found += measure(chosen, truth, ceilings, arguments)
            # a tile may hang or end the process: what was found before stays
            if arguments.results:
                record = {"triton": triton.__version__, "rounds": arguments.rounds}
                record |= {"ceilings": library, "results": found}
                write_results(
                    "sweep_tiles", record, results=arguments.results, device=arguments.device
                )
        del case, truth


def parse_arguments() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["S1", "S6"], choices=SHAPES | SMALL_SHAPES)
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=165.0, help="start nothing new after")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--results", type=Path, help="folder to write JSON to; none: print only")
    return parser.parse_args()


class Truth:
    """A case in the form of the launchers, and float64 results of some of its rows."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.policy = Head(case.input, case.weight, None, 1.0, case.softcap)
        self.reference = Head(case.reference_input, case.reference_weight, None, 1.0, case.softcap)
        self.targets = Targets.of(case.target, -100)
        N, device = len(case.target), case.input.device
        self.rows = torch.linspace(0, N - 1, min(N, ORACLE_ROWS), device=device).long()
        (logits_RV, slopes_RV), (reference_RV, _) = map(
            self._logits_and_slopes, (self.policy, self.reference)
        )
        log_p_RV, log_q_RV = logits_RV.log_softmax(1), reference_RV.log_softmax(1)
        target_R1 = case.target[self.rows, None]
        self.logps = log_p_RV.gather(1, target_R1)[:, 0]
        means_R = (log_p_RV.exp() * slopes_RV).sum(1)
        self.by_scale = slopes_RV.gather(1, target_R1)[:, 0] - means_R
        """Derivative of log p with respect to a common factor of all products h·w."""
        self.kl = (log_q_RV.exp() * (log_q_RV - log_p_RV)).sum(1)

    def _logits_and_slopes(self, head: Head) -> tuple[Tensor, Tensor]:
        """Logits (R, V), and their derivative with respect to a common factor of all h·w."""
        products_RV = head.input[self.rows].double() @ head.weight.double().t()
        if head.softcap is None:
            return products_RV, products_RV
        tanh_RV = torch.tanh(products_RV / head.softcap)
        return head.softcap * tanh_RV, products_RV * (1 - tanh_RV**2)

    def run(self, job: str, policy: Head | None = None) -> TokenStats | JointStats:
        """Run the job and return the forward's results; "lean" includes the backward."""
        policy = policy or self.policy
        if job.startswith("joint"):
            mode = "store" if job == "joint kept" else "scores"
            return token_logps_kl_triton.token_logps_kl_fwd(
                (policy, self.reference), self.targets, "reference_policy", mode
            )
        mode = {"forward": "scores", "kept": "store"}.get(job, job)
        stats = token_logps_triton.token_logps_fwd(policy, self.targets, mode)
        if job == "lean":
            token_logps_triton.token_logps_bwd(
                self.case.grad, policy, self.targets, stats, mode, (True, True, False)
            )
        return stats

    def _shrinkage(self, errors_R: Tensor) -> dict[str, float]:
        """Relative shrinkage of the logits, as caused by truncating sums (least squares), and the
        errors of log p that would remain after rescaling the logits by it."""
        shrunk = -(errors_R @ self.by_scale) / (self.by_scale @ self.by_scale)
        left_R = (errors_R + shrunk * self.by_scale).abs()
        return {
            "shrunk": shrunk.item(),
            "worst_rescaled": left_R.max().item(),
            "mean_rescaled": left_R.mean().item(),
        }

    def check(self, job: str) -> tuple[dict[str, float], Tensor]:
        """Errors of log p and KL, and log p of all rows; equal models must have a KL of 0."""
        stats = self.run(job)
        errors_R = stats.logps[self.rows] - self.logps
        found = {"worst": errors_R.abs().max().item(), "mean": errors_R.abs().mean().item()}
        found |= self._shrinkage(errors_R)
        if isinstance(stats, JointStats):
            found["kl_mean"] = (stats.kl[self.rows] - self.kl).abs().mean().item()
            same = self.run(job, self.reference)
            assert isinstance(same, JointStats)
            if same.kl.any() or not torch.equal(same.logps, same.reference_logps):
                raise ArithmeticError(f"equal models have a KL of {same.kl.abs().max():.1e}")
        if not found["worst"] < WRONG:
            raise ArithmeticError(f"log p is off by {found['worst']:.1e}")
        return found, stats.logps


@contextmanager
def chosen_by_table(candidate: Candidate) -> Iterator[None]:
    """Within the context, the launchers use the candidate's block shapes."""
    before = launch.fused_tile, token_logps_triton._FROZEN_TILE
    launch.fused_tile = lambda device, joint=False: candidate.tile
    token_logps_triton._FROZEN_TILE = candidate.frozen
    try:
        yield
    finally:
        launch.fused_tile, token_logps_triton._FROZEN_TILE = before


@torch.no_grad()
def measure(
    candidates: list[Candidate],
    truth: Truth,
    ceilings: dict[str, float],
    arguments: argparse.Namespace,
) -> list[dict]:
    """One row of results per candidate, printed as a table."""
    rows, runnable, first_N = [], [], None
    for candidate in candidates:
        row = {"case": truth.case.name, "job": candidate.job, "name": candidate.name}
        row["tile"] = repr(candidate.tile)
        rows.append(row)
        if time.monotonic() > arguments.end:
            row["failure"] = "the time is over"
            continue
        start = time.perf_counter()
        try:
            with chosen_by_table(candidate):
                errors, logps_N = truth.check(candidate.job)
            first_N = logps_N if first_N is None else first_N
            row |= errors | {"same_bits": torch.equal(logps_N, first_N)}
            runnable.append((candidate, row))
        except Exception as error:
            # a tile that does not fit or does not compile is a result
            row["failure"] = in_a_line(error)
        row["check_seconds"] = time.perf_counter() - start
    runs = {candidate.name: partial(run_candidate, candidate, truth) for candidate, _ in runnable}
    seconds, failures = interleave(runs, arguments)
    flops, library = truth.case.pass_flops / 1e12, ceilings["gemm_tflops_bf16_out"]
    for candidate, row in runnable:
        if candidate.name in failures:
            row["failure"] = failures[candidate.name]
            continue
        row["milliseconds"] = statistics.median(seconds[candidate.name]) * 1e3
        row["tflops"] = PASSES[candidate.job] * flops / row["milliseconds"] * 1e3
        row["of_library"] = row["tflops"] / library
    print(table(rows), flush=True)
    return rows


def run_candidate(candidate: Candidate, truth: Truth) -> None:
    with chosen_by_table(candidate):
        truth.run(candidate.job)


def table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        if "failure" in row:
            figures = row["failure"][:100]
        else:
            kl = f"  KL {row['kl_mean']:.1e}" if "kl_mean" in row else ""
            bits = "" if row["same_bits"] else "  other bits"
            figures = (
                f"{row['milliseconds']:8.2f} ms {row['tflops']:6.0f} TFLOP/s "
                f"{row['of_library']:5.0%}  log p worst {row['worst']:.1e} mean {row['mean']:.1e}"
                f" shrunk {row['shrunk']:.1e}, rescaled {row['worst_rescaled']:.1e}{kl}{bits}"
            )
        lines.append(f"{row['job']:<10} {row['name']:<30} {figures}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
