"""Peak memory of the LM-head ops beyond inputs and their gradients, relative to full logits.

    python benchmarks/bench_head_memory.py --json
    python benchmarks/bench_head_memory.py --rows 512 --hidden 64 --vocab 8192

Each figure comes from a separate process. On a GPU it is the allocator's peak. On a CPU there are
two figures, the high-water mark of resident memory and the peak of torch's own allocations. They
agree except for buffers of the GEMM library and for pages of the gradients that are not yet written
at the peak.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from fastpref_kernels import get_workspace_mib, token_logps, token_logps_and_kl
from machine import write_results
from torch import Tensor

MIB = 2**20
GOAL = 0.20
"""Goal of the peak memory, as a share of the float32 logits' bytes."""
OPS = ("token_logps", "token_logps_and_kl")
PASSES = ("forward", "forward+backward")


def main() -> None:
    arguments = parse_arguments()
    if arguments.child:
        print(json.dumps(measure(arguments)))
        return
    logits_mib = arguments.rows * arguments.vocab * 4 / MIB
    methods = ["allocator"] if arguments.device == "cuda" else ["resident", "allocator"]
    print(f"N {arguments.rows}, D {arguments.hidden}, V {arguments.vocab}, {arguments.dtype}")
    print(f"float32 logits of one model: {logits_mib:.0f} MiB; goal below {GOAL:.0%} of it\n")
    print(f"{'op':<20}{'pass':<18}{'method':<11}{'MiB':>9}{'of logits':>11}{'seconds':>9}")
    figures = []
    for op in arguments.ops:
        for kind in PASSES:
            for method in methods:
                figure = run_child(op, kind, method)
                figure |= {"share_of_logits": figure["extra_mib"] / logits_mib}
                figures.append(figure)
                print(
                    f"{op:<20}{kind:<18}{method:<11}{figure['extra_mib']:>9.1f}"
                    f"{figure['share_of_logits']:>11.1%}{figure['seconds']:>9.1f}"
                )
    if arguments.json:
        found = {
            "rows": arguments.rows,
            "hidden": arguments.hidden,
            "vocab": arguments.vocab,
            "dtype": arguments.dtype,
            "workspace_mib": get_workspace_mib(),
            "float32_logits_mib": logits_mib,
            "goal_share_of_logits": GOAL,
            "figures": figures,
        }
        write_results("head_memory", found, device=arguments.device)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8192, help="N, tokens")
    parser.add_argument("--hidden", type=int, default=1024, help="D")
    parser.add_argument("--vocab", type=int, default=128256, help="V")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=OPS)
    parser.add_argument("--json", action="store_true", help="write results/<device>/")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_child(op: str, kind: str, method: str) -> dict:
    command = [sys.executable, __file__, *sys.argv[1:], "--child", op, kind, method]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def measure(arguments: argparse.Namespace) -> dict:
    """Peak memory beyond inputs and their gradients, for one op and pass, by one method."""
    op, kind, method = arguments.child
    # warm-up: buffers and threads of the GEMM library are allocated once per process
    small = build(op, kind, argparse.Namespace(**{**vars(arguments), "rows": 64, "vocab": 512}))
    small()
    run = build(op, kind, arguments)
    peak = {"resident": peak_resident, "allocator": peak_allocated}[method]
    start = time.perf_counter()
    peak_bytes, kept_bytes = peak(run, arguments.device)
    seconds = time.perf_counter() - start
    return {
        "op": op,
        "pass": kind,
        "method": method,
        "extra_mib": (peak_bytes - kept_bytes) / MIB,
        "seconds": seconds,
    }


def build(op: str, kind: str, arguments: argparse.Namespace) -> Callable[[], int]:
    """The pass to measure; calling it returns the bytes of the gradients that it leaves."""
    options = {"dtype": getattr(torch, arguments.dtype), "device": arguments.device}
    torch.manual_seed(0)
    N, D, V = arguments.rows, arguments.hidden, arguments.vocab

    def head() -> tuple[Tensor, Tensor]:
        return torch.randn(N, D, **options), torch.randn(V, D, **options).mul_(3 / D**0.5)

    input_ND, weight_VD = (tensor.requires_grad_() for tensor in head())
    target_N = torch.randint(V, (N,), device=arguments.device)
    reference = head() if op == "token_logps_and_kl" else None

    def run() -> int:
        with torch.set_grad_enabled(kind == "forward+backward"):
            if reference is None:
                total = token_logps(input_ND, weight_VD, target_N).sum()
            else:
                scores = token_logps_and_kl(input_ND, weight_VD, target_N, *reference)
                total = (scores.logps + scores.kl).sum()
            if total.requires_grad:
                total.backward()
        leaves = (input_ND, weight_VD)
        return sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)

    return run


def peak_resident(run: Callable[[], int], device: str) -> tuple[int, int]:
    """Growth of the resident set size to its high-water mark, and the result of `run`."""
    assert device == "cpu", "resident memory says nothing about a GPU's"
    # "5" resets the high-water mark to the present resident set size (man 5 proc)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    kept = run()
    return resident_bytes("VmHWM") - before, kept


def resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {field} in /proc/self/status")


def peak_allocated(run: Callable[[], int], device: str) -> tuple[int, int]:
    """Peak bytes of torch's allocator beyond those held before, and the result of `run`."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, kept
    with torch.profiler.profile(profile_memory=True) as profiler:
        kept = run()
    events = profiler.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak, kept


if __name__ == "__main__":
    main()
