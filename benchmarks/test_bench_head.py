"""The jobs of `bench_head.py` under pytest-benchmark, to track one contender over time.

pytest benchmarks/test_bench_head.py --benchmark-json=head.json
"""

import pytest
import torch
from head_cases import SHAPES, synthetic_case
from head_contenders import CONTENDERS, JOBS, CannotRunError, run_job
from kl_contenders import KL_CONTENDERS, KL_JOBS, run_kl_job

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
ROWS = 4096 if ON_GPU else 256


@pytest.fixture(scope="module", params=[n for n in SHAPES if n.startswith("tiny") != ON_GPU])
def case(request):
    return synthetic_case(request.param, ROWS, DEVICE)


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("contender", CONTENDERS)
def test_head(benchmark, case, job, contender):
    measure(benchmark, lambda: run_job(CONTENDERS[contender], job, case))


@pytest.mark.parametrize("job", KL_JOBS)
@pytest.mark.parametrize("contender", KL_CONTENDERS)
def test_two_heads(benchmark, case, job, contender):
    measure(benchmark, lambda: run_kl_job(KL_CONTENDERS[contender], job, case))


def measure(benchmark, job):
    def run():
        job()
        if ON_GPU:
            torch.cuda.synchronize()

    try:
        run()
    except (CannotRunError, ImportError) as reason:
        pytest.skip(str(reason))
    benchmark(run)
