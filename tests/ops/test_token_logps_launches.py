"""How many kernels a call of the head launches: for few tokens a GPU waits for the host.

Counted in Triton's interpreter. A product is one launch, as it is on a GPU, and so is an operator
of torch that computes something.
"""

import os
import sys
from collections import Counter

import pytest
import torch
from launches import Launches
from oracle import random_head, random_target

pytest.importorskip("triton", reason="Triton is for Linux")
if not os.environ.get("TRITON_INTERPRET"):
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from fastpref_kernels import (
    gemm,
    launch,
    row_sums,
    tdpo1_token_values_triton,
    token_logps_kl_triton,
)
from fastpref_kernels import token_logps_triton as one_model
from fastpref_kernels.gemm_tiles import FUSED_TILES, JOINT_TILES
from fastpref_kernels.head import Head, Targets
from triton.runtime.interpreter import InterpretedFunction

# one tile of rows, a slice of the vocabulary: what a small micro-batch of a small model is
N, V, D = 64, 256, 64
OPS = {
    "token_logps": one_model,
    "tdpo1_token_values": tdpo1_token_values_triton,
    "token_logps_kl": token_logps_kl_triton,
}
HELD = {
    ("token_logps", "scores"): (17, 0),
    ("token_logps", "store"): (25, 24),
    ("token_logps", "lean"): (17, 11),
    ("token_logps", "frozen"): (36, 2),
    ("tdpo1_token_values", "scores"): (43, 0),
    ("tdpo1_token_values", "store"): (53, 17),
    ("token_logps_kl", "scores"): (51, 0),
    ("token_logps_kl", "store"): (63, 26),
    ("token_logps_kl", "lean"): (51, 26),
}
"""Most launches of a forward and of a backward."""


@pytest.fixture
def launches(monkeypatch):
    """Counts while it is entered; what the interpreter and a product do inside is one launch."""
    counter = Launches()

    def as_one(function, name):
        def counted(*args, **kwargs):
            with counter.counted_as(name):
                return function(*args, **kwargs)

        return counted

    products = [gemm.matmul, gemm.add_matmul, gemm.matmul_into]
    for module in [m for n, m in sys.modules.items() if n.startswith("fastpref_kernels.")]:
        for product in products:
            if getattr(module, product.__name__, None) is product:
                monkeypatch.setattr(module, product.__name__, as_one(product, "product"))
    run = InterpretedFunction.run

    def run_kernel(kernel, *args, **kwargs):
        with counter.counted_as(kernel.fn.__name__):
            return run(kernel, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", run_kernel)
    return counter


def test_a_call_launches_no_more_kernels_than_it_did(launches, monkeypatch):
    found = {}
    # what a GPU takes of both models at once, a CPU takes of one after the other
    monkeypatch.setattr(row_sums, "_model_by_model", lambda function, *values: function(*values))
    for op, mode in HELD:
        tile = (JOINT_TILES if op == "token_logps_kl" else FUSED_TILES)["sm_90"]
        monkeypatch.setattr(launch, "fused_tile", lambda device, joint, tile=tile: tile)
        policy, reference = (
            Head(input.detach(), weight.detach(), None, 1.0, None)
            for input, weight, _ in (random_head(N, V, D, seed=seed) for seed in range(2))
        )
        models = policy if op == "token_logps" else (policy, reference)
        targets = Targets.of(random_target(N, V), -100)
        options = {"direction": "reference_policy"} if op == "token_logps_kl" else {}
        with launches:
            stats = getattr(OPS[op], f"{op}_fwd")(models, targets, mode=mode, **options)
        forward = launches.take()
        backward = Counter()
        if mode != "scores":
            grads = torch.ones(N), torch.ones(N)
            with launches:
                getattr(OPS[op], f"{op}_bwd")(
                    grads if op == "token_logps_kl" else grads[0], models, targets, stats,
                    mode=mode, needs_grad=(True, mode != "frozen", False), **options,
                )  # fmt: skip
            backward = launches.take()
        found[op, mode] = (forward.total(), backward.total())
        print(op, mode, found[op, mode], dict(forward), dict(backward), sep="\n   ")
    for call, (forward_limit, backward_limit) in HELD.items():
        forward, backward = found[call]
        assert 0 < forward <= forward_limit and backward <= backward_limit, call
